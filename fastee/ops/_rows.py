"""An activation as its pool walks it."""

from __future__ import annotations

from torch import Tensor


def walk(x: Tensor, pool: str) -> tuple[Tensor, tuple[int, int, int, int, int, int]]:
    """Return what a pool reads of x, and (rows, features, inner, row stride, feature stride, inner stride); layouts as `_cpu.pooled`."""
    if pool in ("cls", "last"):
        x = x[:, 0 if pool == "cls" else -1]
    if pool == "mean_tokens":
        _, inner, features = x.shape
        strides = (1, features)
    elif x.dim() == 2:
        inner, features, strides = 1, x.shape[1], (1, 1)
    else:
        features, inner = x.shape[1], x.shape[2:].numel()
        strides = (inner, 1) if x.numel() == 0 or x[0].is_contiguous() else (1, features)
    return x, (x.shape[0], features, inner, x.stride(0), *strides)

"""The numba backend: what it takes, when an automatic choice passes it over, and tensors as the flat buffers that its kernels know."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, bfloat16, float16, float32

from fastee import reference
from fastee.kernels import numba
from fastee.reference import Norm

from ._rows import walk
from .results import ROWS, QuantizedRows

NORMS = {"": 0, "layer": 1, "rms": 2, "affine": 3}
LARGE = 400_000
NARROW = (bfloat16, float16)
MEASURES = ("max_prob", "margin", "entropy", "energy")
NO_NORM = Norm("", None, None, 0.0)
MOVES = "torch moves rows as fast"
MEANS = "torch takes means as fast"


def floats(*tensors: Tensor | None) -> str | None:
    """Decline what is not fp32, bf16 or fp16 in this machine's memory."""
    for t in tensors:
        if t is not None and t.device.type != "cpu":
            return f"tensor on {t.device}"
        if t is not None and t.dtype not in (float32, *NARROW):
            return f"dtype {str(t.dtype).removeprefix('torch.')} (this backend computes fp32)"
    return numba.missing()


def widening(run: Callable) -> Callable:
    """Hand `run` its bf16 and fp16 tensors and int8 weights as fp32: a copy, after which the arithmetic is that of fp32."""

    def widen(a):
        if isinstance(a, ROWS):
            return reference.dequantize_rows(a.data, a.scale)
        return a.float() if isinstance(a, Tensor) and a.dtype in NARROW else a

    return lambda *args: run(*map(widen, args))


def kernel(module: str, name: str | None = None) -> Callable:
    """Return a compiled kernel, compiling it when nobody has yet."""
    return getattr(numba.load(module), name or module)


def not_ready(module: str) -> str | None:
    """Pass over a kernel whose compilation would hold up the caller for seconds; an explicit ``backend="numba"`` compiles it."""
    if numba.loaded(module) or numba.on_disk(module):
        return None
    return "not compiled on this machine yet (about 10 s, once): run `python -m fastee.kernels.numba`, or ask for backend='numba'"


def large(x: Tensor, weight: Tensor | QuantizedRows) -> str | None:
    """Pass over a batch whose sums and products torch finishes sooner, for all that its calls cost around them.

    Measured on Zen 5, one thread: the reference costs 85 us more per call, but multiplies 60 against 8 and pools 10 against 4 per ns.
    """
    work = x.numel() + x.shape[0] * weight.data.numel()
    return f"{work:,} sums and products; for more than {LARGE:,} torch is faster" if x.shape[0] > 1 and work > LARGE else None


def flat(t: Tensor | None, dtype: torch.dtype | None = None) -> np.ndarray:
    """Return the memory that `t` spans as one contiguous array without a copy, seen as `dtype`; empty for None."""
    if t is None:
        return EMPTY
    t = t.detach() if t.dtype not in NARROW or dtype else t.float()  # a narrow norm vector, which `widening` does not see
    if not t.is_contiguous():
        span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        t = t.as_strided((span,), (1,))
    t = t.reshape(-1)
    return (t if dtype is None else t.view(dtype)).numpy()


EMPTY = np.empty(0, np.float32)
NO_MASK = np.empty(0, np.uint8)
NO_INDEX = np.empty(0, np.int64)


def flags(mask: Tensor | None) -> np.ndarray:
    """Return a token mask as contiguous bytes; empty for None."""
    return NO_MASK if mask is None else flat(mask.to(torch.bool).contiguous(), torch.uint8)


def activation(x: Tensor, pool: str) -> tuple[np.ndarray, int, int, int, int, int, int]:
    """Return x as (memory, rows, features, inner, row stride, feature stride, inner stride) under a pool."""
    x, shape = walk(x, pool)
    return flat(x), *shape


def elsewhere(x: Tensor, *rest) -> str | None:
    """Decline a tensor that is not in this machine's memory; its dtype does not matter."""
    return f"tensor on {x.device}" if x.device.type != "cpu" else numba.missing()


def stats_memory(rows: int, second_moment: bool = False) -> tuple[Tensor, Tensor]:
    """Return the results of row statistics: label int64 [B], and fp32 [4 or 5, B] in the order of `RowStats`."""
    return torch.empty(rows, dtype=torch.int64), torch.empty(5 if second_moment else 4, rows)

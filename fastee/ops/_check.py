"""Argument checks shared by the ops: each raises with the argument's name, what was got and what was expected."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastee.errors import did_you_mean
from fastee.reference import Norm

from .results import ROWS

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MEASURES = ("max_prob", "margin", "entropy", "energy")
POOLS = ("mean", "mean_tokens", "cls", "last", "none")
NORMS = ("layer", "rms", "affine")


def show(value: Any) -> str:
    """Describe a value for an error message: a tensor by dtype, shape and device, anything else by its repr."""
    if isinstance(value, Tensor):
        where = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}{where}"
    return f"{type(value).__name__} {value!r}"


def tensor(op: str, name: str, value: Any, dtypes: tuple[torch.dtype, ...], shape: str, ndim: int | tuple[int, ...]) -> Tensor:
    """Return `value` if it is a dense tensor of one of `dtypes` with an allowed number of dimensions."""
    dims = (ndim,) if isinstance(ndim, int) else ndim
    if isinstance(value, Tensor) and value.layout == torch.strided and value.dtype in dtypes and value.dim() in dims:
        return value
    kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a {kinds} tensor {shape}, got {show(value)}")
    if value.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got layout {value.layout}")
    if value.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must be {kinds} {shape}, got {show(value)}")
    raise ValueError(f"{op}: {name} must be {kinds} {shape}, got {show(value)}")


def same_device(op: str, first: str, a: Tensor, **others: Tensor | None) -> None:
    for name, b in others.items():
        if b is not None and b.device != a.device:
            raise ValueError(f"{op}: {name} must be on {a.device} like {first}, got {b.device}")


def word(op: str, name: str, value: Any, known: tuple[str, ...]) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{op}: {name} must be one of {', '.join(known)}, got {show(value)}")
    if value not in known:
        raise ValueError(f"{op}: {name} must be one of {', '.join(known)}, got {value!r}{did_you_mean(value, known)}")
    return value


def number(op: str, name: str, value: Any, positive: bool = False) -> float:
    try:
        value = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{op}: {name} must be a number, got {show(value)}") from None
    if value != value:  # not math.isnan: torch.compile may hand in a symbol
        raise ValueError(f"{op}: {name} must not be NaN")
    if positive and not (0.0 < value < math.inf):
        raise ValueError(f"{op}: {name} must be positive and finite, got {value}")
    return value


def vector(op: str, name: str, value: Any, length: int, of: str) -> Tensor | None:
    if value is None:
        return None
    value = tensor(op, name, value, FLOATS, f"[{of}]", 1)
    if value.shape[0] != length:
        raise ValueError(f"{op}: {name} must have {length} elements ({of}), got {show(value)}")
    return value


def norm(op: str, value: Any, features: int) -> Norm | None:
    if value is None:
        return None
    if not isinstance(value, Norm):
        raise TypeError(f"{op}: norm must be None or fastee.ops.Norm(kind, weight, bias, eps), got {show(value)}")
    word(op, "norm.kind", value.kind, NORMS)
    weight = vector(op, "norm.weight", value.weight, features, "D")
    bias = vector(op, "norm.bias", value.bias, features, "D")
    eps = number(op, "norm.eps", value.eps)
    if eps < 0:
        raise ValueError(f"{op}: norm.eps must not be negative, got {eps}")
    return Norm(value.kind, weight, bias, eps)


def pooled_features(op: str, x: Tensor, kind: str) -> int:
    """Return D for input `x` under pool `kind`, or raise with the shape that this pool takes."""
    wants = {"mean": ("[B, D] or [B, D, ...]", x.dim() >= 2, 1), "none": ("[B, D]", x.dim() == 2, 1)}
    shape, fits, dim = wants.get(kind, ("[B, T, D]", x.dim() == 3, 2))
    if not fits:
        raise ValueError(f"{op}: x must be {shape} for pool={kind!r}, got {show(x)}")
    if kind != "none" and x.dim() > 2 and x.shape[0] and 0 in x.shape[1:]:
        raise ValueError(f"{op}: x must not be empty but for its batch, got {show(x)}")
    return x.shape[dim]


def head(op: str, x: Any, weight: Any, bias: Any, pool: Any, norm_: Any, measure: Any, threshold: Any, temperature: Any, mask: Any):
    """Check the arguments of a head and return them normalised."""
    x = tensor(op, "x", x, FLOATS, "[B, D, ...]", tuple(range(2, 9)))
    given = weight
    if isinstance(weight, ROWS):
        if weight.format != "int8" or weight.group is not None:
            raise ValueError(f"{op}: weight must be int8 with one scale per class, got {weight.format} with group {weight.group}")
        weight = tensor(op, "weight.data", weight.data, (torch.int8,), "[C, D]", 2)
        vector(op, "weight.scale", given.scale, weight.shape[0], "C")
    else:
        weight = tensor(op, "weight", weight, FLOATS, "[C, D]", 2)
    word(op, "pool", pool, POOLS)
    word(op, "measure", measure, MEASURES)
    features = pooled_features(op, x, pool)
    if weight.shape[1] != features:
        raise ValueError(f"{op}: weight must be [C, {features}] to match x {show(x)} with pool={pool!r}, got {show(weight)}")
    if weight.shape[0] == 0 or features == 0:
        raise ValueError(f"{op}: weight must have at least one class and one feature, got {show(weight)}")
    bias = vector(op, "bias", bias, weight.shape[0], "C")
    norm_ = norm(op, norm_, features)
    if mask is not None:
        if pool != "mean_tokens":
            raise ValueError(f"{op}: mask goes with pool='mean_tokens', got pool={pool!r}")
        mask = tensor(op, "mask", mask, (torch.bool, torch.uint8, torch.int64), "[B, T]", 2)
        if mask.shape != x.shape[:2]:
            raise ValueError(f"{op}: mask must be {list(x.shape[:2])} like x, got {show(mask)}")
    same_device(op, "x", x, weight=weight, bias=bias, mask=mask)
    threshold = number(op, "threshold", threshold)
    temperature = number(op, "temperature", temperature, positive=True)
    return x, given, bias, pool, norm_, measure, threshold, temperature, mask

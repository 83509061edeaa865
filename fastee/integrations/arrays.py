"""The ops for NumPy, CuPy and every array with DLPack: the same functions and arguments as ``fastee.ops``, results of the kind that came in.

>>> import numpy as np
>>> from fastee.integrations import arrays
>>> out = arrays.exit_head(np.ones((2, 3, 4, 4), "f"), np.eye(3, dtype="f") * 9, threshold=0.3)
>>> type(out.label).__name__, out.exits.tolist()
('ndarray', [True, True])

``x`` decides the kind. Memory is shared, never copied, but for a NumPy array that may not be written in an op other than `exit_head` and
`exit_step` (torch knows no such tensors). Those two read arrays in C, through DLPack; the others make tensors first, some 2 us for each array.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastee import dispatch, ops

__all__ = [
    "compact", "dequantize_rows", "exit_head", "exit_step", "feature_delta", "gather_rows", "linear_stats", "mean_entropy", "pack_planes", "pool", "quantize_rows",
    "row_stats", "unpack_planes",
]  # fmt: skip


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), str, float, int, bool))  # most arguments: what they lack costs 0.3 us to ask each


def to_torch(value: Any) -> Any:
    """Return an array as a tensor over the same memory; anything else as it is."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is np.ndarray:
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    if isinstance(value, ops.Norm):
        return value._replace(weight=to_torch(value.weight), bias=to_torch(value.bias))
    if kind is Result:
        return value._result
    if isinstance(value, Tensor) or not hasattr(kind, "__dlpack__"):
        return value
    return torch.from_dlpack(value)


def _back(like: Any) -> Callable[[Tensor], Any]:
    """Return what makes an array of the kind of `like` from a tensor."""
    if isinstance(like, np.ndarray):
        return Tensor.numpy
    if isinstance(like, Tensor):
        return lambda t: t
    space = like.__array_namespace__() if hasattr(like, "__array_namespace__") else None
    if space is None or not hasattr(space, "from_dlpack"):
        raise TypeError(f"x: {type(like).__module__}.{type(like).__name__} has no array namespace with from_dlpack")
    return lambda t: space.from_dlpack(t.detach())


class Result:
    """An op's result whose tensors come out as arrays of the caller's kind, each when it is read."""

    __slots__ = ("_result", "_make")

    def __init__(self, result: Any, make: Callable[[Tensor], Any]):
        self._result, self._make = result, make

    def __getattr__(self, name: str) -> Any:
        return _give(getattr(self._result, name), self._make)

    def __iter__(self):
        return (_give(v, self._make) for v in self._result)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._result!r})"


def _give(value: Any, make: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return make(value)
    if value is None or isinstance(value, (int, float, str, tuple)) and not hasattr(value, "_fields"):
        return value
    return value if callable(value) else Result(value, make)


def _lift(op: Callable) -> Callable:
    @_documented(op)
    def call(x: Any, *args: Any, **named: Any) -> Any:
        if type(x) is np.ndarray:
            like, make = to_torch(x), Tensor.numpy
        elif isinstance(x, Result):
            like, make = x._result, x._make
        else:
            like, make = to_torch(x), _back(x)
        for name, value in named.items():
            if type(value) not in _PLAIN:
                named[name] = to_torch(value)
        out = op(like, *map(to_torch, args), **named)
        return _give(out, make) if isinstance(out, Tensor) else Result(out, make)

    return call


_numpy, _native_head = Tensor.numpy, dispatch.direct("exit_head")


def _lift_head(op: Callable, step: bool) -> Callable:
    lifted = _lift(op)

    @_documented(op)
    def call(
        x: Any, weight: Any, bias: Any = None, pool: str = "mean", norm: ops.Norm | None = None, measure: str = "max_prob", threshold: float = 0.9, *,
        temperature: float = 1.0, mask: Any = None, logits: bool = False, backend: str | None = None,
    ) -> Any:  # fmt: skip
        if type(weight) is Result:
            weight = weight._result  # quantised rows
        if backend is None and mask is None:
            make = _numpy if type(x) is np.ndarray else _back(x)
            result = _native_head(x, weight, bias, pool, norm, measure, threshold, temperature, None, logits, step, make)
            if result is not None:
                return result
        return lifted(x, weight, bias, pool, norm, measure, threshold, temperature=temperature, mask=mask, logits=logits, backend=backend)

    return call


def _documented(op: Callable) -> Callable:
    def dress(call: Callable) -> Callable:
        functools.update_wrapper(call, op)
        call.__doc__ = f"``fastee.ops.{op.__name__}`` for arrays of any kind; see there and this module."
        return call

    return dress


exit_head, exit_step = _lift_head(ops.exit_head, False), _lift_head(ops.exit_step, True)
compact, dequantize_rows = map(_lift, (ops.compact, ops.dequantize_rows))
feature_delta, gather_rows, linear_stats, mean_entropy = map(_lift, (ops.feature_delta, ops.gather_rows, ops.linear_stats, ops.mean_entropy))
pack_planes, pool, quantize_rows, row_stats, unpack_planes = map(_lift, (ops.pack_planes, ops.pool, ops.quantize_rows, ops.row_stats, ops.unpack_planes))

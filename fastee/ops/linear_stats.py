from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastee import dispatch, native, reference
from fastee.reference import RowStats

from . import _check, _cpu, _library, _numba, _triton
from ._head import triton_declines
from .exit_head import exit_head
from .results import ROWS, QuantizedRows
from .row_stats import fake_stats, flat_stats


def _check_args(x, weight, bias=None, *, temperature=1.0, second_moment=False):
    args = _check.head("linear_stats", x, weight, bias, "none", None, "max_prob", 0.0, temperature, None)
    return (*args[:3], args[7], bool(second_moment)), {}


def _run_reference(*args):
    stats = reference.linear_stats(*args)
    return RowStats(stats.label, *(s if s is None else s.float() for s in stats[1:]))


def _run_cpu(x, weight, bias, temperature, second_moment):
    return native.hot.linear_stats(x, weight, None if bias is None else bias.float(), temperature, second_moment)


@_numba.widening
def _run_numba(x, weight, bias, temperature, second_moment):
    (rows, features), classes = x.shape, weight.shape[0]
    label, stats = _numba.stats_memory(rows, second_moment)
    _numba.kernel("linear_stats")(
        _numba.flat(x), rows, features, x.stride(0), _numba.flat(weight), classes, weight.stride(0), _numba.flat(bias),
        temperature, second_moment, label.numpy(), stats.numpy().reshape(-1),
    )  # fmt: skip
    return RowStats(label, *stats)


def _layout(x, weight, bias):
    return (
        _cpu.contiguous_rows("x", x)
        or _cpu.contiguous_rows("weight", weight)
        or (None if bias is None or bias.is_contiguous() else "bias is not contiguous")
    )


_op = dispatch.register(
    dispatch.Op(
        "linear_stats",
        (
            dispatch.Backend("triton", _triton.linear_stats, lambda x, w, b, t, m: triton_declines(x, w, b, "none", None)),
            dispatch.Backend("cpu", _run_cpu, lambda x, w, b, t, m: _cpu.floats(x, w, b) or _layout(x, w, b)),
            dispatch.Backend(
                "numba",
                _run_numba,
                lambda x, w, b, t, m: _numba.floats(x, w, b) or _layout(x, w, b),
                lambda x, w, b, t, m: _numba.not_ready("linear_stats") or _numba.large(x, w),
            ),
            dispatch.Backend("reference", _run_reference),
        ),
        _check_args,
    )
)
_library.define(
    "linear_stats(Tensor x, Tensor weight, Tensor? bias, float temperature, bool second_moment) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda *args: flat_stats(dispatch.choose(_op, args, {}).run(*args), args[4]),
    lambda x, weight, bias, temperature, second_moment: fake_stats(x, second_moment),
)


def linear_stats(
    x: Tensor,
    weight: Tensor | QuantizedRows,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    second_moment: bool = False,
    backend: str | None = None,
) -> RowStats:
    """Return the `row_stats` of ``x @ weight.T + bias`` without keeping the logits.

    x [B, D], weight [C, D], bias [C] or None, fp32/bf16/fp16/fp64; the rest as in `row_stats`. `weight` may be int8 from `quantize_rows` (one scale
    per class): a quarter of the bytes, but with ``second_moment=True`` it is widened first.

    >>> import torch, fastee
    >>> fastee.ops.linear_stats(torch.tensor([[0.0, 2.0]]), torch.eye(2)).label.tolist()
    [1]
    """
    args, options = _check_args(x, weight, bias, temperature=temperature, second_moment=second_moment)
    if isinstance(weight, ROWS):
        if not second_moment:
            return exit_head(x, weight, bias, "none", None, "max_prob", math.inf, temperature=temperature, backend=backend).stats
        args = (args[0], reference.dequantize_rows(weight.data, weight.scale), *args[2:])
    if is_compiling():
        out = torch.ops.fastee.linear_stats(*args)
        return RowStats(*out[:5], out[5] if second_moment else None)
    return dispatch.choose(_op, args, options, backend).run(*args)

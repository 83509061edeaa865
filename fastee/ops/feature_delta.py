from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastee import dispatch, native, reference

from . import _check, _cpu, _library, _numba, _triton


def _check_args(a, b):
    dims = tuple(range(2, 9))
    a = _check.tensor("feature_delta", "a", a, _check.FLOATS, "[B, ...]", dims)
    b = _check.tensor("feature_delta", "b", b, _check.FLOATS, "[B, ...]", dims)
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"feature_delta: b must be {_check.show(a)} like a, got {_check.show(b)}")
    _check.same_device("feature_delta", "a", a, b=b)
    return (a, b), {}


def _run_cpu(a, b):
    out = torch.empty(a.shape[0])
    native.hot.feature_delta(a.detach(), b.detach(), out)
    return out


@_numba.widening
def _run_numba(a, b):
    out = torch.empty(a.shape[0])
    _numba.kernel("feature_delta")(_numba.flat(a), _numba.flat(b), a.shape[0], a.shape[1:].numel(), a.stride(0), b.stride(0), out.numpy())
    return out


def _run_reference(a, b):
    small = a.dtype in (torch.bfloat16, torch.float16)
    return (reference.feature_delta(a.float(), b.float()) if small else reference.feature_delta(a, b)).float()


_op = dispatch.register(
    dispatch.Op(
        "feature_delta",
        (
            dispatch.Backend(
                "triton", _triton.feature_delta, lambda a, b: _triton.floats(a, b) or _cpu.contiguous_rows("a", a) or _cpu.contiguous_rows("b", b)
            ),
            dispatch.Backend("cpu", _run_cpu, lambda a, b: _cpu.floats(a, b) or _cpu.contiguous_rows("a", a) or _cpu.contiguous_rows("b", b)),
            dispatch.Backend(
                "numba",
                _run_numba,
                lambda a, b: _numba.floats(a, b) or _cpu.contiguous_rows("a", a) or _cpu.contiguous_rows("b", b),
                lambda a, b: _numba.not_ready("feature_delta"),
            ),
            dispatch.Backend("reference", _run_reference),
        ),
        _check_args,
    )
)
_library.define(
    "feature_delta(Tensor a, Tensor b) -> Tensor",
    lambda a, b: dispatch.choose(_op, (a, b), {}).run(a, b),
    lambda a, b: a.new_empty(a.shape[0], dtype=torch.float32),
)


def feature_delta(a: Tensor, b: Tensor, *, backend: str | None = None) -> Tensor:
    """Return how far the directions of two features lie apart, ``|a/|a| - b/|b||`` per row, fp32 [B] in [0, 2].

    a, b [B, ...] of one shape, fp32/bf16/fp16/fp64, any row stride. DistrEE's criterion (arXiv 2502.15735, the exact form
    reconstructed): the step of the joined feature between two exits, sqrt(2 - 2 cos). A row with a zero feature gives +inf, one with
    NaN or inf gives NaN; both never exit under ``delta < threshold``. Scaling a or b by a positive number changes nothing.
    The result carries no gradient. Raises `TypeError` and `ValueError` that name the argument.

    >>> import torch, fastee
    >>> round(fastee.ops.feature_delta(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0]])).item(), 5)
    1.41421
    """
    args, options = _check_args(a, b)
    if is_compiling():
        return torch.ops.fastee.feature_delta(*args)
    return dispatch.choose(_op, args, options, backend).run(*args)

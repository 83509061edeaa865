from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastee import dispatch, native, reference

from . import _check, _cpu, _library, _numba, _triton


def _check_args(x, kind="mean", mask=None):
    x = _check.tensor("pool", "x", x, _check.FLOATS, "[B, D, ...]", tuple(range(2, 9)))
    _check.pooled_features("pool", x, _check.word("pool", "kind", kind, _check.POOLS))
    if mask is not None:
        if kind != "mean_tokens":
            raise ValueError(f"pool: mask goes with kind='mean_tokens', got kind={kind!r}")
        mask = _check.tensor("pool", "mask", mask, (torch.bool, torch.uint8, torch.int64), "[B, T]", 2)
        if mask.shape != x.shape[:2]:
            raise ValueError(f"pool: mask must be {list(x.shape[:2])} like x, got {_check.show(mask)}")
        _check.same_device("pool", "x", x, mask=mask)
    return (x, kind, mask), {}


def _run_cpu(x, kind, mask):
    out = torch.empty(x.shape[0], x.shape[1 if kind in ("mean", "none") else 2])
    native.hot.pool(x, kind, None if mask is None else mask.to(torch.uint8).contiguous(), out)
    return out


@_numba.widening
def _run_numba(x, kind, mask):
    memory = _numba.activation(x, kind)
    out = torch.empty(memory[1], memory[2])
    _numba.kernel("pool")(*memory, _numba.flags(mask), out.numpy().reshape(-1))
    return out


def _run_reference(x, kind, mask):
    out = reference.pool(x.float() if x.dtype in (torch.bfloat16, torch.float16) else x, kind, mask)
    return out.clone() if out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() else out


_op = dispatch.register(
    dispatch.Op(
        "pool",
        (
            dispatch.Backend("triton", _triton.pool, lambda x, kind, mask: _triton.floats(x) or _cpu.pooled(x, kind)),
            dispatch.Backend("cpu", _run_cpu, lambda x, kind, mask: _cpu.floats(x) or _cpu.pooled(x, kind)),
            dispatch.Backend(
                "numba",
                _run_numba,
                lambda x, kind, mask: _numba.floats(x) or _cpu.pooled(x, kind),
                lambda x, kind, mask: _numba.MEANS if mask is None else _numba.not_ready("pool"),
            ),
            dispatch.Backend("reference", _run_reference),
        ),
        _check_args,
    )
)


def _fake(x, kind, mask):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[0], x.shape[1 if kind in ("mean", "none") else 2], dtype=dtype)


_library.define(
    "pool(Tensor x, str kind, Tensor? mask) -> Tensor", lambda x, kind, mask: dispatch.choose(_op, (x, kind, mask), {}).run(x, kind, mask), _fake
)


def pool(x: Tensor, kind: str = "mean", mask: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Reduce an activation to one feature vector per row, [B, D] fp32 (fp64 stays fp64).

    ``mean``: x [B, D, ...] in any memory format; ``mean_tokens``: [B, T, D], mean over tokens whose `mask` [B, T] is true (all
    when None; a row without tokens gives NaN); ``cls`` and ``last``: first and last token; ``none``: [B, D] as it is.

    >>> import torch, fastee
    >>> fastee.ops.pool(torch.ones(1, 2, 4, 4)).tolist()
    [[1.0, 1.0]]
    """
    args, options = _check_args(x, kind, mask)
    if is_compiling():
        return torch.ops.fastee.pool(*args)
    return dispatch.choose(_op, args, options, backend).run(*args)

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from fastee import dispatch, native, reference

from . import _check, _cpu, _cuda, _library, _numba, _triton
from .results import CompactResult


def _check_args(mask):
    return (_check.tensor("compact", "mask", mask, (torch.bool, torch.uint8), "[B]", 1),), {}


def _run_cpu(mask):
    index = torch.empty(mask.shape[0], dtype=torch.int64)
    return CompactResult(index, native.hot.compact(mask.view(torch.uint8), index))


def _run_numba(mask):
    index = torch.empty(mask.shape[0], dtype=torch.int64)
    return CompactResult(index, _numba.kernel("compact")(_numba.flat(mask, torch.uint8), mask.shape[0], mask.stride(0), index.numpy()))


def _run_reference(mask):
    index, count = reference.compact(mask)
    return CompactResult(index, int(count) if count.device.type == "cpu" else count)


_op = dispatch.register(
    dispatch.Op(
        "compact",
        (
            dispatch.Backend("cuda", _cuda.compact, _cuda.elsewhere),
            dispatch.Backend("triton", _triton.compact, _triton.elsewhere),
            dispatch.Backend("cpu", _run_cpu, _cpu.elsewhere),
            dispatch.Backend("numba", _run_numba, _numba.elsewhere, lambda mask: _numba.not_ready("compact")),
            dispatch.Backend("reference", _run_reference),
        ),
        _check_args,
    )
)


_direct = dispatch.direct("direct_compact")


def _flat(mask):
    index, count = dispatch.choose(_op, (mask,), {}).run(mask)
    return index, torch.as_tensor(count, device=mask.device)


_library.define(
    "compact(Tensor mask) -> (Tensor, Tensor)",
    _flat,
    lambda mask: (mask.new_empty(mask.shape[0], dtype=torch.int64), mask.new_empty((), dtype=torch.int64)),
)


def compact(mask: Tensor, *, backend: str | None = None) -> CompactResult:
    """Order the rows so that those whose `mask` (bool or uint8 [B], any stride) is true come first.

    Returns ``.index`` int64 [B]: the true rows in order, then the false rows reversed (always a permutation, so scattering
    back through it is safe), and ``.count``, how many are true (an int on the CPU). Deterministic for any B, 0 included.

    >>> import torch, fastee
    >>> fastee.ops.compact(torch.tensor([False, True, False, True])).index.tolist()
    [1, 3, 2, 0]
    """
    if backend is None and not is_dynamo_compiling():
        result = _direct(mask)
        if result is not None:
            return CompactResult(*result)
    args, options = _check_args(mask)
    if is_compiling():
        return CompactResult(*torch.ops.fastee.compact(*args))
    return dispatch.choose(_op, args, options, backend).run(*args)

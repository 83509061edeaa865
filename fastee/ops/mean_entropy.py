from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastee import dispatch, native, reference

from . import _check, _cpu, _library, _numba, _triton


def _check_args(logits, mask=None, *, temperature=1.0):
    logits = _check.tensor("mean_entropy", "logits", logits, _check.FLOATS, "[B, T, C]", 3)
    if 0 in logits.shape[1:]:
        raise ValueError(f"mean_entropy: logits must not be empty but for its batch, got {_check.show(logits)}")
    if mask is not None:
        mask = _check.tensor("mean_entropy", "mask", mask, (torch.bool, torch.uint8, torch.int64), "[B, T]", 2)
        if mask.shape != logits.shape[:2]:
            raise ValueError(f"mean_entropy: mask must be {list(logits.shape[:2])} like logits, got {_check.show(mask)}")
        _check.same_device("mean_entropy", "logits", logits, mask=mask)
    return (logits, mask, _check.number("mean_entropy", "temperature", temperature, positive=True)), {}


def _run_cpu(logits, mask, temperature):
    out = torch.empty(logits.shape[0])
    native.hot.mean_entropy(logits.detach(), None if mask is None else mask.to(torch.uint8).contiguous(), temperature, out)
    return out


@_numba.widening
def _run_numba(logits, mask, temperature):
    rows, frames, classes = logits.shape
    out = torch.empty(rows)
    _numba.kernel("mean_entropy")(
        _numba.flat(logits), rows, frames, classes, logits.stride(0), _numba.flags(mask), temperature, out.numpy()
    )
    return out


def _run_reference(logits, mask, temperature):
    return reference.mean_entropy(logits, mask, temperature).float()


_op = dispatch.register(
    dispatch.Op(
        "mean_entropy",
        (
            dispatch.Backend("triton", _triton.mean_entropy, lambda z, mask, t: _triton.floats(z) or _cpu.contiguous_rows("logits", z)),
            dispatch.Backend("cpu", _run_cpu, lambda z, mask, t: _cpu.floats(z) or _cpu.contiguous_rows("logits", z)),
            dispatch.Backend(
                "numba",
                _run_numba,
                lambda z, mask, t: _numba.floats(z) or _cpu.contiguous_rows("logits", z),
                lambda z, mask, t: _numba.not_ready("mean_entropy"),
            ),
            dispatch.Backend("reference", _run_reference),
        ),
        _check_args,
    )
)
_library.define(
    "mean_entropy(Tensor logits, Tensor? mask, float temperature) -> Tensor",
    lambda *args: dispatch.choose(_op, args, {}).run(*args),
    lambda logits, mask, temperature: logits.new_empty(logits.shape[0], dtype=torch.float32),
)


def mean_entropy(logits: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0, backend: str | None = None) -> Tensor:
    """Return the mean entropy (nats) of the frames of each row, fp32 [B]; no [T, C] softmax is kept.

    logits [B, T, C] fp32/bf16/fp16/fp64, divided by `temperature`; mask [B, T] true for real frames (all when None), whose padding
    may hold anything. DAISY's criterion (arXiv 2406.05464). A row without a real frame, or with a NaN, +inf or all -inf
    frame, gives NaN and never exits. The result carries no gradient.

    >>> import torch, fastee
    >>> fastee.ops.mean_entropy(torch.zeros(1, 3, 4)).item()
    1.386294...
    """
    args, options = _check_args(logits, mask, temperature=temperature)
    if is_compiling():
        return torch.ops.fastee.mean_entropy(*args)
    return dispatch.choose(_op, args, options, backend).run(*args)

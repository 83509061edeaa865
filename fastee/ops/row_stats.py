from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from fastee import dispatch, native, reference
from fastee.reference import RowStats

from . import _check, _cpu, _library, _numba, _triton


def _check_args(logits, *, temperature=1.0, second_moment=False):
    logits = _check.tensor("row_stats", "logits", logits, _check.FLOATS, "[B, C]", 2)
    if logits.shape[1] == 0:
        raise ValueError(f"row_stats: logits must have at least one class, got {_check.show(logits)}")
    return (logits, _check.number("row_stats", "temperature", temperature, positive=True), bool(second_moment)), {}


def _run_reference(logits, temperature, second_moment):
    stats = reference.row_stats(logits, temperature, second_moment)
    return RowStats(stats.label, *(s if s is None else s.float() for s in stats[1:]))


@_numba.widening
def _run_numba(logits, temperature, second_moment):
    rows, classes = logits.shape
    label, stats = _numba.stats_memory(rows, second_moment)
    _numba.kernel("row_stats")(
        _numba.flat(logits), rows, classes, logits.stride(0), temperature, second_moment, label.numpy(), stats.numpy().reshape(-1)
    )
    return RowStats(label, *stats)


def _run_cpu(logits, temperature, second_moment):
    return native.hot.row_stats(logits, temperature, second_moment)


_op = dispatch.register(
    dispatch.Op(
        "row_stats",
        (
            dispatch.Backend("triton", _triton.row_stats, lambda z, t, m: _triton.floats(z) or _cpu.contiguous_rows("logits", z)),
            dispatch.Backend("cpu", _run_cpu, lambda z, t, m: _cpu.floats(z) or _cpu.contiguous_rows("logits", z)),
            dispatch.Backend(
                "numba", _run_numba, lambda z, t, m: _numba.floats(z) or _cpu.contiguous_rows("logits", z), lambda z, t, m: _numba.not_ready("row_stats")
            ),
            dispatch.Backend("reference", _run_reference),
        ),
        _check_args,
    )
)


_direct = dispatch.direct("direct_row_stats")


def flat_stats(stats: RowStats, second_moment: bool) -> tuple[Tensor, ...]:
    """The six tensors that torch's dispatcher returns, none an alias of another."""
    last = stats.entropy_p2 if second_moment else torch.empty(0, device=stats.label.device)
    return (stats.label, *(s.clone() for s in stats[1:5]), last.clone())  # a backend may keep them in one block


def fake_stats(x: Tensor, second_moment: bool) -> tuple[Tensor, ...]:
    rows = _library.rows_like(x, torch.int64, *[torch.float32] * 5)
    return (*rows[:5], rows[5] if second_moment else x.new_empty(0, dtype=torch.float32))


_library.define(
    "row_stats(Tensor logits, float temperature, bool second_moment) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda z, t, m: flat_stats(dispatch.choose(_op, (z, t, m), {}).run(z, t, m), m),
    lambda z, t, m: fake_stats(z, m),
)


def row_stats(logits: Tensor, *, temperature: float = 1.0, second_moment: bool = False, backend: str | None = None) -> RowStats:
    """Return label, max_prob, margin, entropy (nats) and lse of each row of logits [B, C] from one pass.

    `logits` fp32/bf16/fp16/fp64, any row stride; they are divided by `temperature` first and never written. With
    ``second_moment=True`` also ``.entropy_p2``, the entropy of p^2 / sum p^2. All results fp32 [B] (label int64). Classes at
    -inf have probability 0; a row with NaN or +inf, or all -inf, has label -1 and NaN elsewhere; ties go to the
    smaller index; B = 0 gives empty results. Five (seven) number state of arXiv 1805.02867, extended by the entropy sums.
    Raises `TypeError` and `ValueError` that name the argument.

    >>> import torch, fastee
    >>> s = fastee.ops.row_stats(torch.tensor([[0.0, 0.0], [0.0, float("-inf")]]))
    >>> s.label.tolist(), s.max_prob.tolist()
    ([0, 0], [0.5, 1.0])
    """
    if backend is None and not is_dynamo_compiling():
        result = _direct(logits, temperature, second_moment)
        if result is not None:
            return result
    args, options = _check_args(logits, temperature=temperature, second_moment=second_moment)
    if is_compiling():
        out = torch.ops.fastee.row_stats(*args)
        return RowStats(*out[:5], out[5] if second_moment else None)
    return dispatch.choose(_op, args, options, backend).run(*args)

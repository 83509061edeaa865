from __future__ import annotations

from torch import Tensor
from torch.compiler import is_compiling

from fastee.dispatch import choose, direct
from fastee.reference import Norm

from ._head import make_op, through_torch
from .results import ExitStepResult, QuantizedRows

_op, _packet = make_op("exit_step", step=True)
_direct = direct("exit_head")


def exit_step(
    x: Tensor,
    weight: Tensor | QuantizedRows,
    bias: Tensor | None = None,
    pool: str = "mean",
    norm: Norm | None = None,
    measure: str = "max_prob",
    threshold: float = 0.9,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    logits: bool = False,
    backend: str | None = None,
) -> ExitStepResult:
    """Run head, rule and compaction of one exit in a single call: `exit_head` plus who survives.

    Arguments, errors and edge behaviour are those of `exit_head`. Adds ``.index`` int64 [B] (rows that stay, in order, then the
    rows that leave, reversed: always a permutation) and ``.count``, the number that stay (an int on the CPU).

    >>> import torch, fastee
    >>> x = torch.tensor([[9.0, 0.0], [1.0, 1.0], [0.0, 9.0]])
    >>> out = fastee.ops.exit_step(x, torch.eye(2), pool="none", threshold=0.9)
    >>> out.count, out.index.tolist()
    (1, [1, 2, 0])
    """
    if is_compiling():
        args, _ = _op.check(x, weight, bias, pool, norm, measure, threshold, temperature=temperature, mask=mask, logits=logits)
        return through_torch(_packet, True, *args)
    if _direct is not None and backend is None and mask is None:
        result = _direct(x, weight, bias, pool, norm, measure, threshold, temperature, None, logits, True)
        if result is not None:
            return result
    args, options = _op.check(x, weight, bias, pool, norm, measure, threshold, temperature=temperature, mask=mask, logits=logits)
    return choose(_op, args, options, backend).run(*args)

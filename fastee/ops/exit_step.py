from __future__ import annotations

from ._head import make_op

_op, exit_step = make_op(
    "exit_step",
    step=True,
    doc="""Run head, rule and compaction of one exit in a single call: `exit_head` plus who survives.

    Arguments, errors and edge behaviour are those of `exit_head`. Adds ``.index`` int64 [B] (rows that stay, in order, then the
    rows that leave, reversed: always a permutation) and ``.count``, the number that stay (an int on the CPU).

    >>> import torch, fastee
    >>> x = torch.tensor([[9.0, 0.0], [1.0, 1.0], [0.0, 9.0]])
    >>> out = fastee.ops.exit_step(x, torch.eye(2), pool="none", threshold=0.9)
    >>> out.count, out.index.tolist()
    (1, [1, 2, 0])
    """,
)

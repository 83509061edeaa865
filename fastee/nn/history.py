"""Measures that remember: ``patience`` and ``gate`` judge a row by what every exit before said of it.

What they remember is one more tensor at the end of the carry, int32 [B, K], one column per exit. So it is compacted, sent over links
and started over together with the row, and evaluating an exit twice changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastee import ops
from fastee.ops.results import ExitStepResult

MEASURES = ("patience", "gate")
NOT_RUN = -2


def blank(rows: int, exits: int, device: torch.device) -> Tensor:
    """Return the history [rows, exits] of rows that passed no exit yet."""
    return torch.full((rows, exits), NOT_RUN, dtype=torch.int32, device=device)


def gate_features(logits: Tensor) -> Tensor:
    """Return what a gate reads of logits [B, C]: fp32 [B, 4] max_prob, entropy, margin, entropy of p^2 (JEI-DNN, arXiv 2310.09163)."""
    s = ops.row_stats(logits.detach(), second_moment=True)
    return torch.stack([s.max_prob, s.entropy, s.margin, s.entropy_p2], 1)


def remember(measure: str, history: Tensor, exit: int, step: ExitStepResult, gate: torch.nn.Module | None) -> Tensor:
    """Write what exit `exit` says into its column and return the score [B] fp32, larger = more confident, NaN where a row is invalid.

    ``patience`` (PABEE, arXiv 2006.04152): how many exits before, in a row, gave the same label; exits that did not run do not count.
    ``gate`` (JEI-DNN): with g the gates' probabilities and S their sum over the exits before, the row leaves when
    g >= (1 - S) / 2, so the score is the difference of the two and the threshold 0.
    """
    before = history[:, :exit]
    if measure == "patience":
        label = step.label.to(torch.int32)
        history[:, exit] = label
        count = torch.zeros(len(label), dtype=torch.float32, device=label.device)
        last = torch.full_like(label, NOT_RUN)
        for column in (*before.unbind(1), label):
            ran = column != NOT_RUN
            count = torch.where(ran, torch.where(column == last, count + 1, 0.0), count)
            last = torch.where(ran, column, last)
        return count.masked_fill(label < 0, float("nan"))
    g = gate_probability(gate, step.logits)
    history[:, exit] = torch.where(g.isnan(), 0.0, g).view(torch.int32)
    past = torch.where(before == NOT_RUN, 0, before).contiguous().view(torch.float32)
    return g - (1 - _in_order(past, torch.zeros_like(g))) / 2


def gate_probability(gate: torch.nn.Linear, logits: Tensor) -> Tensor:
    """Return sigmoid(gate(features)) fp32 [B], bit for bit the same whatever the batch.

    torch's products and its exp round differently at the end of a vector than inside, so the four products are added in order and the
    sigmoid is the probability of the larger of two classes, x and 0.
    """
    x = _in_order(
        gate_features(logits) * gate.weight.detach()[0].float(), gate.bias.detach().float().expand(len(logits))
    )
    p = ops.row_stats(torch.stack([x, torch.zeros_like(x)], 1)).max_prob
    return torch.where(x < 0, 1 - p, p)


def _in_order(columns: Tensor, start: Tensor) -> Tensor:
    for column in columns.unbind(1):
        start = start + column
    return start

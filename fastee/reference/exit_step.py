from typing import NamedTuple

from torch import Tensor

from .compact import compact
from .exit_head import exit_head
from .row_stats import RowStats


class ExitStepResult(NamedTuple):
    label: Tensor
    confidence: Tensor
    exits: Tensor
    stats: RowStats
    logits: Tensor
    index: Tensor  # int64 [B], survivors in order, then the rest reversed
    count: Tensor  # int64 [], survivors


def exit_step(x: Tensor, weight: Tensor, bias: Tensor | None = None, *rule, **options) -> ExitStepResult:
    head = exit_head(x, weight, bias, *rule, **options)
    return ExitStepResult(*head, *compact(~head.exits))

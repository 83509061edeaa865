from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import linear

from .norm import Norm, normalize
from .pool import pool as pool_op
from .row_stats import RowStats, row_stats
from .widen import widen


class ExitHeadResult(NamedTuple):
    label: Tensor  # int64 [B]
    confidence: Tensor  # fp32 [B], the score: larger is more confident
    exits: Tensor  # bool [B]
    stats: RowStats
    logits: Tensor  # [B, C]


def score(stats: RowStats, measure: str, temperature: float = 1.0) -> Tensor:
    if measure == "energy":
        return stats.lse * temperature
    return -stats.entropy if measure == "entropy" else getattr(stats, measure)


def exit_head(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, pool: str = "mean", norm: Norm | None = None, measure: str = "max_prob",
    threshold: float = 0.9, temperature: float = 1.0, mask: Tensor | None = None,
) -> ExitHeadResult:  # fmt: skip
    features, weight = pool_op(widen(x), pool, mask), widen(weight)
    if norm is not None:
        features = normalize(features, norm._replace(weight=widen(norm.weight), bias=widen(norm.bias)))
    logits = linear(features.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
    stats = row_stats(logits, temperature)
    confidence = score(stats, measure, temperature)
    exits = (confidence >= threshold) & (threshold != float("inf"))  # NaN compares false: it never exits
    return ExitHeadResult(stats.label, confidence, exits, stats, logits)

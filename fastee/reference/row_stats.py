from typing import NamedTuple

import torch
from torch import Tensor


class RowStats(NamedTuple):
    """What one pass over a row of logits yields, each [B]; an invalid row has label -1 and NaN elsewhere."""

    label: Tensor  # int64, smallest index on a tie
    max_prob: Tensor
    margin: Tensor  # p1 - p2
    entropy: Tensor  # nats
    lse: Tensor  # logsumexp of logits / temperature
    entropy_p2: Tensor | None = None  # entropy of p^2 / sum p^2, only with second_moment=True


def row_stats(logits: Tensor, temperature: float = 1.0, second_moment: bool = False) -> RowStats:
    z = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    top = z.amax(-1)
    two = z.topk(min(2, z.shape[-1]), -1).values
    u = z - top[:, None]
    e = u.exp()
    ue = torch.where(e > 0, u * e, 0.0)
    s, t = e.sum(-1), ue.sum(-1)
    second = (two[:, 1] - top).exp() if z.shape[-1] > 1 else torch.zeros_like(top)
    s2, t2 = (e * e).sum(-1), (ue * e).sum(-1)
    invalid = z.isnan().any(-1) | top.isinf()  # NaN or +inf somewhere, or -inf everywhere
    values = [1 / s, (1 - second) / s, s.log() - t / s, top + s.log(), s2.log() - 2 * t2 / s2]
    values = [v.masked_fill(invalid, float("nan")) for v in values]
    return RowStats(z.argmax(-1).masked_fill(invalid, -1), *values[:4], values[4] if second_moment else None)

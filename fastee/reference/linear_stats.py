from torch import Tensor
from torch.nn.functional import linear

from .row_stats import RowStats, row_stats
from .widen import widen


def linear_stats(x: Tensor, weight: Tensor, bias: Tensor | None = None, temperature: float = 1.0, second_moment: bool = False) -> RowStats:
    weight = widen(weight)
    return row_stats(linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)), temperature, second_moment)

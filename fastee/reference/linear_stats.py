from torch import Tensor
from torch.nn.functional import linear

from .row_stats import RowStats, row_stats


def linear_stats(x: Tensor, weight: Tensor, bias: Tensor | None = None, temperature: float = 1.0, second_moment: bool = False) -> RowStats:
    return row_stats(linear(x.to(weight.dtype), weight, bias), temperature, second_moment)

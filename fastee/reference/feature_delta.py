import torch
from torch import Tensor


def feature_delta(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.flatten(1), b.flatten(1)
    u, v = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    delta = (a / u - b / v).norm(dim=1)  # = sqrt(2 - 2 cos(a, b)), without its cancellation
    delta = torch.where((u * v).isinf().squeeze(1), torch.nan, delta)  # |a|^2 or |b|^2 beyond the dtype: no answer
    return torch.where(((u == 0) | (v == 0)).squeeze(1), torch.inf, delta)  # a zero feature has no direction

from typing import NamedTuple

import torch
from torch import Tensor


class CompactResult(NamedTuple):
    index: Tensor  # int64 [B], a permutation
    count: Tensor  # int64 [], how many survive


def compact(mask: Tensor) -> CompactResult:
    keep = mask.to(torch.bool)
    rows = torch.arange(keep.numel(), device=keep.device)
    rank = keep.cumsum(0)  # survivors up to and including this row
    where = torch.where(keep, rank - 1, keep.numel() - 1 - (rows - rank))
    return CompactResult(torch.empty_like(rows).scatter_(0, where, rows), keep.sum())

import torch
from torch import Tensor

from .row_stats import row_stats


def mean_entropy(logits: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    frames = row_stats(logits.flatten(0, 1), temperature).entropy.view(logits.shape[:2])  # [B, T]
    if mask is None:
        return frames.mean(1)
    keep = mask.to(torch.bool)
    return torch.where(keep, frames, 0.0).sum(1) / keep.sum(1)  # no frame: 0 / 0 = NaN, never exits

import torch
from torch import Tensor


def pool(x: Tensor, kind: str = "mean", mask: Tensor | None = None) -> Tensor:
    if kind == "mean":  # [B, D, *spatial], any memory format
        return x.flatten(2).mean(-1) if x.dim() > 2 else x
    if kind == "mean_tokens":  # [B, T, D], mask [B, T]: a row without tokens pools to NaN
        if mask is None:
            return x.mean(1)
        keep = mask.to(torch.bool)
        return torch.where(keep[..., None], x, 0.0).sum(1) / keep.sum(1, keepdim=True)
    return {"cls": lambda: x[:, 0], "last": lambda: x[:, -1], "none": lambda: x}[kind]()

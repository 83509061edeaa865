import torch
from torch import Tensor


def quantize_rows(x: Tensor, format: str = "int8", group: int | None = None) -> tuple[Tensor, Tensor]:
    rows = x.float().reshape(x.shape[0], -1)
    groups = rows.reshape(x.shape[0], -1, group) if group else rows[:, None]
    top = groups.abs().amax(-1, keepdim=True) if rows.numel() else groups.new_zeros(*groups.shape[:2], 1)
    tiny = torch.where(top < 2.0**-100, 2.0**64, 1.0)  # keeps 127 / top finite; a power of two, so exact
    inverse = torch.where(top > 0, 127.0 / (top * tiny), 0.0)
    good = top.isfinite()  # a group with NaN or inf gets scale NaN and comes back as NaN, never as a wrong number
    q = torch.where(good, (groups * tiny * inverse).round().clamp(-127, 127), 0.0).to(torch.int8)
    scale = torch.where(good, top / 127.0, torch.nan).squeeze(-1)
    return q.reshape(x.shape), scale if group else scale.squeeze(-1)


def dequantize_rows(data: Tensor, scale: Tensor, group: int | None = None) -> Tensor:
    rows = data.float().reshape(data.shape[0], scale.shape[1] if group else 1, -1) if data.numel() else data.float()
    return (rows * scale.reshape(data.shape[0], -1, 1)).reshape(data.shape) if data.numel() else rows

import math

import torch
from torch import Tensor

LARGEST_SCALE = float.fromhex("0x1.0204060000000p+121")  # 127 times the next float is inf


def quantize_rows(x: Tensor, format: str = "int8", group: int | None = None) -> tuple[Tensor, Tensor]:
    row = math.prod(x.shape[1:])
    groups = x.float().reshape(x.shape[0], row // group if group else 1, group or row)
    top = groups.abs().amax(-1, keepdim=True) if groups.numel() else groups.new_zeros(*groups.shape[:2], 1)
    tiny = torch.where(top < 2.0**-100, 2.0**64, 1.0)  # keeps 127 / top finite; a power of two, so exact
    inverse = torch.where(top > 0, torch.full_like(top, 127.0) / (top * tiny), 0.0)  # 127.0 / tensor would be 127 * (1 / tensor)
    good = top.isfinite()  # a group with NaN or inf gets scale NaN and comes back as NaN, never as a wrong number
    q = torch.where(good, (groups * tiny * inverse).round().clamp(-127, 127), 0.0).to(torch.int8)
    scale = torch.where(good, (top / 127.0).clamp(max=LARGEST_SCALE), torch.nan).squeeze(-1)
    return q.reshape(x.shape), scale if group else scale.squeeze(-1)


def dequantize_rows(data: Tensor, scale: Tensor, group: int | None = None) -> Tensor:
    row = math.prod(data.shape[1:])
    groups = data.float().reshape(data.shape[0], row // group if group else 1, group or row)
    return (groups * scale.reshape(groups.shape[0], groups.shape[1], 1)).reshape(data.shape)

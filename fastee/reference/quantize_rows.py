import math

import torch
from torch import Tensor

# Largest magnitude on the grid of a format, and the largest scale with which that stays finite.
GRIDS = {
    "int8": (127.0, float.fromhex("0x1.020406p+121")),
    "int4": (7.0, float.fromhex("0x1.249248p+125")),
    "fp8_e4m3": (448.0, float.fromhex("0x1.249248p+119")),
}


def to_bf16(x: Tensor) -> Tensor:
    bits = x.float().contiguous().view(torch.int32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # half to even
    quiet = bits >> 16 | 0x40  # a NaN keeps its sign and upper payload
    return torch.where(x.isnan(), quiet, rounded).to(torch.int16).view(torch.bfloat16)


def join_nibbles(q: Tensor) -> Tensor:
    q = torch.nn.functional.pad(q, (0, q.shape[1] % 2)).view(torch.uint8) & 15
    return q[:, ::2] | q[:, 1::2] << 4


def split_nibbles(data: Tensor, row: int) -> Tensor:
    q = torch.stack((data & 15, data >> 4), -1).flatten(1)[:, :row]
    return (q.to(torch.int8) ^ 8) - 8


def quantize_rows(x: Tensor, format: str = "int8", group: int | None = None) -> tuple[Tensor, Tensor]:
    if format == "bf16":
        return to_bf16(x), x.new_empty(0, dtype=torch.float32)
    (limit, largest), row = GRIDS[format], math.prod(x.shape[1:])
    groups = x.float().reshape(x.shape[0], row // group if group else 1, group or row)
    top = groups.abs().amax(-1, keepdim=True) if groups.numel() else groups.new_zeros(*groups.shape[:2], 1)
    tiny = torch.where(top < 2.0**-100, 2.0**64, 1.0)  # keeps limit / top finite; a power of two, so exact
    inverse = torch.where(top > 0, torch.full_like(top, limit) / (top * tiny), 0.0)  # limit / tensor would be limit * (1 / tensor)
    good = top.isfinite()  # a group with NaN or inf gets scale NaN and comes back as NaN, never as a wrong number
    q = torch.where(good, (groups * tiny * inverse).clamp(-limit, limit), 0.0).reshape(x.shape)
    scale = torch.where(good, (top / limit).clamp(max=largest), torch.nan).squeeze(-1)
    q = q.to(torch.float8_e4m3fn) if format == "fp8_e4m3" else q.round().to(torch.int8)
    return join_nibbles(q.reshape(x.shape[0], row)) if format == "int4" else q, scale if group else scale.squeeze(-1)


def dequantize_rows(data: Tensor, scale: Tensor, group: int | None = None, format: str = "int8", shape: tuple[int, ...] | None = None) -> Tensor:
    shape = data.shape if shape is None else shape
    row = math.prod(shape[1:])
    values = (split_nibbles(data, row) if format == "int4" else data).float()
    if format == "bf16":
        return values
    groups = values.reshape(shape[0], row // group if group else 1, group or row)
    return (groups * scale.reshape(groups.shape[0], groups.shape[1], 1)).reshape(shape)

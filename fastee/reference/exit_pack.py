import torch
from torch import Tensor

from .exit_step import ExitStepResult, exit_step
from .gather_rows import gather_rows
from .quantize_rows import quantize_rows


def exit_pack(x: Tensor, weight: Tensor, bias: Tensor | None, *rule, format: str = "int8", group: int | None = None) -> tuple[ExitStepResult, Tensor, Tensor, Tensor]:
    step = exit_step(x, weight, bias, *rule)
    data, scale = quantize_rows(gather_rows(x, step.index[: int(step.count)]), format, group)
    wire = torch.cat([part.contiguous().reshape(-1).view(torch.uint8) for part in (scale, data)])
    return step, wire, data, scale

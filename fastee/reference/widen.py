import torch
from torch import Tensor


def widen(t: Tensor | None) -> Tensor | None:
    """All arithmetic is fp32, or fp64 when the input is: narrow inputs are widened, exactly, before anything else."""
    return t if t is None or t.dtype == torch.float64 else t.float()

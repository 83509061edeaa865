from typing import NamedTuple

import torch
from torch import Tensor


class Norm(NamedTuple):
    """The normalisation between pool and linear: ``layer``, ``rms``, or ``affine`` (a BatchNorm folded to scale and shift)."""

    kind: str
    weight: Tensor | None = None  # [D]
    bias: Tensor | None = None  # [D]
    eps: float = 1e-5


def normalize(x: Tensor, norm: Norm) -> Tensor:
    if norm.kind == "layer":
        return torch.nn.functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    if norm.kind == "rms":
        x = x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    if norm.weight is not None:
        x = x * norm.weight
    return x if norm.bias is None else x + norm.bias

"""mean_entropy of the frames of each row beside log_softmax and a masked mean in torch, which keeps [B, T, C] twice."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import fastee
from fastee.testing.bench import Context, Group

SHAPES = {"headline": [(1, 100, 32)], "small": [(1, 100, 32), (8, 100, 32), (1, 100, 1000), (8, 100, 1000)]}
SHAPES["all"] = [*SHAPES["small"], (1, 1500, 32), (1, 16, 32_000)]


def eager(logits, mask):
    logp = F.log_softmax(logits, -1)
    entropy = -(logp.exp() * logp).sum(-1)
    return (entropy * mask).sum(1) / mask.sum(1)


def cases(ctx: Context) -> Iterator[Group]:
    for B, T, C in SHAPES[ctx.shapes]:
        base = 2 * torch.randn(B, T, C, generator=torch.Generator().manual_seed(ctx.seed))
        mask = torch.arange(T).expand(B, T) < torch.linspace(T, T // 2, B)[:, None]  # rows of different length
        inputs = ctx.rotate(lambda i, z=base, m=mask: (z + 0.01 * i, m), 4 * base.numel())
        if not torch.allclose(fastee.ops.mean_entropy(*inputs[0]), eager(*inputs[0]), atol=1e-4):
            raise RuntimeError(f"{B}x{T}x{C}: fastee and torch disagree")
        read = 4 * C * int(mask.sum())
        yield Group(
            "mean_entropy",
            f"{B}x{T}x{C}",
            "fp32",
            ctx.usual(fastee.ops.mean_entropy, eager, inputs),
            bytes=read,
            working_set=16 * B * T * C,
            bars=(">= 1x torch",),
        )

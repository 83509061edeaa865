"""feature_delta of two activations beside the same in torch: two norms, two divisions, one more norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import fastee
from fastee.testing.bench import Context, Group

SHAPES = {"headline": [(1, 64, 7, 7)], "small": [(1, 64, 7, 7), (32, 64, 7, 7), (32, 16, 28, 28), (1, 128, 768)]}
SHAPES["all"] = [*SHAPES["small"], (1, 768), (256, 64, 7, 7), (8, 128, 768)]


def eager(a, b):
    a, b = a.flatten(1), b.flatten(1)
    return (a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)).norm(dim=1)


def cases(ctx: Context) -> Iterator[Group]:
    for shape in SHAPES[ctx.shapes]:
        g = torch.Generator().manual_seed(ctx.seed)
        a, noise = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
        inputs = ctx.rotate(lambda i, a=a, noise=noise: (a, a + 0.1 * (i + 1) * noise), 8 * a.numel())
        if not torch.allclose(fastee.ops.feature_delta(*inputs[0]), eager(*inputs[0]), atol=1e-5):
            raise RuntimeError(f"{shape}: fastee and torch disagree")
        yield Group(
            "feature_delta",
            "x".join(map(str, shape)),
            "fp32",
            ctx.usual(fastee.ops.feature_delta, eager, inputs),
            bytes=8 * a.numel(),
            working_set=20 * a.numel(),
            bars=(">= 1x torch",),
        )

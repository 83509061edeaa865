"""row_stats on logits that exist already, beside softmax + topk + entropy + logsumexp in torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import fastee
from fastee.testing.bench import Case, Context, Group

SHAPES = {"headline": [(1, 10)], "small": [(1, 10), (32, 10), (1, 1000), (32, 1000), (1, 32_000)]}
SHAPES["all"] = [*SHAPES["small"], (256, 1000), (32, 32_000), (8, 128_256)]


def eager(z):
    logp = F.log_softmax(z, -1)
    p = logp.exp()
    top, label = p.topk(2, -1)
    return label[:, 0], top[:, 0], top[:, 0] - top[:, 1], -(p * logp).sum(-1), z.logsumexp(-1)


def ours_as_tensors(z):
    """A result makes its tensors on first access: all five are made here, as torch makes them."""
    return fastee.ops.row_stats(z)[:5]


def cases(ctx: Context) -> Iterator[Group]:
    for B, C in SHAPES[ctx.shapes]:
        base = 2 * torch.randn(B, C, generator=torch.Generator().manual_seed(ctx.seed))
        inputs = ctx.rotate(lambda i, z=base: (z + 0.01 * i,), 4 * B * C)
        ours, theirs = fastee.ops.row_stats(base), eager(base)
        if not torch.allclose(ours.entropy, theirs[3], atol=1e-3):
            raise RuntimeError(f"{B}x{C}: fastee and torch disagree on the entropy")
        providers = [
            Case("fastee", ours_as_tensors, inputs, note=fastee.explain("row_stats", base).chosen),
            Case("torch", eager, inputs, note="eager, all five statistics"),
        ]
        if not ctx.quick and ctx.shapes == "small":
            providers.append(ctx.compiled(eager, inputs))
        providers += ctx.backends(fastee.ops.row_stats, inputs)
        yield Group("row_stats", f"{B}x{C}", "fp32", providers, bytes=4 * B * C, working_set=16 * B * C, bars=(">= 1x torch",))

"""compact beside the two ways a user writes it: nonzero (survivors only) and a stable argsort (the full permutation)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import fastee
from fastee.testing.bench import Case, Context, Group


def by_nonzero(mask):
    stay = mask.nonzero().squeeze(1)
    return stay, stay.shape[0]


def by_argsort(mask):
    return torch.argsort(mask.logical_not(), stable=True), int(mask.sum())


def cases(ctx: Context) -> Iterator[Group]:
    for B in {"headline": (32,), "small": (1, 32, 256, 4096)}.get(ctx.shapes, (1, 4, 32, 64, 256, 1024, 4096, 70_000)):
        gen = torch.Generator().manual_seed(ctx.seed)
        inputs = ctx.rotate(lambda i, b=B, g=gen: (torch.rand(b, generator=g) < 0.5,), B)
        count = int(inputs[0][0].sum())
        if not torch.equal(fastee.ops.compact(*inputs[0]).index[:count], by_nonzero(*inputs[0])[0]):
            raise RuntimeError(f"B={B}: fastee and torch disagree on the survivors")
        yield Group(
            "compact", str(B), "bool",
            [Case("fastee", fastee.ops.compact, inputs, note=fastee.explain("compact", *inputs[0]).chosen),
             Case("torch", by_nonzero, inputs, note="nonzero, survivors only"), Case("argsort", by_argsort, inputs, note="stable argsort, full permutation"),
             *ctx.backends(fastee.ops.compact, inputs)],
            bytes=9 * B, working_set=36 * B, bars=(">= 1x torch",),
        )  # fmt: skip

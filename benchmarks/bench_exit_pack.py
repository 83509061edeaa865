"""exit_pack beside our own separate calls (exit_step, gather_rows, quantize_rows) and beside the same in torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import fastee
from fastee.testing.bench import Case, Context, Group

SHAPES = {"headline": [(32, 256, 8, 8)], "small": [(32, 256, 8, 8), (1, 256, 8, 8), (64, 64, 32, 32), (256, 128, 8, 8)]}
SHAPES["all"] = [*SHAPES["small"], (32, 512, 4, 4), (8, 64, 56, 56)]


def eager(x, weight, bias, threshold):
    p = torch.nn.functional.linear(x.mean((2, 3)), weight, bias).softmax(1)
    confidence, label = p.max(1)
    rows = x.index_select(0, (confidence < threshold).nonzero().squeeze(1))
    scale = rows.flatten(1).abs().amax(1) / 127
    return label, (rows / scale[:, None, None, None]).round().to(torch.int8), scale


def separate(x, weight, bias, threshold):
    step = fastee.ops.exit_step(x, weight, bias, threshold=threshold)
    q = fastee.ops.quantize_rows(fastee.ops.gather_rows(x, step.index[: step.count]))
    return step, q, q.data, q.scale


def fused(x, weight, bias, threshold):
    out = fastee.ops.exit_pack(x, weight, bias, threshold=threshold)
    return out, out.packed, out.packed.data, out.packed.scale  # tensors of the native result are made here: they count


def cases(ctx: Context) -> Iterator[Group]:
    for shape in SHAPES[ctx.shapes]:
        g = torch.Generator().manual_seed(ctx.seed)
        x, weight, bias = torch.randn(shape, generator=g), torch.randn(10, shape[1], generator=g), torch.randn(10, generator=g)
        confidence = fastee.ops.exit_head(x, weight, bias).confidence
        threshold = float(confidence.median()) if shape[0] > 1 else 2.0  # half of the rows stay; a single one does
        n = x.numel()
        inputs = ctx.rotate(lambda i, x=x, w=weight, b=bias, t=threshold: (x + 1e-4 * i, w, b, t), 4 * n)
        one, two = fused(x, weight, bias, threshold)[1], separate(x, weight, bias, threshold)[1]
        if not torch.equal(one.data, two.data) or not torch.equal(one.scale, two.scale):
            raise RuntimeError(f"{shape}: the fused and the separate calls disagree")
        yield Group(
            "exit_pack", "x".join(map(str, shape)), "fp32->int8",
            [Case("fastee", fused, inputs, note=fastee.explain("exit_pack", x, weight, bias).chosen),
             Case("separate", separate, inputs, note="exit_step + gather_rows + quantize_rows"), Case("torch", eager, inputs, note="eager")],
            bytes=4 * n + one.nbytes, working_set=4 * n * len(inputs), bars=(">= 1.3x separate", ">= 10x torch"),
        )  # fmt: skip

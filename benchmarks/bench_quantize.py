"""quantize_rows and dequantize_rows (one scale per row): int8 beside the same in torch, every format beside a plain copy."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import fastee
from fastee.testing.bench import Case, Context, Group

SHAPES = {"headline": [(1, 256, 8, 8)], "small": [(1, 256, 8, 8), (32, 256, 8, 8), (1, 768), (32, 128, 768)]}
SHAPES["all"] = [*SHAPES["small"], (1, 64, 32, 32), (32, 64, 32, 32), (256, 4096)]


def eager_quantize(x):
    flat = x.flatten(1)
    scale = flat.abs().amax(1) / 127
    return (flat / scale[:, None]).round().to(torch.int8).view_as(x), scale


def eager_dequantize(data, scale):
    return data * scale.view(-1, *[1] * (data.dim() - 1))


def quantise(x, format="int8"):
    q = fastee.ops.quantize_rows(x, format)
    return q.data, q.scale  # the native result makes its tensors here: they count


def cases(ctx: Context) -> Iterator[Group]:
    for shape in SHAPES[ctx.shapes]:
        base = torch.randn(shape, generator=torch.Generator().manual_seed(ctx.seed))
        n, name = base.numel(), "x".join(map(str, shape))
        inputs = ctx.rotate(lambda i, b=base: (b + 0.01 * i,), 4 * n)
        q, (data, scale) = fastee.ops.quantize_rows(base), eager_quantize(base)
        if (q.data.int() - data.int()).abs().max() > 1 or not torch.allclose(q.scale, scale):
            raise RuntimeError(f"{name}: fastee and torch disagree")
        yield Group(
            "quantize_rows", name, "fp32->int8",
            [Case("fastee", quantise, inputs, note=fastee.explain("quantize_rows", base).chosen),
             Case("torch", eager_quantize, inputs, note="eager"), Case("copy", torch.clone, inputs, note="torch.clone of x", bytes=8 * n),
             *ctx.backends(fastee.ops.quantize_rows, inputs)],
            bytes=5 * n, roof="copy", working_set=20 * n, bars=(">= 1x torch",),
        )  # fmt: skip
        packed = [(fastee.ops.quantize_rows(x),) for (x,) in inputs]
        yield Group(
            "dequantize_rows", name, "int8->fp32",
            [Case("fastee", fastee.ops.dequantize_rows, packed, note=fastee.explain("dequantize_rows", q).chosen),
             Case("torch", eager_dequantize, [(p.data, p.scale) for (p,) in packed], note="eager"),
             *ctx.backends(fastee.ops.dequantize_rows, packed)],
            bytes=5 * n, roof="copy", working_set=8 * n, bars=(">= 1x torch",),
        )  # fmt: skip
        for fmt, width, bar in (("int8", 1.0, 0.5), ("int4", 0.5, 0.4), ("fp8_e4m3", 1.0, None), ("bf16", 2.0, None)):
            bars = (f">= {bar}x copy",) if bar else ()  # half the speed of a copy: twice its time
            coded = [(fastee.ops.quantize_rows(x, fmt),) for (x,) in inputs]
            copy = Case("copy", torch.clone, inputs, note="torch.clone of x", bytes=8 * n)
            yield Group("quantize_rows", name, f"fp32->{fmt} beside a copy", [Case("fastee", partial(quantise, format=fmt), inputs), copy], baseline="copy",
                        bytes=int((4 + width) * n), roof="copy", working_set=20 * n, bars=bars)  # fmt: skip
            yield Group("dequantize_rows", name, f"{fmt}->fp32 beside a copy", [Case("fastee", fastee.ops.dequantize_rows, coded), copy], baseline="copy",
                        bytes=int((4 + width) * n), roof="copy", working_set=20 * n, bars=bars)  # fmt: skip

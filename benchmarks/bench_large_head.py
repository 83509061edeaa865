"""Heads of many classes: weights against the memory's bandwidth, batches against BLAS on each instruction set, two threads against one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

import fastee
from fastee import native
from fastee.testing.bench import Case, Context, Group

from .bench_exit_step import THRESHOLD, eager_head

WEIGHTS = {"headline": [(1000, 4096)], "small": [(1000, 1024), (1000, 4096), (10_000, 1024), (32_000, 768), (32_000, 4096)]}
BATCHES = {"headline": [(256, 4096, 1000)], "small": [(32, 256, 10), (32, 512, 100), (256, 256, 100), (32, 1024, 1000), (256, 1024, 1000), (64, 4096, 1000), (256, 4096, 1000)]}
WEIGHTS["all"], BATCHES["all"] = WEIGHTS["small"], BATCHES["small"]


def tensors(ctx: Context, B: int, D: int, C: int):
    gen = torch.Generator().manual_seed(ctx.seed)
    return torch.randn(B, D, generator=gen), torch.randn(C, D, generator=gen) / D**0.5, torch.randn(C, generator=gen)


def head(x, weight, bias):
    return fastee.ops.exit_head(x, weight, bias, "none", threshold=THRESHOLD)


def eager(x, weight, bias):
    return eager_head(x, weight, bias, lambda x: x)


def on(select: Callable, setting, back) -> Callable:
    """Return `head` under another instruction set or thread count; the two switches cost some 0.3 us."""

    def run(x, weight, bias):
        select(setting)
        try:
            return head(x, weight, bias)
        finally:
            select(back)

    return run


def weights(ctx: Context, D: int, C: int) -> Iterator[Group]:
    """Batch 1: every weight is read once. bf16 and int8 beside fp32, each with its own bytes; torch beside fp32."""
    x, weight, bias = tensors(ctx, 1, D, C)
    kinds = {"fp32": weight, "bf16": weight.bfloat16(), "int8": fastee.ops.quantize_rows(weight, "int8")}
    cases = {
        kind: Case(f"fastee_{kind}", head, [(x, w, bias)], bytes=C * D * {"fp32": 4, "bf16": 2, "int8": 1}[kind], note=f"{kind} weights, {'exact whole numbers' if kind == 'int8' else 'fp32 arithmetic'}")
        for kind, w in kinds.items()
    }
    torch_case = Case("torch", eager, [(x, weight, bias)], note="eager, fp32 weights")
    for kind, bar in (("fp32", ">= 1x torch"), ("bf16", ">= 1.7x fastee_fp32"), ("int8", ">= 3x fastee_fp32")):
        others = [torch_case] if kind == "fp32" else [cases["fp32"]]
        size = cases[kind].bytes
        yield Group("exit_head", f"1x{D}->{C} weights", kind, [cases[kind], *others], baseline=others[0].provider, bytes=size, flops=2 * C * D,
                    working_set=size, bars=(bar,))  # fmt: skip


def batch(ctx: Context, B: int, D: int, C: int) -> Iterator[Group]:
    """A batch: torch's whole head and its product alone (BLAS), on each instruction set of vectors that runs here."""
    inputs = [tensors(ctx, B, D, C)]
    best = native.isa()
    for isa in [i for i in native.isas() if i not in ("scalar", "emu16")]:
        cases = [
            Case("fastee", on(native.hot.select_isa, isa, best), inputs, note=f"cpu ({isa}), batch invariant"),
            Case("torch", eager, inputs, note="eager"),
            Case("product", F.linear, inputs, note="torch's linear layer alone: BLAS"),
        ]
        bars = (">= 1.2x torch" if C <= 100 else ">= 1x torch", *((">= 0.85x product",) if C == 1000 else ()))
        yield Group("exit_head", f"{B}x{D}->{C} {isa}", "fp32", cases, bytes=4 * (B * D + C * D), flops=2 * B * C * D, working_set=4 * (B * D + C * D), bars=bars)


def threads(ctx: Context, B: int, D: int, C: int) -> Iterator[Group]:
    """Two threads beside one, and apart from that beside torch, whose OpenMP worker spins on the second core for milliseconds after each call."""
    inputs, nbytes = [tensors(ctx, B, D, C)], 4 * (B * D + C * D)
    ours = Case("fastee", head, inputs, note="two threads")
    for other, bar in (
        (Case("one_thread", on(native.set_num_threads, 1, 2), inputs, note="fastee, one thread"), ">= 1.5x one_thread"),
        (Case("torch", eager, inputs, note="eager, two threads"), ">= 1x torch"),
    ):
        yield Group("exit_head", f"{B}x{D}->{C} two threads", "fp32", [ours, other], baseline=other.provider, bytes=nbytes, working_set=nbytes, bars=(bar,), threads=2)


def cases(ctx: Context) -> Iterator[Group]:
    if native.hot is None:
        raise RuntimeError(f"native parts: {native.reason.get('_hot')}")
    for C, D in WEIGHTS[ctx.shapes]:
        yield from weights(ctx, D, C)
    for shape in BATCHES[ctx.shapes]:
        yield from batch(ctx, *shape)
    for shape in ((1, 1024, 32_000), (32, 1024, 1000), (256, 256, 100), (256, 1024, 1000), (64, 4096, 32_000), (256, 4096, 1000)):
        yield from threads(ctx, *shape)

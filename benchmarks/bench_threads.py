"""Large calls on two threads, native pool and torch's, beside the same native call on one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import torch

import fastee
from fastee import native
from fastee.testing.bench import Case, Context, Group

from .bench_exit_step import POOLS, eager_head
from .bench_quantize import eager_quantize

THREADS = 2


def alone(fn):
    """Return `fn` on one thread; switching the pool there and back costs well under 1 % of the calls below."""

    def run(*args):
        native.set_num_threads(1)
        try:
            return fn(*args)
        finally:
            native.set_num_threads(THREADS)

    return run


def calls(seed: int):
    """Yield (op, shape, fastee's call, torch's call or None, its arguments, bytes)."""
    g = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(10, 256, generator=g), torch.randn(10, generator=g)
    x = torch.randn(256, 256, 8, 8, generator=g)
    yield "exit_head", "256x256x8x8->10", fastee.ops.exit_head, partial(eager_head, pool=POOLS["mean"]), (x, weight, bias), 4 * x.numel()
    z = torch.randn(32, 32_000, generator=g)
    yield "row_stats", "32x32000", fastee.ops.row_stats, lambda z: z.softmax(-1).max(-1), (z,), 4 * z.numel()
    yield "quantize_rows", "256x256x8x8 int8", fastee.ops.quantize_rows, eager_quantize, (x,), 5 * x.numel()
    h = x.to(torch.bfloat16)
    yield "pack_planes", "256x256x8x8 bf16", fastee.ops.pack_planes, None, (h,), h.nbytes
    yield "unpack_planes", "256x256x8x8 bf16", fastee.ops.unpack_planes, None, (fastee.ops.pack_planes(h),), h.nbytes


def cases(ctx: Context) -> Iterator[Group]:
    if (os.cpu_count() or 1) < THREADS:
        raise ValueError(f"threads: needs {THREADS} cores, this machine has {os.cpu_count()}")
    for op, shape, ours, eager, args, nbytes in calls(ctx.seed):
        others = [(Case("one_thread", alone(ours), [args], note="the same call on one thread"), ">= 1.5x one_thread")]
        if eager is not None:  # apart: its OpenMP worker spins on the second core for milliseconds after each call
            others.append((Case("torch", eager, [args], note=f"eager, {THREADS} threads"), ">= 1x torch"))
        for other, bar in others:
            yield Group(op, f"{shape}, {THREADS} threads", "fp32", [Case("fastee", ours, [args]), other], baseline=other.provider, bytes=nbytes,
                        working_set=nbytes, threads=THREADS, bars=(bar,))  # fmt: skip

"""compact beside the two ways a user writes it: nonzero (survivors only) and a stable argsort (the full permutation); its C function alone."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import numba
import numpy as np
import torch

import fastee
from fastee import native
from fastee.testing.bench import Case, Context, Group

CALLS = 1000
DLTENSOR = np.dtype([("data", "u8"), ("device", "i4", 2), ("ndim", "i4"), ("code", "u1"), ("bits", "u1"), ("lanes", "u2"),
                     ("shape", "u8"), ("strides", "u8"), ("byte_offset", "u8")])  # fmt: skip


def by_nonzero(mask):
    stay = mask.nonzero().squeeze(1)
    return stay, stay.shape[0]


def by_argsort(mask):
    return torch.argsort(mask.logical_not(), stable=True), int(mask.sum())


def in_c(mask: torch.Tensor) -> Callable[[], int]:
    """Return a compiled loop of CALLS calls of fastee_compact on a mask that is described once; it returns the last count."""
    function = ctypes.CDLL(str(Path(native.hot.__file__).with_name("libfastee.so"))).fastee_compact
    function.argtypes, function.restype = [ctypes.c_size_t] * 4, ctypes.c_int
    shape, count, index = np.array([len(mask)]), np.zeros(1, np.int64), np.empty(len(mask), np.int64)
    tensor = np.array([(mask.data_ptr(), (1, 0), 1, 6, 8, 1, shape.ctypes.data, 0, 0)], DLTENSOR)  # a bool tensor on the CPU

    @numba.njit
    def loop(tensor, index, count):
        for _ in range(CALLS):
            function(tensor, index, count, 0)

    addresses = [a.ctypes.data for a in (tensor, index, count)]

    def run():
        loop(*addresses)
        return int(count[0])

    run.holds = mask, shape, tensor, index  # what the addresses stand for
    return run


def cases(ctx: Context) -> Iterator[Group]:
    if native.hot is not None:
        mask = torch.arange(32) % 3 > 0
        compiled = in_c(mask)
        if compiled() != int(mask.sum()):
            raise RuntimeError(f"{CALLS} calls in C found {compiled()} survivors, expected {int(mask.sum())}")
        yield Group("compact", f"32, {CALLS} calls in C", "bool", [Case("fastee", compiled, [()], note="fastee_compact from a compiled loop")], baseline="fastee",
                    bytes=9 * 32 * CALLS, working_set=9 * 32, bars=(f"<= {CALLS * 60 // 1000} us",))  # 60 ns a call  # fmt: skip
    for B in {"headline": (32,), "small": (1, 32, 256, 4096, 65_536)}.get(ctx.shapes, (1, 4, 32, 64, 256, 1024, 4096, 65_536, 70_000)):
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
            bytes=9 * B, working_set=36 * B, bars=(">= 1x torch", *(("<= 20 us",) if B == 65_536 else ())),
        )  # fmt: skip

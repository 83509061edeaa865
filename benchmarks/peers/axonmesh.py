"""axonmesh: splits one network between an edge and a server. Its int8 wire, its cut and its confidence policy."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator

import numpy as np
import torch

import fastee
from fastee.planning import Replanner
from fastee.testing.bench import Case, Context, Group

from ..bench_planner import CODECS, CUTS, two_nodes
from ..bench_scheduler import SIZES, _asks, _scheduler
from . import Peer

PEER = Peer("0.9.0", "Apache-2.0", (("--no-deps", "axonmesh==0.9.0", "psutil==7.2.2"),))
KILOBYTES = (64, 256, 784)


def load():
    """Return (policy, planner, protocol) of axonmesh past its ``__init__``, which imports OpenCV and an AGPL package not needed here."""
    if "axonmesh" not in sys.modules:
        package = types.ModuleType("axonmesh")
        package.__path__ = list(importlib.util.find_spec("axonmesh").submodule_search_locations)
        sys.modules["axonmesh"] = package
    from axonmesh import planner, policy, protocol

    return policy, planner, protocol


def wire(ctx: Context) -> Iterator[Group]:
    _, _, protocol = load()
    for kilobytes in KILOBYTES[: 1 if ctx.shapes == "headline" else None]:
        n = kilobytes * 256
        base = torch.randn(1, n // 256, 16, 16, generator=torch.Generator().manual_seed(ctx.seed))
        inputs = ctx.rotate(lambda i, x=base: (x + 0.01 * i,), 4 * n)
        ours, theirs = (
            [(fastee.ops.quantize_rows(x),) for (x,) in inputs],
            [(protocol.pack_tensors({0: x}, compress=False),) for (x,) in inputs],
        )
        step = float(base.max() - base.min()) / 255
        if (protocol.unpack_tensors(*theirs[0])[0] - base).abs().max() > step or (
            fastee.ops.dequantize_rows(*ours[0]) - base
        ).abs().max() > step:
            raise RuntimeError(f"{kilobytes} KB: an element comes back more than one of {step:.4f} off")
        copy = Case("copy", torch.clone, inputs, note="torch.clone of x", bytes=8 * n)
        yield Group(
            "quantize_rows",
            f"{kilobytes} KB",
            "fp32->int8",
            [
                Case("fastee", fastee.ops.quantize_rows, inputs, note="one scale per row", ratio=ours[0][0].nbytes / (4 * n)),
                Case(
                    "axonmesh",
                    lambda x: protocol.pack_tensors({0: x}, compress=False),
                    inputs,
                    note="pack_tensors, one scale, no zlib",
                    ratio=len(theirs[0][0]) / (4 * n),
                ),
                copy,
            ],
            baseline="axonmesh",
            bytes=5 * n,
            roof="copy",
            working_set=20 * n,
            bars=(">= 1x axonmesh", ">= 0.5x copy"),
        )
        yield Group(
            "dequantize_rows",
            f"{kilobytes} KB",
            "int8->fp32",
            [
                Case("fastee", fastee.ops.dequantize_rows, ours),
                Case("axonmesh", protocol.unpack_tensors, theirs, note="unpack_tensors"),
                copy,
            ],
            baseline="axonmesh",
            bytes=5 * n,
            roof="copy",
            working_set=20 * n,
            bars=(">= 1x axonmesh", ">= 0.5x copy"),
        )


def cut(ctx: Context) -> Iterator[Group]:
    _, planner, _ = load()
    prof = two_nodes(ctx.seed)
    options = [planner.CutOption(k, (k,), int(prof.wire_bytes[k, 0]), (k + 1) / CUTS) for k in range(CUTS)]
    rates = [(float(b),) for b in 10.0 ** np.random.default_rng(ctx.seed).uniform(5, 8.5, 257)]
    ours = Replanner(prof)

    def replan(rate):
        ours.set_link(0, 1, rate, 2e-3)
        return ours.replan()

    yield Group(
        "replan",
        f"{CUTS} cuts, 2 nodes",
        "latency",
        [
            Case("fastee", replan, rates, note=f"least latency over cuts and {CODECS} codecs; the link moves before every call"),
            Case(
                "axonmesh",
                lambda rate: planner.plan_cut(options, planner.budget_bytes_per_frame(rate / 1e6, 30)),
                rates,
                note="plan_cut: least edge share within a budget of bytes",
            ),
        ],
        baseline="axonmesh",
        per_call=True,
        bars=(">= 1x axonmesh",),
    )


def decide(ctx: Context) -> Iterator[Group]:
    policy, _, _ = load()
    size = SIZES[0]
    sched = _scheduler(*size, True, ctx.seed)
    asks = _asks(sched, 257, ctx.seed)
    yield Group(
        "decide",
        "x".join(map(str, size)),
        "one row",
        [
            Case("fastee", sched.decide, asks, note="exits x nodes x codecs under a deadline"),
            Case(
                "axonmesh",
                policy.AdaptivePolicy().decide_confidence,
                [(score,) for _, _, score, _ in asks],
                note="two thresholds and a moving average",
            ),
        ],
        baseline="axonmesh",
        bars=(">= 1x axonmesh",),
    )


CASES = {"quantize": wire, "planner": cut, "scheduler": decide}

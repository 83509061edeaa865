"""A batch of 24 rows on mobile, edge and cloud: the scheduler beside all here, send the input and data parallel, by the same client; exits on and off.

Times are of whole batches; the note says the rows' median and the bytes on links.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import fastee
from fastee.cluster.modes import MODES, run_mode, summary
from fastee.testing.bench import Case, Context, Group

from .fault_net import LINKS, SLOWDOWN, inputs, network

ROWS = 24


def cases(ctx: Context) -> Iterator[Group]:
    torch.set_num_threads(1)
    names, net, x, rounds = list(SLOWDOWN), network(), inputs(ROWS), 3 if ctx.quick else 8
    links = {(names.index(a), names.index(b)): speed for pair, speed in LINKS.items() for a, b in (pair, pair[::-1])}
    with fastee.local_cluster(net, nodes=3, names=names, link=links, slowdown=list(SLOWDOWN.values()), example=x[:1], codec="raw", credit=ROWS) as cluster:
        for exits in (True, False):
            times, told = {mode: [] for mode in MODES}, {}
            for turn in range(rounds + 1):
                for mode in MODES:
                    out = run_mode(cluster, x, mode, exits=exits)
                    if any(out.errors):
                        raise next(e for e in out.errors if e)
                    told[mode] = summary(out)
                    if turn:
                        times[mode].append(told[mode]["seconds"] * 1e9)
            made = [
                Case("fastee" if mode == "scheduled" else mode, None, times=times[mode], note=f"rows' p50 {told[mode]['p50'] * 1e3:.0f} ms, {told[mode]['bytes'] / 1e3:.0f} KB on links; slow-down {tuple(SLOWDOWN.values())}")
                for mode in MODES
            ]
            yield Group("modes", f"{ROWS} rows, exits {'on' if exits else 'off'}", "fp32", made, baseline="here", per_call=True,
                        bars=(">= 1x here", ">= 1x send_input", ">= 1x data_parallel"))  # fmt: skip

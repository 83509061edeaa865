"""Pipeline and joint planners from Python: a plan from scratch, a re-plan after a link moved, beside a plain Python recursion."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastee.planning import Replanner, plan
from fastee.planning.problem import core, question
from fastee.scheduling import Profile
from fastee.testing.bench import Case, Context, Group

SIZES = ((100, 20, 4), (10, 3, 2))  # segments x nodes x codecs
CUTS, EXITS, CODECS = 50, 8, 4


def world(seed: int, segments: int, nodes: int, codecs: int) -> Profile:
    rng = np.random.default_rng(seed)
    mean = rng.uniform(1e-3, 4e-3, (segments, 1, 1)) * 10.0 ** rng.uniform(-1, 1, (1, nodes, 1))
    return Profile(
        nodes=[f"n{i}" for i in range(nodes)], batch_sizes=(1,), mean=mean, spread=0.1 * mean, codecs=[f"c{i}" for i in range(codecs)],
        wire_bytes=10.0 ** rng.uniform(2.5, 5.5, (segments, 1)) * np.linspace(1.0, 0.2, codecs), codec_seconds=np.linspace(0, 2e-4, codecs) * np.ones((segments, 1)),
        bandwidth=10.0 ** rng.uniform(6.5, 9, (nodes, nodes)), delay=rng.uniform(1e-4, 5e-3, (nodes, nodes)),
    )  # fmt: skip


def two_nodes(seed: int) -> Profile:
    """A device and a machine eight times as fast; carries shrink along the network, so that the best cut moves with the link."""
    rng = np.random.default_rng(seed)
    mean = rng.uniform(1e-4, 4e-4, (CUTS + 1, 1, 1)) * np.array([8.0, 1.0])[None, :, None]
    wire = np.geomspace(3e5, 2e3, CUTS + 1)[:, None] * rng.uniform(0.5, 2, (CUTS + 1, 1))
    return Profile(
        nodes=("device", "server"), batch_sizes=(1,), mean=mean, spread=0.1 * mean, codecs=[f"c{i}" for i in range(CODECS)],
        wire_bytes=wire * np.linspace(1.0, 0.2, CODECS), codec_seconds=wire * np.linspace(0, 2e-9, CODECS), bandwidth=[[0, 2e7], [2e7, 0]],
        delay=[[0, 2e-3], [2e-3, 0]],
    )  # fmt: skip


def problem(prof: Profile, objective: str = "latency", **options) -> dict:
    fields = dict(weights=None, source=0, batch=1, quantile=None, exit_probability=None, exit_loss=None, head_seconds=None, segment_memory=None, answer_bytes=64)
    return question(prof, None, None, objective=objective, choose_exits=True, **{**fields, **options}).numbers


def recursion(n: dict) -> float:
    """The same shortest path in plain Python."""
    nodes, source = range(n["nodes"]), n["source"]
    bandwidth, delay, run, wire, packing = (n[k].tolist() for k in ("bandwidth", "delay", "run", "wire_bytes", "codec_seconds"))
    value = [0.0 if p == source else delay[p][source] + 8 * n["answer_bytes"] / bandwidth[p][source] for p in nodes]
    for s in range(n["segments"] - 1, -1, -1):
        there = [run[s][p] + value[p] for p in nodes]
        value = [min(there[p] + (0.0 if p == a else delay[a][p] + min(8 * b / bandwidth[a][p] + t for b, t in zip(wire[s], packing[s], strict=True)))
                     for p in nodes) for a in nodes]  # fmt: skip
    return value[source]


def cut_scan(n: dict):
    """One cut between two nodes, every exit left on: the scan that edge/cloud splitters do, in plain Python, for a given link."""
    run, leave = n["run"].tolist(), n["leave"].tolist()
    wire, packing, segments = n["wire_bytes"].tolist(), n["codec_seconds"].tolist(), n["segments"]
    reach = [1.0]
    for share in leave:
        reach.append(reach[-1] * (1 - share))
    here, there = [0.0], [0.0]
    for s in range(segments):
        here.append(here[-1] + reach[s] * run[s][0])
        there.append(there[-1] + reach[s] * run[s][1])
    home = 8 * n["answer_bytes"] / n["bandwidth"][1][0] + n["delay"][1][0]

    def scan(bandwidth: float, delay: float) -> float:
        best = here[-1]
        for s in range(segments):
            move = min(8 * b / bandwidth + t for b, t in zip(wire[s], packing[s], strict=True)) + delay + home
            best = min(best, here[s] + reach[s] * move + there[-1] - there[s])
        return best

    return scan


def cases(ctx: Context) -> Iterator[Group]:
    for size in SIZES:
        name = "x".join(map(str, size))
        n = problem(world(ctx.seed, *size))
        table = core("bench").Pipeline(n)
        if abs(table.solve()["value"] / recursion(n) - 1) > 1e-9:
            raise RuntimeError(f"{name}: planner and plain recursion disagree")
        yield Group("pipeline", name, "latency", [Case("fastee", table.solve, note="segments x nodes x codecs, tables prepared"), Case("python", lambda n=n: recursion(n))],
                    baseline="python", bars=("<= 2 ms",) if size[1] == 20 else ())  # fmt: skip
        prof = world(ctx.seed, *size)
        yield Group("plan", name, "latency", [Case("fastee", lambda prof=prof: plan(prof), note="checks, alternatives and the Plan object included")], baseline="fastee")

    prof = two_nodes(ctx.seed)
    leave = np.zeros(CUTS)
    leave[np.linspace(2, CUTS - 2, EXITS).astype(int)] = 0.2
    rng = np.random.default_rng(ctx.seed)
    links = [(float(b), 0.002) for b in 10.0 ** rng.uniform(5, 8.5, 257)]
    replanner = Replanner(prof, exit_probability=leave, head_seconds=np.full(CUTS, 5e-5), hysteresis=0.1)

    def replan(bandwidth, delay):
        replanner.set_link(0, 1, bandwidth, delay)
        return replanner.replan()

    seen = set()
    for link in links:
        replan(*link)
        seen.add(tuple(replanner.place))
    scan = cut_scan(problem(prof, exit_probability=leave))
    yield Group("replan", f"{EXITS} exits x {CUTS} cuts x {CODECS} codecs, 2 nodes", "latency", [
        Case("fastee", replan, links, note=f"the link moves before every call, {len(seen)} different placements among them"),
        Case("cut_scan", scan, links, note="plain Python, one cut, no choice of exits"),
    ], baseline="cut_scan", per_call=True, bars=("<= 5 us", "p99 <= 5 us"))  # fmt: skip

    for size in ((20, 6, 2),) if ctx.shapes == "headline" else ((20, 6, 2), (50, 10, 2)):
        table = core("bench").Pipeline(problem(world(ctx.seed, *size), "throughput"))
        found = table.solve()
        gap = "optimum" if found["exact"] else f"within {found['value'] / found['bound'] * 100 - 100:.1f} % of the bound"
        yield Group("pipeline", "x".join(map(str, size)), "throughput", [Case("fastee", table.solve, note=f"{gap}, {found['states']} partial plans")], baseline="fastee")

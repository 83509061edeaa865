"""DistrEdge (IPDPS 2022, arXiv 2202.01699): rows of a CNN split over unequal devices by a learned splitter, against seven ways to split.

Seconds are those of the latency model of `docs/spatial.md` with its synthetic devices, without contention: no board was measured, and
Jetson latencies are not testable here. OSDS is judged as trained, without the baselines that a plan of fastee is compared with; `search`
gets no plan of OSDS. DeeperThings and AOFL get the volumes of LC-PSS. Seeds change the vectors of LC-PSS, the agents and the search.

Verdict rule: *reproduced* when in the mean over seeds OSDS is at least as fast as the best of the seven baselines in every group at every
rate, and at least 1.1 times as fast in the median over the heterogeneous groups; *direction only* when only the median holds.
"""

from __future__ import annotations

import math
import os
import statistics
from pathlib import Path

from benchmarks.bench_spatial import GROUPS, RATES, osds
from benchmarks.papers.common import Row
from fastee.planning.spatial import BASELINES, NETS, SpatialPlanner

TITLE = "DistrEdge: a learned split of rows over unequal devices"
PUBLISHED = "1.1x to 3x faster than the state of the art (Jetson boards)"
COST = "latency % of the best baseline (geometric mean over the groups; `point`: Mbit/s)"
SEEDS = 3
NETWORKS = {"VGG-16": "vgg16", "ResNet-50": "resnet50"}
EPISODES, QUICK = 4000, 100
OSDS, OURS = "OSDS (reconstructed)", "fastee: search"


def run(seed: int, quick: bool, console) -> list[Row]:
    return [row for shown in NETWORKS for row in network(shown, seed, quick, console)]


def network(shown: str, seed: int, quick: bool, console) -> list[Row]:
    """One network at every rate; agents go on from FASTEE_BENCH_OSDS_AGENTS as in `bench_spatial`, VGG-16's of seed 0 are the same ones."""
    net, kept = NETS[NETWORKS[shown]](), os.environ.get("FASTEE_BENCH_OSDS_AGENTS")
    mark = "" if (shown, seed) == ("VGG-16", 0) else f"{NETWORKS[shown]}-{seed}-"
    rows = []
    for rate in RATES:
        seconds: dict[str, dict[str, float]] = {name: {} for name in (*BASELINES, OSDS, OURS)}
        for group, devices in GROUPS.items():
            planner = SpatialPlanner(net, devices, rate, seed=seed)
            for name in BASELINES:
                seconds[name][group] = planner.baseline(name).latency
            saved = Path(kept) / f"{mark}{group.replace(' ', '_')}-{rate / 1e6:.0f}.pt" if kept and not quick else None
            seconds[OSDS][group] = osds(planner, QUICK if quick else EPISODES, saved, seed).best_latency
            seconds[OURS][group] = planner.plan("search", seed=seed).latency
            times = f"{seconds[OSDS][group]:.4f} s by OSDS, {seconds[OURS][group]:.4f} s by ours"
            console.print(f"distredge {shown} seed {seed}, {group} at {rate / 1e6:.0f} Mbit/s: {times}")
        best = {group: min(seconds[name][group] for name in BASELINES) for group in GROUPS}
        for name, found in seconds.items():
            cost = math.exp(statistics.fmean(math.log(found[g] / best[g]) for g in GROUPS))
            provenance = {OSDS: "reconstructed", OURS: "ours"}.get(name, "baseline")
            rows.append(Row("distredge", f"{'quick' if quick else 'full'}, {shown}", seed, name, provenance, None, cost, rate / 1e6, found))
    return rows


def ratios(rows: list[Row], method: str) -> dict[tuple[str, float], float]:
    """Return how many times as fast as the best baseline a method is, in the mean over seeds, per (group, Mbit/s)."""
    found: dict[tuple[str, float], list[float]] = {}
    for r in rows:
        if r.method == method:
            rest = [o.extra for o in rows if o.method in BASELINES and (o.seed, o.point) == (r.seed, r.point)]
            for group, seconds in r.extra.items():
                found.setdefault((group, r.point), []).append(min(o[group] for o in rest) / seconds)
    return {k: statistics.fmean(v) for k, v in found.items()}


def verdict(rows: list[Row]) -> tuple[str, str]:
    """Return (verdict, what it rests on)."""
    said, holds = [], {}
    for method in (OSDS, OURS):
        found = ratios(rows, method)
        middle = statistics.median(v for (group, _), v in found.items() if len(set(GROUPS[group])) > 1)
        holds[method] = min(found.values()) >= 1.0, middle >= 1.1
        (group, rate), worst = min(found.items(), key=lambda item: item[1])
        said.append(f"{method}: {worst:.2f}x to {max(found.values()):.2f}x the speed of the best baseline, median {middle:.2f}x over the "
                    f"heterogeneous groups, least with {group} at {rate:g} Mbit/s")  # fmt: skip
    theirs = {(r.seed, r.point): r.extra for r in rows if r.method == OSDS}
    lost = sum(s > theirs[r.seed, r.point][g] for r in rows if r.method == OURS for g, s in r.extra.items())
    said.append(f"ours slower than OSDS in {lost} of {sum(len(e) for e in theirs.values())} runs")
    episodes = QUICK if rows[0].size.startswith("quick") else EPISODES
    said.append(f"OSDS has {episodes:,} of its {EPISODES:,} episodes; all seconds are those of a latency model, no board was measured")
    every, median = holds[OSDS]
    return "reproduced" if every and median else "direction only" if median else "not reproduced", "; ".join(said)

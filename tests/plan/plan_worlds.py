"""Seeded small planning worlds, and their answers by brute force: every placement, every codec, every set of exits, in plain Python."""

from __future__ import annotations

import itertools
import math

import numpy as np

from fastee.planning import ClusterSpec, NodeSpec
from fastee.scheduling import Profile

INF = math.inf


def profile_of(run, wire, bandwidth, delay, codec_seconds=None, nodes=None, spread=None, fingerprint="world") -> Profile:
    run, wire = np.array(run, dtype=float), np.array(wire, dtype=float)
    return Profile(
        nodes=nodes or [f"n{i}" for i in range(run.shape[1])], batch_sizes=(1,), mean=run[:, :, None],
        spread=np.zeros((*run.shape, 1)) if spread is None else np.array(spread, dtype=float)[:, :, None],
        codecs=[f"c{i}" for i in range(wire.shape[1])], wire_bytes=wire,
        codec_seconds=np.zeros(wire.shape) if codec_seconds is None else codec_seconds, bandwidth=bandwidth, delay=delay, fingerprint=fingerprint,
    )  # fmt: skip


def random_world(seed: int, segments: int, nodes: int, codecs: int, limits: bool = False) -> dict:
    """Arguments of `fastee.plan`: random speeds, links that may be missing, hosts, prices, exits; with `limits` memory that binds."""
    rng = np.random.default_rng(seed)
    run = 10.0 ** rng.uniform(-3.5, -1.5, (segments, 1)) * 10.0 ** rng.uniform(-0.7, 0.7, (1, nodes)) * rng.uniform(0.7, 1.4, (segments, nodes))
    bandwidth = 10.0 ** rng.uniform(5.5, 8, (nodes, nodes)) * (rng.random((nodes, nodes)) < 0.85)
    prof = profile_of(run, 10.0 ** rng.uniform(2, 5, (segments, codecs)), bandwidth, rng.uniform(0, 0.01, (nodes, nodes)), rng.uniform(0, 1e-3, (segments, codecs)))
    memory = rng.integers(1, 9, segments).astype(float)
    spec = []
    for n in range(nodes):
        hosts = [s for s in range(segments) if rng.random() < 0.85] if limits and n else None
        room = float(rng.integers(4, 3 + int(memory.sum()))) if limits and rng.random() < 0.8 else None
        spec.append(NodeSpec(f"n{n}", memory=room, price=float(rng.uniform(0, 2)), watts=float(rng.uniform(0, 5)), hosts=hosts, speed=float(rng.uniform(0.5, 2))))
    exits = segments - 1
    leave = np.where(rng.random(exits) < 0.7, rng.uniform(0, 0.9, exits), 0.0)
    return dict(
        prof=prof, cluster=ClusterSpec(spec), exit_probability=leave, exit_loss=rng.uniform(0, 0.1, exits), segment_memory=memory,
        head_seconds=run[:-1].min(axis=1) * rng.uniform(0, 0.6, exits), weights={"seconds": 0.3, "money": 1.0, "energy": 0.1, "bytes": 1e-6},
        source=int(rng.integers(nodes)), answer_bytes=200,
    )  # fmt: skip


def walk(n: dict, place, codec, on) -> dict:
    """What a plan does, summed step by step with explicit probabilities; impossible steps make it infinite."""
    segments, home = n["segments"], n["source"]
    seconds = cost = drop = 0.0
    nodes, links, answers = {}, {}, {}
    inside, at = 1.0, home

    def link(a, b, amount, packing):
        if n["bandwidth"][a][b] <= 0:
            return INF, INF
        wire = amount * 8.0 / n["bandwidth"][a][b] + packing
        return wire, wire + n["delay"][a][b]

    for s in range(segments):
        p = place[s]
        if p != at:
            wire, total = link(at, p, n["wire_bytes"][s][codec[s]], n["codec_seconds"][s][codec[s]])
            if inside > 0:
                seconds += inside * total
                cost += inside * (n["second_price"] * total + n["price"][at] * n["codec_seconds"][s][codec[s]] + n["byte_price"] * n["wire_bytes"][s][codec[s]])
                links[at, p] = links.get((at, p), 0.0) + inside * wire
        work = n["run"][s][p] + (n["head"][s][p] if s < segments - 1 and on[s] else 0.0)
        if math.isinf(work):
            return dict(latency=INF, cost=INF, throughput=INF, drop=drop)
        seconds += inside * work
        cost += inside * (n["second_price"] + n["price"][p]) * work
        nodes[p] = nodes.get(p, 0.0) + inside * work
        share = 1.0 if s == segments - 1 else n["leave"][s] if on[s] else 0.0
        if share * inside > 0 and p != home:
            wire, total = link(p, home, n["answer_bytes"], 0.0)
            seconds += inside * share * total
            cost += inside * share * (n["second_price"] * total + n["byte_price"] * n["answer_bytes"])
            answers[p] = answers.get(p, 0.0) + inside * share * wire
        if s < segments - 1 and on[s]:
            drop += inside * share * n["loss"][s]
            inside *= 1.0 - share
        at = p
    return dict(latency=seconds, cost=cost, throughput=max([*nodes.values(), *links.values(), *answers.values()]), drop=drop)


def contiguous(place) -> bool:
    stretches = [node for node, _ in itertools.groupby(place)]
    return len(set(stretches)) == len(stretches)


def brute_force(n: dict, objective: str) -> float:
    """The least objective over every legal plan, +inf when there is none."""
    segments, nodes = n["segments"], n["nodes"]
    usable = [k for k in range(segments - 1) if n["leave"][k] > 0]
    best = INF
    for place in itertools.product(range(nodes), repeat=segments):
        if objective == "throughput" and not contiguous(place):
            continue
        used = [sum(n["memory"][s] for s in range(segments) if place[s] == p) for p in range(nodes)]
        if any(u > r for u, r in zip(used, n["room"], strict=True)):
            continue
        moves = [s for s in range(segments) if place[s] != (place[s - 1] if s else n["source"])]
        for chosen in itertools.product(range(n["codecs"]), repeat=len(moves)):
            codec = [-1] * segments
            for s, c in zip(moves, chosen, strict=True):
                codec[s] = c
            for flags in itertools.product((False, True), repeat=len(usable)) if n["choose_exits"] else [(True,) * len(usable)]:
                on = [False] * (segments - 1)
                for k, flag in zip(usable, flags, strict=True):
                    on[k] = flag
                got = walk(n, place, codec, on)
                if got["drop"] <= n["max_drop"] and got["latency"] <= n["deadline"]:
                    best = min(best, got[objective])
    return best

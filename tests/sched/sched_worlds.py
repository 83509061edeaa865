"""Seeded random worlds for the scheduler: a profile, a promise, and a stream of events that both cores must answer alike."""

from __future__ import annotations

import math

import numpy as np

from fastee.scheduling import Costs, Profile, QoS, Scheduler


def small_profile(**changes) -> Profile:
    """Three segments (2 exits) on a slow "mobile" and a fast "cloud", 10 ms apart at 20 Mbit/s; segments take 4 ms and 0.4 ms."""
    fields = dict(
        nodes=("mobile", "cloud"), batch_sizes=(1, 8), mean=[[[4e-3, 8e-3], [4e-4, 8e-4]]] * 3, spread=np.zeros((3, 2, 2)),
        codecs=("raw", "int8"), wire_bytes=[[3136, 788], [16384, 4100], [8192, 2052]], codec_seconds=[[0, 2e-5]] * 3,
        bandwidth=[[0, 20e6], [20e6, 0]], delay=[[0, 0.01], [0.01, 0]], fingerprint="small",
    )  # fmt: skip
    return Profile(**{**fields, **changes})


def local_profile(segments: int = 3, seconds: float = 1e-3, **changes) -> Profile:
    """One node."""
    shape = (segments, 1, 1)
    fields = dict(nodes=("here",), batch_sizes=(1,), mean=np.full(shape, seconds), spread=np.zeros(shape), codecs=("raw",),
                  wire_bytes=np.full((segments, 1), 100.0), codec_seconds=np.zeros((segments, 1)), bandwidth=[[0]], delay=[[0]])
    return Profile(**{**fields, **changes})


def random_profile(rng: np.random.Generator, alike: bool = False) -> Profile:
    """`alike`: nodes and links of nearly one speed, so that what was sent last decides where to go, and one batch size, 64."""
    s, n, nc = rng.integers(1, 7), rng.integers(1, 6), rng.integers(1, 4)
    sizes = [64] if alike else sorted(set(rng.integers(1, 40, rng.integers(1, 4)).tolist()))
    speed = 10.0 ** rng.uniform(-1, 1, (1, n, 1)) if not alike else rng.uniform(0.9, 1.1, (1, n, 1))
    mean = 10.0 ** rng.uniform(-4.5, -2.5, (s, 1, 1)) * speed * np.linspace(1, 4, len(sizes))
    mean[rng.random(mean.shape) < 0.03] = 0.0
    bandwidth = 10.0 ** (rng.uniform(7, 7.1, (n, n)) if alike else rng.uniform(5, 9, (n, n))) * (rng.random((n, n)) < 0.85)
    return Profile(
        nodes=[f"n{i}" for i in range(n)], batch_sizes=sizes, mean=mean, spread=mean * rng.uniform(0, 0.5, mean.shape),
        codecs=[f"c{i}" for i in range(nc)], wire_bytes=10.0 ** rng.uniform(1, 5.5, (s, nc)), codec_seconds=rng.uniform(0, 1e-3, (s, nc)),
        bandwidth=bandwidth, delay=rng.uniform(0, 0.02, (n, n)) * (rng.random((n, n)) < 0.8),
        gain=rng.normal(0.02, 0.05, (s - 1, rng.integers(1, 9))) if s > 1 and rng.random() < 0.5 else None,
        gain_range=(0.0, 1.0) if rng.random() < 0.7 else (-2.5, 0.0),
    )  # fmt: skip


def random_params(policy: str, rng: np.random.Generator, nodes: int, exits: int) -> dict:
    """Numbers for one policy, drawn wide enough that every branch of its rule is taken."""
    yes = lambda: bool(rng.random() < 0.5)
    if policy == "patience":
        return {"patience": int(rng.integers(1, 4))}
    if policy == "distree":
        return {"delta": [float(d) for d in rng.choice([0.0, 0.3, 0.6, math.inf], exits)], "students": yes()}
    if policy == "mdi_exit":
        mu_min, mu_max = float(rng.choice([1e-4, 5e-3])), float(rng.choice([0.02, 10.0]))
        return {"adapt": str(rng.choice(["none", "rate", "threshold"])), "raw_offload": yes(), "t_o": int(rng.integers(0, 4)),
                "t_q1": int(rng.integers(0, 2)), "t_q2": int(rng.integers(2, 5)), "q_max": int(rng.choice([4, 1000])), "takeover": int(rng.integers(1, 4)),
                "period": float(10.0 ** rng.uniform(-3, -1)), "mu": float(rng.uniform(mu_min, mu_max)), "mu_min": mu_min, "mu_max": mu_max,
                "weight": float(rng.uniform(0.1, 1.0)), "report_age": float(rng.choice([1.0, 50.0]))}  # fmt: skip
    if policy == "dimee":
        first = int(rng.integers(0, exits - 1))
        return {"alpha": float(rng.choice([0.5, 0.75, 1.1])), "tiers": rng.integers(0, nodes, 3).tolist(), "cuts": [first, int(rng.integers(first + 1, exits))]}
    if policy == "splitee":
        return {"alpha": float(rng.choice([0.3, 0.75])), "cloud": int(rng.integers(-1, nodes)), "side_information": yes(), "explore": float(rng.uniform(0, 2)),
                "offload_cost": float(rng.uniform(0, 0.6)), "layer_cost": float(rng.uniform(0, 0.2))}
    if policy == "daisy":
        return {"mode": str(rng.choice(["eval", "train"])), "range": str(rng.choice(["avg", "min_max", "threshold"])), "u_threshold": float(rng.uniform(0, 1)),
                "inf_threshold": float(rng.uniform(0, 0.5)), "counts": [1, *rng.integers(0, 20, exits).tolist()], "batch_mode": str(rng.choice(["per_sample", "all"]))}
    return {}


def random_arguments(rng: np.random.Generator, policy: str | None = None, alike: bool = False) -> dict:
    policy = policy or str(rng.choice(["deadline", "threshold"]))
    prof = random_profile(rng, alike)
    while policy == "dimee" and prof.num_exits < 2:
        prof = random_profile(rng, alike)
    s, n = prof.num_segments, len(prof.nodes)
    some = lambda: rng.uniform(0, 2, n) * (rng.random(n) < 0.7)
    cost_weight = float(rng.choice([0.0, 0.5, 10.0]))
    priced = cost_weight > 0 and rng.random() < 0.5
    hosts = rng.random((s, n)) < 0.8
    hosts[np.arange(s), rng.integers(0, n, s)] = True
    which = rng.integers(0, 3, n)
    return dict(
        profile=prof, policy=policy, params=random_params(policy, rng, n, s - 1), seed=int(rng.integers(0, 1 << 62)), node=int(rng.integers(n)), home=int(rng.integers(n)),
        thresholds=[float(t) for t in rng.choice([0.0, 0.3, 0.7, 0.9, math.inf, -0.4], s - 1)], hosts=hosts if rng.random() < 0.5 else None,
        media=[np.flatnonzero(which == m).tolist() for m in set(which.tolist())] if rng.random() < 0.5 else (), max_tasks=int(rng.integers(1, 40)), answer_bytes=int(rng.integers(0, 5000)),
        qos=QoS(deadline=None if rng.random() < 0.1 else float(10.0 ** rng.uniform(-3.5, -0.5)), hit_rate=float(rng.uniform(0.5, 0.999)),
                max_drop=None if rng.random() < 0.5 else float(rng.uniform(0, 0.1)), cost_weight=cost_weight,
                energy_weight=float(rng.uniform(0, 1)), money_weight=float(rng.uniform(0, 1)), weight=float(rng.choice([1.0, 0.2, 3.0]))),
        tenants=[QoS(deadline=float(10.0 ** rng.uniform(-3, -1)), hit_rate=float(rng.uniform(0.5, 0.999)), weight=float(rng.uniform(0, 2)))
                 for _ in range(rng.integers(0, 3))],
        costs=Costs(watts=some(), joules_per_byte=some() * 1e-6, price_per_second=some(), price_per_byte=some() * 1e-6) if priced else None,
    )  # fmt: skip


def play(sched: Scheduler, rng: np.random.Generator, events: int) -> list:
    """Drive one scheduler; every answer lands in the log, and the log steers nothing, so equal seeds give equal questions."""
    prof, log, handles, now = sched.profile, [], [0, -1, 1 << 40], 0
    k, n = prof.num_exits, len(prof.nodes)
    pick = lambda: int(handles[rng.integers(len(handles))])
    edges = [0.3, 0.7, 0.9, -0.4, float(np.float32(0.7)), math.nan, math.inf, -math.inf]  # thresholds, and what is no score
    score = lambda: float(rng.choice(edges)) if rng.random() < 0.2 else float(rng.uniform(-1, 1) if rng.random() < 0.2 else rng.random())
    sample = lambda: {"gate": score(), "delta": float(rng.choice([0.1, 0.5, math.inf, math.nan])), "label": int(rng.integers(-1, 3)), "pool": int(rng.integers(-1, 4)),
                      "max_prob": score(), "margin": score(), "entropy": score(), "lse": score()}  # fmt: skip
    for _ in range(events):
        if rng.random() < 0.7:  # else at the same moment as the event before
            now += int(rng.integers(0, 2_000_000)) if rng.random() < 0.95 else -int(rng.integers(0, 5_000_000))
        kind = rng.random()
        if kind < 0.25:
            deadline = None if rng.random() < 0.7 else now + int(rng.integers(-1_000_000, 50_000_000))
            handles.append(sched.admit(now, deadline, int(rng.integers(0, k + 1)) if rng.random() < 0.3 else 0, int(rng.integers(0, len(sched.tenants) + 1))))
            log.append(handles[-1])
            del handles[:-30]
        elif kind < 0.60:
            d = sched.decide(pick(), int(rng.integers(-1, k + 1)), score(), now, **(sample() if rng.random() < 0.7 else {}))
            log.append((d.action, d.node, d.codec, d.forced, d.until, d.code))
        elif kind < 0.70:
            rows = int(rng.integers(0, 12))
            tasks = [pick() for _ in range(rows)]
            exit, scores, samples = int(rng.integers(-1, k + 1)), [score() for _ in range(rows)], [sample() for _ in range(rows)]
            extra = {name: [x[name] for x in samples] for name in samples[0]} if rows and rng.random() < 0.5 else None
            log.append(sched.decide_batch(tasks, exit, scores, now, extra).tolist())
        elif kind < 0.82:
            s, p = int(rng.integers(k + 1)), int(rng.integers(n))
            rows = int(rng.integers(1, 60))
            usual = max(float(prof.mean[s, p, 0]), 1e-6) * 1e9
            sched.observe(s, p, rows, max(1, int(usual * 10.0 ** rng.normal(0, 0.3))))
        elif kind < 0.90:
            a, b = (int(v) for v in rng.integers(0, n, 2))
            nbytes = int(10.0 ** rng.uniform(0, 6))
            usual = nbytes * 8e9 / max(float(prof.bandwidth[a, b]), 1e5) + float(prof.delay[a, b]) * 1e9
            when = (now,) if rng.random() < 0.6 else (None,) if rng.random() < 0.5 else ()
            sched.observe_link(sched.node if when else a, b, nbytes, max(1, int(usual * 10.0 ** rng.normal(0, 0.2))), *when)
        elif kind < 0.94:
            sched.observe_queue(int(rng.integers(n)), int(rng.integers(0, 6)), int(rng.integers(0, 3)))
            sched.set_idle(bool(rng.random() < 0.5))
        elif kind < 0.96:
            sched.set_node_up(int(rng.integers(n)), bool(rng.random() < 0.6))
        elif kind < 0.97:
            sched.set_link_up(int(rng.integers(n)), int(rng.integers(n)), bool(rng.random() < 0.6))
        elif kind < 0.98:
            log.append(sched.rebatch(int(rng.integers(k + 1)), int(rng.integers(1, 40)), int(rng.integers(1, 40)), int(rng.integers(0, 10**6))))
        else:
            log.append(sched.finish(pick(), float(rng.random()) if rng.random() < 0.5 else math.nan))
        if rng.random() < 0.5:
            for _ in range(int(rng.integers(1, 6))):
                found = sched.poll(now)
                log.append(found and (found[0], found[1].code, found[1].until))
                if found is None:
                    break
        if rng.random() < 0.3:
            log.append((sched.next_tick(), sched.admit_interval()))
            if now >= sched.next_tick():
                sched.tick(now)
    return log

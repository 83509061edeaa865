"""Seeded random worlds for the simulator: machines, links of every kind, faults, bursts, in short specs."""

from __future__ import annotations

import numpy as np

from fastee.scheduling import POLICIES
from fastee.simulation import Spec

DRIVEN = [name for name in ("deadline", "threshold", "mdi_exit", "patience", "distree", "dimee", "splitee", "jei_gate", "daisy") if name in POLICIES]


def three_tiers(**changes) -> Spec:
    """A slow mobile behind 20 Mbit/s, an edge, a cloud; 60 tasks a second for the mobile, 100 ms each."""
    fields = dict(
        network={"seconds": [0.004] * 3, "spread": 0.1, "wire_bytes": [[3136, 788], [16384, 4100], [8192, 2052]], "codecs": ["raw", "int8"],
                 "batch_sizes": [1, 8], "batch_cost": [1.0, 3.0]},
        machines=[{"name": "mobile", "slowdown": 4.0, "price": 0.1}, {"name": "edge", "slowdown": 1.5, "batch": 4, "price": 1.0},
                  {"name": "cloud", "slowdown": 0.3, "batch": 8, "price": 5.0}],
        connections=[{"source": "mobile", "target": "*", "link": "20mbit 5ms"}, {"source": "edge", "target": "cloud", "link": "100mbit 10ms"}],
        arrivals=[{"sources": ["mobile"], "rate": 60.0}], thresholds=[0.8, 0.8], tasks=200, qos={"deadline": 0.1},
    )  # fmt: skip
    return Spec(**{**fields, **changes})


def random_spec(seed: int, tasks: int = 60, policy: str | None = None) -> Spec:
    """A world that may hold anything: 1 to 6 machines, traces, shared media, every fault."""
    rng = np.random.default_rng([seed, 99])
    policy = policy or str(rng.choice(DRIVEN))
    s, n = int(rng.integers(3 if policy == "dimee" else 1, 5)), int(rng.integers(1, 7))
    names = [f"m{i}" for i in range(n)]
    real = lambda low, high: float(rng.uniform(low, high))
    pick = lambda: str(rng.choice(names))
    machines = [{"name": m, "slowdown": 10.0 ** real(-1, 1.5), "batch": int(rng.integers(1, 6)), "price": real(0, 3)} for m in names]
    connections, pairs = [], []
    for a in range(n):
        for b in range(n):
            if a != b and rng.random() < 0.7:
                pairs.append((names[a], names[b]))
                link = f"{int(10.0 ** real(2, 5.5))}kbit {real(0, 20):.3f}ms"
                connections.append({"source": names[a], "target": names[b], "both": False, "link": link,
                                    "loss": real(0, 0.2) if rng.random() < 0.3 else 0.0, "duplicate": real(0, 0.3) if rng.random() < 0.3 else 0.0,
                                    "capacity": "radio" if rng.random() < 0.2 else None, "offset": real(0, 5)})  # fmt: skip
    on_bus = [c for c in connections if c["capacity"] is None][: int(rng.integers(0, 4))]
    for c in on_bus:
        c |= {"medium": "bus", "link": "5mbit 1ms"}
    span, faults = tasks / 100.0, []
    for _ in range(int(rng.integers(0, 5))):
        kind, at, seconds = str(rng.choice(["death", "freeze", "straggler", "partition", "flap", "loss", "duplicate", "clock"])), real(0, span), real(0.01, span)
        fault = {"kind": kind, "at": at, "seconds": seconds, "factor": 10.0 ** real(-0.5, 1), "chance": real(0, 0.6), "period": real(0.05, 0.5),
                 "offset": real(-0.2, 0.2), "drift": real(-5e4, 5e4)}  # fmt: skip
        if kind in ("flap", "loss", "duplicate"):
            if not pairs:
                continue
            fault["source"], fault["target"] = pairs[int(rng.integers(len(pairs)))]
        elif kind == "partition":
            fault["nodes"] = [pick()]
        else:
            fault["node"] = pick()
        faults.append(fault)
    codecs = int(rng.integers(1, 3))
    kind = str(rng.choice(["poisson", "periodic", "bursts"]))
    return Spec(
        network={"seconds": [10.0 ** real(-3.5, -2) for _ in range(s)], "spread": real(0, 0.4), "codecs": ["raw", "int8"][:codecs],
                 "wire_bytes": [[10.0 ** real(2, 4.5) for _ in range(codecs)] for _ in range(s)], "batch_sizes": [1, 4], "batch_cost": [1.0, real(1, 4)],
                 "codec_seconds": [[real(0, 1e-3) for _ in range(codecs)] for _ in range(s)]},
        machines=machines, connections=connections, capacities={"radio": {"synthetic": "lte", "rate": 2e6, "seconds": 5.0, "seed": seed}},
        arrivals=[{"kind": kind, "sources": [pick()], "rate": 10.0 ** real(1, 2.5), "on": 0.1, "off": 0.3}] + ([{"sources": ["*"], "rate": 10.0}] if rng.random() < 0.4 else []),
        thresholds=[real(0.3, 0.9) for _ in range(s - 1)], tasks=tasks, seed=seed, faults=faults, policy=policy,
        params={"counts": [4] * s} if policy == "daisy" else {"period": 0.05, "adapt": str(rng.choice(["none", "rate", "threshold"]))} if policy == "mdi_exit" else {},
        qos={"deadline": None if rng.random() < 0.1 else 10.0 ** real(-2, -0.5), "hit_rate": real(0.5, 0.999)},
        detect=10.0 ** real(-2.5, -0.5), grace=real(0, 0.3), timeout=real(0.3, 2.0), report=0.0 if rng.random() < 0.2 else real(0.01, 0.2),
        credit=int(rng.integers(1, 9)), max_tasks=int(rng.integers(2, 64)), max_neighbours=int(rng.integers(0, 6)), byte_price=1e-9,
    )  # fmt: skip

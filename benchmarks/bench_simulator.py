"""The simulator: events per second with 1,000 nodes, and a task's whole life beside the Python twin and the same model in SimPy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import msgspec
import numpy as np

from fastee.simulation import Spec, simulate, twin
from fastee.simulation.build import build
from fastee.testing.bench import Case, Context, Group

EVENTS = 100_000
TASKS = 500


def mesh(nodes: int, tasks: int, **changes) -> Spec:
    """`nodes` equal machines in a ring with 8 neighbours each, 50 tasks a second on each, four segments of 4 ms."""
    fields = dict(
        network={"seconds": [0.004] * 4, "spread": 0.1, "wire_bytes": [[3136, 788], [16384, 4100], [8192, 2052], [8192, 2052]],
                 "codecs": ["raw", "int8"], "batch_sizes": [1, 8], "batch_cost": [1.0, 3.0]},
        machines=[{"name": "n", "count": nodes, "batch": 4}],
        connections=[{"source": "n", "target": "n", "link": "100mbit 2ms", "pattern": "ring", "degree": 8}],
        arrivals=[{"sources": ["n"], "rate": 50.0}], thresholds=[0.8] * 3, tasks=tasks, qos={"deadline": 0.1},
    )  # fmt: skip
    return msgspec.convert({**fields, **changes}, Spec)


def engine(spec: Spec, native: bool):
    """A simulator at time 0, and what it was built from."""
    built = build(spec, None, None, False)
    schedulers = [built.make(node, native) for node in range(len(built.names))]
    if not native:
        return twin.Simulator(built.world, schedulers, lambda node: built.make(node, False)), built
    from fastee import _C

    return _C.Simulator(built.world, [s._core for s in schedulers]), built


def advance(spec: Spec, native: bool = True) -> Callable[[int], None]:
    """A function that handles the next so many events; a world that is over begins anew."""
    state = [engine(spec, native)[0]]

    def run(events: int) -> None:
        if not state[0].run(events):
            state[0] = engine(spec, native)[0]

    return run


def until(spec: Spec, native: bool) -> Callable[[int], None]:
    """A function that runs until so many more tasks have ended."""
    state = [engine(spec, native)[0], 0]

    def run(tasks: int) -> None:
        state[1] += tasks
        while state[0].totals()["ended"] < state[1]:
            if not state[0].run(tasks):
                state[:] = [engine(spec, native)[0], tasks]

    return run


def simpy_model(spec: Spec) -> tuple[Callable[[int], None], list[float]]:
    """The same queues, service times, scores and exits in SimPy: no links, no deadlines, no scheduler, so less work per task.

    Returns the function that runs until so many more tasks have ended, and the latencies so far.
    """
    import simpy

    built = build(spec, None, None, False)
    w, exits = built.world, built.world["segments"] - 1
    service, latency = w["service"].reshape(w["nodes"], w["segments"], -1)[:, :, 0] * 1e-9, []
    confidence, rng = w["confidence"].reshape(-1, exits), np.random.default_rng(0)
    env = simpy.Environment()
    machines = [simpy.Resource(env) for _ in range(w["nodes"])]
    spread = float(w["jitter"][0]) * 3**0.5

    def task(node: int, row: int):
        start = env.now
        for segment in range(exits + 1):
            with machines[node].request() as turn:
                yield turn
                yield env.timeout(service[node, segment] * (1 + spread * (2 * rng.random() - 1)))
            if segment == exits or confidence[row, segment] >= 0.8:
                break
        latency.append(env.now - start)

    def arrivals():
        for at, node, row in zip(w["arrival"] * 1e-9, w["source"], w["row"], strict=True):
            yield env.timeout(max(0.0, at - env.now))
            env.process(task(int(node), int(row)))

    env.process(arrivals())

    def run(tasks: int) -> None:
        goal = len(latency) + tasks
        while len(latency) < goal:
            env.step()

    return run, latency


def cases(ctx: Context) -> Iterator[Group]:
    big = mesh(1000, 2_000_000 if ctx.shapes == "all" else 1_000_000)
    yield Group("simulate", f"1000 nodes, {EVENTS} events", "events", [Case("fastee", advance(big), [(EVENTS,)], note="<= 50 ms is 2 million events/s")],
                baseline="fastee", bars=("<= 50 ms",))  # fmt: skip

    # Batches of one, thresholds only, nothing offloaded: what the SimPy model can do as well.
    alone = mesh(100, 400_000, machines=[{"name": "n", "count": 100}], connections=[], policy="threshold", qos={"deadline": 60.0}, arrivals=[{"sources": ["n"], "rate": 30.0}])
    own = simulate(alone, tasks=20_000)
    peers = [Case("twin", until(alone, False), [(TASKS,)], note="the same rules in Python")]
    try:
        run, latency = simpy_model(alone)
    except ImportError:
        peers.append(Case("simpy", None, [(TASKS,)], note="simpy is not installed here"))
    else:
        run(20_000)
        off = abs(float(np.mean(latency[:20_000])) / float(own.latency.mean()) - 1)
        if off > 0.05:
            raise RuntimeError(f"the SimPy model's mean latency is {100 * off:.1f} % off ours: not the same model")
        peers.append(Case("simpy", run, [(TASKS,)], note=f"mean latency within {100 * off:.2f} % of ours; no scheduler, links or deadlines"))
    yield Group("simulate", f"100 nodes, {TASKS} tasks", "tasks", [Case("fastee", until(alone, True), [(TASKS,)]), *peers], baseline="twin", bars=(">= 50x simpy",))


def million() -> None:
    """1,000,000 tasks x 1,000 nodes, once, with time and memory of the whole process."""
    import resource

    start = time.perf_counter()
    result = simulate(mesh(1000, 1_000_000))
    result.check()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"1,000,000 tasks x 1,000 nodes: {time.perf_counter() - start:.1f} s with building and checking, {peak:.2f} GB, "
          f"{result.totals['events']:,} events, {result.totals['events'] / result.wall / 1e6:.2f} million/s")  # fmt: skip


if __name__ == "__main__":
    million()

"""The simulator: events per second with 1,000 nodes, and a task's whole life beside the Python twin and the same model on SimPy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import msgspec

from fastee.simulation import Spec, simulate, twin
from fastee.simulation.build import build
from fastee.testing.bench import Case, Context, Group

EVENTS = 100_000
TASKS = 5_000


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


def simpy_model(spec: Spec):
    """The same model on SimPy: its clock and its queue of events, every rule of the world in Python (those of the simulator's twin).

    The schedulers are the C++ objects that ours drives, asked from Python: with the policy in Python too it is 9 times slower. Events are
    timeouts with a callback, SimPy's cheapest kind. Returns (simulator, run), with `run` as that of `until`.
    """
    import simpy

    class OnSimPy(twin.Simulator):
        def __init__(self, *parts):
            self.env = simpy.Environment()
            super().__init__(*parts)
            self.follow_arrival()

        def push(self, time, kind, a, b):
            def come(_):
                self.now = self.env.now
                self.handle(kind, a, b)

            self.env.timeout(time - self.now).callbacks.append(come)

        def follow_arrival(self):
            """Arrivals go before everything else of the same moment."""
            if self.next_arrival == len(self.w["arrival"]):
                return
            event = simpy.Event(self.env)
            event._ok, event._value = True, None
            event.callbacks.append(self.come_in)
            self.env.schedule(event, simpy.events.URGENT, self.w["arrival"][self.next_arrival] - self.now)

        def come_in(self, _):
            self.now = self.env.now
            self.next_arrival += 1
            self.arrive(self.next_arrival - 1)
            self.follow_arrival()

    built = build(spec, None, None, False)
    model, goal = OnSimPy(built.world, [built.make(node, True) for node in range(len(built.names))], None), [0]

    def run(tasks: int) -> None:
        goal[0] += tasks
        while model.count["ended"] < goal[0]:
            model.env.step()

    return model, run


def cases(ctx: Context) -> Iterator[Group]:
    big = mesh(1000, 2_000_000 if ctx.shapes == "all" else 1_000_000)
    yield Group("simulate", f"1000 nodes, {EVENTS} events", "events", [Case("fastee", advance(big), [(EVENTS,)], note="<= 50 ms is 2 million events/s")],
                baseline="fastee", bars=("<= 50 ms",))  # fmt: skip

    # Links with rate and delay, queues, batches, credits, deadlines, and a decision per event, all of them the same: so are the results.
    world = mesh(100, 400_000, arrivals=[{"sources": ["n"], "rate": 100.0}])
    own = simulate(world, tasks=TASKS)
    # 5,000 at a time: of 500 a third of ours went into caches that the other, forty times longer, had filled with its own.
    peers = []
    try:
        model, run = simpy_model(msgspec.structs.replace(world, tasks=TASKS))
        run(TASKS)
        if [int(o) for o in model.outcome] != own.outcome.tolist() or model.exit_of != own.exit.tolist():
            raise RuntimeError("simpy: not the same model, its tasks end otherwise than ours")
        peers.append(Case("simpy", simpy_model(world)[1], [(TASKS,)], note="every task ends as in ours; the C++ schedulers asked from Python"))
    except ImportError:
        peers.append(Case("simpy", None, [(TASKS,)], note="simpy is not installed here"))
    yield Group("simulate", f"100 nodes, {TASKS} tasks", "tasks", [Case("fastee", until(world, True), [(TASKS,)]), *peers], baseline="fastee", bars=(">= 50x simpy",))


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

"""The scheduler's calls from Python, C++ core beside its pure-Python twin: decide, decide_batch, observe and a whole task."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastee.scheduling import Profile, QoS, Scheduler, rule
from fastee.testing.bench import Case, Context, Group

SIZES = ((3, 3, 2), (8, 16, 4))  # exits x nodes x codecs: a small cluster, and the size that the design names
NOW = 1_000_000


def _scheduler(exits: int, nodes: int, codecs: int, native: bool, seed: int, **more) -> Scheduler:
    rng = np.random.default_rng(seed)
    mean = rng.uniform(1e-3, 4e-3, (exits + 1, nodes, 3)) * np.array([1.0, 4.0, 12.0])
    profile = Profile(
        nodes=[f"n{i}" for i in range(nodes)], batch_sizes=(1, 8, 32), mean=mean, spread=0.1 * mean, codecs=[f"c{i}" for i in range(codecs)],
        wire_bytes=rng.uniform(1e3, 1e5, (exits + 1, codecs)), codec_seconds=np.full((exits + 1, codecs), 2e-5),
        bandwidth=np.full((nodes, nodes), 1e9), delay=np.full((nodes, nodes), 1e-3),
    )  # fmt: skip
    return Scheduler(profile, QoS(deadline=60.0), thresholds=[0.9] * exits, native=native, **more)


def _confident(stats, task, node):
    return stats.confidence > 0.95 and task.slack > 1e-3


def tasks_of(sched: Scheduler) -> np.ndarray:
    return np.array([sched.admit(NOW) for _ in range(4096)])


def _pair(size: tuple[int, int, int], seed: int) -> tuple[Scheduler, Scheduler]:
    return _scheduler(*size, True, seed), _scheduler(*size, False, seed)


def _asks(sched: Scheduler, count: int, seed: int) -> list[tuple]:
    """Arguments of `decide` for tasks that stay: scores below the threshold, exits in turn."""
    rng = np.random.default_rng(seed)
    exits = sched.profile.num_exits
    return [(sched.admit(NOW), i % exits, float(u), NOW) for i, u in enumerate(rng.uniform(0, 0.85, count))]


def _life(sched: Scheduler):
    """One task from admission over one exit that it fails to the one that it takes."""

    def life(now):
        task = sched.admit(now)
        sched.decide(task, 0, 0.4, now)
        return sched.decide(task, 1, 0.95, now)

    return life


def cases(ctx: Context) -> Iterator[Group]:
    for size in SIZES:
        name = "x".join(map(str, size))
        core, twin = _pair(size, ctx.seed)
        asks = _asks(core, 64, ctx.seed), _asks(twin, 64, ctx.seed)
        if [core.decide(*a) for a in asks[0]] != [twin.decide(*a) for a in asks[1]]:
            raise RuntimeError(f"{name}: core and twin disagree")
        yield Group("decide", name, "task", [Case("fastee", core.decide, asks[0], note="C++ core"), Case("twin", twin.decide, asks[1])],
                    baseline="twin", per_call=True, bars=("<= 0.25 us", "p99 <= 1 us"))  # fmt: skip

        # The same decisions through the two ways of binding, arguments and answer included.
        bound = _scheduler(*size, True, ctx.seed)
        yield Group("decide_binding", name, "task", [Case("fastcall", bound.decide, _asks(bound, 64, ctx.seed), note="METH_FASTCALL"),
                                                     Case("pybind11", bound._core.decide_pybind11, _asks(bound, 64, ctx.seed))],
                    baseline="pybind11", per_call=True)  # fmt: skip

        # The loop runs in C++, without the Python call: what a simulator or an engine pays. A row is a loop of 64 decisions.
        plain = _scheduler(*size, True, ctx.seed)
        ruled = _scheduler(*size, True, ctx.seed, rule=rule(_confident))
        scores = np.random.default_rng(ctx.seed).uniform(0, 0.85, 4096)
        loops, notes = {}, {}
        for which, sched in (("plain", plain), ("rule", ruled)):
            tasks = tasks_of(sched)
            ns = sched._core.time_decide(tasks, 1, scores, NOW, 64, 200)
            notes[which] = f"per decision p50 {np.percentile(ns, 50):.1f} ns, p99 {np.percentile(ns, 99):.1f} ns"
            loops[which] = lambda s=sched, t=tasks, u=scores: s._core.time_decide(t, 1, u, NOW, 64, 1)
        yield Group("decide_native", name, "C++ loop of 64 decisions", [Case("fastee", loops["plain"], [()], note=notes["plain"])], baseline="fastee",
                    bars=(f"<= {64 * 0.1:g} us", f"p99 <= {64 * 1:g} us"))  # fmt: skip
        yield Group("decide_rule", name, "C++ loop of 64 decisions", [Case("rule", loops["rule"], [()], note=notes["rule"]), Case("plain", loops["plain"], [()])],
                    baseline="plain", bars=(f"<= {64 * 0.02:g} us over plain",))  # fmt: skip

        core, twin = _pair(size, ctx.seed)
        yield Group("task", name, "admit, decide, decide", [Case("fastee", _life(core), [(NOW,)], note="C++ core"), Case("twin", _life(twin), [(NOW,)])],
                    baseline="twin", per_call=True)  # fmt: skip

        for rows in {"headline": (32,), "small": (1, 32, 256)}.get(ctx.shapes, (1, 8, 32, 256, 1024)):
            core, twin = _pair(size, ctx.seed)
            scores = np.random.default_rng(ctx.seed).uniform(0, 0.85, rows)
            batch = [(np.array([s.admit(NOW) for _ in range(rows)]), 1, scores, NOW) for s in (core, twin)]
            if core.decide_batch(*batch[0]).tolist() != twin.decide_batch(*batch[1]).tolist():
                raise RuntimeError(f"{name}, {rows} rows: core and twin disagree")
            yield Group("decide_batch", f"{rows} rows, {name}", "numpy",
                        [Case("fastee", core.decide_batch, [batch[0]], note="C++ core"), Case("twin", twin.decide_batch, [batch[1]])], baseline="twin",
                        bars=(f"<= {0.03 * rows:g} us",) if rows >= 256 else ())  # fmt: skip

        core, twin = _pair(size, ctx.seed)
        seen = [(s % (size[0] + 1), 0, 1, int(core.profile.mean[s % (size[0] + 1), 0, 0] * 1e9 * f)) for s, f in enumerate(np.linspace(0.8, 1.25, 64))]
        yield Group("observe", name, "task", [Case("fastee", core.observe, seen, note="C++ core, tables rebuilt when an estimate moves 2 %"),
                                              Case("twin", twin.observe, seen)], baseline="twin", per_call=True)  # fmt: skip

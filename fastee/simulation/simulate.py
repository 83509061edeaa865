"""simulate(): the cluster on a virtual clock, driven by the very schedulers that a live node runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from fastee.errors import BackendUnavailable
from fastee.scheduling import Profile, QoS
from fastee.simulation import twin
from fastee.simulation.build import build
from fastee.simulation.difficulty import DifficultyTrace
from fastee.simulation.events import Outcome
from fastee.simulation.result import SimulationResult
from fastee.simulation.spec import Arrivals, FaultSpec, Network, Promise, Spec, load_spec

try:
    from fastee import _C
except ImportError as error:  # FASTEE_BUILD=none, or not built yet
    _C, _WHY_NOT = None, str(error)
else:
    _WHY_NOT = ""

_CHUNK = 200_000


def simulate(
    cluster: Spec | Profile | str | os.PathLike,
    trace: DifficultyTrace | tuple | None = None,
    policy=None,
    *,
    tasks: int | None = None,
    faults: Sequence[FaultSpec | Mapping] | None = None,
    arrivals: Sequence[Arrivals | Mapping] | None = None,
    seed: int | None = None,
    qos: QoS | None = None,
    thresholds: Sequence[float] | None = None,
    params: Mapping | None = None,
    rule=None,
    log: bool = False,
    native: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SimulationResult:
    """Simulate `tasks` tasks on a cluster and return what became of each.

    `cluster`: a `Spec`, the path of a SPEC.toml, or a `Profile` (its nodes and links; tasks then arrive at node 0, 10 a second unless
    `arrivals` says otherwise). `trace`: a `DifficultyTrace` or (confidence [rows, K], correct [rows, K+1]); None takes the spec's.
    Whatever is given here replaces the spec's own. `policy`: a name, with its `params`, or one made by ``@fastee.policy``; `rule`: made by
    ``@fastee.rule``. `log=True` keeps the event log (56 bytes a line).
    `native`: True demands the C++ core, False takes the Python twin (same log, 100 times slower), None takes what is there.
    `progress(ended, tasks)` is called now and then.

    Same arguments, same result, bit for bit. Bad input raises ``TypeError`` or ``ValueError`` naming the field.

    >>> spec = Spec(network=Network(seconds=[.002, .002], wire_bytes=[[784], [4096]]), machines=[{"name": "here"}],
    ...             arrivals=[{"sources": ["here"], "rate": 50.0}], thresholds=[0.8], tasks=100)
    >>> simulate(spec).check()
    100
    """
    spec, profile = _spec(cluster)
    own = None if policy is None or isinstance(policy, str) else policy
    changes: dict = {"policy": policy if own is None else getattr(own, "name", "custom"), "tasks": tasks, "seed": seed}
    changes["params"] = None if params is None else dict(params)
    changes["thresholds"] = None if thresholds is None else [float(t) for t in thresholds]
    if qos is not None:
        if not isinstance(qos, QoS):
            raise TypeError(f"simulate: qos must be a QoS, got {type(qos).__name__}")
        changes["qos"] = Promise(**{name: getattr(qos, name) for name in Promise.__struct_fields__})
    changes["faults"] = None if faults is None else list(faults)
    changes["arrivals"] = None if arrivals is None else list(arrivals)
    spec = _convert(msgspec.structs.replace(spec, **{name: value for name, value in changes.items() if value is not None}))
    if trace is not None and not isinstance(trace, DifficultyTrace):
        if not isinstance(trace, tuple) or len(trace) != 2:
            raise TypeError(f"simulate: trace must be a DifficultyTrace or (confidence, correct), got {type(trace).__name__}")
        trace = DifficultyTrace(*trace)
    if native and _C is None:
        raise BackendUnavailable(f"simulate: the C++ core is not there ({_WHY_NOT}); build it with `make build`")
    use_core = _C is not None if native is None else bool(native)

    built = build(spec, profile, trace, log, own, rule)
    world, count = built.world, len(built.world["arrival"])
    schedulers = [built.make(node, use_core) for node in range(len(built.names))]
    if use_core:
        engine = _C.Simulator(world, [scheduler._core for scheduler in schedulers])
    else:
        engine = twin.Simulator(world, schedulers, lambda node: built.make(node, False))
    started = time.perf_counter()
    while engine.run(_CHUNK):
        if progress is not None:
            progress(engine.totals()["ended"], count)
    wall = time.perf_counter() - started
    totals, columns = engine.totals(), {name: np.asarray(value) for name, value in engine.results().items()}
    outcome = columns["outcome"].astype(np.int8)
    answered = outcome == Outcome.ANSWERED
    exits = columns["exit"].astype(np.int64)
    correct = np.zeros(count, bool)
    correct[answered] = built.correct[world["row"][answered], exits[answered]]
    deadline = world["deadline"].astype(np.float64) / 1e9
    deadline[world["deadline"] == (1 << 63) - 1] = np.inf
    return SimulationResult(
        nodes=built.names, policy=spec.policy, seed=spec.seed, num_exits=world["segments"] - 1, arrival=world["arrival"] / 1e9, source=world["source"],
        deadline=deadline, latency=np.where(answered, columns["latency"] / 1e9, np.inf), outcome=outcome, exit=exits, node=columns["node"].astype(np.int32),
        correct=correct, forced=columns["forced"].astype(bool), wire_bytes=columns["wire"], compute=columns["compute"] / 1e9, cost=columns["cost"],
        attempts=columns["attempts"].astype(np.int32), hops=columns["hops"].astype(np.int32), utilisation=columns["busy"] / max(1, totals["now"]),
        rows=columns["ran"], sent_bytes=columns["sent"], totals=totals, wall=wall,
        lines=np.asarray(engine.log(), np.int64).reshape(-1, 7) if log else None,
    )  # fmt: skip


def _spec(cluster) -> tuple[Spec, Profile | None]:
    if isinstance(cluster, Spec):
        return cluster, None
    if isinstance(cluster, Profile):
        net = Network(seconds=[0.0], wire_bytes=[[0.0]])  # not read: the profile has the costs
        return Spec(network=net, machines=[], arrivals=[Arrivals(sources=[cluster.nodes[0]], rate=10.0)]), cluster
    if isinstance(cluster, (str, Path, os.PathLike)):
        return load_spec(cluster), None
    raise TypeError(f"simulate: cluster must be a Spec, a Profile or the path of a SPEC.toml, got {type(cluster).__name__}")


def _convert(spec: Spec) -> Spec:
    """Check the types all the way down: a Spec made in Python may hold anything, or dicts instead of its parts."""
    try:
        return msgspec.convert(msgspec.to_builtins(spec), Spec)
    except msgspec.ValidationError as error:
        raise ValueError(f"simulate: {error}") from None
    except TypeError as error:
        raise TypeError(f"simulate: {error}") from None

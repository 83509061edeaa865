"""From a Spec to the plain numbers that both simulators take, and to one Scheduler per node."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastee.errors import did_you_mean
from fastee.scheduling import Costs, Profile, QoS, Scheduler, parse_link
from fastee.simulation.capacity import read_capacity, synthetic_capacity
from fastee.simulation.difficulty import DifficultyTrace
from fastee.simulation.events import FaultKind
from fastee.simulation.spec import Arrivals, Connection, FaultSpec, Spec, check_numbers

NO_DEADLINE = (1 << 63) - 1
FRAME_BYTES = 136  # header, route and table rows beside a tensor's values, as in the live cluster
MAX_NODES = 1024


@dataclass
class Built:
    """`world`: what a simulator takes; `make(n)` gives node n's Scheduler; `names` of the nodes; `correct` bool [rows, K+1]."""

    world: dict
    make: Callable[[int, bool | None], Scheduler]
    names: tuple[str, ...]
    correct: np.ndarray
    qos: QoS


@dataclass
class _Costs:
    """The net on the nodes: mean, spread [S, N, NB] seconds; wire [S, NC] bytes with the frame; links as a dict (a, b) -> (rate, delay)."""

    names: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    mean: np.ndarray
    spread: np.ndarray
    codecs: tuple[str, ...]
    wire: np.ndarray
    codec_seconds: np.ndarray
    answer_bytes: int
    batch: list[int]
    price: list[float]
    gain: np.ndarray | list | None = None
    gain_range: tuple[float, float] = (0.0, 1.0)
    groups: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class _Link:
    rate: float
    delay: float
    medium: int
    loss: float = 0.0
    duplicate: float = 0.0


def build(spec: Spec, profile: Profile | None, difficulty: DifficultyTrace | None, log: bool, policy=None, rule=None) -> Built:
    """Check `spec` and expand it; a `profile` gives the net, the nodes and the links instead of the spec's own; `policy`, `rule`: made by decorators."""
    check_numbers(spec)
    costs = _from_profile(profile, spec) if profile is not None else _from_spec(spec)
    n, s = len(costs.names), len(costs.mean)
    links, media, traces = _links_of_profile(profile) if profile is not None else _connect(spec, costs)
    if difficulty is None:
        difficulty = _difficulty(spec, s - 1)
    if difficulty.num_exits != s - 1:
        raise ValueError(f"simulate: the trace must have {s - 1} exits as the net has, got {difficulty.num_exits}")
    arrival, source = _arrive(spec, costs)
    qos = QoS(**{name: getattr(spec.qos, name) for name in spec.qos.__struct_fields__})
    sources = sorted(set(source.tolist()))
    lone = sources[0] if len(sources) == 1 else None
    members = _members(spec, costs, links, lone)
    home = [lone if lone is not None and (lone == i or (lone in members[i] and (i, lone) in links)) else i for i in range(n)]
    ordered = sorted(links)
    service = _service(costs)
    optional = lambda value: np.zeros(0) if value is None else value
    world = {
        "nodes": n, "segments": s, "codecs": len(costs.codecs), "max_batch": service.shape[2], "service": service.ravel(),
        "jitter": np.divide(costs.spread[:, :, 0], costs.mean[:, :, 0], out=np.zeros((s, n)), where=costs.mean[:, :, 0] > 0).T.ravel().copy(),
        "batch": np.array(costs.batch, np.int64), "price": np.array(costs.price, np.float64), "byte_price": float(spec.byte_price),
        "wire_bytes": np.rint(costs.wire).astype(np.int64).ravel(), "codec_ns": np.rint(costs.codec_seconds * 1e9).astype(np.int64).ravel(),
        "answer_bytes": int(costs.answer_bytes), "traces": [(t.at.tolist(), t.cum.tolist()) for t in traces], "media": media,
        "links": [(a, b, links[a, b].medium, _ns(links[a, b].delay), links[a, b].loss, links[a, b].duplicate) for a, b in ordered],
        "members": members, "home": np.array(home, np.int64), "faults": _faults(spec.faults, costs, {pair: i for i, pair in enumerate(ordered)}),
        "arrival": arrival, "source": source, "deadline": np.full(len(arrival), qos.deadline_ns, np.int64),
        "row": _rows(spec.seed, len(arrival), len(difficulty.confidence)), "confidence": difficulty.confidence.ravel(),
        "gate": optional(difficulty.gate).ravel(), "delta": optional(difficulty.delta).ravel(),
        "label": optional(difficulty.label).astype(np.int64).ravel(), "pool": optional(difficulty.pool).astype(np.int64).ravel(),
        "rows": len(difficulty.confidence), "detect": _ns(spec.detect), "grace": _ns(spec.grace), "timeout": _ns(spec.timeout),
        "report": _ns(spec.report), "stale": _ns(spec.stale), "credit": spec.credit, "attempts": 16, "seed": spec.seed, "log": bool(log),
    }  # fmt: skip
    thresholds = list(spec.thresholds) if spec.thresholds is not None else None

    def make(node: int, native: bool | None) -> Scheduler:
        near = members[node]
        rate, delay = np.zeros((len(near), len(near))), np.zeros((len(near), len(near)))
        for i, a in enumerate(near):
            for j, b in enumerate(near):
                if (a, b) in links:
                    rate[i, j], delay[i, j] = links[a, b].rate, links[a, b].delay
        mine = Profile(
            nodes=[costs.names[i] for i in near], batch_sizes=costs.batch_sizes, mean=costs.mean[:, near], spread=costs.spread[:, near],
            codecs=costs.codecs, wire_bytes=costs.wire, codec_seconds=costs.codec_seconds, bandwidth=rate, delay=delay, gain=costs.gain,
            gain_range=costs.gain_range,
        )  # fmt: skip
        media: dict[int, list[int]] = {}
        for i, b in enumerate(near):
            if (node, b) in links:
                media.setdefault(links[node, b].medium, []).append(i)
        prices = Costs(price_per_second=[costs.price[i] for i in near], price_per_byte=[spec.byte_price] * len(near)) if qos.money_weight > 0 else None
        return Scheduler(
            mine, qos, policy=policy or spec.policy, thresholds=thresholds, node=near.index(node), home=near.index(home[node]), media=list(media.values()), max_tasks=spec.max_tasks,
            params=_local_params(spec.params, costs, near), rule=rule, costs=prices, answer_bytes=costs.answer_bytes,
            seed=(spec.seed * MAX_NODES + node) % (1 << 63), native=native,
        )  # fmt: skip

    return Built(world, make, costs.names, difficulty.correct, qos)


def _local_params(params: dict, costs: _Costs, near: list[int]) -> dict:
    """The policy's params with nodes, given by name or number, as columns of one scheduler."""

    def column(name: str, node) -> int:
        at = _group(costs, f"params.{name}", node)[0] if isinstance(node, str) else node
        if at not in near:
            raise ValueError(f"simulate: params.{name}: every node needs a link to {node!r}, among its nearest; {costs.names[near[0]]!r} and others have none")
        return near.index(at)

    out = dict(params)
    if "tiers" in out:
        out["tiers"] = [column("tiers", node) for node in out["tiers"]]
    if "cloud" in out:
        out["cloud"] = column("cloud", out["cloud"])
    return out


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _from_spec(spec: Spec) -> _Costs:
    net, names, groups, slow, batch, price = spec.network, [], {}, [], [], []
    for machine in spec.machines:
        members = [machine.name] if machine.count == 1 else [f"{machine.name}{i}" for i in range(machine.count)]
        if machine.name in groups:
            raise ValueError(f"simulate: machines must have different names, got {machine.name!r} twice")
        groups[machine.name] = list(range(len(names), len(names) + len(members)))
        names += members
        slow += [machine.slowdown] * machine.count
        batch += [machine.batch] * machine.count
        price += [machine.price] * machine.count
    if not 1 <= len(names) <= MAX_NODES:
        raise ValueError(f"simulate: machines must be 1..{MAX_NODES}, got {len(names)}")
    for i, name in enumerate(names):
        if groups.setdefault(name, [i]) != [i]:
            raise ValueError(f"simulate: {name!r} is the name of a machine and of a group")
    groups["*"] = list(range(len(names)))
    if len(net.batch_cost) != len(net.batch_sizes):
        raise ValueError(f"simulate: network.batch_cost must have one factor per batch size ({len(net.batch_sizes)}), got {len(net.batch_cost)}")
    seconds = np.asarray(net.seconds, np.float64)
    for name, values in (("seconds", seconds), ("batch_cost", np.asarray(net.batch_cost, np.float64))):
        if not len(values) or not (np.isfinite(values) & (values >= 0) & (values <= 1e6)).all():
            raise ValueError(f"simulate: network.{name} must hold finite numbers in 0..1e6, got {values.tolist()[:20]}")
    mean = seconds[:, None, None] * np.asarray(slow)[None, :, None] * np.asarray(net.batch_cost, np.float64)[None, None, :]
    wire = _matrix("wire_bytes", net.wire_bytes, (len(seconds), len(net.codecs))) + FRAME_BYTES
    codec = np.zeros(wire.shape) if net.codec_seconds is None else _matrix("codec_seconds", net.codec_seconds, wire.shape)
    return _Costs(tuple(names), tuple(net.batch_sizes), mean, mean * net.spread, tuple(net.codecs), wire, codec, net.answer_bytes + FRAME_BYTES, batch, price,
                  net.gain, net.gain_range, groups)  # fmt: skip


def _matrix(name: str, rows: list, shape: tuple[int, int]) -> np.ndarray:
    if len(rows) != shape[0] or any(len(row) != shape[1] for row in rows):
        raise ValueError(f"simulate: network.{name} must be [{shape[0]} segments][{shape[1]} codecs], got {len(rows)} rows of {sorted({len(r) for r in rows})}")
    return np.array(rows, np.float64)


def _from_profile(profile: Profile, spec: Spec) -> _Costs:
    groups = {name: [i] for i, name in enumerate(profile.nodes)}
    groups["*"] = list(range(len(profile.nodes)))
    batch = {m.name: m for m in spec.machines}
    unknown = [name for name in batch if name not in groups]
    if unknown:
        raise ValueError(f"simulate: machines names {unknown}, the profile has {list(profile.nodes)}")
    return _Costs(profile.nodes, profile.batch_sizes, np.array(profile.mean), np.array(profile.spread), profile.codecs, profile.wire_bytes + FRAME_BYTES,
                  np.array(profile.codec_seconds), spec.network.answer_bytes + FRAME_BYTES, [batch[n].batch if n in batch else 1 for n in profile.nodes],
                  [batch[n].price if n in batch else 0.0 for n in profile.nodes], profile.gain, profile.gain_range, groups)  # fmt: skip


def _links_of_profile(profile: Profile):
    links, media = {}, []
    for a in range(len(profile.nodes)):
        for b in range(len(profile.nodes)):
            if a != b and profile.bandwidth[a, b] >= 1:
                links[a, b] = _Link(float(profile.bandwidth[a, b]), float(profile.delay[a, b]), len(media))
                media.append((round(profile.bandwidth[a, b]), -1, 0))
    return links, media, []


def _group(costs: _Costs, what: str, name: str | None) -> list[int]:
    if name not in costs.groups:
        known = list(costs.groups)
        raise ValueError(f"simulate: {what} must be a machine or group, got {name!r}{did_you_mean(str(name), known)}")
    return costs.groups[name]


def _connect(spec: Spec, costs: _Costs):
    names, traces = [], []
    for name, capacity in spec.capacities.items():
        names.append(name)
        if (capacity.file is None) == (capacity.synthetic is None):
            raise ValueError(f"simulate: capacities.{name} must have either a file or synthetic")
        if capacity.file is not None:
            traces.append(read_capacity(Path(spec.folder) / capacity.file, capacity.format))
        else:
            traces.append(synthetic_capacity(capacity.synthetic, capacity.rate, capacity.seconds, capacity.seed))
    links: dict[tuple[int, int], _Link] = {}
    media: list[tuple[int, int, int]] = []
    shared: dict[str, int] = {}
    for c in spec.connections:
        rate, delay = parse_link(c.link)
        trace = -1
        if c.capacity is not None:
            if c.capacity not in names:
                raise ValueError(f"simulate: capacity must be one of {names}, got {c.capacity!r}{did_you_mean(c.capacity, names)}")
            trace = names.index(c.capacity)
            rate = traces[trace].mean_rate
        if rate < 1:
            continue
        for number, pair in enumerate(_pairs(c, costs)):
            if pair in links:
                raise ValueError(f"simulate: the link {costs.names[pair[0]]!r} -> {costs.names[pair[1]]!r} is given twice")
            if c.medium is None or c.medium not in shared:
                offset = 0 if trace < 0 else _ns(c.offset + number) % int(traces[trace].at[-1])
                media.append((round(rate), trace, offset))
                at = len(media) - 1
                if c.medium is not None:
                    shared[c.medium] = at
            else:
                at = shared[c.medium]
                if media[at][:2] != (round(rate), trace):
                    raise ValueError(f"simulate: links of the medium {c.medium!r} must have one rate and one capacity")
            links[pair] = _Link(rate, delay, at, c.loss, c.duplicate)
    return links, media, traces


def _pairs(c: Connection, costs: _Costs) -> list[tuple[int, int]]:
    a, b = _group(costs, "connections.source", c.source), _group(costs, "connections.target", c.target)
    if c.pattern == "ring":
        if a != b:
            raise ValueError(f"simulate: a ring has one group as source and target, got {c.source!r} and {c.target!r}")
        half = max(1, c.degree // 2)
        pairs = {(a[i], a[(i + d) % len(a)]) for i in range(len(a)) for d in range(1, half + 1)}
    else:
        pairs = {(x, y) for x in a for y in b}
    pairs = {(x, y) for x, y in pairs if x != y}
    if c.both:
        pairs |= {(y, x) for x, y in pairs}
    return sorted(pairs)


def _members(spec: Spec, costs: _Costs, links: dict, lone: int | None) -> list[list[int]]:
    """Itself, the home, and the peers that it can send to: of many, those that are soonest done with a whole task."""
    whole, nearest = costs.mean[:, :, 0].sum(axis=0), [[] for _ in costs.names]
    for (a, b), link in links.items():
        nearest[a].append((link.delay + costs.wire[0, 0] * 8 / link.rate + whole[b], b))
    members = []
    for a, peers in enumerate(nearest):
        chosen = {b for _, b in sorted(peers)[: spec.max_neighbours]} | {a}
        if lone is not None and (a, lone) in links:
            chosen.add(lone)
        members.append(sorted(chosen))
    return members


def _service(costs: _Costs) -> np.ndarray:
    """int64 [N, S, max batch] ns: straight lines between the profiled batch sizes, proportional beyond."""
    s, n, _ = costs.mean.shape
    rows = np.arange(1, max(costs.batch) + 1)
    out = np.empty((n, s, len(rows)), np.int64)
    sizes = np.asarray(costs.batch_sizes, np.float64)
    for i in range(n):
        for j in range(s):
            time = np.interp(rows, sizes, costs.mean[j, i])
            time = np.where(rows > sizes[-1], costs.mean[j, i, -1] * rows / sizes[-1], time)
            out[i, j] = np.rint(time * 1e9)
    return out


def _rows(seed: int, tasks: int, rows: int) -> np.ndarray:
    """Which sample each task is: a hash of seed and task number, so that more tasks never change the earlier ones."""
    with np.errstate(over="ignore"):
        z = np.arange(tasks, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) % np.uint64(rows)).astype(np.int64)


def _difficulty(spec: Spec, exits: int) -> DifficultyTrace:
    d = spec.difficulty
    if d.file is not None:
        return DifficultyTrace.load(Path(spec.folder) / d.file)
    accuracy = d.accuracy if d.accuracy is not None else [0.95 - 0.3 * 0.6**i for i in range(exits + 1)]
    if len(accuracy) != exits + 1:
        raise ValueError(f"simulate: difficulty.accuracy must hold {exits + 1} numbers, one per exit and the end, got {len(accuracy)}")
    return DifficultyTrace.synthetic(accuracy, d.rows, d.seed)


def _arrive(spec: Spec, costs: _Costs) -> tuple[np.ndarray, np.ndarray]:
    """(time int64 [T], source int64 [T]) of the first `tasks` arrivals; every source draws from a stream of its own."""
    if not spec.arrivals:
        raise ValueError("simulate: arrivals must hold at least one entry")
    streams = [(a, node) for a in spec.arrivals for name in a.sources for node in _group(costs, "arrivals.sources", name)]
    before: list[int] = []  # entries that the same node had already
    seen: dict[int, int] = {}
    for _, node in streams:
        before.append(seen.get(node, 0))
        seen[node] = before[-1] + 1
    if not streams:
        raise ValueError("simulate: arrivals must name at least one source")
    for a, _ in streams:
        if a.kind != "times" and not a.rate > 0:
            raise ValueError(f"simulate: arrivals.rate must be > 0 tasks per second, got {a.rate}")
        if a.kind == "times" and (a.times is None or any(not (math.isfinite(t) and 0 <= t <= 1e6) for t in a.times)):
            raise ValueError("simulate: arrivals.times must hold seconds in 0..1e6")
    total = sum(_mean_rate(a) for a, _ in streams)
    given = sum(len(a.times) for a, _ in streams if a.kind == "times")
    span = (max(0, spec.tasks - given) / total if total > 0 else 0.0) * 1.1 + 1e-3
    while True:
        times, sources = [], []
        for (a, node), number in zip(streams, before, strict=True):
            drawn = _times(a, span, *(np.random.default_rng([spec.seed, i, node, number]) for i in (1, 2)))
            times.append(drawn)
            sources.append(np.full(len(drawn), node, np.int64))
        time, source = np.concatenate(times), np.concatenate(sources)
        # Only what lies within the span is complete: a source that drew further must not push out another one's task.
        inside = time <= _ns(span + min(a.start for a, _ in streams)) if total > 0 else np.ones(len(time), bool)
        if inside.sum() >= spec.tasks or total == 0:
            break
        span *= 1.3
    time, source = time[inside], source[inside]
    order = np.lexsort((source, time))[: spec.tasks]
    return time[order], source[order]


def _mean_rate(a: Arrivals) -> float:
    if a.kind == "times":
        return 0.0
    return a.rate * (a.on * a.factor + a.off) / (a.on + a.off) if a.kind == "bursts" else a.rate


def _times(a: Arrivals, span: float, rng: np.random.Generator, thin: np.random.Generator) -> np.ndarray:
    """Arrival times (int64 ns) of one source within `span` seconds after its start; a longer span has the shorter one as its beginning."""
    if a.kind == "times":
        return np.sort(np.rint(np.asarray(a.times) * 1e9).astype(np.int64))
    if a.kind == "periodic":
        return np.rint((a.start + np.arange(1, int(span * a.rate) + 1) / a.rate) * 1e9).astype(np.int64)
    peak = a.rate * (max(1.0, a.factor) if a.kind == "bursts" else 1.0)
    gaps, when = [], 0.0
    while when <= span:
        gaps.append(rng.exponential(1.0 / peak, 1024))
        when += float(gaps[-1].sum())
    time = np.cumsum(np.concatenate(gaps))
    if a.kind == "bursts":  # thinning
        share = np.where(time % (a.on + a.off) < a.on, a.factor, 1.0) * (a.rate / peak)
        time = time[thin.random(len(time)) < share]
    return np.rint((a.start + time[time <= span]) * 1e9).astype(np.int64)


def _faults(faults: Sequence[FaultSpec], costs: _Costs, links: dict[tuple[int, int], int]) -> list[tuple[int, int, int, int, float]]:
    """Elementary faults (time, kind, target, span, value) by time."""
    out: list[tuple[int, int, int, int, float]] = []
    put = lambda at, kind, target, span=0, value=0.0: out.append((_ns(at), int(kind), target, span, float(value)))
    for number, f in enumerate(faults):
        where = f"faults[{number}]"
        if f.kind in ("death", "freeze", "straggler", "clock"):
            for node in _group(costs, f"{where}.node", f.node):
                if f.kind == "death":
                    put(f.at, FaultKind.DEATH, node)
                    if f.seconds is not None:
                        put(f.at + f.seconds, FaultKind.RESTART, node)
                elif f.kind == "freeze":
                    if f.seconds is None:
                        raise ValueError(f"simulate: {where}.seconds must say how long the freeze lasts")
                    put(f.at, FaultKind.FREEZE, node, _ns(f.seconds))
                elif f.kind == "straggler":
                    put(f.at, FaultKind.SLOW, node, 0, f.factor)
                    if f.seconds is not None:
                        put(f.at + f.seconds, FaultKind.SLOW, node, 0, 1.0)
                else:
                    put(f.at, FaultKind.CLOCK, node, _ns(f.offset), f.drift)
            continue
        if f.kind == "partition":
            inside = {node for name in f.nodes for node in _group(costs, f"{where}.nodes", name)}
            if not inside:
                raise ValueError(f"simulate: {where}.nodes must name the machines that are cut off")
            pairs = [pair for pair in links if (pair[0] in inside) != (pair[1] in inside)]
        else:
            a, b = _group(costs, f"{where}.source", f.source), _group(costs, f"{where}.target", f.target)
            pairs = [pair for pair in links if pair[0] in a and pair[1] in b]
            if not pairs:
                raise ValueError(f"simulate: {where}: there is no link from {f.source!r} to {f.target!r}")
        if f.kind in ("partition", "flap") and f.seconds is None:
            raise ValueError(f"simulate: {where}.seconds must say how long the {f.kind} lasts")
        for pair in pairs:
            if f.kind == "partition":
                put(f.at, FaultKind.LINK_DOWN, links[pair])
                put(f.at + f.seconds, FaultKind.LINK_UP, links[pair])
            elif f.kind == "flap":
                for i in range(max(1, math.ceil(f.seconds / f.period))):
                    put(f.at + i * f.period, FaultKind.LINK_DOWN, links[pair])
                    put(f.at + (i + 0.5) * f.period, FaultKind.LINK_UP, links[pair])
            else:
                kind = FaultKind.LOSS if f.kind == "loss" else FaultKind.DUPLICATE
                put(f.at, kind, links[pair], 0, f.chance)
                if f.seconds is not None:
                    put(f.at + f.seconds, kind, links[pair], 0, 0.0)
    return sorted(out, key=lambda fault: fault[0])

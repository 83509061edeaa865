"""plan(): which node runs which segments, with which codec per cut and which exits; the answer explains itself."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fastee.errors import CheckpointMismatch, NoPlan, did_you_mean
from fastee.planning import explain
from fastee.planning.cluster import ClusterSpec
from fastee.planning.problem import Question, core, question
from fastee.scheduling import Profile, QoS

KINDS = ("auto", "pipeline", "joint", "spatial")
_FORMAT, _VERSION = "fastee-plan", 1
_MAX_JSON_BYTES = 64 << 20
_MAX_ALTERNATIVES = 64


class Figures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a plan is predicted to do per batch: `latency` expected seconds (at the asked quantile of each step), `throughput` tasks/s at the
    bottleneck, `cost` in weighted units, `bytes` sent, `drop` expected accuracy loss; None where there is no plan."""

    latency: float | None
    throughput: float | None
    cost: float | None
    bytes: float | None
    drop: float | None


class Alternative(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Another plan that was weighed. `value`: the objective, smaller is better; `reason`: why it is out, "" when it is a legal plan."""

    name: str
    figures: Figures
    value: float | None
    reason: str = ""


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A placement and what it is predicted to do.

    `place`: node name per segment; `codecs`: codec of the move into each segment, None where the carry stays; `exits`: which are on;
    `value`: the objective (seconds; seconds per batch at the bottleneck; cost units); `bound`: no plan is better than this;
    `exact`: value is the optimum of the model; `memory`: bytes per node; `reach`: share of tasks that run each segment.
    """

    kind: str
    objective: str
    nodes: tuple[str, ...]
    source: str
    place: tuple[str, ...]
    codecs: tuple[str | None, ...]
    exits: tuple[bool, ...]
    value: float
    bound: float
    exact: bool
    figures: Figures
    memory: dict[str, float]
    reach: tuple[float, ...]
    alternatives: tuple[Alternative, ...]
    fingerprint: str
    batch: int = 1
    quantile: float | None = None
    deadline: float | None = None
    max_drop: float | None = None

    @property
    def latency(self) -> float:
        """Expected seconds of a task."""
        return self.figures.latency

    @property
    def throughput(self) -> float:
        """Tasks per second at the bottleneck; +inf when nothing takes time."""
        return math.inf if self.figures.throughput is None else self.figures.throughput

    @property
    def cost(self) -> float:
        return self.figures.cost

    @property
    def bytes(self) -> float:
        """Expected bytes sent per batch, answers included."""
        return self.figures.bytes

    @property
    def indices(self) -> list[int]:
        """The placement as node indices, as ``cluster(x, plan=...)`` takes it."""
        return [self.nodes.index(name) for name in self.place]

    def explain(self) -> str:
        """Return in words and numbers what was chosen, why, and what it beat."""
        return explain.text(self)

    def check(self, prof: Any, nodes: Sequence[str] | None = None) -> None:
        """Raise CheckpointMismatch unless this plan was made for the network of `prof` (a Profile, or the network itself), with that many segments, and
        everyone it needs is among `nodes` (None: not asked)."""
        who, is_of = ("the profile", "is of") if isinstance(prof, Profile) else ("this network", "is")
        if self.fingerprint != prof.fingerprint:
            raise CheckpointMismatch(f"plan: made for the network {self.fingerprint!r}, {who} {is_of} {prof.fingerprint!r}; plan again")
        if len(self.place) != prof.num_segments:
            raise CheckpointMismatch(f"plan: places {len(self.place)} segments, {who} has {prof.num_segments}; plan again")
        for name in (self.source, *self.place) if nodes is not None else ():
            if name not in nodes:
                raise CheckpointMismatch(f"plan: node {name!r} has left, there are {list(nodes)}; plan again")

    def to_json(self) -> bytes:
        """The plan as JSON (UTF-8)."""
        return msgspec.json.encode(_File(format=_FORMAT, version=_VERSION, plan=self))

    @classmethod
    def from_json(cls, data: bytes | str, prof: Profile | None = None) -> Plan:
        """Read what `to_json` wrote; anything else raises ValueError, a plan for another network than `prof` CheckpointMismatch."""
        if not isinstance(data, (bytes, bytearray, memoryview, str)):
            raise TypeError(f"from_json: data must be bytes or str, got {type(data).__name__}")
        if len(data) > _MAX_JSON_BYTES:
            raise ValueError(f"from_json: data must have at most {_MAX_JSON_BYTES} bytes, got {len(data)}")
        try:
            read = msgspec.json.decode(data, type=_File)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:  # ValidationError is a DecodeError
            raise ValueError(f"from_json: not a plan: {error}") from None
        if read.format != _FORMAT or read.version != _VERSION:
            raise CheckpointMismatch(f"from_json: expected {_FORMAT} version {_VERSION}, got {read.format[:40]!r} version {read.version}")
        plan = read.plan
        segments = len(plan.place)
        if segments == 0 or len(plan.codecs) != segments or len(plan.exits) != segments - 1 or len(plan.reach) != segments:
            raise ValueError(f"from_json: not a plan: place, codecs, exits and reach must have S, S, S - 1 and S entries, got "
                             f"{segments}, {len(plan.codecs)}, {len(plan.exits)} and {len(plan.reach)}")  # fmt: skip
        for name in (*plan.place, plan.source):
            if name not in plan.nodes:
                raise ValueError(f"from_json: not a plan: node {name!r} is none of {list(plan.nodes)}")
        if prof is not None:
            plan.check(prof)
        return plan

    def save(self, path: str | os.PathLike) -> None:
        """Write the JSON to `path`."""
        Path(path).write_bytes(self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike, prof: Profile | None = None) -> Plan:
        """Read a file that `save` wrote; with `prof` also check that it is of the same network."""
        return cls.from_json(Path(path).read_bytes(), prof)


class _File(msgspec.Struct, forbid_unknown_fields=True):
    format: str
    version: int
    plan: Plan


def plan(
    prof: Profile,
    cluster: ClusterSpec | None = None,
    qos: QoS | None = None,
    kind: str = "auto",
    *,
    objective: str = "latency",
    exit_probability: Any = None,
    exit_loss: Any = None,
    head_seconds: Any = None,
    segment_memory: Any = None,
    weights: Mapping[str, float] | None = None,
    quantile: float | None = None,
    source: str | int = 0,
    batch: int = 1,
    answer_bytes: float = 64,
    **spatial: Any,
) -> Plan:
    """Place the segments of a profiled network on the nodes of a cluster: the best plan of the model, never worse than "all here" or "all there".

    Args:
        prof: measured costs. cluster: nodes and links (None: the profile's own). qos: its deadline bounds the expected latency, its
            `max_drop` the expected accuracy loss.
        kind: ``pipeline`` leaves every exit of `exit_probability` on; ``joint`` also chooses which exits are on; ``auto`` is joint where
            `exit_probability` is given, else pipeline, and spatial where `prof` is a Net; ``spatial`` splits the rows of a CNN
            (`fastee.planning.spatial.plan_spatial`; `prof` is then its Net, `cluster` its devices, and `links` and further arguments go there).
        objective: ``latency``; ``throughput`` (contiguous stages on distinct nodes; the busiest node or link); ``cost`` (`weights` over ``seconds`` of the
            task, ``money`` = node price x compute seconds, ``energy`` = watts x compute seconds, ``bytes`` sent; default money alone).
        exit_probability: [K] share of the tasks reaching an exit that it answers, taken as independent of which other exits are on.
        exit_loss: [K] expected accuracy loss of such a task. head_seconds: [K] or [K, N] part of a segment's profiled time that is its head,
            saved while the exit is off (None: unknown, nothing is saved).
        segment_memory: [S] bytes; needed where a node has a limit.
        quantile: every segment at mean + z * spread (algorithms.md 1.5), None: at its mean.
        source: the node that holds the input and wants the answer. batch: one of the profile's batch sizes; all figures are per batch.

    Raises:
        NoPlan: nothing keeps the limits; the message names the limit and by how much it is missed.

    >>> prof = Profile(nodes=("here", "there"), batch_sizes=(1,), mean=[[[.01], [.001]]] * 2, spread=[[[0], [0]]] * 2, codecs=("raw",),
    ...                wire_bytes=[[1000], [250]], codec_seconds=[[0], [0]], bandwidth=[[0, 1e6], [1e6, 0]], delay=[[0, .001], [.001, 0]])
    >>> plan(prof).place, round(plan(prof).latency * 1e3, 2)
    (('there', 'there'), 12.51)
    """
    if kind not in KINDS:
        raise ValueError(f"plan: kind must be one of {', '.join(KINDS)}, got {kind!r}{did_you_mean(str(kind), KINDS)}")
    if kind == "spatial" or (kind == "auto" and not isinstance(prof, Profile)):
        from fastee.planning.spatial import Net, plan_spatial

        if kind == "spatial" or isinstance(prof, Net):
            return plan_spatial(prof, cluster, **spatial)
    if spatial:
        raise TypeError(f"plan: unknown argument {next(iter(spatial))!r} for kind {kind!r}")
    if kind == "auto":
        kind = "pipeline" if exit_probability is None else "joint"
    if kind == "joint" and exit_probability is None:
        raise ValueError("plan: kind 'joint' needs exit_probability [K], the share of tasks that each exit answers")
    ask = question(
        prof, cluster, qos, objective=objective, weights=weights, source=source, batch=batch, quantile=quantile, exit_probability=exit_probability,
        exit_loss=exit_loss, head_seconds=head_seconds, segment_memory=segment_memory, answer_bytes=answer_bytes, choose_exits=kind == "joint",
    )  # fmt: skip
    return answer(ask, kind)


def answer(ask: Question, kind: str) -> Plan:
    """Solve the question, weigh the simple plans beside it, and return the better."""
    table = core("plan").Pipeline(ask.numbers)
    found = table.solve()
    others = _alternatives(ask)
    # A search cut short by its width may lose to a simple plan; then the simple plan is the answer.
    legal = [o for o in others if o[1]["found"]]
    least = min(legal, key=lambda o: o[1]["value"], default=None)
    if least is not None and least[1]["value"] < found["value"]:
        found = {**least[1], "bound": found["bound"], "exact": found["exact"]}
    if not found["found"]:
        raise NoPlan(f"plan: {_reason(ask, found['exact'])}")
    account = table.account(found["place"], found["codec"], found["on"])
    return Plan(
        kind=kind, objective=ask.objective, nodes=ask.nodes, source=ask.nodes[ask.source], place=tuple(ask.nodes[n] for n in found["place"]),
        codecs=tuple(None if c < 0 else ask.codecs[c] for c in found["codec"]), exits=tuple(found["on"]), value=found["value"],
        bound=found["bound"], exact=found["exact"], figures=_figures(account, ask.batch), memory=dict(zip(ask.nodes, account["memory"], strict=True)),
        reach=tuple(account["reach"]), alternatives=tuple(_alternative(ask, table, *other) for other in others), fingerprint=ask.fingerprint,
        batch=ask.batch, quantile=ask.quantile, deadline=ask.deadline, max_drop=ask.max_drop,
    )  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _figures(account: dict | None, batch: int) -> Figures:
    if account is None:
        return Figures(None, None, None, None, None)
    rate = batch / account["bottleneck"] if account["bottleneck"] > 0 else math.inf
    return Figures(*(_finite(v) for v in (account["seconds"], rate, account["cost"], account["bytes"], account["drop"])))


def _only(ask: Question, node: int) -> np.ndarray:
    run = np.full_like(ask.numbers["run"], math.inf)
    run[:, node] = ask.numbers["run"][:, node]
    return run


def _alternatives(ask: Question) -> list[tuple[str, dict, dict]]:
    """Return (name, placement, relaxed numbers) of "all here", of "send the input, all on" each other node, and of the plan without exits."""
    nodes = [ask.source, *(n for n in range(len(ask.nodes)) if n != ask.source)][:_MAX_ALTERNATIVES]
    tries = [("all here" if n == ask.source else f"send the input, all on {ask.nodes[n]}", ask.with_numbers(run=_only(ask, n))) for n in nodes]
    if ask.numbers["leave"].any() and ask.numbers["choose_exits"]:
        tries.append(("without exits", ask.with_numbers(leave=np.zeros_like(ask.numbers["leave"]))))
    return [(name, core("plan").Pipeline(numbers).solve(), numbers) for name, numbers in tries]


_UNLIMITED = dict(deadline=math.inf, max_drop=math.inf)


def _alternative(ask: Question, table: Any, name: str, placement: dict, numbers: dict) -> Alternative:
    reason = ""
    if not placement["found"]:
        free = {**numbers, **_UNLIMITED, "room": np.full(len(ask.nodes), math.inf)}
        placement = core("plan").Pipeline(free).solve()
        reason = _reason(Question(**{**ask.__dict__, "numbers": numbers}), True)
        if not placement["found"]:
            return Alternative(name, _figures(None, ask.batch), None, reason)
    account = table.account(placement["place"], placement["codec"], placement["on"])
    return Alternative(name, _figures(account, ask.batch), _finite(account["value"]), reason)


def _reason(ask: Question, proven: bool) -> str:
    """Say which limit no plan keeps."""
    n = ask.numbers
    solve = lambda **changes: core("plan").Pipeline({**n, **changes}).solve()
    open_room = np.full(len(ask.nodes), math.inf)
    for s, row in enumerate(n["run"]):
        if np.isinf(row).all():
            return f"segment {s} has no host"
    free = solve(**_UNLIMITED, room=open_room)
    if not free["found"]:
        stages = " in contiguous stages on distinct nodes" if ask.objective == "throughput" else ""
        return f"no path of links leads from {ask.nodes[ask.source]!r} over the hosts of all segments and back{stages}"
    fitting = solve(**_UNLIMITED)
    if not fitting["found"]:
        for s, need in enumerate(n["memory"]):
            most = n["room"][np.isfinite(n["run"][s])].max()
            if need > most:
                return f"segment {s} needs {need:g} bytes of memory, its hosts have at most {most:g}"
        total, room = n["memory"].sum(), n["room"].sum()
        if total > room:
            return f"the segments need {total:g} bytes of memory, the nodes have {room:g} together"
        return f"no placement fits the nodes' memory ({total:g} bytes of segments, limits {dict(zip(ask.nodes, n['room'].tolist(), strict=True))})"
    if not solve(deadline=math.inf)["found"]:
        least = solve(deadline=math.inf, max_drop=math.inf, objective=0)
        drop = core("plan").Pipeline(n).account(least["place"], least["codec"], least["on"])["drop"]
        return f"the exits lose {drop:g} of accuracy, max_drop is {n['max_drop']:g}; kind 'joint' may switch exits off"
    quickest = solve(deadline=math.inf, objective=0)
    if quickest["found"] and quickest["value"] > n["deadline"]:
        return f"the quickest plan takes {quickest['value'] * 1e3:.6g} ms, the deadline is {n['deadline'] * 1e3:.6g} ms"
    return "no plan keeps all limits together" if proven else "no plan that keeps the limits was found; the search was cut short by its width"

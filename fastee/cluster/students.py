"""A team of students, each on a node of its own, and the aggregator that stops them: ``student_cluster()`` (NoNN, DistrEE)."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import cloudpickle
import torch

from fastee import ops
from fastee.cluster import codec as codecs
from fastee.cluster.client import Client, NodeState, TaskAnswer, _Task
from fastee.cluster.endpoint import Item, Lost
from fastee.cluster.frame import FREE, Flag, Frame, Kind
from fastee.cluster.link import link_table
from fastee.cluster.local import LocalNode, check_nodes, end_nodes, launch, open_clusters
from fastee.cluster.messages import Refused, node_peer, to_payload
from fastee.cluster.result import ClusterResult
from fastee.cluster.students_worker import StudentSettings
from fastee.errors import ClusterError, FrameError, PeerLost
from fastee.nn.early_exit import update_with_tensors
from fastee.nn.students import StudentTeam

_WEIGHT = 0.1


@dataclass(frozen=True)
class StudentAnswer:
    """One answered task: logits [C], label, ``confidence`` -Delta, exit (0-based), latency in seconds since its clock started, whether the deadline
    (or the loss of every student) forced the exit, ``missing``: students that count as zeros in it."""

    logits: torch.Tensor
    label: int
    confidence: float
    exit: int
    latency: float
    forced: bool
    missing: frozenset[int]


@dataclass
class _State:
    """The aggregator's view of a task: the exit under way and since when, what came per exit, who is out, the answer so far."""

    out: set[int]
    since: float
    exit: int = 0
    shown: list[dict[int, torch.Tensor]] = field(default_factory=list)
    joined: torch.Tensor | None = None
    answered: set[int] = field(default_factory=set)
    best: tuple[torch.Tensor, float, frozenset[int]] | None = None


class StudentClient(Client):
    """The aggregator: sends every input to all living students and joins what they show, exit by exit (algorithm: docs/cluster.md)."""

    def __init__(self, names: Sequence[str], *, team: StudentTeam, straggler: float, ahead: int, **options: Any):
        self.team, self.straggler, self.ahead = team, straggler, ahead
        self._states: dict[int, _State] = {}
        self._steps = [(0.0, 0.0)] * team.num_exits  # mean and mean deviation of the seconds from one exit to the next
        super().__init__(names, machine=len(names), **options)

    # tasks

    def _send(self, task: _Task, entry: NodeState) -> None:
        up = {n.index for n in self.nodes if n.up}
        task.entry = task.place = entry.index
        task.visited = set(up)
        entry.in_flight += 1
        shown = [{} for _ in range(self.team.num_exits)]
        self._states[task.number] = _State(set(range(len(self.nodes))) - up, time.monotonic(), shown=shown)
        tensors, payload = codecs.pack((*task.values, torch.tensor([min(self._pending)])))
        for i in up:
            frame = Frame(Kind.TASK, task=task.number, origin=self._incarnation, hops=task.attempt << 8 | i, segment=1 + self.ahead, tensors=tensors, payload=payload)
            if not self._endpoint.put(node_peer(i), i, frame):
                self._miss(task, i)

    def _settle(self, task: _Task, *counters: str) -> bool:
        state = self._states.pop(task.number, None)
        found = super()._settle(task, *counters)
        if found and state is not None:
            for i in task.visited - state.out:
                done = to_payload(Refused("settled", ""))
                self._endpoint.put(node_peer(i), i, Frame(Kind.REFUSED, task=task.number, origin=self._incarnation, payload=done))
        return found

    def _start_over(self, number: int, attempt: int) -> None:
        self._states.pop(number, None)
        super()._start_over(number, attempt)

    def _lost(self, node: NodeState) -> None:
        for task in list(self._pending.values()):
            if node.index in task.visited:
                self._miss(task, node.index)

    def _handle(self, item: Item) -> None:
        if isinstance(item, Lost):
            task = self._pending.get(item.key[0])
            if task is not None and task.attempt == item.key[2] >> 8:
                self._miss(task, item.key[2] & 255)
        else:
            super()._handle(item)

    def _miss(self, task: _Task, student: int) -> None:
        """A student will not answer this task any more: zeros from now on; nobody left starts it over, or ends it with what there is."""
        state = self._states.get(task.number)
        if state is None:
            return
        state.out.add(student)
        if len(state.out) < len(self.nodes):
            self._join(task, state)
        elif state.best is not None:
            self._answer(task, state, forced=True)
        elif any(n.up for n in self.nodes):
            self._start_over(task.number, task.attempt)
        else:
            self._fail(task, PeerLost("cluster: every student was lost before the first exit"))

    def _answered(self, node: NodeState, frame: Frame) -> None:
        task, state = self._pending.get(frame.task), self._states.get(frame.task)
        if task is None or state is None or frame.hops >> 8 != task.attempt or not 0 <= frame.exit < self.team.num_exits:
            self.counts["duplicates"] += 1
            return
        values = codecs.unpack(frame)
        width = len(self.team.groups[node.index])
        if len(values) != 1 or values[0].shape != (1, width):
            raise FrameError(f"frame: student {node.name!r} shows [1, {width}], got {[list(v.shape) for v in values]}")
        if frame.exit < state.exit or node.index in state.shown[frame.exit]:
            self.counts["duplicates"] += 1  # the team went on without it; its next exit may come in time
            return
        state.shown[frame.exit][node.index] = values[0]
        self._join(task, state)

    # the aggregator

    def _join(self, task: _Task, state: _State, now_or_never: bool = False) -> None:
        """Go on while the exit under way is complete: every student that is not out has answered, or `now_or_never` the wait is over."""
        while task.number in self._states:
            here = state.shown[state.exit]
            waiting = set(range(len(self.nodes))) - state.out - set(here)
            if not here or (waiting and not now_or_never):
                return
            now_or_never = False
            self._exit(task, state, here)

    def _exit(self, task: _Task, state: _State, here: dict[int, torch.Tensor]) -> None:
        team, m, now = self.team, state.exit, time.monotonic()
        with torch.inference_mode():
            joined = team.join([here.get(i) for i in range(len(self.nodes))])
            logits = team.heads[m](joined)
            delta = math.inf if state.joined is None else float(team.change(joined, state.joined, set(here) & state.answered)[0])
        mean, spread = self._steps[m]
        off = now - state.since - mean
        self._steps[m] = (mean + _WEIGHT * off, spread + _WEIGHT * (abs(off) - spread)) if mean else (now - state.since, 0.0)
        state.best = logits, -delta, frozenset(range(len(self.nodes))) - set(here)
        if m == team.num_exits - 1 or delta < team.delta[m]:
            self._answer(task, state)
            return
        mean, spread = self._steps[m + 1]
        if task.deadline is not None and time.monotonic_ns() + (mean + 2 * spread) * 1e9 > task.due:
            self._answer(task, state, forced=True)
            return
        state.exit, state.since, state.joined, state.answered = m + 1, now, joined, set(here)
        for i in set(range(len(self.nodes))) - state.out:
            more = Frame(Kind.CREDIT, task=task.number, origin=self._incarnation, segment=m + 2 + self.ahead, payload=b"{}")
            self._endpoint.put(node_peer(i), i, more)

    def _answer(self, task: _Task, state: _State, forced: bool = False) -> None:
        logits, confidence, missing = state.best
        exit_ = state.exit - (state.exit > 0 and not state.shown[state.exit])
        latency = (time.monotonic_ns() - task.start) * 1e-9
        label = int(ops.row_stats(logits).label[0])
        late = task.deadline is not None and latency > task.deadline
        if self._settle(task, "answers", *["forced"] * forced, *["late"] * late):
            self.exits[exit_] += 1
            answer = StudentAnswer(logits[0], label, confidence, exit_, latency, forced, missing)
            self._finish(task, answer)

    # clocks

    def _until(self, task: _Task, state: _State) -> float:
        """When the exit under way is joined without those that are missing, or the answer so far leaves: monotonic seconds."""
        wait = state.since + self.straggler if state.shown[state.exit] else math.inf
        return min(wait, task.due * 1e-9) if task.deadline is not None and (state.best is not None or state.shown[state.exit]) else wait

    def _pause(self) -> float:
        soonest = min((self._until(self._pending[n], s) for n, s in list(self._states.items()) if n in self._pending), default=math.inf)
        return min(super()._pause(), max(0.0, soonest - time.monotonic()))

    def _watch(self, now: int) -> None:
        super()._watch(now)
        for number, state in list(self._states.items()):
            task = self._pending.get(number)
            if task is not None and self._until(task, state) <= now * 1e-9:
                if state.shown[state.exit]:
                    self._join(task, state, now_or_never=True)
                else:
                    self._answer(task, state, forced=True)


class StudentCluster:
    """Running students; made by :func:`student_cluster`, a context manager, callable.

    ``cluster(x, deadline=0.1)`` answers a batch, ``cluster.submit(row)`` returns the Future of a `StudentAnswer`; ``.nodes``, ``.stats()``, ``.close()``.
    """

    def __init__(self, team: StudentTeam, nodes: list[LocalNode], client: StudentClient):
        self.nodes, self.team = nodes, team
        self._client = client
        self._closed = False
        open_clusters.add(self)

    def __enter__(self) -> StudentCluster:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def __call__(self, x: Any, deadline: float | None = None, on_error: str = "raise") -> ClusterResult:
        """Answer every row of `x` as a task of its own, at most `credit` at once; ``.node`` is -1, ``.wire_bytes`` 0 (not told). `on_error`: "raise" or "return"."""
        if on_error not in ("raise", "return"):
            raise ValueError(f"on_error: got {on_error!r}, expected 'raise' or 'return'")
        values = self.team.students[0].inputs.flat(x)
        futures = [self._submit(tuple(v[i : i + 1] for v in values), deadline, False) for i in range(len(values[0]))]
        answers = [future.exception() or future.result() for future in futures]
        if on_error == "raise" and (error := next((a for a in answers if isinstance(a, Exception)), None)) is not None:
            raise error
        rows = [a if isinstance(a, Exception) else TaskAnswer(a.logits, a.label, a.confidence, a.exit, -1, a.latency, 0, a.forced) for a in answers]
        return ClusterResult(rows, self.team.num_classes)

    def submit(self, row: Any, deadline: float | None = None) -> Future:
        """Send one input (batch dimension of 1) and return the Future of its `StudentAnswer`; the clock starts now."""
        values = self.team.students[0].inputs.flat(row)
        if len(values[0]) != 1:
            raise ValueError(f"row: expected one row, got {len(values[0])}")
        return self._submit(values, deadline, True)

    def _submit(self, values: tuple[torch.Tensor, ...], deadline: float | None, from_now: bool) -> Future:
        if self._closed:
            raise ClusterError("cluster: it is closed")
        if deadline is not None and (isinstance(deadline, bool) or not isinstance(deadline, int | float) or not 0 < deadline < 1e6):
            raise ValueError(f"deadline: expected seconds > 0 or None, got {deadline!r}")
        return self._client.submit(tuple(v.detach() for v in values), deadline, b"", Flag.NONE, FREE, from_now=from_now)

    def stats(self) -> dict[str, Any]:
        """Return counters: tasks == answers + errors + pending always; ``exits`` (exit -> answers), ``forced``, ``late``, which nodes are ``up``."""
        counts, pending = self._client.snapshot()
        wanted = ("tasks", "answers", "errors", "retries", "duplicates", "forced", "late")
        exits = {k: self._client.exits[k] for k in sorted(self._client.exits)}
        return {**{k: counts[k] for k in wanted}, "pending": pending, "exits": exits, "up": {n.name: n.up for n in self._client.nodes}}

    def close(self) -> None:
        """End the client and all processes; what is pending fails with ClusterError. Harmless when repeated."""
        if not self._closed:
            self._closed = True
            open_clusters.discard(self)
            self._client.close()
            end_nodes(self.nodes)


def student_cluster(
    team: StudentTeam,
    link: str | Mapping[tuple[int, int], str] | None = "20mbit 10ms",
    slowdown: float | Sequence[float] | None = None,
    *,
    names: Sequence[str] | None = None,
    straggler: float = 0.1,
    ahead: int = 1,
    credit: int = 4,
    grace: float = 0.5,
    timeout: float = 30.0,
    start_timeout: float = 60.0,
) -> StudentCluster:
    """Start a process per student of `team` and return the :class:`StudentCluster`, whose aggregator joins what they show at each exit.

    A row leaves at the first exit where the joined feature has settled (`team.set_delta`), or forced when the next exit would come after its deadline.
    Nothing but features of a few hundred values crosses the links after the input. `straggler`: seconds after the exit before, or the start, until
    the team goes on without students that have not answered; these, and lost ones, count as zeros, and may answer again at the next exit. `ahead`: segments that
    a student runs before the aggregator wants them (0: it waits for every decision). `link`, `slowdown`, the rest: as in ``spatial_cluster``; the
    caller is machine number N. A task ends in ``PeerLost`` when no student answers its first exit.

    >>> with fastee.student_cluster(team.set_delta(0.4), link="20mbit 10ms") as cluster:     # doctest: +SKIP
    ...     out = cluster(x, deadline=0.1)
    """
    if not isinstance(team, StudentTeam):
        raise TypeError(f"team: expected a StudentTeam, got {type(team).__name__}")
    names = tuple(f"student{i}" for i in range(len(team.students))) if names is None else names
    count, names, factors = check_nodes(len(team.students), names, slowdown)
    links = link_table(link, count + 1)
    for label, value in (("straggler", straggler), ("grace", grace), ("timeout", timeout), ("start_timeout", start_timeout)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
            raise ValueError(f"{label}: expected seconds, got {value!r}")
    for label, value, low, high in (("ahead", ahead, 0, 64), ("credit", credit, 1, 1024)):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{label}: expected an int in {low}..{high}, got {value!r}")
    fingerprint = _fingerprint(team)
    blobs = (cloudpickle.dumps((team.students[i], team.branches[i], StudentSettings(i, names, fingerprint, factors[i]), links)) for i in range(count))
    client = partial(StudentClient, names, team=team.eval(), straggler=straggler, ahead=ahead, fingerprint=fingerprint, links=links, credit=credit, grace=grace,
                     timeout=timeout)  # fmt: skip
    return StudentCluster(team, *launch(names, blobs, client, start_timeout, "fastee.cluster.students_worker"))


def _fingerprint(team: StudentTeam) -> bytes:
    """16 bytes that change with the students, the branches, the heads or who imitates what."""
    digest = hashlib.blake2b(repr(([s.fingerprint for s in team.students], team.groups)).encode(), digest_size=16)
    update_with_tensors(digest, {**team.branches.state_dict(prefix="branch."), **team.heads.state_dict(prefix="head.")})
    return digest.digest()

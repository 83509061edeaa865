"""The client's side: every task gets exactly one answer or one typed error, whatever happens to the nodes.

Tasks are admitted under a credit window per entry node. The client follows where each task is (nodes tell when they pass one on),
starts a task over when a node that had it is lost, and drops answers that come twice. One thread receives; with a concurrent
endpoint the caller's own thread sends, which saves a hand-over between threads on every task.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import secrets
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import torch

from fastee.cluster import codec as codecs
from fastee.cluster.endpoint import Arrival, Complaint, Identity, Item, Lost, open_endpoint
from fastee.cluster.frame import FREE, NO_DEADLINE, Flag, Frame, Kind
from fastee.cluster.keys import Keys
from fastee.cluster.link import Link
from fastee.cluster.messages import (
    Heartbeat,
    Hello,
    Moved,
    Ports,
    Refused,
    client_peer,
    from_payload,
    node_of,
    node_peer,
    to_payload,
)
from fastee.cluster.transport import PeerEvent
from fastee.errors import ClusterError, DeadlineExceeded, FingerprintMismatch, FrameError, PeerLost, Rejected

MAX_ATTEMPTS = 16
MAX_PENDING = 65536
_TICK_SECONDS = 0.05
_ATTEMPT_STEP = 256
_HELP_SECONDS = 0.05
# A node whose heartbeats (every 0.1 s) have not been heard for so long is suspect: not lost yet, but nothing that has a deadline waits for it.
_SUSPECT_SECONDS = 0.25
_WATCH_NS = 5_000_000  # between two looks whether the processes live: a system call each
# A waiting caller whose answers came sooner than this looks again and again instead of sleeping, for twice as long as they took: median of a 64 KB
# offload over raw libzmq's 2.6 instead of 3.0 on two idle cores, one run of 400 trips each (2026-11).
_SPIN_SECONDS = 0.001
_WAITED_WEIGHT = 0.2


class TaskAnswer(NamedTuple):
    """One answered task: logits [C], label, confidence, exit (0-based, K = the end), name index of the node where it ended,
    latency in seconds since its clock started, bytes it put on links between machines, whether the deadline forced the exit."""

    logits: torch.Tensor
    label: int
    confidence: float
    exit: int
    node: int
    latency: float
    wire_bytes: int
    forced: bool


@dataclass(slots=True)
class _Task:
    number: int
    values: tuple[torch.Tensor, ...]
    deadline: float | None
    route: bytes
    flags: Flag
    codec: int
    future: Future | None = None
    outcome: Any = None  # a TaskAnswer or an exception
    start: int = 0
    expiry: int = 0
    entry: int = -1
    place: int = -1
    hops: int = 0
    attempt: int = 0
    visited: set[int] = field(default_factory=set)
    due: int = NO_DEADLINE


class NodeState:
    """What the client knows of a node."""

    def __init__(self, index: int, name: str):
        self.index, self.name = index, name
        self.hello = self.connected = self.up = self.exited = self.suspect = False
        self.heard = 0.0
        self.refusal = ""
        self.told = Hello(name, index, 0)
        self.beat = Heartbeat(0, 0.0, 0)
        self.beats = 0
        self.in_flight = 0


class Client:
    """Submits tasks to nodes and settles their futures; thread-safe towards callers.

    `running` tells per node whether its process lives. `machine`: where the caller is, an index of `links`. Times: `grace` seconds past a deadline, `timeout` seconds for a task without one.
    `segments` of the net: with it, tasks that have a deadline and no plan are taken away from suspect nodes and run on one that is not (0: never).
    """

    def __init__(
        self,
        names: Sequence[str],
        ports: Sequence[Ports],
        fingerprint: bytes,
        links: Mapping[tuple[int, int], Link],
        *,
        credit: int,
        grace: float,
        timeout: float,
        running: Callable[[int], bool] = lambda index: True,
        keys: Keys | None = None,
        public: Sequence[str] = (),
        machine: int = 0,
        segments: int = 0,
    ):
        self.nodes = [NodeState(i, name) for i, name in enumerate(names)]
        self.credit, self.grace, self.timeout = credit, grace, timeout
        self.counts: Counter[str] = Counter()
        self.exits: Counter[int] = Counter()
        self.served: Counter[int] = Counter()
        self._ports, self._fingerprint, self._links, self._running = list(ports), fingerprint, dict(links), running
        self._keys, self._public, self._machine, self._segments = keys, tuple(public), machine, segments
        self._by_peer = {node_peer(node.index): node for node in self.nodes}
        self._watched, self._suspected, self._changes = 0.0, False, True
        self._incarnation = secrets.randbits(63)
        self._numbers = itertools.count(secrets.randbits(31) << 32)
        self._lock = threading.RLock()
        self._turned, self._waiters = threading.Condition(self._lock), 0
        self._settled: deque[_Task] = deque()
        self._watch_at = 0
        self._waited = 1.0  # seconds until the answer, lately
        self._arrivals: deque[_Task] = deque()
        self._queue: deque[_Task] = deque()
        self._pending: dict[int, _Task] = {}
        self._expiries: list[tuple[int, int]] = []
        self._again: list[tuple[int, int, int]] = []
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._fatal: BaseException | None = None
        self._receiver = threading.Lock()
        self._helpers, self._helped, self._needed = 0, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._main, name="fastee-cluster", daemon=True)
        self._ready = threading.Event()
        self._thread.start()
        self._ready.wait(10)

    # called from any thread

    def submit(self, values: tuple[torch.Tensor, ...], deadline: float | None, route: bytes, flags: Flag, codec: int, *, from_now: bool) -> Future:
        """Queue one task (every tensor with one row) and return the Future of its `TaskAnswer`.

        With `from_now` the task's clock starts here, else when its credit is there (a closed loop of `credit` tasks).
        """
        future: Future = Future()
        future.set_running_or_notify_cancel()
        self.begin(values, deadline, route, flags, codec, from_now=from_now, future=future)
        return future

    def begin(
        self, values: tuple[torch.Tensor, ...], deadline: float | None, route: bytes, flags: Flag, codec: int, *, from_now: bool = False,
        future: Future | None = None,
    ) -> _Task:  # fmt: skip
        """Queue one task as `submit` does; without a `future` its outcome is for `wait` alone, which spares making and setting one."""
        now = time.monotonic_ns()
        task = _Task(next(self._numbers), values, deadline, route, flags, codec, future)
        with self._lock:
            if self._fatal is not None:
                raise ClusterError(f"cluster: its I/O thread failed: {self._fatal!r}")
            if self._stop.is_set():
                raise ClusterError("cluster: it is closed")
            if len(self._arrivals) + len(self._pending) >= MAX_PENDING:
                raise Rejected(f"cluster: {MAX_PENDING} tasks are pending already; slow down")
            if from_now:
                self._start(task, now)
            entry = self._entry() if self._endpoint.concurrent else None
            if entry is not None and entry.in_flight < self.credit and not (self._queue or self._arrivals):
                self._take_up(task)
                self._run_clock(task)
                self._send(task, entry)  # what can wait is done while the task is on its way
            else:
                self._arrivals.append(task)
                if entry is not None:
                    self._admit()
            self.counts["tasks"] += 1
        self._settle_futures()
        if future is not None:
            self._needed.set()
        # The thread looks at its clock every _TICK_SECONDS anyway.
        if entry is None or (future is not None and task.expiry - now < _TICK_SECONDS * 1e9):
            self._endpoint.wake()
        return task

    def wait(self, tasks: Sequence[_Task]) -> None:
        """Return when all `tasks` have their outcome. Meanwhile the caller receives in the thread's place: an answer that must wake first the
        thread and then the caller costs two switches of threads and of the interpreter's lock."""
        if not self._endpoint.concurrent:
            for task in tasks:
                while task.outcome is None:
                    self._await_turn(task)
            return
        with self._lock:
            self._helpers += 1
        began = time.monotonic()
        spin = 2 * self._waited if self._waited < _SPIN_SECONDS else 0.0
        try:
            if began - self._helped > _HELP_SECONDS:
                self._endpoint.wake()  # the thread may stand in `receive`
            for task in tasks:
                while task.outcome is None:
                    if not self._stop.is_set() and self._receiver.acquire(blocking=False):
                        try:
                            self._turn(spin)
                        except Exception as error:  # as in the thread, which then fails what is pending
                            self._fatal = error
                            self._stop.set()
                            self._needed.set()
                        finally:
                            self._helped = time.monotonic()
                            self._release_receiver()
                    else:
                        self._await_turn(task)
        finally:
            self._waited += _WAITED_WEIGHT * (time.monotonic() - began - self._waited)
            with self._lock:
                self._helpers -= 1
            if self._pending:
                self._needed.set()

    def _await_turn(self, task: _Task) -> None:
        """Sleep until the task has its outcome or nobody receives any more."""
        with self._turned:
            self._waiters += 1  # before the look at the receiver: who leaves it looks here afterwards
            try:
                if task.outcome is None and (self._receiver.locked() or self._stop.is_set() or not self._endpoint.concurrent):
                    self._turned.wait(_TICK_SECONDS)
            finally:
                self._waiters -= 1

    def _release_receiver(self) -> None:
        self._receiver.release()
        self._notify()

    def _notify(self) -> None:
        if self._waiters:
            with self._turned:
                self._turned.notify_all()

    def wait_ready(self, timeout: float) -> list[NodeState]:
        """Wait until every node has said HELLO and reaches every other; returns those that have not by then."""
        end = time.monotonic() + timeout

        def missing() -> list[NodeState]:
            return [n for n in self.nodes if not (n.hello and n.up and len(n.beat.up) == len(self.nodes) - 1)]

        with self._changed:
            while (late := missing()) and time.monotonic() < end and not any(n.exited or n.refusal for n in late) and self._fatal is None:
                self._changed.wait(0.05)
        return late

    def bytes_from_here(self) -> dict[int, int]:
        """Bytes that the client itself put on the link from machine 0 to each other machine."""
        return dict(self._endpoint.bytes_to)

    def snapshot(self) -> tuple[Counter[str], int]:
        """Return the counters and the number of tasks under way, taken at one moment."""
        with self._lock:
            return Counter(self.counts), len(self._arrivals) + len(self._pending)

    def close(self, timeout: float = 5.0) -> None:
        """Stop the thread; what is still pending fails with ``ClusterError``."""
        with self._lock:
            self._stop.set()
        self._needed.set()
        with contextlib.suppress(AttributeError):
            self._endpoint.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    # the thread

    def _main(self) -> None:
        endpoint = None
        try:
            hello = to_payload(Hello("client", -1, os.getpid()))
            endpoint = self._endpoint = open_endpoint(
                Identity(client_peer(self._incarnation), self._machine, self._incarnation, self._fingerprint, hello, self._links, keys=self._keys)
            )
            for node, at in zip(self.nodes, self._ports, strict=True):
                endpoint.connect(node_peer(node.index), node.index, at.host, at, self._public[node.index] if self._public else "")
            self._ready.set()
            while not self._stop.is_set():
                if self._helpers or time.monotonic() - self._helped < _HELP_SECONDS:
                    self._needed.wait(_HELP_SECONDS)
                    self._needed.clear()
                    if self._helpers:
                        continue
                self._receiver.acquire()
                try:
                    self._turn()
                finally:
                    self._release_receiver()
        except BaseException as error:
            self._fatal = error
            raise
        finally:
            self._ready.set()
            with self._lock:
                left = [*self._pending.values(), *self._arrivals]
                self._arrivals.clear()
                self._pending.clear()
                self._stop.set()
                self.counts["errors"] += len(left)
            why = "it was closed before the task was answered" if self._fatal is None else f"its I/O thread failed: {self._fatal!r}"
            for task in left:
                self._finish(task, ClusterError(f"cluster: {why}"))
            self._settle_futures()
            if endpoint is not None:
                endpoint.close()

    def _turn(self, spin: float = 0.0) -> None:
        items = self._endpoint.receive(self._pause(), spin=spin)
        with self._lock:
            for item in items:
                self._handle(item)
            now = time.monotonic_ns()
            if self._arrivals or self._queue or self._soonest() <= now:
                self._admit()
            self._watch(now)
        self._settle_futures()

    def _finish(self, task: _Task, outcome: TaskAnswer | Exception) -> None:
        """Give a task its one outcome; its future is told by `_settle_futures`."""
        task.outcome = outcome
        if task.future is not None:
            self._settled.append(task)

    def _settle_futures(self) -> None:
        """Tell the callers, outside the lock: what hangs on a future may call back into this client."""
        self._notify()
        while self._settled:
            try:
                task = self._settled.popleft()
            except IndexError:  # another thread took the last one
                return
            if isinstance(task.outcome, Exception):
                task.future.set_exception(task.outcome)
            else:
                task.future.set_result(task.outcome)

    def _pause(self) -> float:
        return min(_TICK_SECONDS, max(0.0, (self._soonest() - time.monotonic_ns()) * 1e-9))

    def _soonest(self) -> int:
        expiry = self._expiries[0][0] if self._expiries else NO_DEADLINE
        return min(expiry, self._again[0][0]) if self._again else expiry

    def _start(self, task: _Task, now: int) -> None:
        task.start = now
        if task.deadline is None:
            task.expiry = now + round(self.timeout * 1e9)
        else:
            task.due = now + round(task.deadline * 1e9)
            task.expiry = task.due + round(self.grace * 1e9)

    # membership

    def _watch(self, now: int) -> None:
        look = now >= self._watch_at
        if not (look or self._changes):
            return
        self._changes = False
        if look:
            self._watch_at = now + _WATCH_NS
        for node in self.nodes:
            if look and not node.exited and not self._running(node.index):
                node.exited = True
            up = node.hello and node.connected and not node.exited
            if up != node.up:
                node.up = up
                (self._found if up else self._lost)(node)
                self._tell()
        self._suspect()
        if all(node.exited for node in self.nodes):
            for task in list(self._pending.values()):
                self._fail(task, PeerLost("cluster: all nodes are dead; close it and start a new one"))

    def _suspect(self) -> None:
        """Start over what waits at nodes that have fallen silent, while somebody else can still make the deadline."""
        now = time.monotonic()
        if now - self._watched > _SUSPECT_SECONDS / 2:  # this process stood still: silence of the others proves nothing
            for node in self.nodes:
                node.heard = now
        self._watched = now
        for node in self.nodes:
            before, node.suspect = node.suspect, node.up and now - node.heard > _SUSPECT_SECONDS
            if node.suspect and not before:
                for task in list(self._pending.values()):
                    if node.index in task.visited and self._may_flee(task):
                        self._start_over(task.number, task.attempt)
        self._suspected = any(n.suspect for n in self.nodes)

    def _may_flee(self, task: _Task) -> bool:
        return self._segments > 0 and task.deadline is not None and not task.route and any(n.up and not n.suspect for n in self.nodes)

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _lost(self, node: NodeState) -> None:
        for task in list(self._pending.values()):
            if node.index in task.visited:
                self._start_over(task.number, task.attempt)

    def _found(self, node: NodeState) -> None:
        """A node is up, for the first time or again."""

    # tasks

    def _admit(self) -> None:
        with self._lock:
            for task in self._arrivals:
                self._take_up(task)
            self._queue += self._arrivals
            self._arrivals.clear()
        now = time.monotonic_ns()
        while self._again and self._again[0][0] <= now:
            _, number, attempt = heapq.heappop(self._again)
            task = self._pending.get(number)
            if task is not None and task.attempt == attempt:
                self._queue.appendleft(task)
        while self._expiries and self._expiries[0][0] <= now:
            task = self._pending.get(heapq.heappop(self._expiries)[1])
            if task is not None:
                self._expire(task)
        entry = self._entry()
        if entry is None:
            self._nobody()
        while entry is not None and self._queue and entry.in_flight < self.credit:
            task = self._queue.popleft()
            if task.number in self._pending:
                self._run_clock(task)
                self._send(task, entry)

    def _entry(self) -> NodeState | None:
        found = None
        for node in self.nodes:
            if node.up and not node.beat.leaving:
                if not node.suspect:
                    return node
                found = found or node
        return found

    def _run_clock(self, task: _Task) -> None:
        if not task.start:
            self._start(task, time.monotonic_ns())
            heapq.heappush(self._expiries, (task.expiry, task.number))

    def _take_up(self, task: _Task) -> None:
        self._pending[task.number] = task
        if task.start:
            heapq.heappush(self._expiries, (task.expiry, task.number))

    def _nobody(self) -> None:
        """No node is up: the clock of every waiting task runs, so that it ends in an error and not in waiting."""
        refusal = next((n.refusal for n in self.nodes if n.refusal), "")
        for task in self._queue:
            self._run_clock(task)
            if refusal:
                self._fail(task, FingerprintMismatch(f"cluster: no node takes this client: {refusal}"))

    def _send(self, task: _Task, entry: NodeState) -> None:
        """Send a task, new or again; with the lock held, for which its answer waits until it is in the books."""
        task.hops = task.attempt * _ATTEMPT_STEP
        # While a node is suspect the others do not know it yet and would go on sending there: the task stays where it enters.
        fleeing = self._suspected and self._may_flee(task)
        route = bytes([entry.index]) * self._segments if fleeing else task.route
        codec = "raw" if task.codec == FREE or entry.index == 0 else codecs.codec_name(task.codec)
        peer, sent = node_peer(entry.index), None
        if self._endpoint.concurrent and codec == "raw":
            sent = self._endpoint.submit(peer, entry.index, task.number, task.hops, task.codec, task.flags, route, task.values, task.due)
        if sent is None:
            sent = self._endpoint.put(peer, entry.index, self._frame(task, route, codec), task.due)
        task.entry = task.place = entry.index
        task.visited = {entry.index}
        entry.in_flight += 1
        if not sent:
            self._fail(task, PeerLost(f"cluster: the link from {self.nodes[0].name!r} to {entry.name!r} is down and no nearer node is up"))

    def _frame(self, task: _Task, route: bytes, codec: str) -> Frame:
        tensors, payload = codecs.pack(task.values, codec)
        return Frame(
            Kind.TASK,
            task=task.number,
            origin=self._incarnation,
            codec=task.codec,
            flags=task.flags,
            hops=task.hops,
            route=route,
            tensors=tensors,
            payload=payload,
        )

    def _start_over(self, number: int, attempt: int) -> None:
        """Send a task anew from its input, unless this attempt is already history."""
        task = self._pending.get(number)
        if task is None or task.attempt != attempt or task.entry < 0:
            return
        self._release(task)
        task.attempt += 1
        if task.attempt >= MAX_ATTEMPTS:
            self._fail(task, PeerLost(f"cluster: the task was started {MAX_ATTEMPTS} times and lost each time"))
            return
        self.counts["retries"] += 1
        lost_host = any(n != FREE and not self.nodes[n].up for n in task.route)
        if task.route and (lost_host or task.attempt > 2):
            task.route = b""
            self.counts["replanned"] += 1
        # The first retry is at once; later ones wait, or two nodes that lost each other would be asked in a tight loop.
        wait = 0 if task.attempt == 1 else min(0.2, 0.01 * 2**task.attempt)
        heapq.heappush(self._again, (time.monotonic_ns() + round(wait * 1e9), number, task.attempt))

    def _release(self, task: _Task) -> None:
        if task.entry >= 0:
            self.nodes[task.entry].in_flight -= 1
            task.entry = task.place = -1

    def _expire(self, task: _Task) -> None:
        where = f"last seen at node {self.nodes[task.place].name!r}" if task.place >= 0 else "not taken by any node"
        limit = f"timeout of {self.timeout} s" if task.deadline is None else f"deadline of {task.deadline} s plus {self.grace} s of grace"
        self._fail(task, DeadlineExceeded(f"cluster: no answer within the {limit}; the task was {where}"))

    def _settle(self, task: _Task, *counters: str) -> bool:
        with self._lock:
            found = self._pending.pop(task.number, None) is not None
            if found:
                for counter in counters:
                    self.counts[counter] += 1
        if found:
            self._release(task)
        return found

    def _fail(self, task: _Task, error: Exception) -> None:
        if self._settle(task, "errors", f"error {type(error).__name__}"):
            self._finish(task, error)

    # what nodes say

    def _handle(self, item: Item) -> None:
        if isinstance(item, Arrival):
            node = self._by_peer[item.peer]
            node.heard = time.monotonic()
            try:
                self._act(node, item.frame)
            except FrameError as error:
                self._complain(node, str(error))
        elif isinstance(item, PeerEvent):
            self._by_peer[item.peer].connected = item.up
            self._changes = True
        elif isinstance(item, Lost):
            self._start_over(item.key[0], item.key[2] // _ATTEMPT_STEP)
        elif isinstance(item, Complaint):
            node = self.nodes[node_of(item.peer)]
            if item.keys and not node.hello:
                node.refusal = f"no connection to node {node.name!r}: {item.reason}"
                self._tell()
            self._complain(node, item.reason)

    def _complain(self, node: NodeState, reason: str) -> None:
        self.counts["bad frames"] += 1
        print(f"cluster: ignored bytes from node {node.name!r}: {reason}", file=sys.stderr)

    def _act(self, node: NodeState, frame: Frame) -> None:
        kind = frame.kind
        if kind is Kind.ANSWER:
            self._answered(node, frame)
        elif kind is Kind.REFUSED:
            self._refused(node, frame, from_payload(frame, Refused))
        elif kind is Kind.HEARTBEAT:
            node.beat = from_payload(frame, Heartbeat)
            node.beats += 1
            self._tell()
        elif kind is Kind.HELLO:
            node.told = from_payload(frame, Hello)
            node.hello = self._changes = True
            self._tell()
        elif kind is Kind.MOVED:
            target, task = from_payload(frame, Moved).node, self._pending.get(frame.task)
            if task is not None and frame.hops // _ATTEMPT_STEP == task.attempt and 0 <= target < len(self.nodes):
                task.visited.add(target)
                if frame.hops > task.hops:
                    task.hops, task.place = frame.hops, target
                if not self.nodes[target].up:
                    self._start_over(task.number, task.attempt)

    def _answered(self, node: NodeState, frame: Frame) -> None:
        task = self._pending.get(frame.task)
        if task is None:
            self.counts["duplicates"] += 1
            return
        logits, label, confidence, exit_, wire_bytes, forced = codecs.unpack_answer(frame)
        latency = (time.monotonic_ns() - task.start) * 1e-9
        late = task.deadline is not None and latency > task.deadline
        if self._settle(task, "answers", *["forced"] * forced, *["late"] * late):
            self.exits[exit_] += 1
            self.served[node.index] += 1
            self._finish(task, TaskAnswer(logits, label, confidence, exit_, node.index, latency, wire_bytes, forced))

    def _refused(self, node: NodeState, frame: Frame, refusal: Refused) -> None:
        if refusal.code == "fingerprint" and not node.hello:
            node.refusal = refusal.reason
            self._tell()
        task = self._pending.get(frame.task)
        if task is None or frame.hops // _ATTEMPT_STEP != task.attempt:
            return
        if refusal.code == "leaving":
            node.beat = msgspec.structs.replace(node.beat, leaving=True)
        if refusal.code in ("undeliverable", "leaving"):
            self._start_over(task.number, task.attempt)
        elif refusal.code == "rejected":
            self._fail(task, Rejected(f"cluster: {refusal.reason}"))
        elif refusal.code == "late":
            self._fail(task, DeadlineExceeded(f"cluster: the deadline of {task.deadline} s was past on arrival at node {node.name!r}"))
        elif refusal.code == "fingerprint":
            self._fail(task, FingerprintMismatch(f"cluster: node {node.name!r} refused the task: {refusal.reason}"))
        else:
            self._fail(task, ClusterError(f"cluster: {refusal.code} task: {refusal.reason}"))

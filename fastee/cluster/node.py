"""One node's work, independent of sockets: tasks in, segments run, every next step asked of the scheduler, frames out.

A node is driven by one thread (:meth:`Node.run`); others talk to it through :meth:`Node.post` only. What it wants sent goes to
the ``emit`` callable that it was given, which may be called from that thread only and must not block.
"""

from __future__ import annotations

import heapq
import itertools
import math
import queue
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fastee.cluster import codec as codecs
from fastee.cluster.endpoint import TaskKey
from fastee.cluster.frame import FREE, NO_DEADLINE, Flag, Frame, Kind
from fastee.cluster.keys import Keys
from fastee.cluster.messages import Heartbeat, Moved, Refused, to_payload
from fastee.errors import FrameError
from fastee.nn.result import judge
from fastee.scheduling import Action, Decision, Profile, QoS, Scheduler

TASK_OVERHEAD = 136
"""Bytes of a frame beside its tensors' values: header, route, one or two table rows."""
_SCHEDULERS_KEPT = 32
_MAX_TASKS = 4096
_STALE_NS = 1_000_000  # a task that waited longer than this is decided anew before it runs
_SERVICE_WEIGHT = 0.1


@dataclass
class Settings:
    """What a node is told at start: who it is, the declared slowness, the rule, the credit towards each peer, the scheduler's policy with its params;
    with CURVE its keys, the public keys that may connect (-> name) and those of all nodes by index; groups of nodes whose links from here are one medium."""

    index: int
    names: tuple[str, ...]
    fingerprint: bytes
    slowdown: float = 1.0
    thresholds: tuple[float, ...] = ()
    qos: QoS = field(default_factory=QoS)
    credit: int = 8
    keys: Keys | None = None
    allowed: dict[str, str] = field(default_factory=dict)
    public: tuple[str, ...] = ()
    policy: str = "deadline"
    params: dict[str, Any] = field(default_factory=dict)
    media: Sequence[Sequence[int]] = ()


@dataclass
class Outgoing:
    """A frame for a peer: ``target`` is a node index, or -1 for the client ``frame.origin``; ``deadline`` (ns, this node's clock);
    ``keyed``: it settles its task, unless that task's armed answer left before."""

    target: int
    frame: Frame
    deadline: int = NO_DEADLINE
    keyed: bool = False


@dataclass
class _Work:
    """A task on this node. ``segment`` is the next to run; ``carry`` is None until the payload was unpacked."""

    frame: Frame
    sender: int
    deadline: int
    order: int
    scheduler: Scheduler
    handle: int
    segment: int
    exit: int = -1
    confidence: float = math.nan
    carry: codecs.Carry | None = None
    head: Any = None
    credited: bool = False
    since: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """Earliest deadline first, then the oldest: a task that continues stays ahead of those that came after it."""
        return self.deadline, self.order


class Node:
    """A machine of the cluster: runs segments of `net` one task at a time and follows its scheduler.

    `net` offers ``num_segments``, ``num_classes``, ``run_segment(i, carry)`` and ``exit_step(i, carry, logits=True)``. A ``slowdown`` f > 1
    emulates a slower machine: after t seconds of this thread's processor time the node stays busy for (f-1)*t more, while it still decides on arrivals.
    """

    def __init__(
        self,
        net: Any,
        settings: Settings,
        profile: Profile,
        emit: Callable[[Outgoing], None],
        clock: Callable[[], int] = time.monotonic_ns,
        arm: Callable[[Outgoing], None] | None = None,
    ):
        self.net = net
        self.settings = settings
        self.index = settings.index
        self.profile = profile
        self.handled = 0
        self.service = 0.0
        self.segments = [0.0] * net.num_segments
        self.exits = [0] * net.num_segments
        self.late = self.forced = 0
        self.shortcut: Any = None  # the native way of a task that comes alone, told which schedulers there are
        self._name = settings.names[settings.index]
        self._emit, self._clock, self._arm = emit, clock, arm
        self._answered: dict[tuple[int, int, int], None] = {}
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._ready: list[tuple[tuple[int, int], _Work]] = []
        self._waiting: dict[Scheduler, dict[int, _Work]] = {}
        self._starved: list[tuple[int, _Work]] = []
        self._busy: tuple[int, _Work] | None = None
        self._order = itertools.count()
        self._schedulers: OrderedDict[tuple[bytes, bool, int, int], Scheduler] = OrderedDict()
        self._credit = dict.fromkeys(range(len(settings.names)), settings.credit)
        self._down = set(range(len(settings.names))) - {self.index}
        self._queues: dict[int, int] = {}
        self._under_way: OrderedDict[TaskKey, Scheduler] = OrderedDict()  # task on an emulated link -> who sent it there

    @property
    def queue_length(self) -> int:
        """Tasks that wait for this node's processor or occupy it."""
        return len(self._ready) + sum(map(len, self._waiting.values())) + len(self._starved) + (self._busy is not None)

    @property
    def idle(self) -> bool:
        """Whether nothing waits here and nothing runs, so that the next task may be run to its end at once."""
        return not (self._ready or self._waiting or self._starved) and self._busy is None and self._inbox.empty()

    def post(self, *event: Any) -> None:
        """Hand an event over, from any thread: ("task", frame, sender index), ("up", node, bool), ("credit", node),
        ("queue", node, length), ("link", target, bytes, ns, date, key) when a task was there, ("answered", key) when an armed answer left, ("speed", node, seconds, spread)
        of every segment there, ("leaving", frame, sender): a task that is not taken any more, ("stop",)."""
        self._inbox.put(event)

    def run(self) -> None:
        """Serve until a ("stop",) event."""
        torch.set_num_threads(1)
        with torch.inference_mode():
            while self.step():
                pass

    def step(self, longest: float = 1.0) -> bool:
        """Handle what is due, waiting up to `longest` seconds for something; False after a ("stop",) event."""
        wait = min(longest, self.pause())
        while True:
            try:
                event = self._inbox.get(timeout=wait) if wait > 0 else self._inbox.get_nowait()
            except queue.Empty:
                break
            wait = 0.0
            if event[0] == "stop":
                return False
            getattr(self, f"_on_{event[0]}")(*event[1:])
        self._pump()
        if self._busy is not None:
            if self._clock() >= self._busy[0]:
                work, self._busy = self._busy[1], None
                self._ran(work)
                self._pump()
        elif self._ready:
            work = heapq.heappop(self._ready)[1]
            if self._given_up(work):
                return True
            if self._clock() - work.since > _STALE_NS:
                decision = self._decide(work)
                if decision.action is not Action.CONTINUE:
                    self._follow(work, decision)
                    return True
            self._compute(work)
        return True

    def pause(self) -> float:
        """Seconds until `step` has something to do by itself."""
        now = self._clock()
        if self._busy is None and self._ready:
            return 0.0
        soonest = now + 1_000_000_000 if self._busy is None else self._busy[0]
        for scheduler in (*self._schedulers.values(), *self._waiting):
            soonest = min(soonest, scheduler.next_tick())
        return max(0.0, (soonest - now) * 1e-9)

    # events

    def _on_up(self, node: int, up: bool) -> None:
        (self._down.discard if up else self._down.add)(node)
        self._credit[node] = self.settings.credit
        for scheduler in self._schedulers.values():
            scheduler.set_node_up(node, up)
        self._forget()  # a home that is down has schedulers of its own
        self._retry_starved()

    def _on_credit(self, node: int) -> None:
        self._credit[node] = min(self.settings.credit, self._credit[node] + 1)
        self._retry_starved()

    def _on_queue(self, node: int, length: int) -> None:
        self._queues[node] = length
        for scheduler in self._schedulers.values():
            scheduler.observe_queue(node, length)

    def _on_link(self, target: int, nbytes: int, duration: int, at: int, key: TaskKey) -> None:
        # All learn the rate; what is still under way is the business of the one that sent it.
        sender = self._under_way.pop(key, None)
        for scheduler in {*self._schedulers.values(), sender} - {None}:
            scheduler.observe_link(self.index, target, nbytes, duration, at if scheduler is sender else None)

    def _on_answered(self, key: tuple[int, int, int]) -> None:
        self._answered[key] = None
        if len(self._answered) > _MAX_TASKS:  # the work was done just before: nobody will ask for the oldest any more
            del self._answered[next(iter(self._answered))]

    def _on_speed(self, node: int, seconds: list[float], spread: list[float]) -> None:
        """A node tells what it measured: the schedulers are made anew, unless that is what they know."""
        told = np.array([seconds, spread], float) if len(seconds) == len(spread) == self.net.num_segments else np.empty(0)
        if node == self.index or told.size == 0 or not (np.isfinite(told).all() and (told >= 0).all()):
            return
        mean, deviation = self.profile.mean.copy(), self.profile.spread.copy()
        mean[:, node, 0], deviation[:, node, 0] = told
        if not (np.array_equal(mean, self.profile.mean) and np.array_equal(deviation, self.profile.spread)):
            self.profile = replace(self.profile, mean=mean, spread=deviation)
            self._schedulers.clear()
            self._forget()

    def _on_leaving(self, frame: Frame, sender: int) -> None:
        self._turn_away(frame, sender, "leaving", f"node {self._name!r} is leaving")

    def _given_up(self, work: _Work) -> bool:
        """True when the I/O thread has answered the task at its deadline: nothing more is computed for it."""
        if not self._answered or self._answered.pop((work.frame.task, work.frame.origin, work.frame.hops >> 8), 0) == 0:
            return False
        work.scheduler.finish(work.handle)
        self._done(work)
        return True

    def _on_task(self, frame: Frame, sender: int) -> None:
        now = self._clock()
        try:
            scheduler = self._scheduler(frame)
        except (FrameError, ValueError) as error:
            return self._turn_away(frame, sender, "invalid", str(error))
        # With exits off nothing can be cut short, so the deadline only tells the client whether the answer was in time.
        bound = frame.time_left != NO_DEADLINE and not frame.exits_off
        handle = scheduler.admit(now, deadline=now + frame.time_left if bound else NO_DEADLINE, segment=frame.segment)
        if handle < 0:
            late = bound and frame.time_left <= 0
            return self._turn_away(frame, sender, "late" if late else "rejected", f"node {self._name!r} refused admission")
        deadline = now + frame.time_left if bound else NO_DEADLINE
        self._follow(_Work(frame, sender, deadline, next(self._order), scheduler, handle, frame.segment))
        return None

    def _scheduler(self, frame: Frame) -> Scheduler:
        """Return the scheduler for the frame's plan, exits and codec; a frame that asks for what cannot be raises ``ValueError``."""
        segments, names = self.net.num_segments, self.settings.names
        if frame.segment >= segments or not frame.tensors:
            raise ValueError(f"segment {frame.segment} with {len(frame.tensors)} tensors; the net has segments 0..{segments - 1}")
        if frame.route and (len(frame.route) != segments or any(n != FREE and n >= len(names) for n in frame.route)):
            raise ValueError(f"plan {list(frame.route)} for {segments} segments and {len(names)} nodes")
        exits_off = frame.exits_off
        # The caller shares machine 0 but not node 0's process: that one's death must not look like "no answer gets home".
        home = self.index if 0 in self._down else 0
        key = (frame.route, exits_off, frame.codec, home)
        if key in self._schedulers:
            self._schedulers.move_to_end(key)
            return self._known(frame, self._schedulers[key])
        profile = self.profile
        column = list(range(len(profile.codecs)))
        if frame.codec != FREE:
            name = codecs.codec_name(frame.codec)
            if name not in profile.codecs:
                raise ValueError(f"codec {name!r} is not in the profile, it has {list(profile.codecs)}")
            column = [profile.codecs.index(name)]
        profile = replace(
            profile,
            codecs=tuple(profile.codecs[c] for c in column),
            wire_bytes=profile.wire_bytes[:, column] + TASK_OVERHEAD,
            codec_seconds=profile.codec_seconds[:, column],
        )
        hosts = None
        if frame.route:
            hosts = np.ones((segments, len(names)), bool)
            for segment, node in enumerate(frame.route):
                if node != FREE:
                    hosts[segment] = np.arange(len(names)) == node
        # Where every step is planned there is nothing to queue for: policies that wait until a neighbour's queue is shorter would wait for ever.
        planned = bool(frame.route) and FREE not in frame.route
        scheduler = Scheduler(
            profile,
            self.settings.qos,
            policy="deadline" if planned else self.settings.policy,
            params={} if planned else self.settings.params,
            thresholds=[math.inf] * (segments - 1) if exits_off else list(self.settings.thresholds),
            node=self.index,
            hosts=hosts,
            home=home,
            media=self.settings.media,
            max_tasks=_MAX_TASKS,
            answer_bytes=TASK_OVERHEAD + 4 * int(self.net.num_classes),
        )
        for node in self._down:
            scheduler.set_node_up(node, False)
        for node, length in self._queues.items():
            scheduler.observe_queue(node, length)
        self._schedulers[key] = scheduler
        # A dropped one lives on in the tasks that hold it; only what it had learned is lost to later ones.
        while len(self._schedulers) > _SCHEDULERS_KEPT:
            self._schedulers.popitem(last=False)
            self._forget()
        return self._known(frame, scheduler)

    def _known(self, frame: Frame, scheduler: Scheduler) -> Scheduler:
        if self.shortcut is not None:
            self.shortcut.learn(frame.route, frame.exits_off, frame.codec, scheduler)
        return scheduler

    def _forget(self) -> None:
        if self.shortcut is not None:
            self.shortcut.forget()

    # decisions

    def _decide(self, work: _Work) -> Decision:
        """Ask for the next step. An exit is told once: asked again, the scheduler knows it and must not count it twice."""
        ahead = sum(key < work.key for key, _ in self._ready) + (self._busy is not None)
        work.scheduler.observe_queue(self.index, ahead)
        exit_, work.exit = work.exit, -1
        return work.scheduler.decide(work.handle, exit_, work.confidence, self._clock())

    def _stuck(self, work: _Work, node: int) -> bool:
        """Say whether moving a task that was sent here, and has made no progress since, to `node` would lead nowhere.

        Back to the sender: each node knows its own speed best, so two that each think the other faster would throw a task to and fro until its time
        is up (seen: 23,000 moves in 15 s). Anywhere, once it has moved twice per node. It is computed here then.
        """
        if work.sender < 0 or work.frame.route or work.segment != work.frame.segment:
            return False
        return node == work.sender or work.frame.hops % 256 > 2 * len(self.settings.names)

    def _follow(self, work: _Work, decision: Decision | None = None) -> None:
        """Do what the scheduler says; a peer without credit makes it choose again without that peer."""
        if self._given_up(work):
            return
        decision = decision or self._decide(work)
        shut: list[int] = []
        while decision.action is Action.OFFLOAD and self._credit[decision.node] <= 0:
            if work.frame.route and work.frame.route[work.segment] == decision.node:
                self._starved.append((decision.node, work))
                break
            shut.append(decision.node)
            work.scheduler.set_node_up(decision.node, False)
            decision = self._decide(work)
        for node in shut:
            work.scheduler.set_node_up(node, node not in self._down)
        action = decision.action
        if action is Action.OFFLOAD and self._stuck(work, decision.node):
            action = Action.CONTINUE
        if (action is Action.REJECT or decision.forced) and work.deadline == NO_DEADLINE:
            # Without a deadline only a lost node makes the scheduler give up: the client starts over without the plan.
            work.scheduler.finish(work.handle)
            self._done(work)
            self._refuse(work.frame, "undeliverable", f"no way on from node {self._name!r}: a node of the plan is down")
        elif action is Action.EXIT:
            self._exit(work, decision.forced)
        elif action is Action.CONTINUE:
            work.since = self._clock()
            heapq.heappush(self._ready, (work.key, work))
        elif action is Action.OFFLOAD:
            if self._credit[decision.node] > 0:
                self._offload(work, decision.node, work.scheduler.profile.codecs[decision.codec])
        elif action is Action.WAIT:
            self._waiting.setdefault(work.scheduler, {})[work.handle] = work
        else:
            self._done(work)
            self._refuse(work.frame, "rejected", f"node {self._name!r} cannot meet the deadline")

    def _pump(self) -> None:
        """Let schedulers adapt that want to, and ask for the decisions that waiting tasks have got meanwhile."""
        now = self._clock()
        for scheduler in self._schedulers.values():
            if scheduler.next_tick() <= now:
                scheduler.tick(now)
        for scheduler, waiting in list(self._waiting.items()):
            while waiting:
                ahead = len(self._ready) + (self._busy is not None)
                scheduler.observe_queue(self.index, ahead)
                scheduler.set_idle(not ahead)  # else policies that queue everything (mdi_exit) would wait for ever
                found = scheduler.poll(self._clock())
                if found is None:
                    break
                self._follow(waiting.pop(found[0]), found[1])
            if not waiting:
                del self._waiting[scheduler]

    def _retry_starved(self) -> None:
        waiting, self._starved = self._starved, []
        for node, work in waiting:
            if node in self._down or self._credit[node] > 0:
                self._follow(work)
            else:
                self._starved.append((node, work))

    # what the shortcut did

    def ran(self, first: int, spent: list[int]) -> None:
        """Note segments that were run here from `first` on, ns each."""
        for segment, duration in enumerate(spent, first):
            seconds, before = duration * 1e-9, self.segments[segment]
            self.service += _SERVICE_WEIGHT * (seconds - self.service)
            self.segments[segment] = before + _SERVICE_WEIGHT * (seconds - before) if before else seconds

    def answered(self, exit_: int, forced: bool, late: bool) -> None:
        """Note a task that the shortcut answered."""
        self.handled += 1
        self.exits[exit_] += 1
        self.forced += forced
        self.late += late

    def adopt(
        self, frame: Frame, sender: int, scheduler: Scheduler, handle: int, deadline: int, segment: int, exit_: int, confidence: float,
        carry: codecs.Carry, head: Any, credited: bool, code: int | None, error: Exception | None,
    ) -> None:  # fmt: skip
        """Go on with a task that the shortcut began and that stands before `segment`: with the decision `code` that it got, or one that is asked
        for now, or with what the net raised there."""
        work = _Work(frame, sender, deadline, next(self._order), scheduler, handle, segment, exit_, confidence, carry, head, credited)
        if error is None:
            self._follow(work, None if code is None else Decision.from_code(code, self._clock()))
        elif isinstance(error, FrameError):
            self._fail(work, "invalid", str(error))
        else:
            where = f"segment {segment}" if segment < self.net.num_segments else f"exit {segment - 1}"
            self._fail(work, "failed", f"{where} on node {self._name!r}: {_tail(error)}")

    # work

    def _compute(self, work: _Work) -> None:
        started, computed = self._clock(), time.thread_time_ns()
        segment, head = work.segment, None
        try:
            if work.carry is None:
                work.carry = codecs.unpack(work.frame)
            carry = tuple(self.net.run_segment(segment, work.carry))
            if segment < self.net.num_segments - 1 and not work.frame.exits_off:
                head = self.net.exit_step(segment, carry, logits=True)
        except FrameError as error:
            return self._fail(work, "invalid", str(error))
        except Exception as error:  # the user's module may raise anything, and the client must hear of it
            return self._fail(work, "failed", f"segment {segment} on node {self._name!r}: {_tail(error)}")
        work.carry, work.head = carry, head
        # The extra is of this thread's processor time: what other processes took meanwhile must not be multiplied.
        extra = (time.thread_time_ns() - computed) * (self.settings.slowdown - 1)
        work.since = started
        self._busy = (self._clock() + round(extra), work)
        return None

    def _ran(self, work: _Work) -> None:
        segment, spent = work.segment, max(1, self._clock() - work.since)
        work.exit, work.segment = segment, segment + 1
        work.confidence = math.nan if work.head is None else float(work.head.confidence[0])
        for scheduler in self._schedulers.values():
            scheduler.observe(segment, self.index, 1, spent)
        self.ran(segment, [spent])
        self._give_credit(work)
        if work.head is not None and work.deadline != NO_DEADLINE and self._arm is not None:
            # The best answer so far: it leaves in time even if what comes next takes longer than anybody foresaw.
            self._arm(Outgoing(-1, self._answer(work, segment, work.head.logits, work.head.label, work.head.confidence, forced=True), work.deadline))
        self._follow(work)

    def _answer(self, work: _Work, exit_: int, logits: Any, label: Any, confidence: Any, forced: bool) -> Frame:
        tensors, payload = codecs.pack((logits, label, confidence))
        flags = work.frame.flags | Flag.FORCED if forced else work.frame.flags
        return work.frame.with_(
            kind=Kind.ANSWER, segment=work.segment, exit=exit_, codec=codecs.RAW.id, flags=flags, route=b"", tensors=tensors, payload=payload
        )

    def _exit(self, work: _Work, forced: bool) -> None:
        exit_ = work.segment - 1
        try:
            if work.segment == self.net.num_segments:
                logits = work.carry[0]
                label, confidence = judge(logits, self.net.measure)
            else:
                if work.head is None:
                    # Time ran out on arrival: the carry's first tensor is what the last head reads, so its answer can be had here.
                    carry = codecs.unpack(work.frame) if work.carry is None else work.carry
                    work.head = self.net.exit_step(exit_, carry, logits=True)
                logits, label, confidence = work.head.logits, work.head.label, work.head.confidence
            frame = self._answer(work, exit_, logits, label, confidence, forced)
        except FrameError as error:
            return self._fail(work, "invalid", str(error))
        except Exception as error:
            return self._fail(work, "failed", f"exit {exit_} on node {self._name!r}: {_tail(error)}")
        self._done(work)
        self._emit(Outgoing(-1, frame, work.deadline, keyed=True))
        self.exits[exit_] += 1
        self.forced += forced
        self.late += self._clock() > work.deadline
        return None

    def _offload(self, work: _Work, node: int, codec: str) -> None:
        frame = work.frame
        try:
            if work.carry is not None or any(t.packing != codecs.codec_id(codec) for t in frame.tensors):
                tensors, payload = codecs.pack(codecs.unpack(frame) if work.carry is None else work.carry, codec)
            else:
                tensors, payload = frame.tensors, frame.payload
        except FrameError as error:
            return self._fail(work, "invalid", str(error))
        except Exception as error:
            return self._fail(work, "failed", f"carry into segment {work.segment} on node {self._name!r}: {_tail(error)}")
        work.scheduler.finish(work.handle)
        self._credit[node] -= 1
        self._under_way[frame.task, frame.origin, frame.hops + 1] = work.scheduler
        if len(self._under_way) > _MAX_TASKS:  # lost, or over a link that tells no arrivals
            self._under_way.popitem(last=False)
        frame = frame.with_(segment=work.segment, exit=work.segment - 1, hops=frame.hops + 1, tensors=tensors, payload=payload)
        self._emit(Outgoing(-1, frame.with_(kind=Kind.MOVED, tensors=(), payload=to_payload(Moved(node)))))
        self._emit(Outgoing(node, frame, work.deadline, keyed=True))
        self._done(work)
        return None

    def _fail(self, work: _Work, code: str, reason: str) -> None:
        work.scheduler.finish(work.handle)
        self._done(work)
        self._refuse(work.frame, code, reason)

    def _refuse(self, frame: Frame, code: str, reason: str) -> None:
        payload = to_payload(Refused(code, reason))
        self._emit(Outgoing(-1, frame.with_(kind=Kind.REFUSED, route=b"", tensors=(), payload=payload), keyed=True))

    def _done(self, work: _Work) -> None:
        self.handled += 1
        self._give_credit(work)

    def _turn_away(self, frame: Frame, sender: int, code: str, reason: str) -> None:
        self._renew(frame, sender)
        self._refuse(frame, code, reason)

    def _give_credit(self, work: _Work) -> None:
        """Renew the sender's credit once this node's part is computed; waiting for a next hop must not hold it, or two nodes that
        send to each other could block for good."""
        if not work.credited:
            work.credited = True
            self._renew(work.frame, work.sender)

    def _renew(self, frame: Frame, sender: int) -> None:
        if sender >= 0:
            payload = to_payload(Heartbeat(self.queue_length, self.service, self.handled))
            self._emit(Outgoing(sender, Frame(Kind.CREDIT, task=frame.task, origin=frame.origin, hops=frame.hops, payload=payload)))


def _tail(error: Exception) -> str:
    return "".join(traceback.format_exception(error, limit=-3))[-2000:]

"""The simulator in plain Python over the scheduler's twin: the oracle of csrc/sim (same log line for line) and its stand-in.

Every rule is in docs/simulator.md. Integers are nanoseconds and bytes; floats are doubles, combined in the same order as in C++.
"""

from __future__ import annotations

import bisect
import heapq
import math

from fastee.scheduling import Scheduler
from fastee.scheduling.decision import Action
from fastee.simulation.events import FaultKind, Outcome, What

NEVER = NO_DEADLINE = (1 << 63) - 1
MS = 1_000_000
PATH = 8
ROOT3 = 1.7320508075688772
LEAST_JITTER = 0.05
MASK = (1 << 64) - 1
DONE, DELIVER, ANSWER, CREDIT, EXPIRE, LOST, RETRY, REPORT, DETECT, THAW, LINK_DETECT, TICK, RELEASE = range(13)


def scramble(z: int) -> int:
    """The finaliser of splitmix64."""
    z = z + 0x9E3779B97F4A7C15 & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


class Stream:
    """Draws that depend on the seed, the entity and how often it drew; kind 1: node, kind 2: link source << 32 | target."""

    def __init__(self, seed: int, kind: int, entity: int):
        self.key = scramble(scramble(scramble(seed) + kind & MASK) + entity & MASK)
        self.count = 0

    def uniform(self) -> float:
        """Next number in [0, 1)."""
        value = scramble(self.key + self.count & MASK)
        self.count += 1
        return (value >> 11) * 2.0**-53


def wire_ns(nbytes: int, rate: int) -> int:
    """ns that `nbytes` take at `rate` bit/s, rounded up."""
    return (nbytes * 8_000_000_000 + rate - 1) // rate


def leave_at(medium: tuple[int, int, int], traces: list, start: int, nbytes: int) -> int:
    """End of a message that starts at `start` on an idle medium (rate, trace, offset)."""
    rate, trace, offset = medium
    if nbytes <= 0:
        return start
    if trace < 0:
        return start + wire_ns(nbytes, rate)
    at, cum = traces[trace]
    period, total = at[-1], cum[-1]
    cycle, phase = divmod(start + offset, period)
    i = bisect.bisect_right(at, phase) - 1
    target = cum[i] + (phase - at[i]) * (cum[i + 1] - cum[i]) // (at[i + 1] - at[i]) + nbytes
    more = (target - 1) // total
    rest = target - more * total
    j = bisect.bisect_left(cum, rest) - 1
    bulk = cum[j + 1] - cum[j]
    inside = ((rest - cum[j]) * (at[j + 1] - at[j]) + bulk - 1) // bulk
    return (cycle + more) * period + at[j] + inside - offset


class Work:
    """One copy of a task that is under way."""

    __slots__ = ("task", "attempt", "node", "sender", "segment", "exit", "confidence", "handle", "deadline", "order", "since", "wire_ns",
                 "wire_bytes", "path", "credited", "outcome", "forced", "waiting")  # fmt: skip

    def __init__(self, task: int, attempt: int, node: int):
        self.task, self.attempt, self.node = task, attempt, node
        self.sender = self.exit = self.handle = -1
        self.segment = self.order = self.since = self.wire_ns = self.wire_bytes = self.deadline = self.outcome = 0
        self.confidence, self.path = math.nan, []
        self.credited = self.forced = self.waiting = False

    def copy(self) -> Work:
        twin = Work(self.task, self.attempt, self.node)
        for name in self.__slots__:
            setattr(twin, name, getattr(self, name))
        twin.path, twin.credited = list(self.path), True
        return twin


class Node:
    """A machine with its scheduler; `ready` holds (deadline, order, work) per segment."""

    def __init__(self, scheduler: Scheduler, members: list[int], index: int, world: dict):
        self.scheduler = scheduler
        self.me = members.index(index)
        self.ready: list[list] = [[] for _ in range(world["segments"])]
        self.running: list[Work] = []
        self.inbox: list[Work] = []
        self.rooms: dict[int, Work] = {}
        self.credit = [world["credit"]] * len(members)
        self.link = [-1] * len(members)
        self.queued = self.waiting = self.frozen = self.frozen_at_start = self.thaw_at = self.started = self.spent = 0
        self.offset = self.release = self.segment = self.epoch = 0
        self.slow, self.drift, self.tick_at, self.told = 1.0, 0.0, NEVER, None
        self.alive = self.known_up = True
        self.busy = False
        self.stream = Stream(world["seed"], 1, index)

    @property
    def length(self) -> int:
        return self.queued + len(self.running) * self.busy


class LinkState:
    """What changes about a directed link."""

    def __init__(self, seed: int, source: int, target: int, loss: float, duplicate: float):
        self.up, self.epoch = True, 0
        self.loss, self.duplicate = loss, duplicate
        self.stream = Stream(seed, 2, source << 32 | target)


class Simulator:
    """Same constructor, `run`, `results`, `totals` and `log` as ``fastee._C.Simulator``; `remake(n)` gives node n a fresh scheduler."""

    def __init__(self, world: dict, schedulers: list[Scheduler], remake):
        self.w, self.remake = world, remake
        w = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in world.items()}
        self.w = w
        n, tasks = w["nodes"], len(w["arrival"])
        self.N, self.S, self.K = n, w["segments"], w["segments"] - 1
        zero = lambda: [0] * tasks
        self.latency, self.node_of, self.exit_of = [-1] * tasks, [-1] * tasks, [-1] * tasks
        self.wire, self.compute, self.outcome, self.attempts, self.forced, self.hops, self.attempt = (zero() for _ in range(7))
        self.cost = [0.0] * tasks
        self.busy, self.ran, self.sent = [0] * n, [0] * n, [0] * n
        self.count = dict.fromkeys(("events", "duplicates", "messages", "lost", "retries", "batches", "now", "ended", "peak"), 0)
        self.live = 0
        self.lines: list[tuple] = []
        self.events: list[tuple] = []
        self.sequence = self.order = self.next_arrival = self.next_fault = self.now = 0
        self.medium_free = [0] * len(w["media"])
        self.own_free: dict[tuple[int, int], int] = {}  # (source, medium): when the source's last message there has left
        self.place = [dict((m, i) for i, m in enumerate(members)) for members in w["members"]]
        self.observers: list[list] = [[] for _ in range(n)]
        self.nodes: list[Node] = []
        for i in range(n):
            members = w["members"][i]
            self.nodes.append(Node(schedulers[i], members, i, w))
            for place, member in enumerate(members):
                if member != i:
                    self.observers[member].append((i, place))
            if w["report"] > 0:
                self.push(w["report"], REPORT, i, 0)
            self.arm_tick(i)
        self.links, self.link_at = [], {}
        for i, (source, target, _, _, loss, duplicate) in enumerate(w["links"]):
            self.link_at[source, target] = i
            if target in self.place[source]:
                self.nodes[source].link[self.place[source][target]] = i
            self.links.append(LinkState(w["seed"], source, target, loss, duplicate))

    # -- the loop ----------------------------------------------------------------------------------------------------

    def push(self, time: int, kind: int, a, b) -> None:
        heapq.heappush(self.events, (time, self.sequence, kind, a, b))
        self.sequence += 1

    def run(self, most: int) -> bool:
        """Handle up to `most` events; False once every task has ended."""
        arrivals, faults = self.w["arrival"], self.w["faults"]
        for _ in range(most):
            if self.count["ended"] == len(arrivals):
                return False
            soonest = self.events[0][0] if self.events else NEVER
            arrival = arrivals[self.next_arrival] if self.next_arrival < len(arrivals) else NEVER
            wrong = faults[self.next_fault][0] if self.next_fault < len(faults) else NEVER
            self.count["events"] += 1
            if wrong <= arrival and wrong <= soonest and wrong != NEVER:
                self.now = wrong
                self.next_fault += 1
                self.fault(*faults[self.next_fault - 1][1:])
            elif arrival <= soonest and arrival != NEVER:
                self.now = arrival
                self.next_arrival += 1
                self.arrive(self.next_arrival - 1)
            else:
                self.now, _, kind, a, b = heapq.heappop(self.events)
                self.handle(kind, a, b)
        return self.count["ended"] < len(arrivals)

    def handle(self, kind: int, a, b) -> None:
        if kind == DONE:
            if self.nodes[a].epoch == b:
                self.done(a)
        elif kind == DELIVER:
            self.deliver(a)
        elif kind == ANSWER:
            self.answered(a)
        elif kind == CREDIT:
            node, (place, length) = self.nodes[a], b
            if node.alive:
                node.credit[place] = min(self.w["credit"], node.credit[place] + 1)
                node.scheduler.observe_queue(place, length, 0)
                self.pump(a)
        elif kind == EXPIRE:
            if self.outcome[a] == 0:
                self.settle(a, Outcome.EXPIRED, -1, -1, False)
        elif kind == LOST:
            self.lost(a)
        elif kind == RETRY:
            if self.outcome[a] == 0 and self.attempt[a] == b:
                self.start(a)
        elif kind == REPORT:
            self.report(a)
        elif kind == DETECT:
            node = self.nodes[a]
            if node.epoch == b and node.known_up and not (node.alive and node.thaw_at <= self.now):
                self.set_known(a, False)
                for work in self.works_on(a):
                    self.start_over(work.task, work.attempt)
        elif kind == THAW:
            node = self.nodes[a]
            if node.epoch == b and node.thaw_at <= self.now:
                self.write(What.THAW, -1, -1, a, 0, 0)
                if not node.known_up:
                    self.set_known(a, True)
                inbox, node.inbox = node.inbox, []
                for work in inbox:
                    self.deliver(work)
                self.pump(a)
                self.dispatch(a)
        elif kind == LINK_DETECT:
            source, target = self.w["links"][a][:2]
            if not self.links[a].up and self.links[a].epoch == b and target in self.place[source]:
                self.nodes[source].scheduler.set_link_up(self.nodes[source].me, self.place[source][target], False)
        elif kind == TICK:
            node = self.nodes[a]
            if node.epoch == b and node.tick_at == self.now:
                node.tick_at = NEVER
                if node.alive and node.thaw_at <= self.now:
                    node.scheduler.tick(self.local(node))
                    self.pump(a)
        else:
            self.start(a)

    def write(self, what: int, task: int, attempt: int, node: int, a: int, b: int) -> None:
        if self.w["log"]:
            self.lines.append((self.now, int(what), task, attempt, node, a, b))

    def local(self, node: Node) -> int:
        """A node's own clock."""
        return self.now + node.offset + int(self.now * node.drift / 1e6)

    def link_between(self, source: int, target: int) -> int:
        return self.link_at.get((source, target), -1)

    # -- tasks -------------------------------------------------------------------------------------------------------

    def arrive(self, task: int) -> None:
        source, deadline = self.w["source"][task], self.w["deadline"][task]
        self.write(What.ARRIVE, task, 0, source, self.w["row"][task], deadline)
        self.push(self.now + (self.w["timeout"] if deadline == NO_DEADLINE else deadline + self.w["grace"]), EXPIRE, task, 0)
        node = self.nodes[source]
        interval = node.scheduler.admit_interval()
        if interval > 0:
            release = max(self.now, node.release)
            node.release = release + int(interval * 1e9)
            if release > self.now:
                self.push(release, RELEASE, task, 0)
                return
        self.start(task)

    def start(self, task: int) -> None:
        if self.outcome[task]:
            return
        source = self.w["source"][task]
        entry = source if self.nodes[source].known_up else -1
        if entry < 0:
            for member in self.w["members"][source]:
                if member != source and self.nodes[member].known_up and self.link_between(source, member) >= 0:
                    entry = member
                    break
        self.write(What.START, task, self.attempt[task], entry, 0, 0)
        if entry < 0:
            self.settle(task, Outcome.LOST, -1, -1, False)
            return
        work = self.new_work(task, self.attempt[task], entry)
        if entry == source:
            self.deliver(work)
        else:
            self.transmit(work, source, entry, 0)

    def start_over(self, task: int, attempt: int) -> None:
        if self.outcome[task] or self.attempt[task] != attempt:
            return
        self.attempt[task] += 1
        number = self.attempt[task]
        if number >= self.w["attempts"]:
            self.settle(task, Outcome.LOST, -1, -1, False)
            return
        self.count["retries"] += 1
        if number == 1:
            self.start(task)
        else:
            self.push(self.now + min(200 * MS, 10 * MS << min(number, 8)), RETRY, task, number)

    def settle(self, task: int, outcome: Outcome, exit: int, node: int, forced: bool) -> None:
        self.outcome[task] = int(outcome)
        self.latency[task] = self.now - self.w["arrival"][task]
        self.exit_of[task], self.node_of[task], self.forced[task] = exit, node, int(forced)
        self.attempts[task] = self.attempt[task] + 1
        self.count["ended"] += 1
        self.write(What.END, task, self.attempt[task], node, int(outcome), exit)

    # -- messages ----------------------------------------------------------------------------------------------------

    def transmit(self, work: Work, source: int, target: int, codec: int) -> None:
        index = self.link_between(source, target)
        state = self.links[index]
        _, _, medium, delay, _, _ = self.w["links"][index]
        cell = work.segment * self.w["codecs"] + codec
        nbytes = self.w["wire_bytes"][cell]
        work.sender, work.node, work.credited, work.wire_bytes = source, target, False, nbytes
        self.wire[work.task] += nbytes
        self.cost[work.task] += float(nbytes) * self.w["byte_price"]
        self.sent[source] += nbytes
        self.count["messages"] += 1
        self.write(What.SEND, work.task, work.attempt, source, target, nbytes)
        if not state.up:
            self.vanish(work, self.now)
            return
        ready = self.now + self.w["codec_ns"][cell]
        left = leave_at(self.w["media"][medium], self.w["traces"], max(ready, self.medium_free[medium]), nbytes)
        work.wire_ns = left - max(ready, self.own_free.get((source, medium), 0)) + delay
        self.medium_free[medium] = self.own_free[source, medium] = left
        due = left + delay
        if state.loss > 0 and state.stream.uniform() < state.loss:
            self.vanish(work, due)
            return
        self.push(due, DELIVER, work, 0)
        if state.duplicate > 0 and state.stream.uniform() < state.duplicate:
            self.live += 1
            self.count["peak"] = max(self.count["peak"], self.live)
            self.push(due, DELIVER, work.copy(), 0)

    def vanish(self, work: Work, when: int) -> None:
        """A copy that is gone is noticed `detect` later; then its task starts over, unless that attempt is history."""
        self.write(What.VANISH, work.task, work.attempt, work.node, work.segment, 0)
        self.push(when + self.w["detect"], LOST, work, 0)

    def lost(self, work: Work) -> None:
        self.write(What.LOST, work.task, work.attempt, work.node, work.segment, 0)
        self.count["lost"] += 1
        if not work.credited and work.sender >= 0:
            place = self.place[work.sender].get(work.node)
            if place is not None:
                credit = self.nodes[work.sender].credit
                credit[place] = min(self.w["credit"], credit[place] + 1)
        self.live -= 1
        self.start_over(work.task, work.attempt)

    def deliver(self, work: Work) -> None:
        to, source = work.node, work.sender
        node, now = self.nodes[to], self.now
        if not node.alive or (source >= 0 and not self.links[self.link_between(source, to)].up):
            self.vanish(work, now)
            return
        if node.thaw_at > now:
            node.inbox.append(work)
            return
        self.write(What.DELIVER, work.task, work.attempt, to, source, work.segment)
        if source >= 0 and self.nodes[source].alive and work.wire_ns > 0 and work.wire_bytes > 0:
            sender = self.nodes[source]
            sender.scheduler.observe_link(sender.me, self.place[source][to], work.wire_bytes, work.wire_ns, self.local(sender))
        depth = work.path.index(to) if to in work.path else len(work.path)
        if depth < PATH:
            work.path = [*work.path[:depth], to]
        if source >= 0:
            self.hops[work.task] = min(255, self.hops[work.task] + 1)
        work.order = self.order
        self.order += 1
        deadline, clock, home = self.w["deadline"][work.task], self.local(node), self.w["source"][work.task]
        work.deadline = NO_DEADLINE
        if deadline != NO_DEADLINE:
            left = self.w["arrival"][work.task] + deadline - now
            if self.w["home"][to] != home:
                left -= self.way_home(work, to, home)[0]
            work.deadline = clock + left
        work.handle = -1 if depth >= PATH else node.scheduler.admit(clock, work.deadline, work.segment)
        if work.handle < 0:
            self.write(What.REFUSE, work.task, work.attempt, to, work.segment, 0)
            self.send_home(work, Outcome.REFUSED, False)
            self.pump(to)
            return
        node.rooms[work.handle & 0xFFFFFFFF] = work
        self.write(What.ADMIT, work.task, work.attempt, to, work.segment, work.handle)
        self.follow(work)
        self.pump(to)
        self.dispatch(to)

    def way_home(self, work: Work, node: int, to: int) -> tuple[int, int, bool]:
        """(ns, bytes, open) of an answer: over the direct link, else back along the way that the task came."""
        if node == to:
            return 0, 0, True
        way = [to] if self.link_between(node, to) >= 0 else [*(p for p in reversed(work.path) if p != node), to]
        time, nbytes, is_open, at = 0, 0, True, node
        for step in way:
            if step == at:
                continue
            index = self.link_between(at, step)
            if index < 0:
                is_open = False
            else:
                _, _, medium, delay, _, _ = self.w["links"][index]
                is_open = is_open and self.links[index].up
                time += wire_ns(self.w["answer_bytes"], self.w["media"][medium][0]) + delay
                nbytes += self.w["answer_bytes"]
            at = step
        return time, nbytes, is_open

    def send_home(self, work: Work, outcome: Outcome, forced: bool) -> None:
        self.give_credit(work)
        work.outcome, work.forced = outcome, forced
        time, nbytes, is_open = self.way_home(work, work.node, self.w["source"][work.task])
        self.wire[work.task] += nbytes
        self.sent[work.node] += nbytes
        self.cost[work.task] += float(nbytes) * self.w["byte_price"]
        self.write(What.ANSWER, work.task, work.attempt, work.node, int(outcome), work.segment - 1)
        if not is_open:
            self.vanish(work, self.now)
        elif time == 0:
            self.answered(work)
        else:
            self.push(self.now + time, ANSWER, work, 0)

    def answered(self, work: Work) -> None:
        self.live -= 1
        outcome, task = work.outcome, work.task
        stale = outcome != Outcome.ANSWERED and work.attempt != self.attempt[task]
        if self.outcome[task] or stale:
            self.count["duplicates"] += 1
            self.write(What.DUPLICATE, task, work.attempt, work.node, int(outcome), work.segment - 1)
            return
        self.settle(task, outcome, work.segment - 1 if outcome == Outcome.ANSWERED else -1, work.node, work.forced)

    def give_credit(self, work: Work) -> None:
        if work.credited or work.sender < 0:
            return
        work.credited = True
        back = self.link_between(work.node, work.sender)
        length = min(0xFFFF, self.nodes[work.node].length)
        delay = 0 if back < 0 else self.w["links"][back][3]
        self.push(self.now + delay, CREDIT, work.sender, (self.place[work.sender][work.node], length))

    # -- decisions ---------------------------------------------------------------------------------------------------

    def decide(self, work: Work):
        node = self.nodes[work.node]
        key = work.deadline, work.order
        ahead = len(node.running) * node.busy + sum(item[:2] < key for heap in node.ready for item in heap)
        self.tell(node, ahead)
        exit, work.exit = work.exit, -1
        row, extras = self.w["row"][work.task], {}
        if self.w["pool"]:
            extras["pool"] = self.w["pool"][row]
        if 0 <= exit < self.K:
            extras.update((name, self.w[name][row * self.K + exit]) for name in ("gate", "delta", "label") if self.w[name])
        d = node.scheduler.decide(work.handle, exit, work.confidence, self.local(node), **extras)
        self.write(What.DECIDE, work.task, work.attempt, work.node, exit, d.code)
        return d

    def follow(self, work: Work, d=None) -> None:
        if d is None:
            d = self.decide(work)
        n = work.node
        node, members, shut = self.nodes[n], self.w["members"][n], []
        while d.action == Action.OFFLOAD and (node.credit[d.node] <= 0 or node.link[d.node] < 0):
            shut.append(d.node)
            node.scheduler.set_node_up(d.node, False)
            d = self.decide(work)
        for place in shut:
            node.scheduler.set_node_up(place, self.nodes[members[place]].known_up)
        if d.action == Action.EXIT:
            self.send_home(work, Outcome.ANSWERED, d.forced)
        elif d.action == Action.CONTINUE:
            work.since = self.now
            heapq.heappush(node.ready[work.segment], (work.deadline, work.order, work))
            node.queued += 1
        elif d.action == Action.OFFLOAD:
            node.scheduler.finish(work.handle)
            node.credit[d.node] -= 1
            self.give_credit(work)
            self.transmit(work, n, members[d.node], d.codec)
        elif d.action == Action.WAIT:
            node.waiting += 1
            work.waiting = True
        else:
            self.send_home(work, Outcome.REJECTED, False)

    def tell(self, node: Node, ahead: int) -> None:
        if node.told != (ahead, node.waiting):
            node.told = ahead, node.waiting
            node.scheduler.observe_queue(node.me, ahead, node.waiting)

    def pump(self, n: int) -> None:
        node = self.nodes[n]
        if not node.alive or node.thaw_at > self.now:
            return
        while (found := self.ask(node)) is not None:
            work = node.rooms[found[0] & 0xFFFFFFFF]
            if work.waiting:
                node.waiting -= 1
            work.waiting, work.since = False, self.now
            self.write(What.DECIDE, work.task, work.attempt, n, -1, found[1].code)
            self.follow(work, found[1])
            self.dispatch(n)
        self.arm_tick(n)

    def ask(self, node: Node):
        """The next waiting task's decision; each of them stands behind all that is here, as in the live node."""
        node.scheduler.set_idle(not node.busy and node.queued == 0)
        if node.waiting > 0:
            self.tell(node, node.length)
        return node.scheduler.poll(self.local(node))

    def dispatch(self, n: int) -> None:
        node = self.nodes[n]
        if not node.alive or node.busy or node.thaw_at > self.now:
            return
        batch, segment = [], -1
        while node.queued > 0 and len(batch) < self.w["batch"][n]:
            s = segment
            if s < 0:
                s = min((i for i in range(self.S) if node.ready[i]), key=lambda i: node.ready[i][0][:2])
            if not node.ready[s]:
                break
            work = heapq.heappop(node.ready[s])[2]
            node.queued -= 1
            if self.now - work.since > self.w["stale"]:
                d = self.decide(work)
                if d.action != Action.CONTINUE:
                    self.follow(work, d)
                    continue
            segment = s
            batch.append(work)
        if not batch:
            return
        cell = n * self.S + segment
        time = float(self.w["service"][cell * self.w["max_batch"] + len(batch) - 1]) * node.slow
        jitter = self.w["jitter"][cell]
        if jitter > 0:
            time *= max(LEAST_JITTER, 1.0 + jitter * ROOT3 * (2.0 * node.stream.uniform() - 1.0))
        node.spent = max(1, int(time))
        node.running, node.busy, node.segment = batch, True, segment
        node.started, node.frozen_at_start = self.now, node.frozen
        self.count["batches"] += 1
        for work in batch:
            self.write(What.RUN, work.task, work.attempt, n, segment, len(batch))
        self.push(self.now + node.spent, DONE, n, node.epoch)

    def done(self, n: int) -> None:
        node = self.nodes[n]
        if node.frozen > node.frozen_at_start:
            self.push(self.now + node.frozen - node.frozen_at_start, DONE, n, node.epoch)
            node.frozen_at_start = node.frozen
            return
        rows, node.running, node.busy = node.running, [], False
        took, count, segment = self.now - node.started, len(rows), node.segment
        self.busy[n] += took
        self.ran[n] += count
        node.scheduler.observe(segment, node.me, count, took)
        share = node.spent // count
        for work in rows:
            self.compute[work.task] += share
            self.cost[work.task] += float(share) / 1e9 * self.w["price"][n]
            work.exit, work.segment = segment, segment + 1
            work.confidence = self.w["confidence"][self.w["row"][work.task] * self.K + segment] if segment < self.K else math.nan
            self.give_credit(work)
            self.write(What.RAN, work.task, work.attempt, n, segment, took)
        for work in rows:
            self.follow(work)
        self.pump(n)
        self.dispatch(n)

    # -- membership and faults ---------------------------------------------------------------------------------------

    def report(self, n: int) -> None:
        node = self.nodes[n]
        self.push(self.now + self.w["report"], REPORT, n, 0)
        if not node.alive or node.thaw_at > self.now:
            return
        for observer, place in self.observers[n]:
            if self.nodes[observer].alive:
                self.nodes[observer].scheduler.observe_queue(place, node.length, node.waiting)
        self.pump(n)
        self.dispatch(n)

    def works_on(self, n: int) -> list[Work]:
        node = self.nodes[n]
        found = [*node.running, *(item[2] for heap in node.ready for item in heap)]
        found += [work for slot, work in node.rooms.items() if work.waiting and work.node == n and work.handle & 0xFFFFFFFF == slot]
        return [*sorted(found, key=lambda work: work.order), *node.inbox]

    def die(self, n: int) -> None:
        node = self.nodes[n]
        if not node.alive:
            return
        node.epoch += 1
        self.push(self.now + self.w["detect"], DETECT, n, node.epoch)
        for work in self.works_on(n):
            work.waiting = False
            self.vanish(work, self.now)
        node.running, node.inbox, node.ready = [], [], [[] for _ in range(self.S)]
        node.alive = node.busy = False
        node.queued = node.waiting = node.thaw_at = 0
        node.tick_at = NEVER

    def restart(self, n: int) -> None:
        node = self.nodes[n]
        if node.alive:
            return
        node.scheduler, node.alive, node.rooms, node.told = self.remake(n), True, {}, None
        node.epoch += 1
        for i, member in enumerate(self.w["members"][n]):
            node.credit[i] = self.w["credit"]
            if member != n and not self.nodes[member].known_up:
                node.scheduler.set_node_up(i, False)
        for observer, place in self.observers[n]:
            self.nodes[observer].credit[place] = self.w["credit"]
        if not node.known_up:
            self.set_known(n, True)
        self.arm_tick(n)

    def set_known(self, n: int, up: bool) -> None:
        self.nodes[n].known_up = up
        self.write(What.UP if up else What.DOWN, -1, -1, n, 0, 0)
        for observer, place in self.observers[n]:
            other = self.nodes[observer]
            other.credit[place] = self.w["credit"]
            if other.alive:
                other.scheduler.set_node_up(place, up)

    def arm_tick(self, n: int) -> None:
        node = self.nodes[n]
        following = node.scheduler.next_tick()
        if following != NEVER:
            at = self.now + max(1, following - self.local(node))
            if at < node.tick_at:
                node.tick_at = at
                self.push(at, TICK, n, node.epoch)

    def fault(self, kind: int, target: int, span: int, value: float) -> None:
        self.write(What.FAULT, -1, -1, target, kind, span)
        if kind == FaultKind.DEATH:
            self.die(target)
        elif kind == FaultKind.RESTART:
            self.restart(target)
        elif kind == FaultKind.FREEZE:
            node = self.nodes[target]
            until, since = self.now + span, max(node.thaw_at, self.now)
            if node.alive and until > since:
                node.frozen += until - since
                node.thaw_at = until
                self.push(until, THAW, target, node.epoch)
                if span > self.w["detect"]:
                    self.push(self.now + self.w["detect"], DETECT, target, node.epoch)
        elif kind == FaultKind.SLOW:
            self.nodes[target].slow = value
        elif kind in (FaultKind.LINK_DOWN, FaultKind.LINK_UP):
            state, (source, to) = self.links[target], self.w["links"][target][:2]
            state.up = kind == FaultKind.LINK_UP
            state.epoch += 1
            if state.up and to in self.place[source]:
                self.nodes[source].scheduler.set_link_up(self.nodes[source].me, self.place[source][to], True)
            elif not state.up:
                self.push(self.now + self.w["detect"], LINK_DETECT, target, state.epoch)
        elif kind == FaultKind.LOSS:
            self.links[target].loss = value
        elif kind == FaultKind.DUPLICATE:
            self.links[target].duplicate = value
        else:
            self.nodes[target].offset, self.nodes[target].drift = span, value

    def new_work(self, task: int, attempt: int, node: int) -> Work:
        self.live += 1
        self.count["peak"] = max(self.count["peak"], self.live)
        return Work(task, attempt, node)

    # -- what comes out ----------------------------------------------------------------------------------------------

    def results(self) -> dict:
        """Columns per task, then per node."""
        return {"latency": self.latency, "wire": self.wire, "compute": self.compute, "cost": self.cost, "node": self.node_of,
                "exit": self.exit_of, "outcome": self.outcome, "attempts": self.attempts, "forced": self.forced, "hops": self.hops,
                "busy": self.busy, "ran": self.ran, "sent": self.sent}  # fmt: skip

    def totals(self) -> dict:
        """Counters of the run."""
        return {**self.count, "now": self.now}

    def log(self) -> list[tuple]:
        """Lines (time, what, task, attempt, node, a, b)."""
        return self.lines

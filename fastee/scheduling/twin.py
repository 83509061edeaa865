"""The scheduler in plain Python: the oracle of csrc/sched (same answers bit for bit) and the stand-in where that is not built.

Every formula is in docs/scheduler.md. Times are nanoseconds; floats are doubles, combined in the same order as in C++.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastee.scheduling import twin_policies as policies
from fastee.scheduling.decision import Action, pack
from fastee.scheduling.qos import NO_DEADLINE
from fastee.scheduling.rules import RUN as RUN_ACTION
from fastee.scheduling.rules import NodeView, Stats, TaskView
from fastee.scheduling.twin_policies import EXIT, FITS_NOT, NOTHING, RUN, WAIT, Query

INF = math.inf
INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1
EWMA_WEIGHT, OUTLIER_FACTOR, OUTLIER_STREAK = 0.1, 4.0, 5
DRIFT, ALARM = 0.1, 0.5
PUBLISH_CHANGE, PUBLISH_EVERY = 0.02, 16
RATIO_LOW, RATIO_HIGH = 1e-6, 1e6
REBUILD_EVERY = 10_000_000
FORGOTTEN = 1_000_000_000
NS = 1e9
COUNTERS = (
    "admitted", "refused_full", "refused_late", "exits", "forced", "late", "continued", "offloaded", "rejected", "finished",
    "stale", "invalid", "clock_backwards", "observed", "outliers", "ignored", "waited", "refused_queue", "changes",
)  # fmt: skip


class Estimator:
    """EWMA of measured / expected with an outlier guard and change detection, and of its relative variance; `used_*` is what the tables hold.

    A value four times off is skipped and counted; the fifth in a row is believed. The published value follows when it has
    moved by more than 2 %, and at every 16th observation.
    """

    __slots__ = ("ratio", "seen", "kept", "count", "streak", "used_ratio", "used_seen", "used_kept", "noise", "above", "below", "fresh")

    def __init__(self):
        self.ratio = self.kept = self.used_ratio = self.used_kept = 1.0
        self.seen = self.used_seen = 0.0
        self.noise, self.above, self.below = 0.01, 0.0, 0.0
        self.count = self.fresh = self.streak = 0

    def update(self, measured: float, counters: dict) -> bool:
        """Take one ratio in; true when the published value changed."""
        r = min(max(measured, RATIO_LOW), RATIO_HIGH)
        counters["observed"] += 1
        if r < self.ratio / OUTLIER_FACTOR or r > self.ratio * OUTLIER_FACTOR:
            counters["outliers"] += 1
            self.streak += 1
            if self.streak < OUTLIER_STREAK:
                return False
            self.ratio = r
            self.above = self.below = 0.0
        else:
            off = r / self.ratio - 1.0
            usual = DRIFT + math.sqrt(self.noise)
            self.above = max(0.0, self.above + off - usual)
            self.below = max(0.0, self.below - off - usual)
            self.noise = self.noise + 0.05 * (min(off * off, 9.0 * self.noise) - self.noise)
            if self.above > ALARM or self.below > ALARM:
                counters["changes"] += 1
                self.above, self.below, self.fresh = 0.0, 0.0, 0
            weight = max(EWMA_WEIGHT, 1.0 / (self.fresh + 2.0))
            self.seen = self.seen * (1.0 - weight) + weight * (off * off)
            self.kept = self.kept * (1.0 - weight)
            self.ratio = self.ratio + weight * (r - self.ratio)
        self.streak = 0
        self.count += 1
        self.fresh += 1
        if self.count % PUBLISH_EVERY and abs(self.ratio - self.used_ratio) <= PUBLISH_CHANGE * self.used_ratio:
            return False
        self.used_ratio, self.used_seen, self.used_kept = self.ratio, self.seen, self.kept
        return True


@dataclass(slots=True)
class Task:
    """One slot of the task table."""

    live: bool = False
    deadline: int = 0
    segment: int = 0
    best: int = -1
    tenant: int = 0
    generation: int = 0
    sum: float = 0.0
    label: int = -1
    run: int = 0
    pool: int = -1
    arm: int = -1
    sent: tuple[int, int] | None = None  # node and ns on its wire of an OFFLOAD that is not finished yet


@dataclass(slots=True)
class Medium:
    """Links from here that pass one message after another: its clock runs by the estimated rates and is set by one watched message at a time.

    `last`: end of the last message, had it not had to wait. Of the watched one: `due` expected end, `after` ns sent after it, `number` of
    messages on its link with it, `watched` the node it goes to.
    """

    busy_until: int = INT64_MIN
    last: int = INT64_MIN
    due: int = 0
    after: int = 0
    number: int = 0
    watched: int = -1

    def forgotten(self, now: int) -> bool:
        return self.watched >= 0 and clamp64(now - self.due) > FORGOTTEN


class Room:
    """Tasks that were told to WAIT, first come first out: slot -> the time at which each must go at the latest.

    `soonest` is a lower bound of those times, exact after each look at everybody.
    """

    def __init__(self):
        self.until: dict[int, int] = {}
        self.bound = INT64_MAX
        self.walk: int | None = None
        self.left = 0

    def __len__(self) -> int:
        return len(self.until)

    def head(self) -> int:
        return next(iter(self.until))

    def expired(self, now: int) -> int:
        if not self.until or now < self.bound:
            return -1
        due = next((slot for slot, until in self.until.items() if until <= now), -1)
        self.bound = self.until[due] if due >= 0 else min(self.until.values())
        return due

    def soonest(self) -> int:
        return self.bound if self.until else INT64_MAX

    def add(self, slot: int, until: int) -> None:
        self.bound = min(self.bound, until) if self.until else until
        self.until[slot] = until

    def remove(self, slot: int) -> None:
        at = list(self.until).index(slot)
        del self.until[slot]
        if self.walk is not None and at < self.walk:
            self.walk -= 1

    def step(self) -> int:
        """The next one of a walk over all who wait; -1 ends it."""
        slots = list(self.until)
        if self.walk is None:
            self.walk, self.left = 0, len(slots)
        self.left -= 1
        if self.left < 0 or self.walk >= len(slots):
            self.walk = None
            return -1
        self.walk += 1
        return slots[self.walk - 1]


class Core:
    """State and estimates; the methods take checked arguments (the Scheduler face checks)."""

    def __init__(self, config: dict):
        c = self.c = config
        self.S, self.N, self.NB = len(c["mean"]), len(c["mean"][0]), len(c["batch_sizes"])
        self.NC, self.K, self.me, self.home = len(c["wire_bytes"][0]), len(c["mean"]) - 1, c["node"], c["home"]
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.classes = [(c["deadline"], c["quantile"], c["weight"]), *c["classes"]]
        self.per_exit = [0] * self.S
        self.time = [[Estimator() for _ in range(self.N)] for _ in range(self.S)]
        self.rate = [[Estimator() for _ in range(self.N)] for _ in range(self.N)]
        self.node_up = [True] * self.N
        self.link_up = [[c["bandwidth"][a][b] > 0 for b in range(self.N)] for a in range(self.N)]
        self.queue, self.out_queue, self.idle = [0] * self.N, [0] * self.N, False
        media = [Medium() for _ in range(self.N)]
        self.media = [media[p if p == self.me else next(q for q in range(self.N) if q != self.me and c["medium"][q] == c["medium"][p])] for p in range(self.N)]
        self.sent_count, self.arrived_count, self.told = [0] * self.N, [0] * self.N, False
        self.reached, self.accepted = [0] * self.K, [0] * self.K
        self.exit_probability = [0.0 if t == INF else 0.5 for t in c["thresholds"]]
        self.now = self.next_rebuild = INT64_MIN
        self.tasks, self.free = [Task() for _ in range(c["max_tasks"])], list(range(c["max_tasks"] - 1, -1, -1))
        self.room = Room()
        self.eager = self.S * self.N * self.N <= c["eager_limit"]
        self.need, self.need_sd, self.togo, self.there, self.onward = ([[[0.0] * self.N for _ in range(self.S)] for _ in range(self.NB)] for _ in range(5))
        self.level = self.S - 1  # of the rebuild in progress, -1 when all is current
        self.moves_from_here()
        while self.level >= 0:
            self.rebuild_step()
        self.policy = policies.Custom(self) if c["policy"] == "custom" else policies.POLICIES[c["policy"]](self)

    # -- estimates ---------------------------------------------------------------------------------------------------

    def segment_time(self, s: int, n: int, b: int) -> tuple[float, float]:
        """(mean, variance) of segment s on node n at batch bucket b."""
        e = self.time[s][n]
        mean = self.c["mean"][s][n][b] * NS * e.used_ratio
        sd = self.c["spread"][s][n][b] * NS * e.used_ratio
        return mean, e.used_kept * (sd * sd) + e.used_seen * (mean * mean)

    def reachable(self, a: int, b: int) -> bool:
        return self.link_up[a][b] and self.node_up[b]

    def runs(self, s: int, n: int) -> bool:
        return self.c["hosts"][s][n] and self.node_up[n]

    def link_idle(self, p: int, now: int) -> bool:
        return self.reachable(self.me, p) and self.free_at(p, now) <= now

    def move(self, s: int, a: int, b: int) -> tuple[float, float, int, float, float]:
        """(mean, variance, codec, time on the wire, cost) of sending the carry that enters segment s."""
        if not self.reachable(a, b):
            return INF, 0.0, -1, 0.0, INF
        e, best = self.rate[a][b], None
        per_byte, delay = 8.0 * NS / self.c["bandwidth"][a][b] * e.used_ratio, self.c["delay"][a][b] * NS
        for codec in range(self.NC):
            size = self.c["wire_bytes"][s][codec]
            wire = size * per_byte
            mean = delay + wire + self.c["codec_seconds"][s][codec] * NS
            sure = mean + self.c["quantile"] * (wire * math.sqrt(e.used_seen))
            cost = mean + size * self.c["send_ns"][a] if self.c["send_ns"] else mean
            if best is None or sure < best[0]:
                best = sure, mean, e.used_seen * (wire * wire), codec, wire, cost
        return best[1:]

    def return_time(self, n: int) -> float:
        if n == self.home:
            return 0.0
        if not self.reachable(n, self.home):
            return INF
        per_byte = 8.0 * NS / self.c["bandwidth"][n][self.home] * self.rate[n][self.home].used_ratio
        return self.c["delay"][n][self.home] * NS + self.c["answer_bytes"] * per_byte

    def moves_from_here(self) -> None:
        """What a decision needs of the links and queues, always current."""
        self.home_ns = [self.return_time(n) for n in range(self.N)]
        away = [[(INF, 0.0, -1, 0.0, INF) if p == self.me else self.move(s, self.me, p) for p in range(self.N)] for s in range(self.S)]
        self.move_ns, self.move_var, self.codec, self.wire, self.move_cost = ([[m[i] for m in row] for row in away] for i in range(5))
        self.queues()

    def queues(self) -> None:
        self.wait, self.wait_sd = [0.0] * self.N, [0.0] * self.N
        for n in range(self.N):
            runs = [self.segment_time(s, n, 0) for s in range(self.S) if self.c["hosts"][s][n]]
            if runs:
                total = total_var = 0.0
                for mean, var in runs:
                    total, total_var = total + mean, total_var + var
                self.wait[n] = self.queue[n] * (total / len(runs))
                self.wait_sd[n] = math.sqrt(self.queue[n] * (total_var / len(runs)))

    def mean_task_time(self, n: int) -> float:
        total, hosted = 0.0, sum(self.c["hosts"][s][n] for s in range(self.S))
        for s in range(self.S):
            if self.c["hosts"][s][n]:
                total += self.segment_time(s, n, 0)[0]
        return total / hosted if hosted else 0.0

    def place(self, b: int, s: int, p: int) -> None:
        """need (mean, deviation) until the next answer is home, togo until the end, there: the end from the start of s on p."""
        self.need[b][s][p] = self.togo[b][s][p] = self.there[b][s][p] = INF
        self.need_sd[b][s][p] = 0.0
        if not self.runs(s, p):
            return
        mean, var = self.segment_time(s, p, b)
        price = 1.0 + self.c["surcharge"][p] if self.c["surcharge"] else 1.0
        after = self.home_ns[p] if s == self.K else mix(self.exit_probability[s], self.home_ns[p], self.onward[b][s + 1][p])
        there = self.there[b][s][p] = mean * price + after
        if p == self.me:
            self.need[b][s][p], self.need_sd[b][s][p], self.togo[b][s][p] = mean + self.home_ns[p], math.sqrt(var), there
        else:
            self.need[b][s][p] = self.move_ns[s][p] + mean + self.home_ns[p]
            self.need_sd[b][s][p] = math.sqrt(self.move_var[s][p] + var)
            self.togo[b][s][p] = self.move_cost[s][p] + there

    def rebuild_step(self) -> None:
        """Bring one segment of the tables up; onward[b][s][n]: cheapest expected end from the end of s - 1 on n."""
        if self.level < 0:
            return
        s, self.level = self.level, self.level - 1
        for b in range(self.NB):
            for p in range(self.N):
                self.place(b, s, p)
        for n in range(self.N):
            costs = [0.0 if p == n else self.move(s, n, p)[4] for p in range(self.N)]
            for b in range(self.NB):
                self.onward[b][s][n] = min(cost + there for cost, there in zip(costs, self.there[b][s], strict=True))

    def refresh(self, segment: int, places=(), links: bool = False) -> None:
        """Segments after `segment` are not touched; (segment, node) of `places` are brought up at once in a large world too."""
        self.moves_from_here() if links else self.queues()
        self.level = max(self.level, segment)
        while self.eager and self.level >= 0:
            self.rebuild_step()
        if not self.eager:
            for s, p in places:
                for b in range(self.NB):
                    self.place(b, s, p)

    def everywhere(self, *nodes: int) -> list[tuple[int, int]]:
        return [(s, p) for s in range(self.S) for p in nodes]

    def time_at(self, b: int, s: int, p: int, now: int, rounds: float, z: float) -> float:
        """Until the next answer is at home with quantile z, if the task goes to p now."""
        extra = self.delay_at(s, p, now, rounds)
        return (self.need[b][s][p] + z * self.need_sd[b][s][p]) + ((self.wait[p] + z * self.wait_sd[p]) + extra)

    def rebatch(self, segment: int, rows: int, others: int, merge_ns: int) -> bool:
        apart = self.expected(segment, self.me, rows) + self.expected(segment, self.me, others)
        return (apart - self.expected(segment, self.me, rows + others)) * self.time[segment][self.me].used_ratio > merge_ns

    def observe(self, segment: int, node: int, batch: int, duration: int) -> None:
        expected = self.expected(segment, node, batch)
        if not expected > 0 or duration <= 0:
            self.counters["ignored"] += 1
            return
        if self.time[segment][node].update(duration / expected, self.counters):
            self.refresh(segment, [(segment, node)])
        self.policy.observed(node, batch, duration)

    def expected(self, segment: int, node: int, batch: int) -> float:
        sizes, mean = self.c["batch_sizes"], self.c["mean"][segment][node]
        if batch <= sizes[0]:
            return mean[0] * NS
        if batch >= sizes[-1]:
            return mean[-1] * NS * (batch / sizes[-1])
        b = next(i for i, size in enumerate(sizes) if size >= batch)
        part = (batch - sizes[b - 1]) / (sizes[b] - sizes[b - 1])
        return (mean[b - 1] + part * (mean[b] - mean[b - 1])) * NS

    def free_at(self, p: int, now: int) -> int:
        """When what this node has sent over the medium to p is through: as long as the watched message is not there, its clock has not gone on."""
        m = self.media[p]
        if m.watched < 0 or m.forgotten(now):
            return m.busy_until
        return max(m.busy_until, clamp64(clamp64(now - self.delay_ns(m.watched)) + m.after))

    def delay_ns(self, p: int) -> int:
        return int(self.c["delay"][self.me][p] * NS)

    def sent(self, s: int, p: int, now: int) -> int:
        """ns that the message takes of the medium."""
        wire, m = int(min(self.wire[s][p], 1e15)), self.media[p]
        if self.told and clamp64(now - m.busy_until) > FORGOTTEN:  # long there, or lost
            self.arrived_count[p] = self.sent_count[p]
        m.busy_until = clamp64(max(m.busy_until, now) + wire)
        self.sent_count[p] += 1
        if self.told:
            if m.forgotten(now):
                self.arrived_count[m.watched] = self.sent_count[m.watched] - (m.watched == p)
                m.watched = -1
            m.last = clamp64(now + wire)
            if m.watched >= 0:
                m.after = clamp64(m.after + wire)
            else:
                m.watched, m.number, m.due, m.after = p, self.sent_count[p], m.busy_until, 0
        return wire

    def unsent(self, p: int, wire: int) -> None:
        m = self.media[p]
        m.busy_until = clamp64(m.busy_until - wire)
        self.sent_count[p] -= 1
        if not self.told:
            return
        m.last = min(m.last, m.busy_until)
        if m.watched == p and m.number > self.sent_count[p]:
            m.watched = -1
        else:
            m.after = max(0, m.after - wire)

    def arrived(self, p: int, now: int) -> None:
        """The oldest message to p that is under way."""
        self.told = True
        if self.arrived_count[p] >= self.sent_count[p]:
            return
        self.arrived_count[p] += 1
        m = self.media[p]
        if m.watched == p and self.arrived_count[p] >= m.number:
            m.watched = -1
            m.busy_until = max(clamp64(clamp64(now - self.delay_ns(p)) + m.after), m.last)

    def observe_link(self, src: int, dst: int, nbytes: int, duration: int, now: int | None = None) -> None:
        if now is not None:
            now = self.clock(now)
            if src == self.me != dst:
                self.arrived(dst, now)
        bandwidth, delay = self.c["bandwidth"][src][dst], self.c["delay"][src][dst] * NS
        wire = nbytes * 8.0 * NS / bandwidth if bandwidth > 0 and src != dst else 0.0
        if duration <= 0 or not wire > 0 or wire < 0.25 * delay:  # a short message tells the delay, not the rate
            self.counters["ignored"] += 1
            if not (duration > 0 and bandwidth > 0 and src != dst):
                return
        elif self.rate[src][dst].update((duration - delay) / wire, self.counters):
            self.refresh(self.K, self.everywhere(src, dst), True)
        self.policy.observed_link(src, dst, nbytes, duration)

    def observe_queue(self, node: int, length: int, out_length: int) -> None:
        self.queue[node], self.out_queue[node] = length, out_length
        self.queues()
        self.policy.observed_queue(node, self.now)

    def set_node_up(self, node: int, up: bool) -> None:
        if self.node_up[node] != up:
            self.node_up[node] = up
            self.refresh(self.K, self.everywhere(*(range(self.N) if node == self.home else [node])), True)

    def set_link_up(self, src: int, dst: int, up: bool) -> None:
        up = up and self.c["bandwidth"][src][dst] > 0
        if self.link_up[src][dst] != up:
            self.link_up[src][dst] = up
            self.refresh(self.K, self.everywhere(src, dst), True)

    # -- tasks -------------------------------------------------------------------------------------------------------

    def clock(self, now: int) -> int:
        if now < self.now:
            self.counters["clock_backwards"] += 1
        else:
            self.now = now
        return self.now

    def admit(self, now: int, deadline: int | None, segment: int, tenant: int) -> int:
        now = self.clock(now)
        usual = self.classes[tenant][0]
        if deadline is None:
            deadline = min(now + usual, INT64_MAX) if usual != NO_DEADLINE else NO_DEADLINE
        if deadline <= now:
            self.counters["refused_late"] += 1
            return -1
        if not self.free:
            self.counters["refused_full"] += 1
            return -1
        if not self.policy.admits():
            self.counters["refused_queue"] += 1
            return -1
        slot = self.free.pop()
        self.tasks[slot] = Task(True, deadline, segment, segment - 1, tenant, self.tasks[slot].generation)
        self.counters["admitted"] += 1
        self.policy.admitted(slot)
        return self.handle(slot)

    def handle(self, slot: int) -> int:
        return self.tasks[slot].generation << 32 | slot

    def find(self, task: int) -> int:
        """The slot of a live task, else -1."""
        slot = task & 0xFFFFFFFF
        found = 0 <= task and slot < len(self.tasks) and self.tasks[slot].live and self.tasks[slot].generation == task >> 32
        return slot if found else -1

    def release(self, slot: int) -> None:
        self.tasks[slot].live = False
        self.tasks[slot].generation = (self.tasks[slot].generation + 1) & 0x7FFFFFFF
        self.free.append(slot)

    def finish(self, task: int, confidence: float) -> bool:
        slot = self.find(task)
        if slot < 0:
            self.counters["stale"] += 1
            return False
        self.counters["finished"] += 1
        if slot in self.room.until:
            self.room.remove(slot)
        self.policy.finished(slot, confidence)
        self.release(slot)
        return True

    # -- decisions ---------------------------------------------------------------------------------------------------

    def query_of(self, slot: int, now: int, sample: dict) -> Query:
        task = self.tasks[slot]
        slack = INF if task.deadline == NO_DEADLINE else float(clamp64(task.deadline - now))
        _, z, weight = self.classes[task.tenant]
        return Query(slot, task.segment, -1, sample, slack, now, 0, 0.0, z, weight)

    def accepts(self, slot: int, exit: int, sample: dict, now: int) -> bool:
        if self.c["rule"] is None:
            return self.policy.accepts(slot, exit, sample)
        if self.c["thresholds"][exit] == INF or sample["confidence"] != sample["confidence"]:
            return False
        q = self.query_of(slot, now, sample)
        q.exit = exit
        return bool(self.c["rule"](self.stats_view(q), self.task_view(q), self.node_view(q, self.me)))

    def stats_view(self, q: Query) -> Stats:
        x = q.sample
        threshold = self.c["thresholds"][q.exit] if q.exit >= 0 else math.nan
        return Stats(x["confidence"], threshold, x["max_prob"], x["margin"], x["entropy"], x["lse"], x["gate"], x["delta"], x["label"], q.exit)

    def task_view(self, q: Query) -> TaskView:
        t = self.tasks[q.slot]
        return TaskView(q.slack / NS, q.weight, t.segment, self.K, t.best, t.pool, t.tenant)

    def node_view(self, q: Query, p: int) -> NodeView:
        s, b = q.segment, q.bucket
        t = self.time_at(b, s, p, q.now, q.rounds, q.z)
        end = self.togo[b][s][p] + (self.wait[p] + self.delay_at(s, p, q.now, q.rounds))
        return NodeView(t / NS, end / NS, self.wait[p] / NS, p, int(p == self.me), int(t <= q.slack and t < INF), self.queue[p],
                        int(p == self.me and self.idle), RUN_ACTION + p)

    def decide(self, task: int, exit: int, sample: dict, now: int) -> int:
        return self.decide_row(task, exit, sample, self.clock(now), 0, 0.0)

    def decide_batch(self, tasks, exit: int, confidences, samples, now: int) -> list[int]:
        now = self.clock(now)
        rows = samples or [{**NOTHING, "confidence": u} for u in confidences]
        self.policy.batch_begins(confidences)
        staying = len(rows)
        for slot, x in zip(map(self.find, tasks), rows, strict=True):
            if slot >= 0:
                self.take_back(slot)
                staying -= 0 <= exit < self.K and self.accepts(slot, exit, x, now)
        sizes = self.c["batch_sizes"]
        bucket = next((b for b, size in enumerate(sizes) if size >= staying), len(sizes) - 1)
        rounds = (staying - 1) // sizes[-1] if staying > 0 else 0  # full batches that run before the last one
        codes = [self.decide_row(t, exit, x, now, bucket, float(rounds)) for t, x in zip(tasks, rows, strict=True)]
        self.policy.batch_ends()
        return codes

    def take_back(self, slot: int) -> None:
        """An OFFLOAD that is asked about again: the host could not send it."""
        t = self.tasks[slot]
        if t.sent:
            self.unsent(*t.sent)
            t.sent = None

    def decide_row(self, task: int, exit: int, sample: dict, now: int, bucket: int, rounds: float) -> int:
        count, slot = self.counters, self.find(task)
        if slot < 0:
            count["stale"] += 1
            return pack(Action.REJECT, -1, -1, False)
        if slot in self.room.until:
            self.room.remove(slot)
        t = self.tasks[slot]
        self.take_back(slot)
        if exit >= 0:
            t.segment, t.best = exit + 1, max(t.best, exit)
        q = self.query_of(slot, now, sample)
        if t.segment > self.K:
            return self.end(slot, q.slack, False, sample)
        if exit >= 0:
            accepted = self.accepts(slot, exit, sample, now)
            self.policy.learn(slot, exit, sample, accepted)
            self.learn_exit(exit, accepted)
            if accepted:
                return self.end(slot, q.slack, False, sample)
        q.exit, q.bucket, q.rounds = exit, bucket, rounds
        choice = self.policy.place(q)
        if choice[0] == WAIT and choice[2] <= now:  # or poll would give it back at once, for ever
            choice = self.policy.usual(q)
        return self.act(slot, choice, q.slack, now)

    def act(self, slot: int, choice, slack: float, now: int) -> int:
        kind, node, until = choice
        t, count = self.tasks[slot], self.counters
        if kind == EXIT or (kind == FITS_NOT and t.best >= 0):
            return self.end(slot, slack, kind == FITS_NOT, None)
        if kind == FITS_NOT:
            count["rejected"] += 1
            self.release(slot)
            return pack(Action.REJECT, -1, -1, False)
        if kind == WAIT:
            count["waited"] += 1
            self.room.add(slot, until)
            return pack(Action.WAIT, self.me, -1, False, (INT64_MAX if until == INT64_MAX else until - now) // 1000)
        if node == self.me:
            count["continued"] += 1
            return pack(Action.CONTINUE, self.me, -1, False)
        count["offloaded"] += 1
        t.sent = node, self.sent(t.segment, node, now)
        return pack(Action.OFFLOAD, node, self.codec[t.segment][node], False)

    def end(self, slot: int, slack: float, forced: bool, sample: dict | None) -> int:
        best = self.tasks[slot].best
        self.counters["exits"] += 1
        self.counters["forced"] += forced
        self.counters["late"] += slack < self.home_ns[self.me]
        self.per_exit[best] += 1
        self.policy.ended(slot, best, sample, forced)
        self.release(slot)
        return pack(Action.EXIT, self.me, -1, forced)

    def poll(self, now: int) -> tuple[int, int] | None:
        now = self.clock(now)
        slot = self.room.expired(now)
        found = self.policy.poll(now) if slot < 0 else (slot, self.policy.usual(self.query_of(slot, now, NOTHING)))
        if found is None:
            return None
        slot, choice = found
        self.room.remove(slot)
        task, code = self.handle(slot), self.act(slot, choice, self.query_of(slot, now, NOTHING).slack, now)
        if choice[0] == RUN and choice[1] == self.me:
            self.idle = False
        return task, code

    def next_tick(self) -> int:
        return min(self.policy.next_tick(), self.room.soonest(), max(self.next_rebuild, self.now) if self.level >= 0 else INT64_MAX)

    def tick(self, now: int) -> None:
        now = self.clock(now)
        self.policy.tick(now)
        if self.level >= 0 and now >= self.next_rebuild:
            self.rebuild_step()
            self.next_rebuild = min(now + REBUILD_EVERY, INT64_MAX)

    def admit_interval(self) -> float:
        return self.policy.admit_interval()

    def set_idle(self, idle: bool) -> None:
        self.idle = idle

    def learn_exit(self, exit: int, accepted: bool) -> None:
        if self.c["thresholds"][exit] == INF:
            return
        self.reached[exit] += 1
        self.accepted[exit] += accepted
        n = self.reached[exit]
        if n & (n - 1) == 0 or n % 4096 == 0:
            p = (self.accepted[exit] + 1.0) / (n + 2.0)
            if abs(p - self.exit_probability[exit]) > PUBLISH_CHANGE:
                self.exit_probability[exit] = p
                self.refresh(exit)

    def delay_at(self, s: int, p: int, now: int, rounds: float) -> float:
        """What stands before node p beside its queue: this node's earlier sends on that link, or the earlier batches here."""
        if p == self.me:
            return rounds * self.segment_time(s, p, self.NB - 1)[0] if rounds > 0 else 0.0
        free_at = self.free_at(p, now)
        return float(clamp64(free_at - now)) if free_at > now else 0.0

    def snapshot(self) -> dict:
        return {
            **self.counters,
            "live": len(self.tasks) - len(self.free),
            "waiting": len(self.room),
            "capacity": len(self.tasks),
            "per_exit": list(self.per_exit),
            "exit_probability": list(self.exit_probability),
            "segment_ratio": [[e.ratio for e in row] for row in self.time],
            "link_ratio": [[e.ratio for e in row] for row in self.rate],
            "queue": list(self.queue),
            "node_up": list(self.node_up),
            "link_up": [list(row) for row in self.link_up],
            "next_answer_ns": [[self.need[0][s][p] + self.c["quantile"] * self.need_sd[0][s][p] for p in range(self.N)] for s in range(self.S)],
            "completion_ns": [list(row) for row in self.togo[0]],
            **self.policy.state(),
        }


def clamp64(value: int) -> int:
    return min(max(value, INT64_MIN), INT64_MAX)


def mix(p: float, a: float, b: float) -> float:
    """p * a + (1 - p) * b, also where one of them is infinite and has no weight."""
    return b if p <= 0 else a if p >= 1 else p * a + (1.0 - p) * b

"""The policies by name in plain Python: the oracle of csrc/sched/policy_*.cc, one class each; the formulas are in docs/scheduler.md.

A place is `(kind, node, until)`: kind one of FITS_NOT, EXIT, RUN, WAIT.
"""

from __future__ import annotations

import ctypes
import math
import sys
from dataclasses import dataclass

from fastee.scheduling import rules

INF, NAN, NS = math.inf, math.nan, 1e9
NEVER, INT64_MIN = (1 << 63) - 1, -(1 << 63)
FITS_NOT, EXIT, RUN, WAIT = range(4)
NOTHING = {"confidence": NAN, "gate": NAN, "delta": NAN, "label": -1, "pool": -1, "max_prob": NAN, "margin": NAN, "entropy": NAN, "lse": NAN}
SWITCH_GAIN = 0.9  # another place must be 10 % cheaper
MOST_MESSAGES = 2.0  # of its own size, that may be before a task on the way out
MAX = sys.float_info.max
QUANTILE_95 = 1.6448536269514722
SIZE_CLASSES = 51


@dataclass(slots=True)
class Query:
    slot: int
    segment: int
    exit: int
    sample: dict
    slack: float
    now: int
    bucket: int
    rounds: float
    z: float
    weight: float


class SplitMix64:
    """The scheduler's random stream."""

    def __init__(self, seed: int):
        self.state = seed

    def uniform(self) -> float:
        mask = (1 << 64) - 1
        z = self.state = (self.state + 0x9E3779B97F4A7C15) & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return ((z ^ z >> 31) >> 11) * 2.0**-53


class Threshold:
    """Base of all: the score against the exit's threshold; here if that makes the deadline, else where the answer is soonest."""

    def __init__(self, core):
        self.core, self.c = core, core.c
        self.p = core.c["params"]

    def on(self, exit: int) -> bool:
        return self.c["thresholds"][exit] < INF

    def admits(self) -> bool:
        return True

    def admitted(self, slot: int) -> None: ...

    def accepts(self, slot: int, exit: int, x: dict) -> bool:
        return f32(x["confidence"]) >= self.c["thresholds"][exit]

    def learn(self, slot: int, exit: int, x: dict, accepted: bool) -> None: ...

    def place(self, q: Query):
        return self.usual(q)

    def ended(self, slot: int, exit: int, x: dict | None, forced: bool) -> None: ...

    def finished(self, slot: int, confidence: float) -> None: ...

    def batch_begins(self, confidences) -> None: ...

    def batch_ends(self) -> None: ...

    def poll(self, now: int):
        """Ask everybody who waits again, once in a walk."""
        room = self.core.room
        while (slot := room.step()) >= 0:
            choice = self.place(self.core.query_of(slot, now, NOTHING))
            if choice[0] != WAIT:
                return slot, choice
        return None

    def next_tick(self) -> int:
        return NEVER

    def tick(self, now: int) -> None: ...

    def admit_interval(self) -> float:
        return 0.0

    def observed(self, node: int, batch: int, duration: int) -> None: ...

    def observed_link(self, src: int, dst: int, nbytes: int, duration: int) -> None: ...

    def observed_queue(self, node: int, now: int) -> None: ...

    def state(self) -> dict:
        return {}

    def time_at(self, q: Query, p: int) -> float:
        return self.core.time_at(q.bucket, q.segment, p, q.now, q.rounds, q.z)

    def fits(self, q: Query, p: int) -> bool:
        t = self.time_at(q, p)
        return t <= q.slack and t < INF

    def usual(self, q: Query):
        if self.fits(q, self.core.me):
            return RUN, self.core.me, NEVER
        fits = [p for p in range(self.core.N) if p != self.core.me and self.fits(q, p)]
        return (RUN, min(fits, key=lambda p: self.time_at(q, p)), NEVER) if fits else (FITS_NOT, -1, NEVER)

    def wait_while_possible(self, q: Query):
        return self.wait_for(q, min(self.time_at(q, p) for p in range(self.core.N)))

    def wait_for(self, q: Query, time: float):
        if not (time <= q.slack and time < INF):
            return FITS_NOT, -1, NEVER
        return WAIT, self.core.me, NEVER if q.slack == INF else min(q.now + int(min(q.slack - time, 9e18)), NEVER)


class Deadline(Threshold):
    """Cheapest expected end among the places that make the deadline, bound late; EXIT where going on is not worth its cost."""

    def __init__(self, core):
        super().__init__(core)
        self.last_place, self.most_rows = [-1] * core.S, 1

    def observed(self, node: int, batch: int, duration: int) -> None:
        if node == self.core.me:
            self.most_rows = max(self.most_rows, batch)

    def place(self, q: Query):
        core, c, s = self.core, self.c, q.segment
        answered = core.tasks[q.slot].best >= 0
        # A better answer is not worth a run during which somebody who waits for any answer at all misses the last moment.
        if answered and len(core.room) and float(min(max(core.room.soonest() - q.now, INT64_MIN), NEVER)) <= core.segment_time(s, core.me, 0)[0]:
            return FITS_NOT, -1, NEVER
        end = lambda p: core.togo[q.bucket][s][p] + (core.wait[p] + self.earlier(q, p)) + self.sent_before(q, p)
        in_time = [p for p in range(core.N) if self.until_answer(q, p, q.z) <= min(q.slack, MAX)]
        if not in_time:
            return (FITS_NOT, -1, NEVER) if answered else self.likeliest(q)
        best, stay = min(in_time, key=end), self.last_place[s]
        if stay in in_time and not end(best) < SWITCH_GAIN * end(stay):
            best = stay
        if not answered and q.slack < INF and core.N > 1:
            is_open = lambda p: core.queue[p] <= self.most_rows if p == core.me else self.sent_before(q, p) <= MOST_MESSAGES * core.wire[s][p]
            if not is_open(best):
                best = min(filter(is_open, in_time), key=end, default=-1)
            if best < 0:
                wait = self.wait_for(q, min(core.need[q.bucket][s]))
                return wait if wait[0] == WAIT else self.likeliest(q)
        u = q.sample["confidence"]
        if q.exit >= 0 and c["gain"] is not None and self.on(q.exit) and u == u:
            gain = c["gain"][q.exit][self.gain_bin(u)]
            later = INF if end(best) == INF else end(best) - core.home_ns[core.me]
            cost = c["cost_weight"] * (later / NS) if c["cost_weight"] > 0 else 0.0
            if gain * q.weight <= cost and gain <= c["max_drop"]:
                return EXIT, core.me, NEVER
        self.last_place[s] = best
        return RUN, best, NEVER

    def earlier(self, q: Query, p: int) -> float:
        """ns of the earlier full batches of the same call."""
        core = self.core
        return q.rounds * core.segment_time(q.segment, p, core.NB - 1)[0] if p == core.me and q.rounds > 0 else 0.0

    def until_answer(self, q: Query, p: int, z: float) -> float:
        core, b, s = self.core, q.bucket, q.segment
        time = (core.need[b][s][p] + z * core.need_sd[b][s][p]) + ((core.wait[p] + z * core.wait_sd[p]) + self.earlier(q, p))
        return time + self.sent_before(q, p)

    def sent_before(self, q: Query, p: int) -> float:
        return 0.0 if p == self.core.me else self.core.delay_at(q.segment, p, q.now, 0.0)

    def likeliest(self, q: Query):
        """No answer yet and no place keeps the promise: where the next answer is soonest on average, if that makes the deadline; else wait."""
        time = {p: self.until_answer(q, p, 0.0) for p in range(self.core.N)}
        in_time = [p for p in time if time[p] <= min(q.slack, MAX)]
        return (RUN, min(in_time, key=time.get), NEVER) if in_time else self.wait_for(q, min(self.core.need[q.bucket][q.segment]))

    def gain_bin(self, confidence: float) -> int:
        low, high = self.c["gain_range"]
        bins = len(self.c["gain"][0])
        at = (confidence - low) / (high - low) * bins
        return 0 if at < 1 else bins - 1 if at >= bins else int(at)


class Patience(Threshold):
    """PABEE: the same label `patience` times again."""

    def run(self, slot: int, x: dict) -> int:
        t = self.core.tasks[slot]
        return t.run + 1 if x["label"] >= 0 and x["label"] == t.label else 0

    def accepts(self, slot, exit, x):
        return self.on(exit) and self.run(slot, x) >= self.p["patience"]

    def learn(self, slot, exit, x, accepted):
        t = self.core.tasks[slot]
        t.run, t.label = self.run(slot, x), x["label"]


class DistrEE(Threshold):
    """The joined feature stands still, or the slowest student would be late."""

    def accepts(self, slot, exit, x):
        distance = -x["confidence"] if math.isnan(x["delta"]) else x["delta"]
        return exit > 0 and self.on(exit) and distance >= 0 and distance < self.p["delta"][exit]

    def place(self, q):
        core, s = self.core, q.segment
        if not self.p["students"] or not core.runs(s, core.me):
            return self.usual(q)
        slowest = 0.0
        for p in range(core.N):
            if core.runs(s, p) and core.home_ns[p] < INF:
                mean, var = core.segment_time(s, p, q.bucket)
                slowest = max(slowest, mean + core.home_ns[p] + QUANTILE_95 * math.sqrt(var))
        if not slowest + core.delay_at(s, core.me, q.now, q.rounds) <= q.slack:
            return FITS_NOT, -1, NEVER
        return RUN, core.me, NEVER


class JeiGate(Threshold):
    """JEI-DNN, one accumulator: exit when g >= (1 - S) / 2, else S += g."""

    def gate(self, exit: int, x: dict) -> float:
        g = x["gate"] if x["gate"] == x["gate"] else x["confidence"]
        return g if self.on(exit) and 0 <= g <= 1 else NAN

    def accepts(self, slot, exit, x):
        return self.gate(exit, x) >= (1.0 - self.core.tasks[slot].sum) / 2.0

    def learn(self, slot, exit, x, accepted):
        g = self.gate(exit, x)
        if g >= 0:
            self.core.tasks[slot].sum += g


class Daisy(Threshold):
    """Mean entropy, asked inside a learned range of exits; the last of the range always exits."""

    def __init__(self, core):
        super().__init__(core)
        p, self.counts, self.last, self.shared, self.counted = self.p, list(self.p["counts"]), -1, None, False
        self.in_range = [p["train"]] * (core.K + 1)
        if p["train"] or sum(self.counts) == 0:
            return
        exits, total = range(core.K + 1), sum(self.counts)
        mean = sum(n * e for e, n in enumerate(self.counts)) / total
        used = [e for e in exits if self.counts[e] > 0]
        wanted = ({math.floor(mean), math.ceil(mean)}, range(used[0], used[-1] + 1),
                  {e for e in exits if self.counts[e] / total > p["inf_threshold"]})[p["range"]]  # fmt: skip
        self.in_range = [e in wanted for e in exits]
        self.last = max(wanted, default=-1)

    def accepts(self, slot, exit, x):
        if not self.on(exit) or not self.in_range[exit]:
            return False
        entropy = -(x["confidence"] if self.shared is None else self.shared)
        return exit == self.last or 0 <= entropy <= self.p["u_threshold"]

    def ended(self, slot, exit, x, forced):
        if self.p["train"] and not forced and not (self.shared is not None and self.counted):
            self.counts[exit] += 1
            self.counted = True

    def batch_begins(self, confidences):
        if self.p["whole_batch"] and len(confidences):
            total = 0.0
            for u in confidences:
                total += u
            self.shared, self.counted = total / len(confidences), False

    def batch_ends(self):
        self.shared = None

    def state(self):
        return {"daisy_counts": [float(n) for n in self.counts], "daisy_range": [float(r) for r in self.in_range]}


class Dimee(Threshold):
    """Pools choose the tier a sample starts on; alpha at the two cuts."""

    def __init__(self, core):
        super().__init__(core)
        tiers = self.p["tiers"]
        self.tier = tiers.index(core.me) if core.me in tiers else -1

    def pool(self, slot: int, x: dict) -> int:
        pool = x["pool"] if x["pool"] >= 0 else self.core.tasks[slot].pool
        return min(max(pool, 0), 2)

    def accepts(self, slot, exit, x):
        first, second = self.p["cuts"]
        pool = self.pool(slot, x)
        here = (exit == first and pool == 0 and self.tier <= 0) or (exit == second and pool < 2 and self.tier <= 1)
        return here and self.on(exit) and f32(x["confidence"]) >= f32(self.p["alpha"])

    def learn(self, slot, exit, x, accepted):
        self.core.tasks[slot].pool = self.pool(slot, x)

    def place(self, q):
        pool = self.core.tasks[q.slot].pool = self.pool(q.slot, q.sample)
        first, second = self.p["cuts"]
        tier = 0 if pool == 0 and q.segment <= first else 1 if pool < 2 and q.segment <= second else 2
        for node in [*self.p["tiers"][max(tier, self.tier) :], self.core.me]:
            if self.fits(q, node):
                return RUN, node, NEVER
        return FITS_NOT, -1, NEVER


class SplitEE(Threshold):
    """UCB1 over the exit at which to look; below alpha there, the cloud finishes."""

    def __init__(self, core):
        super().__init__(core)
        self.arms = core.K + 1
        self.plays, self.rewarded, self.sum = [0] * self.arms, [0] * self.arms, [0.0] * self.arms
        self.seen = {}

    def admitted(self, slot):
        task = self.core.tasks[slot]
        if task.segment != 0 or self.core.me == self.p["cloud"]:
            return
        unplayed = [i for i in range(self.arms) if self.plays[i] == 0]
        arm = unplayed[0] if unplayed else max(range(self.arms), key=self.bound)
        self.plays[arm] += 1
        task.arm = arm
        self.seen[slot] = {}

    def bound(self, i: int) -> float:
        mean = self.sum[i] / self.rewarded[i] if self.rewarded[i] else 0.0
        return mean + self.p["explore"] * math.sqrt(math.log(sum(self.plays) + 1) / self.plays[i])

    def sure(self, u: float) -> bool:
        return f32(u) >= f32(self.p["alpha"])

    def accepts(self, slot, exit, x):
        return exit == self.core.tasks[slot].arm and self.on(exit) and self.sure(x["confidence"])

    def learn(self, slot, exit, x, accepted):
        if self.core.tasks[slot].arm >= 0:
            self.seen[slot][exit] = x["confidence"]

    def place(self, q):
        arm, cloud = self.core.tasks[q.slot].arm, self.p["cloud"]
        if 0 <= arm < q.segment and self.fits(q, cloud):
            return RUN, cloud, NEVER
        return self.usual(q)

    def ended(self, slot, exit, x, forced):
        if not forced and x is not None:
            self.reward(slot, exit, x["confidence"])

    def finished(self, slot, confidence):
        self.reward(slot, self.core.K, confidence)

    def reward(self, slot: int, exit: int, last: float) -> None:
        arm = self.core.tasks[slot].arm
        if arm < 0 or not math.isfinite(last):
            return
        self.give(arm, last, last, exit)
        if self.p["side_information"]:
            for i in range(arm):
                own = self.seen[slot].get(i, NAN)
                if math.isfinite(own) and (self.sure(own) or exit == self.core.K):
                    self.give(i, own, last, i if self.sure(own) else exit)

    def give(self, arm: int, own: float, last: float, left: int) -> None:
        layers = self.p["layer_cost"] * (arm + 1)
        self.rewarded[arm] += 1
        self.sum[arm] += own - layers if left == arm else last - self.p["offload_cost"] - layers

    def state(self):
        return {"splitee_plays": [float(n) for n in self.plays], "splitee_rewarded": [float(n) for n in self.rewarded], "splitee_reward": list(self.sum)}


class MdiExit(Threshold):
    """Alg 1 in place(), Alg 2 and the liveness rule in poll(), Alg 3 and 4 in tick()."""

    def __init__(self, core):
        super().__init__(core)
        self.source = core.me == core.home
        self.period = int(self.p["period"] * NS)
        self.random = SplitMix64(self.c["seed"])
        self.task_time = [core.mean_task_time(n) for n in range(core.N)]
        self.transfer, self.stamp, self.mu = {}, {}, self.p["mu"]
        finite = [t for t in self.c["thresholds"] if t < INF]
        self.threshold = min(max(finite[0], self.p["t_min"]), self.p["t_max"]) if finite else self.p["t_max"]
        self.next, self.full, self.limiting, self.start, self.tried = None, 0, False, 0, 0

    def admits(self):
        return not self.source or self.core.queue[self.core.me] + len(self.core.room) < self.p["q_max"]

    def accepts(self, slot, exit, x):
        limit = self.threshold if self.p["adapt"] == 2 else self.c["thresholds"][exit]
        return self.on(exit) and f32(x["confidence"]) > f32(limit)

    def place(self, q):
        core = self.core
        queueing = q.exit >= 0 or (q.segment == 0 and self.source and self.p["raw_offload"])
        keep = not queueing or core.queue[core.me] == 0 or len(core.room) > self.p["t_o"]
        return (RUN, core.me, NEVER) if keep and self.fits(q, core.me) else self.wait_while_possible(q)

    def poll(self, now):
        core, room = self.core, self.core.room
        me, N = core.me, core.N
        while self.tried < N and len(room):
            p = (self.start + self.tried) % N
            self.tried += 1
            age = now - self.stamp[p] if p in self.stamp else INF
            fresh = float(min(age, NEVER)) <= self.p["report_age"] * float(self.period) if age < INF else False
            if p == me or not fresh or not core.link_idle(p, now) or len(room) <= core.queue[p]:
                continue
            q = core.query_of(room.head(), now, NOTHING)
            if not self.fits(q, p):
                continue
            lhs = core.queue[me] * self.task_time[me]
            rhs = self.transfer_time(q.segment, p) + core.queue[p] * self.task_time[p]
            if lhs > rhs or self.random.uniform() * rhs < lhs:
                return q.slot, (RUN, p, NEVER)
        first = self.tried <= N
        self.tried = N + 1
        if first and core.idle and core.queue[me] == 0 and len(room):
            q = core.query_of(room.head(), now, NOTHING)
            if self.fits(q, me):
                return q.slot, (RUN, me, NEVER)
        self.tried, self.start = 0, (self.start + 1) % N
        return None

    def transfer_time(self, s: int, p: int) -> float:
        codec = self.core.codec[s][p]
        size = self.c["wire_bytes"][s][codec] if codec >= 0 else 0.0
        return self.transfer.get((p, size_class(size)), self.core.move_ns[s][p])

    def next_tick(self):
        return NEVER if not self.source or self.p["adapt"] == 0 else INT64_MIN if self.next is None else self.next

    def tick(self, now):
        if not self.source or self.p["adapt"] == 0 or now < self.next_tick():
            return
        first, self.next = self.next is None, min(now + self.period, NEVER)
        if first:
            return
        p, q = self.p, self.core.queue[self.core.me] + len(self.core.room)
        step = lambda few, some, many: few if q < p["t_q1"] else some if q < p["t_q2"] else many
        if p["adapt"] == 2 and not self.limiting:
            self.full = self.full + 1 if q >= p["t_q2"] and self.threshold == p["t_min"] else 0
            self.threshold = min(max(self.threshold * step(1.0 + p["a"], 1.0 + p["b"], 1.0 - p["z"]), p["t_min"]), p["t_max"])
            self.limiting = self.full >= p["takeover"]
            return
        self.mu = min(max(self.mu * step(1.0 - p["a"], 1.0 - p["b"], 1.0 + p["z"]), p["mu_min"]), p["mu_max"])
        if p["adapt"] == 2 and q < p["t_q1"] and self.mu == p["mu_min"]:
            self.limiting, self.full = False, 0

    def admit_interval(self):
        return self.mu if self.source and (self.p["adapt"] == 1 or self.limiting) else 0.0

    def observed(self, node, batch, duration):
        self.task_time[node] += self.p["weight"] * (float(duration) / float(batch) - self.task_time[node])

    def observed_link(self, src, dst, nbytes, duration):
        if src == self.core.me:
            at = dst, size_class(float(nbytes))
            old = self.transfer.get(at, float(duration))
            self.transfer[at] = old + self.p["weight"] * (duration - old) if at in self.transfer else old

    def observed_queue(self, node, now):
        if now != INT64_MIN:
            self.stamp[node] = now

    def state(self):
        return {"mdi_mu": [self.mu], "mdi_threshold": [self.threshold], "mdi_task_ns": list(self.task_time)}


class Custom(Threshold):
    """The user's own function; what it may not choose is replaced by what Threshold does."""

    def place(self, q):
        core, usual = self.core, self.usual(q)
        if usual[0] != RUN:
            return usual
        action = int(self.c["custom"](core.stats_view(q), core.task_view(q), [core.node_view(q, p) for p in range(core.N)]))
        if action == rules.EXIT and core.tasks[q.slot].best >= 0:
            return EXIT, core.me, NEVER
        if action == rules.REJECT and core.tasks[q.slot].best < 0:
            return FITS_NOT, -1, NEVER
        if action == rules.WAIT:
            return self.wait_while_possible(q)
        if 0 <= action - rules.RUN < core.N and self.fits(q, action - rules.RUN):
            return RUN, action - rules.RUN, NEVER
        core.counters["invalid"] += 1
        return usual


POLICIES = {"deadline": Deadline, "threshold": Threshold, "patience": Patience, "distree": DistrEE, "mdi_exit": MdiExit, "dimee": Dimee,
            "splitee": SplitEE, "jei_gate": JeiGate, "daisy": Daisy}  # fmt: skip


def size_class(nbytes: float) -> int:
    """Powers of two of bytes, 0..50."""
    c = 0
    while c + 1 < SIZE_CLASSES and nbytes >= 2.0:
        nbytes, c = nbytes / 2.0, c + 1
    return c


def f32(value: float) -> float:
    """Round to fp32 as C does (too large becomes infinite)."""
    return ctypes.c_float(value).value

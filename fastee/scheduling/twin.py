"""The scheduler in plain Python: the oracle of csrc/sched (same answers bit for bit) and the stand-in where that is not built.

Every formula is in docs/scheduler.md. Times are nanoseconds; floats are doubles, combined in the same order as in C++.
"""

from __future__ import annotations

import ctypes
import math

from fastee.scheduling.decision import Action, pack
from fastee.scheduling.qos import NO_DEADLINE

INF = math.inf
INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1
EWMA_WEIGHT, OUTLIER_FACTOR, OUTLIER_STREAK = 0.1, 4.0, 5
PUBLISH_CHANGE, PUBLISH_EVERY = 0.02, 16
RATIO_LOW, RATIO_HIGH = 1e-6, 1e6
SWITCH_GAIN = 0.9  # another place must be 10 % sooner
NS = 1e9
COUNTERS = (
    "admitted", "refused_full", "refused_late", "exits", "forced", "late", "continued", "offloaded", "rejected", "finished",
    "stale", "invalid", "clock_backwards", "observed", "outliers", "ignored",
)  # fmt: skip


class Estimator:
    """EWMA of measured / expected with an outlier guard, and of its relative variance; `used_*` is what the tables hold.

    A value four times off is skipped and counted; the fifth in a row is believed. The published value follows when it has
    moved by more than 2 %, and at every 16th observation.
    """

    __slots__ = ("ratio", "seen", "kept", "count", "streak", "used_ratio", "used_seen", "used_kept")

    def __init__(self):
        self.ratio = self.kept = self.used_ratio = self.used_kept = 1.0
        self.seen = self.used_seen = 0.0
        self.count = self.streak = 0

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
        else:
            weight = max(EWMA_WEIGHT, 1.0 / (self.count + 2.0))
            off = r / self.ratio - 1.0
            self.seen = self.seen * (1.0 - weight) + weight * (off * off)
            self.kept = self.kept * (1.0 - weight)
            self.ratio = self.ratio + weight * (r - self.ratio)
        self.streak = 0
        self.count += 1
        if self.count % PUBLISH_EVERY and abs(self.ratio - self.used_ratio) <= PUBLISH_CHANGE * self.used_ratio:
            return False
        self.used_ratio, self.used_seen, self.used_kept = self.ratio, self.seen, self.kept
        return True


class Core:
    """State, estimates and the two policies; the methods take checked arguments (the Scheduler face checks)."""

    def __init__(self, config: dict):
        c = self.c = config
        self.S, self.N, self.NB = len(c["mean"]), len(c["mean"][0]), len(c["batch_sizes"])
        self.NC, self.K, self.me, self.home = len(c["wire_bytes"][0]), len(c["mean"]) - 1, c["node"], c["home"]
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.per_exit = [0] * self.S
        self.time = [[Estimator() for _ in range(self.N)] for _ in range(self.S)]
        self.rate = [[Estimator() for _ in range(self.N)] for _ in range(self.N)]
        self.node_up = [True] * self.N
        self.link_up = [[c["bandwidth"][a][b] > 0 for b in range(self.N)] for a in range(self.N)]
        self.queue, self.out_queue, self.idle = [0] * self.N, [0] * self.N, False
        self.busy_until = [INT64_MIN] * self.N
        self.last_place = [-1] * self.S
        self.reached, self.accepted = [0] * self.K, [0] * self.K
        self.exit_probability = [0.0 if t == INF else 0.5 for t in c["thresholds"]]
        self.now = INT64_MIN
        capacity = c["max_tasks"]
        self.generation, self.live = [0] * capacity, [False] * capacity
        self.deadline, self.segment, self.best = [0] * capacity, [0] * capacity, [-1] * capacity
        self.free = list(range(capacity - 1, -1, -1))
        self.refresh()

    # -- estimates ---------------------------------------------------------------------------------------------------

    def segment_time(self, s: int, n: int, b: int) -> tuple[float, float]:
        """(mean, variance) of segment s on node n at batch bucket b."""
        e = self.time[s][n]
        mean = self.c["mean"][s][n][b] * NS * e.used_ratio
        sd = self.c["spread"][s][n][b] * NS * e.used_ratio
        return mean, e.used_kept * (sd * sd) + e.used_seen * (mean * mean)

    def reachable(self, a: int, b: int) -> bool:
        return self.link_up[a][b] and self.node_up[b]

    def move(self, s: int, a: int, b: int) -> tuple[float, float, int, float]:
        """(mean, variance, codec, time on the wire) of sending the carry that enters segment s."""
        if not self.reachable(a, b):
            return INF, 0.0, -1, 0.0
        e, best = self.rate[a][b], None
        for codec in range(self.NC):
            wire = self.c["wire_bytes"][s][codec] * 8.0 * NS / self.c["bandwidth"][a][b] * e.used_ratio
            mean = self.c["delay"][a][b] * NS + wire + self.c["codec_seconds"][s][codec] * NS
            var = e.used_seen * (wire * wire)
            sure = mean + self.c["quantile"] * math.sqrt(var)
            if best is None or sure < best[0]:
                best = sure, mean, var, codec, wire
        return best[1:]

    def return_time(self, n: int) -> float:
        if n == self.home:
            return 0.0
        if not self.reachable(n, self.home):
            return INF
        wire = self.c["answer_bytes"] * 8.0 * NS / self.c["bandwidth"][n][self.home] * self.rate[n][self.home].used_ratio
        return self.c["delay"][n][self.home] * NS + wire

    def refresh(self) -> None:
        """Tables per batch bucket: need[b][s][p] until the next answer is home (with the hit rate), togo[b][s][p] until the end."""
        S, N, z = self.S, self.N, self.c["quantile"]
        home = [self.return_time(n) for n in range(N)]
        moves = [[[None if a == b else self.move(s, a, b) for b in range(N)] for a in range(N)] for s in range(S)]
        runs = [[self.c["hosts"][s][n] and self.node_up[n] for n in range(N)] for s in range(S)]
        self.ret, self.codec, self.wire = home[self.me], [[-1] * N for _ in range(S)], [[0.0] * N for _ in range(S)]
        self.need = [[[INF] * N for _ in range(S)] for _ in range(self.NB)]
        self.togo = [[[INF] * N for _ in range(S)] for _ in range(self.NB)]
        for b in range(self.NB):
            onward = [0.0] * N
            for s in range(S - 1, -1, -1):
                there = [INF] * N  # from the start of segment s on node p to the answer at home
                for p in range(N):
                    if not runs[s][p]:
                        continue
                    mean, var = self.segment_time(s, p, b)
                    there[p] = mean + (home[p] if s == self.K else mix(self.exit_probability[s], home[p], onward[p]))
                    if p == self.me:
                        self.need[b][s][p] = mean + home[p] + z * math.sqrt(var)
                        self.togo[b][s][p] = there[p]
                    else:
                        go, go_var, self.codec[s][p], self.wire[s][p] = moves[s][self.me][p]
                        self.need[b][s][p] = go + mean + home[p] + z * math.sqrt(go_var + var)
                        self.togo[b][s][p] = go + there[p]
                onward = [min(there[p] if p == n else moves[s][n][p][0] + there[p] for p in range(N)) for n in range(N)]
        self.refresh_queues()

    def refresh_queues(self) -> None:
        self.wait, self.wait_sure = [0.0] * self.N, [0.0] * self.N
        for n in range(self.N):
            total = total_var = hosted = 0.0
            for s in range(self.S):
                if self.c["hosts"][s][n]:
                    mean, var = self.segment_time(s, n, 0)
                    total, total_var, hosted = total + mean, total_var + var, hosted + 1.0
            if hosted:
                self.wait[n] = self.queue[n] * (total / hosted)
                self.wait_sure[n] = self.wait[n] + self.c["quantile"] * math.sqrt(self.queue[n] * (total_var / hosted))

    def observe(self, segment: int, node: int, batch: int, duration: int) -> None:
        expected = self.expected(segment, node, batch)
        if not expected > 0 or duration <= 0:
            self.counters["ignored"] += 1
        elif self.time[segment][node].update(duration / expected, self.counters):
            self.refresh()

    def expected(self, segment: int, node: int, batch: int) -> float:
        sizes, mean = self.c["batch_sizes"], self.c["mean"][segment][node]
        if batch <= sizes[0]:
            return mean[0] * NS
        if batch >= sizes[-1]:
            return mean[-1] * NS * (batch / sizes[-1])
        b = next(i for i, size in enumerate(sizes) if size >= batch)
        part = (batch - sizes[b - 1]) / (sizes[b] - sizes[b - 1])
        return (mean[b - 1] + part * (mean[b] - mean[b - 1])) * NS

    def observe_link(self, src: int, dst: int, nbytes: int, duration: int) -> None:
        bandwidth, delay = self.c["bandwidth"][src][dst], self.c["delay"][src][dst] * NS
        wire = nbytes * 8.0 * NS / bandwidth if bandwidth > 0 and src != dst else 0.0
        if duration <= 0 or not wire > 0 or wire < 0.25 * delay:  # a short message tells the delay, not the rate
            self.counters["ignored"] += 1
        elif self.rate[src][dst].update((duration - delay) / wire, self.counters):
            self.refresh()

    def observe_queue(self, node: int, length: int, out_length: int) -> None:
        self.queue[node], self.out_queue[node] = length, out_length
        self.refresh_queues()

    def set_node_up(self, node: int, up: bool) -> None:
        if self.node_up[node] != up:
            self.node_up[node] = up
            self.refresh()

    def set_link_up(self, src: int, dst: int, up: bool) -> None:
        up = up and self.c["bandwidth"][src][dst] > 0
        if self.link_up[src][dst] != up:
            self.link_up[src][dst] = up
            self.refresh()

    # -- tasks -------------------------------------------------------------------------------------------------------

    def clock(self, now: int) -> int:
        if now < self.now:
            self.counters["clock_backwards"] += 1
        else:
            self.now = now
        return self.now

    def admit(self, now: int, deadline: int | None, segment: int) -> int:
        now = self.clock(now)
        if deadline is None:
            deadline = min(now + self.c["deadline"], INT64_MAX) if self.c["deadline"] != NO_DEADLINE else NO_DEADLINE
        if deadline <= now:
            self.counters["refused_late"] += 1
            return -1
        if not self.free:
            self.counters["refused_full"] += 1
            return -1
        slot = self.free.pop()
        self.live[slot], self.deadline[slot], self.segment[slot], self.best[slot] = True, deadline, segment, segment - 1
        self.counters["admitted"] += 1
        return self.generation[slot] << 32 | slot

    def find(self, task: int) -> int:
        """The slot of a live task, else -1 (counted)."""
        slot = task & 0xFFFFFFFF
        if 0 <= task and slot < len(self.live) and self.live[slot] and self.generation[slot] == task >> 32:
            return slot
        self.counters["stale"] += 1
        return -1

    def release(self, slot: int) -> None:
        self.live[slot] = False
        self.generation[slot] = (self.generation[slot] + 1) & 0x7FFFFFFF
        self.free.append(slot)

    def finish(self, task: int) -> bool:
        slot = self.find(task)
        if slot < 0:
            return False
        self.counters["finished"] += 1
        self.release(slot)
        return True

    # -- decisions ---------------------------------------------------------------------------------------------------

    def accepts(self, exit: int, confidence: float) -> bool:
        """u >= threshold in fp32, as the exit-head kernels compare; NaN never."""
        return 0 <= exit < self.K and f32(confidence) >= self.c["thresholds"][exit]

    def decide(self, task: int, exit: int, sample: dict, now: int) -> int:
        return self.decide_row(task, exit, sample["confidence"], self.clock(now), 0, 0.0)

    def poll(self, now: int) -> tuple[int, int] | None:
        self.clock(now)
        return None

    def next_tick(self) -> int:
        return INT64_MAX

    def tick(self, now: int) -> None:
        self.clock(now)

    def admit_interval(self) -> float:
        return 0.0

    def set_idle(self, idle: bool) -> None:
        self.idle = idle

    def decide_batch(self, tasks, exit: int, confidences, now: int) -> list[int]:
        now = self.clock(now)
        staying = sum(not self.accepts(exit, u) for u in confidences)
        sizes = self.c["batch_sizes"]
        bucket = next((b for b, size in enumerate(sizes) if size >= staying), len(sizes) - 1)
        rounds = (staying - 1) // sizes[-1] if staying > 0 else 0  # full batches that run before the last one
        return [self.decide_row(t, exit, u, now, bucket, float(rounds)) for t, u in zip(tasks, confidences, strict=True)]

    def decide_row(self, task: int, exit: int, confidence: float, now: int, bucket: int, rounds: float) -> int:
        count, slot = self.counters, self.find(task)
        if slot < 0:
            return pack(Action.REJECT, -1, -1, False)
        if not -1 <= exit <= self.K:
            count["invalid"] += 1
            exit = -1
        if exit >= 0:
            self.segment[slot] = exit + 1
            self.best[slot] = max(self.best[slot], exit)
        s, deadline = self.segment[slot], self.deadline[slot]
        slack = INF if deadline == NO_DEADLINE else float(clamp64(deadline - now))
        if s > self.K:
            return self.end(slot, slack, False)
        if exit >= 0:
            accepted = self.accepts(exit, confidence)
            self.learn_exit(exit, accepted)
            if accepted:
                return self.end(slot, slack, False)
        place = self.place_deadline if self.c["policy"] == "deadline" else self.place_threshold
        action, node = place(s, exit, confidence, slack, now, bucket, rounds)
        if action is None and self.best[slot] < 0:
            count["rejected"] += 1
            self.release(slot)
            return pack(Action.REJECT, -1, -1, False)
        if action is None or action == Action.EXIT:
            return self.end(slot, slack, action is None)
        if action == Action.CONTINUE:
            count["continued"] += 1
            return pack(Action.CONTINUE, self.me, -1, False)
        count["offloaded"] += 1
        self.busy_until[node] = min(max(self.busy_until[node], now) + int(min(self.wire[s][node], 1e15)), INT64_MAX)
        return pack(Action.OFFLOAD, node, self.codec[s][node], False)

    def end(self, slot: int, slack: float, forced: bool) -> int:
        self.counters["exits"] += 1
        self.counters["forced"] += forced
        self.counters["late"] += slack < self.ret
        self.per_exit[self.best[slot]] += 1
        self.release(slot)
        return pack(Action.EXIT, self.me, -1, forced)

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
                self.refresh()

    def delay_at(self, s: int, p: int, now: int, rounds: float) -> float:
        """What stands before node p beside its queue: this node's earlier sends on that link, or the earlier batches here."""
        if p == self.me:
            return rounds * self.segment_time(s, p, self.NB - 1)[0] if rounds > 0 else 0.0
        return float(clamp64(self.busy_until[p] - now)) if self.busy_until[p] > now else 0.0

    def place_threshold(self, s, exit, confidence, slack, now, bucket, rounds):
        need = [self.need[bucket][s][p] + (self.wait_sure[p] + self.delay_at(s, p, now, rounds)) for p in range(self.N)]
        if need[self.me] <= slack and need[self.me] < INF:
            return Action.CONTINUE, self.me
        fits = [p for p in range(self.N) if p != self.me and need[p] <= slack and need[p] < INF]
        if not fits:
            return None, -1
        return Action.OFFLOAD, min(fits, key=lambda p: need[p])

    def place_deadline(self, s, exit, confidence, slack, now, bucket, rounds):
        best, best_end, stay, stay_end = -1, INF, -1, INF
        for p in range(self.N):
            extra = self.delay_at(s, p, now, rounds)
            need = self.need[bucket][s][p] + (self.wait_sure[p] + extra)
            if not (need <= slack and need < INF):
                continue
            end = self.togo[bucket][s][p] + (self.wait[p] + extra)
            if best < 0 or end < best_end:
                best, best_end = p, end
            if p == self.last_place[s]:
                stay, stay_end = p, end
        if best < 0:
            return None, -1
        if stay >= 0 and not best_end < SWITCH_GAIN * stay_end:
            best, best_end = stay, stay_end
        if exit >= 0 and self.c["gain"] is not None and self.c["thresholds"][exit] < INF and confidence == confidence:
            gain = self.c["gain"][exit][self.gain_bin(confidence)]
            later = INF if best_end == INF else best_end - self.ret
            cost = self.c["cost_weight"] * (later / NS) if self.c["cost_weight"] > 0 else 0.0
            if gain <= cost and gain <= self.c["max_drop"]:
                return Action.EXIT, self.me
        self.last_place[s] = best
        return (Action.CONTINUE if best == self.me else Action.OFFLOAD), best

    def gain_bin(self, confidence: float) -> int:
        low, high = self.c["gain_range"]
        bins = len(self.c["gain"][0])
        at = (confidence - low) / (high - low) * bins
        return 0 if at < 1 else bins - 1 if at >= bins else int(at)

    def snapshot(self) -> dict:
        return {
            **self.counters,
            "live": sum(self.live),
            "capacity": len(self.live),
            "per_exit": list(self.per_exit),
            "exit_probability": list(self.exit_probability),
            "segment_ratio": [[e.ratio for e in row] for row in self.time],
            "link_ratio": [[e.ratio for e in row] for row in self.rate],
            "queue": list(self.queue),
            "node_up": list(self.node_up),
            "link_up": [list(row) for row in self.link_up],
            "next_answer_ns": [list(row) for row in self.need[0]],
            "completion_ns": [list(row) for row in self.togo[0]],
        }


def clamp64(value: int) -> int:
    return min(max(value, INT64_MIN), INT64_MAX)


def f32(value: float) -> float:
    """Round to fp32 as C does (too large becomes infinite)."""
    return ctypes.c_float(value).value


def mix(p: float, a: float, b: float) -> float:
    """p * a + (1 - p) * b, also where one of them is infinite and has no weight."""
    return b if p <= 0 else a if p >= 1 else p * a + (1.0 - p) * b

"""The Scheduler that users hold: checks what it is given, then asks the C++ core (csrc/sched) or its twin."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import numpy as np

from fastee.errors import BackendUnavailable, did_you_mean
from fastee.scheduling import twin
from fastee.scheduling.costs import Costs
from fastee.scheduling.decision import Action, Decision
from fastee.scheduling.params import POLICIES, check_params
from fastee.scheduling.profile import Profile
from fastee.scheduling.qos import QoS
from fastee.scheduling.rules import CustomPolicy, Rule
from fastee.scheduling.twin_policies import NOTHING

try:
    from fastee import _C
except ImportError as error:  # FASTEE_BUILD=none, or not built yet
    _C, _WHY_NOT = None, str(error)
else:
    _WHY_NOT = ""

_NEED_THRESHOLDS = ("deadline", "threshold", "mdi_exit")
_EAGER_LIMIT = 1 << 20
_MAX_TASKS, _MAX_BATCH, _MAX_LENGTH, _MAX_BYTES = 1 << 24, 1 << 30, 1 << 40, 1 << 50
_INT64, _MAX_LABEL = (1 << 63) - 1, (1 << 31) - 1


class Scheduler:
    """Decides per task, for one node: EXIT, CONTINUE here, OFFLOAD to a node with a codec, WAIT, or REJECT.

    `profile`, `qos`: copied in. `policy`: a name of `POLICIES`, with its `params` (docs/scheduler.md lists them), or one made by
    `@fastee.policy`. `thresholds`: one score per exit, +inf switches an exit off; None where the policy does not read them, or with a gain
    table (then no score alone is enough). `rule`: made by `@fastee.rule`, replaces the policy's exit rule. `tenants`: up to 15 more
    QoS (their deadline, hit_rate and weight) for `admit(tenant=1...)`. `costs`: energy and money per node. `seed`: of the policy's own
    random choices. `node`: index of the node that decides; `home`: the node that
    wants the answer. `media`: groups of nodes whose links from here share what carries them (a radio). `hosts` [S, N] bool: which node may run which segment (None: all). `max_tasks`: live tasks at once.
    `native`: True demands the C++ core, False takes the Python twin, None takes what is there; both decide bit for bit alike.

    Times are int64 nanoseconds that the caller hands in; a clock that runs backwards is held and counted. A handle of a task that has ended
    is harmless: `decide` answers REJECT, `finish` False, and `snapshot()["stale"]` counts it. EXIT and REJECT end a task;
    `finish` ends one in any other way (its answer came from elsewhere, it was cancelled). One thread at a time.

    >>> prof = Profile(nodes=("here",), batch_sizes=(1,), mean=[[[.001]], [[.002]]], spread=[[[0]], [[0]]], codecs=("raw",),
    ...                wire_bytes=[[784], [4096]], codec_seconds=[[0], [0]], bandwidth=[[0]], delay=[[0]])
    >>> sched = Scheduler(prof, QoS(deadline=0.02), thresholds=[0.9])
    >>> task = sched.admit(now=0)
    >>> sched.decide(task, 0, 0.5, 1_000_000), sched.decide(task, 0, 0.95, 1_000_000)
    (Decision(CONTINUE, node=0), Decision(EXIT, node=0))
    """

    def __init__(
        self,
        profile: Profile,
        qos: QoS,
        policy: str | CustomPolicy = "deadline",
        thresholds: Sequence[float] | None = None,
        node: int = 0,
        hosts=None,
        max_tasks: int = 65536,
        params: dict | None = None,
        *,
        rule: Rule | None = None,
        tenants: Sequence[QoS] = (),
        costs: Costs | None = None,
        home: int = 0,
        media: Sequence[Sequence[int]] = (),
        answer_bytes: int = 64,
        seed: int = 0,
        native: bool | None = None,
    ):
        if not isinstance(profile, Profile):
            raise TypeError(f"Scheduler: profile must be a Profile, got {type(profile).__name__}")
        if not isinstance(qos, QoS):
            raise TypeError(f"Scheduler: qos must be a QoS, got {type(qos).__name__}")
        own = policy if isinstance(policy, CustomPolicy) else None
        if own is None and policy not in POLICIES:
            raise ValueError(f"Scheduler: policy must be one of {list(POLICIES)}, got {policy!r}{did_you_mean(str(policy), POLICIES)}")
        if native and _C is None:
            raise BackendUnavailable(f"Scheduler: the C++ core is not there ({_WHY_NOT}); build it with `make build`")
        self.profile, self.qos, self.policy = profile, qos, policy
        self.node = _int("Scheduler", "node", node, 0, len(profile.nodes) - 1)
        self.home = _int("Scheduler", "home", home, 0, len(profile.nodes) - 1)
        self.max_tasks = _int("Scheduler", "max_tasks", max_tasks, 1, _MAX_TASKS)
        name = "custom" if own else policy
        if rule is not None and not isinstance(rule, Rule):
            raise TypeError(f"Scheduler: rule must be made by @fastee.rule, got {type(rule).__name__}")
        if costs is not None and not isinstance(costs, Costs):
            raise TypeError(f"Scheduler: costs must be Costs, got {type(costs).__name__}")
        self.rule, self.tenants = rule, _tenants(tenants)
        self.params = check_params(name, params, len(profile.nodes), profile.num_exits)
        self.thresholds = _thresholds(thresholds, profile, name in _NEED_THRESHOLDS and rule is None)
        surcharge, send = costs.in_seconds(len(profile.nodes), qos.cost_weight, qos.energy_weight, qos.money_weight) if costs else ([], [])
        self._top_exit, self._top_node = profile.num_exits, len(profile.nodes) - 1
        self.native = _C is not None if native is None else bool(native)
        config = {
            "batch_sizes": list(profile.batch_sizes), "mean": profile.mean, "spread": profile.spread, "wire_bytes": profile.wire_bytes,
            "codec_seconds": profile.codec_seconds, "bandwidth": profile.bandwidth, "delay": profile.delay,
            "gain": profile.gain, "gain_range": profile.gain_range, "hosts": _hosts(hosts, profile),
            "thresholds": np.asarray(self.thresholds, np.float32).astype(np.float64), "deadline": qos.deadline_ns,
            "quantile": qos.quantile, "cost_weight": qos.cost_weight, "max_drop": math.inf if qos.max_drop is None else qos.max_drop,
            "answer_bytes": _int("Scheduler", "answer_bytes", answer_bytes, 0, _MAX_BYTES),
            "policy": name, "params": self.params, "weight": qos.weight,
            "medium": _medium(media, len(profile.nodes)), "classes": [(q.deadline_ns, q.quantile, q.weight) for q in self.tenants],
            "surcharge": surcharge, "send_ns": [v * 1e9 for v in send], "eager_limit": _EAGER_LIMIT, "node": self.node, "home": self.home, "max_tasks": self.max_tasks,
            "seed": _int("Scheduler", "seed", seed, 0, _INT64),
        }  # fmt: skip
        if not self.native:
            config = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in config.items()}
            self._core = twin.Core({**config, "rule": rule, "custom": own})
            return
        # Kept by the core, so that the compiled code lives as long as any of its bound calls.
        config.update(rule=rule.address if rule else 0, rule_reads_node=rule is not None and rule.reads_node, custom=own.address if own else 0, keep=(rule, own))
        self._core = _C.Scheduler(config)
        answers = [Decision(Action.EXIT, self.node), Decision(Action.EXIT, self.node, forced=True), Decision(Action.CONTINUE, self.node),
                   Decision(Action.REJECT)]
        answers += [Decision(Action.OFFLOAD, n, c) for n in range(len(profile.nodes)) for c in range(len(profile.codecs))]
        # Bound C functions in the instance shadow the methods below: 4 times cheaper than a Python frame in between.
        self.__dict__.update(self._core.bind(answers, Decision.from_code))

    def admit(self, now: int, deadline: int | None = None, segment: int = 0, tenant: int = 0) -> int:
        """Take a task in; returns its handle, or -1 when the deadline (ns, absolute) is past or `max_tasks` or the policy's limit are live.

        `deadline=None` means `now` + the deadline of its class: `tenant` 0 is `qos`, 1 and up are `tenants`. `segment` is the next segment
        to run; the heads before it count as answered.
        """
        now = _int64("admit", "now", now)
        deadline = None if deadline is None else _int64("admit", "deadline", deadline)
        segment = _int("admit", "segment", segment, 0, self._top_exit)
        return self._core.admit(now, deadline, segment, _int("admit", "tenant", tenant, 0, len(self.tenants)))

    def decide(
        self, task: int, exit: int, confidence: float, now: int, gate: float = math.nan, delta: float = math.nan, label: int = -1,
        pool: int = -1, max_prob: float = math.nan, margin: float = math.nan, entropy: float = math.nan, lse: float = math.nan,
    ) -> Decision:  # fmt: skip
        """Decide after exit `exit` (0-based; K = the network's end; -1 = on arrival) answered with score `confidence`.

        NaN never exits early; at the end of the network the answer is EXIT whatever the score is. `node` of the Decision is
        where the task goes on. What else is known of the task at this exit (NaN or -1: not given) is for the policies and rules
        that read it: `gate` probability, feature `delta`, predicted `label`, difficulty `pool`, and the row's statistics.
        """
        task = _int64("decide", "task", task)
        exit = _int("decide", "exit", exit, -1, self._top_exit)
        sample = {"confidence": _float("decide", "confidence", confidence)}
        now = _int64("decide", "now", now)
        numbers = {"gate": gate, "delta": delta, "max_prob": max_prob, "margin": margin, "entropy": entropy, "lse": lse}
        sample.update((name, _float("decide", name, value)) for name, value in numbers.items())
        sample["label"] = _int("decide", "label", label, -1, _MAX_LABEL)
        sample["pool"] = _int("decide", "pool", pool, -1, _MAX_LABEL)
        return Decision.from_code(self._core.decide(task, exit, sample, now), self._core.now)

    def poll(self, now: int) -> tuple[int, Decision] | None:
        """A decision for a task that was told to WAIT, if one is due, else None; call it after every event until it gives None."""
        found = self._core.poll(_int64("poll", "now", now))
        return None if found is None else (found[0], Decision.from_code(found[1], self._core.now))

    def next_tick(self) -> int:
        """When `tick` wants to be called next (ns); 2**63 - 1 when there is nothing to adapt."""
        return self._core.next_tick()

    def tick(self, now: int) -> None:
        """Let the policy adapt; the host calls it once the clock has reached `next_tick()`."""
        self._core.tick(_int64("tick", "now", now))

    def admit_interval(self) -> float:
        """Seconds that the source must leave between two arrivals; 0 = as they come."""
        return self._core.admit_interval()

    def set_idle(self, idle: bool) -> None:
        """Tell whether this node's compute stands still."""
        self._core.set_idle(bool(idle))

    def decide_batch(self, tasks, exit: int, confidences, now: int, samples: dict | None = None) -> np.ndarray:
        """Decide for rows that travel together; int64 codes [B] for `Decision.from_code`, in the order of `tasks`.

        `tasks` int64 [B], `confidences` float [B]; `samples`: what else is known, by the names of `decide`'s keywords, each [B]. The rows that do not exit are costed as one batch on this node, and what is
        sent earlier in the batch delays what is sent later. B = 0 gives an empty array.
        """
        if self.native and samples is None:
            codes = self._decide_rows(tasks, exit, confidences, now)
            if codes is not None:
                return codes
        tasks, confidences = np.asarray(tasks), np.asarray(confidences)
        if tasks.size == 0:
            tasks = tasks.astype(np.int64)
        if tasks.dtype.kind not in "iu":
            raise TypeError(f"decide_batch: tasks must be int64, got {tasks.dtype}")
        if confidences.dtype.kind not in "fiu":
            raise TypeError(f"decide_batch: confidences must be float, got {confidences.dtype}")
        if tasks.ndim != 1 or tasks.shape != confidences.shape:
            raise ValueError(f"decide_batch: tasks and confidences must both be [B], got {list(tasks.shape)} and {list(confidences.shape)}")
        exit = _int("decide_batch", "exit", exit, -1, self._top_exit)
        now = _int64("decide_batch", "now", now)
        extra = None if samples is None else _samples(samples, len(tasks))
        if self.native:
            return self._core.decide_batch(tasks.astype(np.int64), exit, confidences, now, extra)
        if extra is not None:
            names = list(extra)
            extra = [{**NOTHING, "confidence": u, **dict(zip(names, row, strict=True))}
                     for u, row in zip(confidences.tolist(), zip(*(extra[n].tolist() for n in names), strict=True), strict=True)]  # fmt: skip
        return np.array(self._core.decide_batch(tasks.tolist(), exit, confidences.tolist(), extra, now), dtype=np.int64)

    def observe(self, segment: int, node: int, batch: int, duration_ns: int) -> None:
        """Correct the cost of a segment (with its head) on a node by one measured run of `batch` rows."""
        segment = _int("observe", "segment", segment, 0, self._top_exit)
        node = _int("observe", "node", node, 0, self._top_node)
        batch = _int("observe", "batch", batch, 1, _MAX_BATCH)
        self._core.observe(segment, node, batch, _int("observe", "duration_ns", duration_ns, 1, _INT64))

    def observe_link(self, src: int, dst: int, nbytes: int, duration_ns: int, now: int | None = None) -> None:
        """Correct the rate of the link src -> dst by one transfer; a message too short to tell the rate is ignored (counted).

        `now`: when it was there, where the host knows and tells it of every message from here: then what is still under way is known
        by its arrival, not by the estimated rate alone.
        """
        src = _int("observe_link", "src", src, 0, self._top_node)
        dst = _int("observe_link", "dst", dst, 0, self._top_node)
        nbytes = _int("observe_link", "nbytes", nbytes, 1, _MAX_BYTES)
        duration_ns = _int("observe_link", "duration_ns", duration_ns, 1, _INT64)
        self._core.observe_link(src, dst, nbytes, duration_ns, None if now is None else max(_int64("observe_link", "now", now), -_INT64))

    def observe_queue(self, node: int, length: int, out_length: int = 0) -> None:
        """Tell how many tasks wait at a node to be run, and how many wait there to be sent."""
        node = _int("observe_queue", "node", node, 0, self._top_node)
        length = _int("observe_queue", "length", length, 0, _MAX_LENGTH)
        self._core.observe_queue(node, length, _int("observe_queue", "out_length", out_length, 0, _MAX_LENGTH))

    def set_node_up(self, node: int, up: bool) -> None:
        """Take a node out of (or back into) every choice."""
        self._core.set_node_up(_int("set_node_up", "node", node, 0, self._top_node), bool(up))

    def set_link_up(self, src: int, dst: int, up: bool) -> None:
        """Take a link out of (or back into) every choice; a link of bandwidth 0 stays down."""
        src = _int("set_link_up", "src", src, 0, self._top_node)
        self._core.set_link_up(src, _int("set_link_up", "dst", dst, 0, self._top_node), bool(up))

    def finish(self, task: int, confidence: float = math.nan) -> bool:
        """End a task whose answer came from elsewhere or that was cancelled; False when it had already ended.

        `confidence`: of the answer of the network's end, where it came from there (policy "splitee" learns from it).
        """
        return self._core.finish(_int64("finish", "task", task), _float("finish", "confidence", confidence))

    def rebatch(self, segment: int, rows: int, others: int, merge_ns: int = 0) -> bool:
        """Whether two groups of rows that wait here for `segment` are sooner through as one batch, `merge_ns` for the merge included.

        DREX's profit test: G(rows) + G(others) - G(rows + others) > merge, with the batch costs of the profile, corrected.
        """
        segment = _int("rebatch", "segment", segment, 0, self._top_exit)
        rows, others = _int("rebatch", "rows", rows, 1, _MAX_BATCH), _int("rebatch", "others", others, 1, _MAX_BATCH)
        return self._core.rebatch(segment, rows, others, _int("rebatch", "merge_ns", merge_ns, 0, _INT64))

    def snapshot(self) -> dict:
        """Counters, the corrections learned so far and the two tables that decisions read; a copy, plain Python values.

        admitted == exits + rejected + finished + live, always. `next_answer_ns` [S, N]: time until the next answer is at home,
        met with the QoS hit rate; `completion_ns` [S, N]: expected time until the task ends; both one row, empty queues.
        """
        return self._core.snapshot()


def _int(call: str, name: str, value, low: int, high: int) -> int:
    number = _int64(call, name, value)
    if not low <= number <= high:
        raise ValueError(f"{call}: {name} must be in {low}..{high}, got {number}")
    return number


def _int64(call: str, name: str, value) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{call}: {name} must be an int, got {type(value).__name__}") from None
    if not -_INT64 - 1 <= number <= _INT64:
        raise ValueError(f"{call}: {name} must fit in 64 bits, got {str(number)[:40]}")
    return number


def _float(call: str, name: str, value) -> float:
    if not hasattr(value, "__float__") and not hasattr(value, "__index__"):
        raise TypeError(f"{call}: {name} must be a number, got {type(value).__name__}")
    return float(value)


def _samples(samples, rows: int) -> dict[str, np.ndarray]:
    if not isinstance(samples, dict) or not samples:
        raise TypeError(f"decide_batch: samples must be a dict of arrays or None, got {type(samples).__name__}")
    out = {}
    for name, values in samples.items():
        if name not in NOTHING or name == "confidence":
            known = [n for n in NOTHING if n != "confidence"]
            raise ValueError(f"decide_batch: samples has no {name!r}; it may hold {known}{did_you_mean(str(name), known)}")
        whole = name in ("label", "pool")
        values = np.asarray(values)
        if values.dtype.kind not in ("iu" if whole else "fiu"):
            raise TypeError(f"decide_batch: samples[{name!r}] must be {'int' if whole else 'float'}, got {values.dtype}")
        if values.shape != (rows,):
            raise ValueError(f"decide_batch: samples[{name!r}] must be [{rows}], got {list(values.shape)}")
        out[name] = np.ascontiguousarray(np.clip(values, -1, _MAX_LABEL) if whole else values, np.int64 if whole else np.float64)
    return out


def _tenants(tenants) -> tuple[QoS, ...]:
    if not isinstance(tenants, Sequence):
        raise TypeError(f"Scheduler: tenants must be a sequence of QoS, got {type(tenants).__name__}")
    for qos in tenants:
        if not isinstance(qos, QoS):
            raise TypeError(f"Scheduler: tenants must hold QoS, got {type(qos).__name__}")
    if len(tenants) > 15:
        raise ValueError(f"Scheduler: tenants must hold at most 15 classes, got {len(tenants)}")
    return tuple(tenants)


def _thresholds(thresholds, profile: Profile, needed: bool) -> list[float]:
    if thresholds is None:
        if needed and profile.gain is None and profile.num_exits:
            raise ValueError(f"Scheduler: thresholds must hold {profile.num_exits} scores, got None (only a profile with a gain table goes without)")
        return [float(np.finfo(np.float32).max)] * profile.num_exits
    try:
        values = [float(t) for t in thresholds]
    except (TypeError, ValueError):
        raise TypeError(f"Scheduler: thresholds must be a sequence of numbers, got {type(thresholds).__name__}") from None
    if len(values) != profile.num_exits:
        raise ValueError(f"Scheduler: thresholds must hold {profile.num_exits} scores, one per exit, got {len(values)}")
    for i, value in enumerate(values):
        if math.isnan(value):
            raise ValueError(f"Scheduler: thresholds[{i}] must not be NaN (+inf switches an exit off)")
    return values


def _medium(media, nodes: int) -> list[int]:
    """Per node the first one whose link from here shares what carries its own."""
    if not isinstance(media, Sequence) or not all(isinstance(group, Sequence) and not isinstance(group, str) for group in media):
        raise TypeError(f"Scheduler: media must be a sequence of groups of nodes, got {media!r:.80}")
    medium, seen = list(range(nodes)), set()
    for group in media:
        members = [_int("Scheduler", "media", node, 0, nodes - 1) for node in group]
        if len({*seen, *members}) < len(seen) + len(members):
            raise ValueError(f"Scheduler: media must name each node once, got {media!r:.80}")
        seen.update(members)
        for node in members:
            medium[node] = min(members)
    return medium


def _hosts(hosts, profile: Profile) -> np.ndarray:
    shape = (profile.num_segments, len(profile.nodes))
    if hosts is None:
        return np.ones(shape, dtype=bool)
    array = np.array(hosts)
    if array.dtype != bool:
        raise TypeError(f"Scheduler: hosts must be bool [S, N], got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"Scheduler: hosts must have shape [S, N] = {list(shape)}, got {list(array.shape)}")
    if not array.any(axis=1).all():
        raise ValueError(f"Scheduler: segment {int(np.argmin(array.any(axis=1)))} has no host")
    return array

"""What a simulation gives back: one column per fact about a task, a summary, the event log."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastee.simulation.check import ConservationError, check_log
from fastee.simulation.events import FaultKind, Outcome, What

_AB = {  # what `a` and `b` of a log line are called
    What.ARRIVE: ("row", "deadline"), What.ADMIT: ("segment", "handle"), What.REFUSE: ("segment", None), What.DECIDE: ("exit", "code"),
    What.RUN: ("segment", "rows"), What.RAN: ("segment", "ns"), What.SEND: ("to", "bytes"), What.DELIVER: ("from", "segment"),
    What.VANISH: ("segment", None), What.LOST: ("segment", None), What.ANSWER: ("outcome", "exit"), What.END: ("outcome", "exit"),
    What.DUPLICATE: ("outcome", "exit"), What.FAULT: ("fault", "span"),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class SimulationResult:
    """T tasks on N nodes. Per task: `arrival`, `latency` (s; inf without an answer), `deadline` (s, inf = none), `outcome` (`Outcome`), `exit`
    (-1 without an answer; K = the network's end), `node` where it ended, `source`, `correct` bool, `in_time` bool, `forced` bool, `wire_bytes`,
    `compute` (s), `cost`, `attempts`, `hops`. Per node: `utilisation`, `rows`, `sent_bytes`. `totals`: counters; `wall`: real seconds.
    """

    nodes: tuple[str, ...]
    policy: str
    seed: int
    num_exits: int
    arrival: np.ndarray
    source: np.ndarray
    deadline: np.ndarray
    latency: np.ndarray
    outcome: np.ndarray
    exit: np.ndarray
    node: np.ndarray
    correct: np.ndarray
    forced: np.ndarray
    wire_bytes: np.ndarray
    compute: np.ndarray
    cost: np.ndarray
    attempts: np.ndarray
    hops: np.ndarray
    utilisation: np.ndarray
    rows: np.ndarray
    sent_bytes: np.ndarray
    totals: dict
    wall: float
    lines: np.ndarray | None = None

    @property
    def in_time(self) -> np.ndarray:
        """bool [T]: answered, and not after the deadline."""
        return (self.outcome == Outcome.ANSWERED) & (self.latency <= self.deadline)

    def summary(self) -> dict:
        """Plain numbers: hit_rate (answered in time, of all), answered, accuracy (of the answered), useful (right and in time, of all),
        p50/p95/p99 (s, of the answered; None when there are none), cost, bytes, exits histogram [K+1], outcomes, utilisation per node."""
        answered = self.outcome == Outcome.ANSWERED
        latency = self.latency[answered]
        at = lambda q: float(np.percentile(latency, q)) if len(latency) else None
        tasks = len(self.outcome)
        return {
            "tasks": tasks, "policy": self.policy, "seed": self.seed, "hit_rate": float(self.in_time.mean()), "answered": float(answered.mean()),
            "accuracy": float(self.correct[answered].mean()) if answered.any() else None, "useful": float((self.correct & self.in_time).mean()),
            "p50": at(50), "p95": at(95), "p99": at(99), "mean_cost": float(self.cost.mean()), "mean_compute": float(self.compute.mean()),
            "mean_bytes": float(self.wire_bytes.mean()), "bytes": int(self.wire_bytes.sum()), "forced": float(self.forced[answered].mean()) if answered.any() else 0.0,
            "exits": np.bincount(self.exit[answered], minlength=self.num_exits + 1).tolist(), "retries": self.totals["retries"],
            "outcomes": {o.name.lower(): int((self.outcome == o).sum()) for o in Outcome if o},
            "utilisation": {name: round(float(u), 6) for name, u in zip(self.nodes, self.utilisation, strict=True)},
            "seconds": self.totals["now"] * 1e-9, "events": self.totals["events"], "wall": self.wall,
            "events_per_second": self.totals["events"] / max(self.wall, 1e-9),
        }  # fmt: skip

    def log(self) -> Iterator[str]:
        """The event log as JSON lines; needs ``simulate(..., log=True)``."""
        if self.lines is None:
            raise ValueError("log: the simulation kept no log, run it with log=True")
        for time, what, task, attempt, node, a, b in self.lines.tolist():
            kind = What(what)
            event: dict = {"t": time, "event": kind.name.lower()}
            if task >= 0:
                event |= {"task": task, "attempt": attempt}
            if node >= 0 and kind is What.FAULT and FaultKind.LINK_DOWN <= a <= FaultKind.DUPLICATE:
                event["link"] = node
            elif node >= 0:
                event["node"] = self.nodes[node]
            for name, value in zip(_AB.get(kind, (None, None)), (a, b), strict=True):
                if name == "to" or (name == "from" and value >= 0):
                    event[name] = self.nodes[value]
                elif name == "outcome":
                    event[name] = Outcome(value).name.lower()
                elif name == "fault":
                    event[name] = FaultKind(value).name.lower()
                elif name is not None and name != "from":
                    event[name] = value
            yield json.dumps(event)

    def save_log(self, path: str | os.PathLike) -> None:
        """Write the JSON lines."""
        with Path(path).open("w", encoding="utf-8") as file:
            for line in self.log():
                file.write(line + "\n")

    def check(self) -> int:
        """Prove that every task ended exactly once, from the columns and, where there is one, from the log; returns the number of tasks.

        Raises `ConservationError` naming the first breach.
        """
        pending = int((self.outcome == Outcome.PENDING).sum())
        if pending or self.totals["ended"] != len(self.outcome):
            raise ConservationError(f"{pending} tasks never ended; {self.totals['ended']} ends for {len(self.outcome)} tasks")
        answered = self.outcome == Outcome.ANSWERED
        if not ((self.exit >= 0) == answered).all() or not (np.isfinite(self.latency) == answered).all():
            raise ConservationError("a task without an answer has an exit or a latency, or one with an answer has none")
        if self.lines is not None and check_log(self.lines.tolist()) != len(self.outcome):
            raise ConservationError("the log and the columns do not hold the same tasks")
        return len(self.outcome)

    @property
    def digest(self) -> str:
        """SHA-256 over all columns and the log: equal runs have equal digests."""
        h = hashlib.sha256()
        for name in ("arrival", "source", "latency", "outcome", "exit", "node", "forced", "wire_bytes", "compute", "cost", "attempts", "hops", "rows", "sent_bytes"):
            h.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        if self.lines is not None:
            h.update(np.ascontiguousarray(self.lines).tobytes())
        return h.hexdigest()

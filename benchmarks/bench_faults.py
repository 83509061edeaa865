"""A stream of tasks through a lab of three machines while faults of one kind come at random; 0 lost, 0 double, 0 wrong, 0 hangs, or it fails.

The times of a row are those of its tasks; the note says the share that was answered in time. `FASTEE_BENCH_FAULT_TASKS` sets the tasks of all kinds
together (10,000), `FASTEE_BENCH_FAULT_KINDS` some kinds, comma separated, `FASTEE_BENCH_FAULT_SHAPER` the lab's shaper (relay).
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fastee.cluster.client import TaskAnswer
from fastee.cluster.config import load_config
from fastee.cluster.lab import Lab
from fastee.testing.bench import Case, Context, Group

from .fault_net import DEADLINE, LINKS, inputs, network, write_cluster

RATE = 50.0
GRACE = 0.5  # that of write_cluster
HANG_SECONDS = DEADLINE + GRACE + 1.0
"""A task that is settled later than this counts as a hang: deadline, grace, and what a stopped thread of a busy machine may take."""
KINDS = ("none", "kill", "freeze", "cut", "flap", "slow", "thin", "double", "all")
TELLS = {
    "none": "no fault", "kill": "kill -9 and restart", "freeze": "SIGSTOP, SIGCONT", "cut": "silent cut, heal", "flap": "cuts of 0.05 to 0.3 s",
    "slow": "10 % of the processor", "thin": "its links at 2 Mbit/s", "double": "answers twice, some late", "all": "everything, two at a time",
}  # fmt: skip


@dataclass
class Tally:
    """What became of a stream: per task seconds until it was settled (inf: never) and how; what must be nothing stands in `broken`."""

    kind: str
    seconds: list[float] = field(default_factory=list)
    answered: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    faults: int = 0
    stats: dict = field(default_factory=dict)

    @property
    def hit_rate(self) -> float:
        """Share of all tasks that were answered within the deadline."""
        return sum(t <= DEADLINE for t in self.answered) / max(1, len(self.seconds))

    def __str__(self) -> str:
        p50, p99, worst = np.percentile(self.answered, [50, 99, 100]) * 1e3 if self.answered else [np.nan] * 3
        wrong = ", ".join(f"{self.broken[k]} {k}" for k in ("lost", "double", "wrong", "hung"))
        errors = ", ".join(f"{n} {name}" for name, n in sorted(self.errors.items())) or "no error"
        return (
            f"{TELLS[self.kind]}: {self.faults} faults, {len(self.seconds)} tasks, {wrong}, {100 * self.hit_rate:.2f} % in time, p50 {p50:.0f} ms, p99 {p99:.0f}, worst "
            f"{worst:.0f}, {errors}, {self.stats['retries']} retries, {self.stats['forced']} forced, {self.stats['duplicates']} duplicates dropped"
        )


class Truth:
    """The answers of 32 inputs at every exit, computed here."""

    def __init__(self):
        net = network()
        self.x = inputs(32)
        with torch.inference_mode():
            self.logits = []
            carry = (self.x,)
            for segment in range(net.num_segments):
                carry = tuple(net.run_segment(segment, carry))
                self.logits.append(carry[0] if segment == net.num_segments - 1 else net.exit_step(segment, carry, logits=True).logits)

    def holds(self, row: int, answer: TaskAnswer) -> bool:
        return torch.allclose(answer.logits, self.logits[answer.exit][row], atol=1e-4)


class _Faults(threading.Thread):
    """Lets faults of a kind come at random, one at a time or, of all kinds, two, until `end` is set; leaves the lab whole."""

    def __init__(self, lab: Lab, kind: str, seed: int):
        super().__init__(name=f"faults {kind}", daemon=True)
        self.lab, self.kind, self.dice, self.count, self.end = lab, kind, random.Random(seed), 0, threading.Event()
        self.failed: Exception | None = None
        self._busy: set[str] = set()
        self._lock = threading.Lock()

    def run(self) -> None:
        if self.kind in ("none", "double"):
            return
        many = threading.BoundedSemaphore(2 if self.kind == "all" else 1)
        going: list[threading.Thread] = []
        while not self.end.wait(self.dice.uniform(0.2, 1.0)):
            if not many.acquire(timeout=0.1):
                continue
            kind = self.dice.choice(KINDS[1:7]) if self.kind == "all" else self.kind
            victim = self.dice.choice([name for name in self.lab.names if name not in self._busy])
            with self._lock:
                self._busy.add(victim)
            self.count += 1
            one = threading.Thread(target=self._one, args=(kind, victim, self.dice.uniform(0.3, 2.0), self.dice.uniform(0.05, 0.3), many), daemon=True)
            one.start()
            going.append(one)
        for one in going:
            one.join()

    def _one(self, kind: str, victim: str, seconds: float, short: float, many: threading.BoundedSemaphore) -> None:
        lab, wait = self.lab, self.end.wait
        try:
            if kind == "kill":
                lab.kill(victim)
                wait(seconds)
                lab.start(victim)
            elif kind == "freeze":
                lab.freeze(victim)
                wait(seconds)
                lab.thaw(victim)
            elif kind == "cut":
                lab.cut(victim)
                wait(seconds)
                lab.heal(victim)
            elif kind == "flap":
                for _ in range(5):
                    lab.cut(victim)
                    wait(short)
                    lab.heal(victim)
                    wait(short)
            elif kind == "slow":
                lab.slow(victim, 0.1)
                wait(seconds)
                lab.slow(victim, 1)
            else:
                pairs = {pair: speed for pair, speed in LINKS.items() if victim in pair}
                for pair, speed in pairs.items():
                    lab.link(*pair, "2mbit " + speed.split()[1])
                wait(seconds)
                for pair, speed in pairs.items():
                    lab.link(*pair, speed)
        except Exception as error:
            self.failed = error
        finally:
            with self._lock:
                self._busy.discard(victim)
            many.release()


def storm(lab: Lab, kind: str, tasks: int, truth: Truth, seed: int = 0, rate: float = RATE) -> Tally:
    """Send `tasks` tasks at `rate` a second through the lab, faults of `kind` coming meanwhile, and return what became of them.

    A task must be settled once: by an answer equal to the network's own, or by a typed error, in HANG_SECONDS.
    """
    tally, faults = Tally(kind), _Faults(lab, kind, seed)
    settled: list[list[tuple[float, Exception | None, bool]]] = [[] for _ in range(tasks)]

    def settle(number: int, future: Future) -> None:  # what is kept of an answer is small: a soak watches this process's memory too
        error = future.exception()
        settled[number].append((time.monotonic(), error, error is not None or truth.holds(number % len(truth.x), future.result())))

    with lab.connect(codec="raw") as cluster:
        until(lambda: all(cluster.stats()["up"].values()) and all(len(b["up"]) == len(lab.names) - 1 for b in cluster.beats().values()), 20)
        for node in range(len(lab.names)):
            cluster(truth.x[:2], plan=[node] * 3, exits=False)
        before = cluster.stats()
        faults.start()
        began, sent = time.monotonic(), []
        for number in range(tasks):
            time.sleep(max(0.0, began + number / rate - time.monotonic()))
            sent.append(time.monotonic())
            cluster.submit(truth.x[number % len(truth.x)][None], deadline=DEADLINE).add_done_callback(partial(settle, number))
        end = time.monotonic() + HANG_SECONDS
        while not all(settled) and time.monotonic() < end:
            time.sleep(0.01)
        faults.end.set()
        faults.join(90)
        time.sleep(0.3)  # for a second answer to a task that has one
        after = cluster.stats()
    if faults.failed is not None:
        raise faults.failed
    tally.faults, tally.stats = faults.count, {k: v - before[k] for k, v in after.items() if isinstance(v, int)}
    for at, ends in zip(sent, settled, strict=True):
        tally.seconds.append(ends[0][0] - at if ends else float("inf"))
        tally.broken["lost"] += not ends
        tally.broken["double"] += max(0, len(ends) - 1)
        tally.broken["hung"] += bool(ends) and tally.seconds[-1] > HANG_SECONDS
        if ends and (error := ends[0][1]) is not None:
            tally.errors[type(error).__name__] += 1
            tally.broken["untyped"] += type(error).__module__ != "fastee.errors"
        elif ends:
            tally.answered.append(tally.seconds[-1])
        tally.broken["wrong"] += not all(right for *_, right in ends)
    counted = tally.stats["answers"] + tally.stats["errors"]
    tally.broken["uncounted"] = abs(tasks - counted) + after["pending"]
    return tally


def until(what, seconds: float) -> None:
    """Wait for a condition; raises RuntimeError when it does not come about."""
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            raise RuntimeError(f"the lab was not whole within {seconds} s")
        time.sleep(0.02)


@contextlib.contextmanager
def labs(shaper: str = "relay") -> Iterator[tuple[Lab, Lab]]:
    """A lab, and one whose nodes say everything twice, the second made when it is asked for: (kind) -> lab."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = load_config(write_cluster(folder))
        made: dict[bool, Lab] = {}

        def lab_for(kind: str) -> Lab:
            double = kind in ("double", "all")
            if double not in made:
                program = [sys.executable, "-m", "benchmarks.faulty_node"] if double else []
                made[double] = stack.enter_context(Lab(config, shaper, program=program))
            return made[double]

        yield lab_for


def cases(ctx: Context) -> Iterator[Group]:
    kinds = os.environ.get("FASTEE_BENCH_FAULT_KINDS", ",".join(KINDS)).split(",")
    tasks = int(os.environ.get("FASTEE_BENCH_FAULT_TASKS", "10000"))
    truth = Truth()
    with labs(os.environ.get("FASTEE_BENCH_FAULT_SHAPER", "relay")) as lab_for:
        for number, kind in enumerate(kinds):
            share = tasks * (number + 1) // len(kinds) - tasks * number // len(kinds)
            tally = storm(lab_for(kind), kind, share, truth, seed=number)
            case = Case("fastee", None, note=str(tally), ratio=sum(tally.broken.values()), times=[t * 1e9 for t in tally.answered])
            yield Group("faults", f"{kind}, {share} tasks at {RATE:.0f}/s", "fp32", [case], baseline="fastee", per_call=True, bars=("ratio <= 0",))

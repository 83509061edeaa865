"""Churn for a long time: tasks without a pause while machines of a lab die, hang, vanish and return; memory and open files of everybody must stay flat.

`FASTEE_BENCH_SOAK_SECONDS`: 60; 1800 for the long one. Growth is from the first third to the last (medians of memory, the fullest tenth of files), per process
that lived through both; a restarted node counts from when it serves. The note says the worst; the bars are in `ratio`: growth over what is allowed (10 % plus 4 MB; 5 files).
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastee.cluster.lab import Lab
from fastee.testing.bench import Case, Context, Group

from .bench_faults import RATE, Tally, Truth, labs, storm

EVERY_SECONDS = 0.5
RSS_SHARE, RSS_BYTES, FILES = 0.10, 4 << 20, 5
# A neighbour that is away closes six sockets, so medians of a node's files moved by 6 either way in half an hour (2026-11, on a loaded machine). Compared
# are its fullest moments, everybody connected; a leak raises those as well.
FULLEST = 90
PAGE = os.sysconf("SC_PAGE_SIZE")


class Watch(threading.Thread):
    """Looks at resident bytes and open files of this process and the lab's nodes; by name and pid, so a restarted node is a new one."""

    def __init__(self, lab: Lab):
        super().__init__(name="soak watch", daemon=True)
        self.lab, self.end, self.seen = lab, threading.Event(), defaultdict(list)

    def run(self) -> None:
        while not self.end.wait(EVERY_SECONDS):
            for name, pid in (("client", os.getpid()), *((name, s["pid"]) for name, s in self.lab.state().items() if s["serves"])):
                try:
                    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
                    self.seen[name, pid].append((resident, len(os.listdir(f"/proc/{pid}/fd"))))
                except (OSError, IndexError):
                    continue  # it has just died

    def growth(self, warm_up: int) -> dict[tuple[str, int], tuple[float, float, float]]:
        """Return per process seen for `warm_up` looks and three times as many after it: (bytes in its first third after the warm-up, more bytes, more files
        in its last third)."""
        out = {}
        for who, looks in self.seen.items():
            kept = np.array(looks[warm_up:], float)
            if len(kept) >= 3 * warm_up:
                third = len(kept) // 3
                (first, files), (last, files_last) = (
                    (np.median(part[:, 0]), np.percentile(part[:, 1], FULLEST)) for part in (kept[:third], kept[-third:])
                )
                out[who] = (first, last - first, files_last - files)
        return out


def soak(lab: Lab, seconds: float, truth: Truth, seed: int = 0) -> tuple[Tally, dict[tuple[str, int], tuple[float, float, float]]]:
    """Storm a lab with all faults for some seconds; return what became of the tasks and every process's growth."""
    watch = Watch(lab)
    watch.start()
    try:
        tally = storm(lab, "all", round(seconds * RATE), truth, seed)
    finally:
        watch.end.set()
        watch.join()
    return tally, watch.growth(round(min(20.0, seconds / 6) / EVERY_SECONDS))


def excess(growth: dict[tuple[str, int], tuple[float, float, float]]) -> float:
    """Return the worst growth over what is allowed; at most 1 is flat."""
    return max((max(more / (RSS_SHARE * first + RSS_BYTES), files / FILES) for first, more, files in growth.values()), default=float("inf"))


def cases(ctx: Context) -> Iterator[Group]:
    seconds = float(os.environ.get("FASTEE_BENCH_SOAK_SECONDS", "60"))
    with labs(os.environ.get("FASTEE_BENCH_FAULT_SHAPER", "relay")) as lab_for:
        began = time.monotonic()
        tally, growth = soak(lab_for("all"), seconds, Truth(), seed=int(began))
    if sum(tally.broken.values()):
        raise RuntimeError(f"tasks were not answered exactly once: {tally}")
    told = ", ".join(f"{name} {first / 2**20:.0f} MB {more / 2**20:+.1f} MB {files:+.0f} files" for (name, _), (first, more, files) in sorted(growth.items()))
    case = Case("fastee", None, note=f"{told}; {tally}", ratio=excess(growth), times=[t * 1e9 for t in tally.answered])
    yield Group("soak", f"{seconds:.0f} s of churn at {RATE:.0f} tasks/s", "fp32", [case], baseline="fastee", per_call=True, bars=("ratio <= 1",))

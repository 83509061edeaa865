"""The C++ core and its plain-Python twin answer every question alike, bit for bit, for every policy."""

import os

import numpy as np
import pytest
from sched_worlds import play, random_arguments

from fastee.scheduling import POLICIES, Scheduler
from fastee.scheduling import scheduler as face

pytestmark = [pytest.mark.skipif(face._C is None, reason="fastee._C is not built"), pytest.mark.filterwarnings("ignore:.*daisy")]
EVERYBODY = {"admitted", "exits", "forced", "late", "continued", "rejected", "finished", "stale", "clock_backwards", "observed", "outliers",
             "ignored", "refused_full", "refused_late", "changes", "offloaded"}  # fmt: skip
WORLDS = 200


def worlds(policy: str, seeds: range, events: int) -> set[str]:
    """Play each world on both cores; the names of the counters that moved."""
    seen = set()
    for seed in seeds:
        arguments = random_arguments(np.random.default_rng(seed), policy)
        logs, snapshots = [], []
        for native in (True, False):
            sched = Scheduler(**arguments, native=native)
            assert sched.native is native
            logs.append(play(sched, np.random.default_rng(seed + 10_000), events))
            snapshots.append(sched.snapshot())
        for i, (core, twin) in enumerate(zip(*logs, strict=True)):
            assert core == twin, f"{policy}, seed {seed}, answer {i}"
        assert snapshots[0] == snapshots[1], f"{policy}, seed {seed}"
        books = snapshots[0]
        assert books["admitted"] == books["exits"] + books["rejected"] + books["finished"] + books["live"]
        assert 0 <= books["waiting"] <= books["live"]
        seen |= {name for name, value in books.items() if isinstance(value, int) and value > 0}
    return seen


@pytest.mark.parametrize("policy", POLICIES)
def test_twin_equals_core_in_random_worlds(policy):
    # a comparison in which nothing happens proves nothing
    wanted = EVERYBODY | ({"waited", "refused_queue"} if policy == "mdi_exit" else set())
    assert wanted <= worlds(policy, range(WORLDS), 60)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_twin_equals_core_in_a_thousand_worlds(policy):
    worlds(policy, range(1000, 2000), 30 if os.environ.get("FASTEE_SLOW") == "1" else 20)  # 20 events: 5 s of CPU per policy


def test_twin_equals_core_where_the_tables_follow_step_by_step(monkeypatch):
    monkeypatch.setattr(face, "_EAGER_LIMIT", 0)
    assert EVERYBODY - {"refused_full"} <= worlds("deadline", range(100), 150)

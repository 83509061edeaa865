"""The C++ core and its plain-Python twin answer every question alike, bit for bit, for every policy."""

import os

import numpy as np
import pytest
from sched_worlds import play, random_arguments

from fastee.scheduling import POLICIES, Decision, Profile, QoS, Scheduler
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


def test_twin_equals_core_where_only_what_is_under_way_decides():
    """Three peers alike and a slow node: every choice rests on what was sent, taken back or told as arrived at the same moment."""
    shape, n = (3, 4, 1), 4
    mean = np.full(shape, 1e-3)
    mean[:, 0] = 1.0
    prof = Profile(nodes=list("abcd"), batch_sizes=(8,), mean=mean, spread=np.zeros(shape), codecs=("raw",), wire_bytes=[[20_000], [5_000], [40_000]],
                   codec_seconds=np.zeros((3, 1)), bandwidth=np.full((n, n), 20e6), delay=np.full((n, n), 5e-3))  # fmt: skip
    rng = np.random.default_rng(0)
    core, twin = (Scheduler(prof, QoS(deadline=None), thresholds=[0.9, 0.9], native=native) for native in (True, False))
    tasks, now, nodes = [], 0, set()
    for step in range(3000):
        now += int(rng.choice([0, 0, 1_000_000, 20_000_000]))
        what, exit, peer = rng.random(), int(rng.integers(-1, 2)), int(rng.integers(1, n))
        picked = [tasks[i] for i in rng.integers(0, len(tasks), int(rng.integers(1, 9)))] if tasks else []
        for sched in (core, twin):
            if what < 0.3 or not tasks:
                new = [sched.admit(now) for _ in range(4)]
                answer = new + sched.decide_batch(new, exit, np.full(4, 0.1), now).tolist()
            elif what < 0.6:
                answer = sched.decide_batch(picked, exit, np.full(len(picked), 0.1), now).tolist()
            elif what < 0.7:
                answer = [sched.decide(t, exit, 0.1, now).code for t in picked]
            elif what < 0.8:
                answer = sched.set_node_up(peer, what < 0.77)
            elif what < 0.9:
                answer = sched.observe_link(0, peer, 1, 5_000_000, now)  # so short that only its arrival counts
            else:
                answer = [sched.finish(t) for t in picked]
            if sched is core:
                expected = answer
        assert answer == expected, step
        tasks = (tasks + answer[:4])[-40:] if what < 0.3 or not tasks else tasks
        if 0.3 <= what < 0.7:
            nodes |= {Decision.from_code(c).node for c in answer}
    assert nodes >= {1, 2, 3}
    assert core.snapshot() == twin.snapshot()

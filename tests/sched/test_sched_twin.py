"""The C++ core and its plain-Python twin answer every question alike, bit for bit."""

import numpy as np
import pytest
from sched_worlds import play, random_arguments

from fastee.scheduling import Scheduler
from fastee.scheduling import scheduler as face

pytestmark = pytest.mark.skipif(face._C is None, reason="fastee._C is not built")


@pytest.mark.parametrize("block", range(8))
def test_twin_equals_core_in_random_worlds(block):
    seen = set()
    for seed in range(block * 40, block * 40 + 40):
        arguments = random_arguments(np.random.default_rng(seed))
        logs, snapshots = [], []
        for native in (True, False):
            sched = Scheduler(**arguments, native=native)
            assert sched.native is native
            logs.append(play(sched, np.random.default_rng(seed + 10_000), 250))
            snapshots.append(sched.snapshot())
        for i, (core, twin) in enumerate(zip(*logs, strict=True)):
            assert core == twin, f"seed {seed}, answer {i}"
        assert snapshots[0] == snapshots[1], f"seed {seed}"
        assert list(snapshots[0]) and set(snapshots[0]) == set(snapshots[1])
        seen |= {name for name, value in snapshots[0].items() if isinstance(value, int) and value > 0}
    # a comparison in which nothing happens proves nothing
    assert {"admitted", "exits", "forced", "late", "continued", "offloaded", "rejected", "finished", "stale", "clock_backwards",
            "observed", "outliers", "ignored", "refused_full", "refused_late"} <= seen

"""The C++ simulator against its pure-Python twin: equal logs, line for line, in random worlds; and determinism."""

import os

import numpy as np
import pytest
from sim_worlds import DRIVEN, random_spec, three_tiers

from fastee.simulation import simulate

pytest.importorskip("fastee._C", reason="needs the compiled core")


def assert_equal_runs(spec):
    core, twin = simulate(spec, log=True, native=True), simulate(spec, log=True, native=False)
    shorter = min(len(core.lines), len(twin.lines))
    off = np.nonzero((core.lines[:shorter] != twin.lines[:shorter]).any(axis=1))[0]
    assert not len(off), f"line {off[0]}: {core.lines[off[0]].tolist()} in C++, {twin.lines[off[0]].tolist()} in Python"
    assert len(core.lines) == len(twin.lines)
    assert core.totals == twin.totals
    assert core.digest == twin.digest
    core.check()
    return core


@pytest.mark.parametrize("block", range(10))
def test_random_worlds_have_equal_logs(block):
    for seed in range(block * 20, block * 20 + 20):
        assert_equal_runs(random_spec(seed))


@pytest.mark.slow
@pytest.mark.parametrize("policy", DRIVEN)
def test_a_thousand_random_worlds_have_equal_logs(policy):
    # A thousand over all policies, 1.7 s of CPU each; a thousand per policy take minutes: FASTEE_SLOW=1 runs those.
    worlds, tasks = (1000, 30) if os.environ.get("FASTEE_SLOW") == "1" else (112, 15)
    for seed in range(1000, 1000 + worlds):
        assert_equal_runs(random_spec(seed, tasks=tasks, policy=policy))


def test_a_longer_world_has_an_equal_log():
    result = assert_equal_runs(three_tiers(tasks=600, faults=[{"kind": "death", "at": 2.0, "node": "edge", "seconds": 2.0}], detect=0.2))
    assert result.summary()["exits"][2] > 0


def test_same_seed_same_log_and_another_seed_another():
    a, b, c = (simulate(three_tiers(seed=seed), log=True) for seed in (1, 1, 2))
    assert a.digest == b.digest != c.digest

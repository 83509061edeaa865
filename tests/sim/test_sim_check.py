"""The conservation checker must see every kind of doctored log, and nothing in honest ones."""

import random

import numpy as np
import pytest
from sim_worlds import random_spec, three_tiers

from fastee.simulation import ConservationError, Outcome, What, check_log, simulate

DEATH = [{"kind": "death", "at": 0.5, "node": "cloud", "seconds": 1.0}]


@pytest.fixture(scope="module")
def honest():
    result = simulate(three_tiers(faults=DEATH, detect=0.1), log=True)
    assert check_log(result.lines.tolist()) == 200
    return result.lines.tolist()


def first(lines, what, where=lambda line: True):
    return next(i for i, line in enumerate(lines) if line[1] == what and where(line))


def doctored(lines, change):
    lines = [list(line) for line in lines]
    change(lines)
    return lines


def swap_end(lines):
    i = first(lines, What.END)
    lines[i][2] = lines[first(lines, What.END, lambda line: line[2] != lines[i][2])][2]


def run_elsewhere(lines):
    i = first(lines, What.RUN)
    lines[i][4] = (lines[i][4] + 1) % 3


def run_on_the_dead(lines):
    i = first(lines, What.FAULT)
    alive = first(lines, What.RAN)
    lines.insert(i + 1, [lines[i][0], What.RUN, lines[alive][2], lines[alive][3], lines[i][4], 0, 1])


def two_at_once(lines):
    i = first(lines, What.RUN)
    lines.insert(i + 1, [lines[i][0], What.RUN, *lines[i][2:5], lines[i][5] + 1, 1])


def skip_a_segment(lines):
    i = first(lines, What.RUN, lambda line: line[5] == 0)
    lines[i][5] = 2


def other_exit(lines):
    i = first(lines, What.END, lambda line: line[5] == Outcome.ANSWERED)
    lines[i][6] = (lines[i][6] + 1) % 3


DOCTORED = {
    "an end is missing": (lambda lines: lines.pop(first(lines, What.END)), "never ended"),
    "an end is doubled": (lambda lines: lines.append(lines[first(lines, What.END)]), "time runs backwards|ends twice"),
    "a task ends for another": (swap_end, "ends twice|no such answer|never arrived"),
    "an arrival is missing": (lambda lines: lines.pop(first(lines, What.ARRIVE)), "never arrived"),
    "a task arrives twice": (lambda lines: lines.insert(1, lines[first(lines, What.ARRIVE)]), "arrives twice"),
    "time runs backwards": (lambda lines: lines.insert(0, [10**15, What.THAW, -1, -1, 0, 0, 0]), "backwards"),
    "a run without admission": (run_elsewhere, "did not admit|did not run"),
    "a run on a dead node": (run_on_the_dead, "dead"),
    "two batches at once": (two_at_once, "before segment|while it runs"),
    "a segment is skipped": (skip_a_segment, "before segment"),
    "done without a run": (lambda lines: lines.pop(first(lines, What.RUN)), "did not run"),
    "an answer without an exit": (lambda lines: lines.pop(first(lines, What.RAN)), "did not run|while it runs|before segment"),
    "an end without an answer": (lambda lines: lines.pop(first(lines, What.ANSWER)), "no such answer|never sent"),
    "an end from another exit": (other_exit, "no such answer"),
    "an attempt is skipped": (lambda lines: lines[first(lines, What.START)].__setitem__(3, 1), "starts attempt"),
    "an unknown event": (lambda lines: lines[5].__setitem__(1, 99), "unknown event"),
}


@pytest.mark.parametrize("name", DOCTORED)
def test_a_doctored_log_is_caught(honest, name):
    change, text = DOCTORED[name]
    with pytest.raises(ConservationError, match=text):
        check_log(doctored(honest, change))


def test_every_dropped_or_doubled_end_is_caught(honest):
    ends = [i for i, line in enumerate(honest) if line[1] == What.END]
    for i in random.Random(0).sample(ends, 25):
        with pytest.raises(ConservationError):
            check_log(honest[:i] + honest[i + 1 :])
        with pytest.raises(ConservationError, match="ends twice"):
            check_log(honest[: i + 1] + honest[i:])


def test_a_log_cut_short_is_fine_when_told_so(honest):
    assert check_log(honest[: len(honest) // 2], complete=False) > 0


def test_columns_are_checked_too():
    result = simulate(three_tiers())
    assert result.check() == 200
    result.outcome[3] = Outcome.PENDING
    with pytest.raises(ConservationError, match="never ended"):
        result.check()
    result = simulate(three_tiers())
    result.exit[int(np.argmax(result.outcome == Outcome.ANSWERED))] = -1
    with pytest.raises(ConservationError):
        result.check()


def test_random_worlds_conserve_their_tasks():
    for seed in range(500, 620):
        result = simulate(random_spec(seed, tasks=80), log=True)
        assert result.check() == len(result.outcome)

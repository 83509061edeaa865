"""The threshold search against enumeration in plain Python."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastee.planning import ThresholdSearch, search_thresholds

OFF = math.inf


def rows(seed: int, count: int, exits: int, ties: bool = False):
    """Scores that tell something about being right; NaN and infinities among them."""
    rng = np.random.default_rng(seed)
    ease = rng.random(count)
    score = np.clip(ease[:, None] + rng.normal(0, 0.25, (count, exits)), 0, 1)
    if ties:
        score = np.round(score, 1)
    right = rng.random((count, exits + 1)) < np.clip(ease[:, None] + np.linspace(0.1, 0.6, exits + 1), 0, 1)
    if count > 4:
        score.flat[rng.integers(0, score.size, 3)] = math.nan, math.inf, -math.inf
    cost = np.sort(rng.uniform(0.1, 2, exits + 1))
    if rng.random() < 0.2:
        rng.shuffle(cost)  # nothing says that a later exit costs more
    return score, right, cost


def policy(score, right, cost, thresholds):
    """(mean cost, lost answers, rows per exit), row by row."""
    total, lost, leave = 0.0, 0, [0] * len(cost)
    for u, r in zip(score.tolist(), right.tolist(), strict=True):
        at = next((k for k, t in enumerate(thresholds) if t < OFF and u[k] >= t), len(thresholds))
        total += cost[at]
        lost += int(r[-1]) - int(r[at])
        leave[at] += 1
    return total / len(score), lost, leave


def exhaustive(score, right, cost, grid, budget) -> float:
    legal = (policy(score, right, cost, t) for t in itertools.product(*[[*g, OFF] for g in grid]))
    return min(c for c, lost, _ in legal if lost <= budget)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("exits, levels, count", [(1, 12, 50), (2, 6, 60), (3, 4, 50), (4, 3, 40), (5, 2, 40)])
def test_finds_the_exhaustive_optimum(exits, levels, count, ties):
    for seed in range(4):
        score, right, cost = rows(seed, count, exits, ties)
        finite = [np.unique(column[np.isfinite(column)]) for column in score.T]
        grid = [f[:: max(1, len(f) // levels)][:levels].tolist() for f in finite]
        for drop in (0.0, 0.02, 0.1):
            found = search_thresholds(score, right, cost, drop, grid=grid, refine=False)
            truth = exhaustive(score, right, cost, grid, math.floor(drop * count + 1e-9))
            assert found.exact and found.grid_cost == found.cost == pytest.approx(truth, rel=1e-12)
            cost_again, lost, leave = policy(score, right, cost, found.thresholds)
            assert (found.drop, found.exits) == (lost / count, leave) and found.cost == pytest.approx(cost_again, rel=1e-12)
            assert lost / count <= drop


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 30), st.floats(0, 0.3))
def test_search_keeps_the_budget_and_refining_never_hurts(seed, exits, count, drop):
    score, right, cost = rows(seed, count, exits, ties=seed % 2 == 0)
    search = ThresholdSearch(score, right, cost)
    coarse, fine = search.search(drop, levels=4, refine=False), search.search(drop, levels=4)
    assert coarse.cost == coarse.grid_cost == fine.grid_cost >= fine.cost
    for found in (coarse, fine):
        again, lost, leave = policy(score, right, cost, found.thresholds)
        assert lost / count <= drop + 1e-9 and leave == found.exits and found.cost == pytest.approx(again, rel=1e-12)
        assert found.cost <= cost[-1] * (1 + 1e-12)  # every exit off is always legal


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 2500))
def test_evaluation_equals_the_rows(seed, exits, count):
    score, right, cost = rows(seed, count, exits, ties=True)
    rng = np.random.default_rng(seed)
    thresholds = rng.choice([0.0, 0.3, 0.5, 0.8, 1.0, OFF, -OFF], exits).tolist()
    got_cost, drop, leave = ThresholdSearch(score, right, cost).evaluate(thresholds)
    truth, lost, where = policy(score, right, cost, thresholds)
    assert got_cost == pytest.approx(truth, rel=1e-12) and leave == where and drop == lost / count


def test_a_larger_budget_never_costs_more():
    search = ThresholdSearch(*rows(5, 3000, 3))
    costs = [search.search(d).grid_cost for d in (0.0, 0.005, 0.01, 0.02, 0.05, 0.2, 1.0)]
    assert costs == sorted(costs, reverse=True) and costs[-1] < costs[0]


def test_beyond_the_limit_it_descends_and_says_so():
    score, right, cost = rows(1, 400, 6)
    search = ThresholdSearch(score, right, cost)
    found = search.search(0.02, levels=100, max_policies=1000)
    assert not found.exact and found.policies == 0 and found.drop <= 0.02 and found.cost <= cost[-1]
    assert search.search(0.02, levels=3).exact


def test_signed_zero_and_one_row():
    found = search_thresholds([[-0.0], [0.0]], [[1, 1], [1, 1]], [1, 2], 0.0)
    assert found.exits == [2, 0]  # both zeros reach the same threshold
    assert search_thresholds([[0.5]], [[0, 1]], [1, 2], 0.0).thresholds == [OFF]
    assert search_thresholds([[0.5]], [[0, 1]], [1, 2], 1.0).exits == [1, 0]
    assert search_thresholds([[math.nan]], [[1, 1]], [1, 2], 0.0).exits == [0, 1]


GOOD = ([[0.5], [0.6]], [[1, 1], [0, 1]], [1.0, 2.0])


@pytest.mark.parametrize("arguments, options, error, message", [
    (([0.5], GOOD[1], GOOD[2]), {}, ValueError, "score: expected [N, K] with at least one row and one exit, got [1]"),
    ((np.zeros((0, 1)), GOOD[1], GOOD[2]), {}, ValueError, "score: expected [N, K] with at least one row and one exit, got [0, 1]"),
    ((GOOD[0], [[1, 1]], GOOD[2]), {}, ValueError, "correct: expected [2, 2] (rows, exits and the end), got [1, 2]"),
    ((GOOD[0], [[1, 2], [0, 1]], GOOD[2]), {}, ValueError, "correct: expected only 0 and 1 (or bool)"),
    ((GOOD[0], GOOD[1], [1.0]), {}, ValueError, "cost: expected 2 numbers, one per exit and one for the end, got [1]"),
    ((GOOD[0], GOOD[1], [1.0, math.nan]), {}, ValueError, "cost: expected finite numbers >= 0, got [1.0, nan]"),
    ((GOOD[0], GOOD[1], [-1.0, 1.0]), {}, ValueError, "cost: expected finite numbers >= 0, got [-1.0, 1.0]"),
    (GOOD, {"max_drop": 1.5}, ValueError, "max_drop: expected a number in [0, 1], got 1.5"),
    (GOOD, {"max_drop": math.nan}, ValueError, "max_drop: expected a number in [0, 1], got nan"),
    (GOOD, {"max_drop": "low"}, TypeError, "max_drop: expected a number, got str"),
    (GOOD, {"levels": 0}, ValueError, "levels: expected an int in 1..254, got 0"),
    (GOOD, {"levels": 2.0}, TypeError, "levels: expected an int, got float"),
    (GOOD, {"grid": [[0.5], [0.5]]}, ValueError, "grid: expected 1 lists of thresholds, one per exit, got 2"),
    (GOOD, {"grid": [[math.nan]]}, ValueError, "grid[0]: expected at most 254 thresholds without NaN, got 1"),
    (GOOD, {"max_policies": -1}, ValueError, "max_policies: expected an int >= 0, got -1"),
])  # fmt: skip
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error) as caught:
        search_thresholds(*arguments, **options)
    assert str(caught.value) == message


def test_bad_thresholds_to_evaluate():
    search = ThresholdSearch(*GOOD)
    with pytest.raises(ValueError, match="^evaluate: thresholds must hold 1 numbers, got 2$"):
        search.evaluate([0.5, 0.5])
    with pytest.raises(ValueError, match="^evaluate: thresholds must not hold NaN$"):
        search.evaluate([math.nan])

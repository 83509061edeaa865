import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastee.calibration import thresholds
from fastee.calibration.risk import binomial_tail, chernoff_upper, p_values, samples_needed, trinomial_p
from fastee.calibration.search import Search, exits_of


def world(n, seed, exits=2):
    """Rows of varying difficulty: deeper exits are right more often, scores are noisy views of it. Returns score, correct, chance."""
    rng = np.random.default_rng(seed)
    hard = rng.random(n)
    score = np.stack([1 - hard + rng.normal(0, 0.15 / (k + 1), n) for k in range(exits)], 1)
    chance = np.stack([1 / (1 + np.exp((hard - 0.6 - 0.35 * k / exits) * 8)) for k in range(exits + 1)], 1)
    return score, rng.random((n, 1)) < chance, chance


COST = [1.0, 2.0, 4.0]


def brute(score, correct, cost, budget):
    """Every vector of thresholds at scores or off."""
    n, k = score.shape
    loss = correct[:, -1:].astype(float) - correct
    best = math.inf
    for theta in itertools.product(*[[*np.unique(score[:, j][np.isfinite(score[:, j])]), math.inf] for j in range(k)]):
        at = exits_of(score, np.array(theta))
        if loss[np.arange(n), at].mean() <= budget + 1e-12:
            best = min(best, float(np.asarray(cost)[at].mean()))
    return best


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 2), st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.25, 1.0]))
def test_the_search_never_breaks_its_budget_and_one_exit_is_solved_exactly(n, exits, seed, budget):
    rng = np.random.default_rng(seed)
    score = rng.integers(0, 5, (n, exits)) / 4  # ties on purpose
    score[rng.random(score.shape) < 0.1] = np.nan
    correct = rng.random((n, exits + 1)) < 0.6
    cost = np.cumsum(rng.integers(1, 4, exits + 1)).astype(float)
    found = thresholds(score, correct, cost, budget, confidence=None)
    at = exits_of(score, np.array(found.thresholds))
    assert found.drop <= budget + 1e-12
    assert found.cost == pytest.approx(cost[at].mean()) and found.exits == np.bincount(at, minlength=exits + 1).tolist()
    assert found.drop == pytest.approx((correct[:, -1].astype(float) - correct[np.arange(n), at]).mean())
    best = brute(score, correct, cost, budget)
    assert found.cost >= best - 1e-9
    if exits == 1:
        assert found.cost == pytest.approx(best)
    shared = Search(score, correct[:, -1:].astype(float) - correct, cost).shared(budget)
    values = [*np.unique(score[np.isfinite(score)]), math.inf]
    loss = correct[:, -1:].astype(float) - correct
    legal = [
        cost[a].mean() for v in values if loss[np.arange(n), a := exits_of(score, np.full(exits, v))].mean() <= budget + 1e-12
    ]  # fmt: skip
    assert cost[exits_of(score, shared)].mean() == pytest.approx(min(legal))


def test_two_exits_come_close_to_the_best_of_all_vectors():
    worse = []
    for seed in range(15):
        score, correct, _ = world(24, seed)
        found, best = thresholds(score, correct, COST, 0.05, confidence=None).cost, brute(score, correct, COST, 0.05)
        assert found >= best - 1e-9
        worse.append(found / best - 1)
    assert np.mean(worse) < 0.02 and max(worse) < 0.1


def test_the_path_goes_from_cautious_to_bold_in_even_steps_of_cost():
    score, correct, _ = world(4000, 1)
    search = Search(score, correct[:, -1:].astype(float) - correct, np.array(COST))
    points = search.points(0.1)
    values = np.array([search.value(t) for t in search.path(points, 0.05, 50)])
    step = np.diff([COST[-1], *values[:, 0]])
    assert (step < 0).all() and np.allclose(step, step.mean(), atol=0.25 * -step.mean())  # exits shared by two thresholds bend it a little
    assert 0.04 < values[-1, 1] < 0.06 and values[0, 1] < 0.002
    for cost, loss, _ in points:  # no point lies clearly under the path
        nearest = np.interp(cost, values[::-1, 0], values[::-1, 1])
        assert cost < values[-1, 0] or loss > nearest - 0.004


def test_the_way_back_finds_cheaper_thresholds():
    cheaper = 0
    for seed in range(10):
        score, correct, _ = world(500, seed, exits=4)
        search = Search(score, correct[:, -1:].astype(float) - correct, np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
        forward = search.points(np.inf)[:25]
        there = min(p[0] for p in forward if p[1] <= 0.03)
        both = search.value(search.best(0.03))
        assert both[0] <= there + 1e-12 and both[1] <= 0.03 + 1e-12
        cheaper += both[0] < there - 1e-9
    assert cheaper >= 5


def test_nan_and_off_never_exit():
    score = np.array([[np.nan, 0.5], [1.0, np.nan], [np.inf, -np.inf]])
    assert exits_of(score, np.array([-np.inf, math.inf])).tolist() == [2, 0, 0]
    assert exits_of(score, np.array([math.inf, 0.2])).tolist() == [1, 2, 2]


@pytest.mark.parametrize("risk", ["accuracy", "agreement"])
def test_the_true_drop_stays_below_the_budget_as_often_as_promised(risk):
    """200 independent calibrations; violations may not exceed the level beyond what a binomial test at 1e-3 forgives."""
    confidence, budget, violations, used = 0.9, 0.03, 0, 0
    fresh_score, _, chance = world(100_000, 10_000)
    for seed in range(200):
        score, correct, _ = world(1200, seed)
        if risk == "agreement":
            correct = correct == correct[:, -1:]
        found = thresholds(score, correct, COST, budget, confidence, risk=risk, seed=seed)
        at = exits_of(fresh_score, np.array(found.thresholds))
        taken = chance[np.arange(len(at)), at]
        if risk == "accuracy":
            true = float((chance[:, -1] - taken).mean())
        else:  # one uniform draw decides all exits of a row: they differ where it falls between the two chances
            true = float(np.where(at == 2, 0.0, np.abs(chance[:, -1] - taken)).mean())
        violations += true > budget
        used += any(t < math.inf for t in found.thresholds)
        assert found.bound in (budget, 0.0)
    level = 1 - confidence
    allowed = next(k for k in range(201) if 1 - binomial_tail(np.array([k]), 200, level)[0] < 1e-3)
    assert violations <= allowed, (violations, allowed)
    assert used > 150  # a guarantee that never lets anyone out would be idle


def test_without_the_guarantee_the_same_world_breaks_the_budget_often():
    """The test above can fail: thresholds tuned on the rows alone miss the true budget about every other time."""
    fresh_score, _, chance = world(100_000, 10_000)
    violations = 0
    for seed in range(40):
        score, correct, _ = world(1200, seed)
        at = exits_of(fresh_score, np.array(thresholds(score, correct, COST, 0.03, None).thresholds))
        violations += float((chance[:, -1] - chance[np.arange(len(at)), at]).mean()) > 0.03
    assert violations > 12


def test_too_few_rows_are_said_with_the_number_needed():
    score, correct, _ = world(50, 0)
    found = thresholds(score, correct, COST, 0.01, 0.95)
    assert found.thresholds == [math.inf] * 2 and found.cost == 4.0 and found.drop == 0.0 and found.bound == 0.0 and found.exits == [0, 0, 50]
    needed = math.ceil(4 * samples_needed(0.01, 0.05, True) / 3)
    assert found.note == f"max_drop=0.01 with confidence 0.95 needs at least {needed} rows, got 50; exits stay off"
    perfect = np.ones((needed, 3), bool)  # and that many flawless rows do
    assert thresholds(np.ones((needed, 2)), perfect, COST, 0.01, 0.95).exits == [needed, 0, 0]
    assert thresholds(np.ones((needed - 4, 2)), perfect[4:], COST, 0.01, 0.95).exits == [0, 0, needed - 4]
    assert "no finite number of rows" in thresholds(score, correct, COST, 0.0, 0.95).note


def test_useless_exits_take_no_more_rows_than_the_budget():
    score, correct, _ = world(4000, 0)
    correct[:, :2] = False
    correct[:, 2] = True
    found = thresholds(score, correct, COST, 0.01, 0.95)
    assert found.drop <= 0.01 and found.exits[2] >= 3960 and "rows, got" not in found.note
    assert found.drop == (4000 - found.exits[2]) / 4000


def test_more_budget_never_costs_more():
    score, correct, _ = world(3000, 1)
    costs = [thresholds(score, correct, COST, d, None).cost for d in (0.0, 0.005, 0.02, 0.05, 0.2, 1.0)]
    assert all(b <= a + 1e-9 for a, b in zip(costs, costs[1:], strict=False)) and costs[-1] == 1.0
    assert thresholds(score, correct, COST, 1.0, 0.9).cost < 1.01


def test_the_same_rows_give_the_same_thresholds():
    score, correct, _ = world(2000, 2)
    a, b = thresholds(score, correct, COST, 0.02), thresholds(score, correct, COST, 0.02)
    assert a == b


def test_the_binomial_tail_is_exact():
    for n, p in ((5, 0.3), (40, 0.02), (300, 0.5)):
        k = np.arange(n + 1)
        want = np.cumsum([math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in k])
        np.testing.assert_allclose(binomial_tail(k, n, p), want, rtol=1e-9)


@pytest.mark.parametrize("signed", [True, False])
def test_p_values_are_small_no_more_often_than_their_size_at_the_edge_of_the_hypothesis(signed):
    rng = np.random.default_rng(0)
    limit, n, repeats = 0.05, 400, 4000
    if signed:
        loss = rng.choice([1.0, -1.0, 0.0], p=[0.15, 0.10, 0.75], size=(n, repeats))
    else:
        loss = (rng.random((n, repeats)) < limit).astype(float)
    for level in (0.01, 0.05, 0.2):
        p = p_values(loss, limit, signed, level)
        assert (p <= level).mean() <= level + 3.3 * math.sqrt(level / repeats)
        assert (p <= level).mean() > level / 8  # valid, and not by being useless


def test_the_trinomial_tail_is_exact():
    n, limit, d, level = 12, 0.1, 0.3, 0.05
    plus, minus = (d + limit) / 2, (d - limit) / 2
    loss = np.array([[1] * 2 + [-1] * 3 + [0] * 7]).T.astype(float)
    upper = chernoff_upper(5 / 12, 12, 0.1 * level)
    tail = lambda plus, minus: sum(
        math.factorial(n) / (math.factorial(a) * math.factorial(b) * math.factorial(n - a - b)) * plus**a * minus**b * (1 - plus - minus) ** (n - a - b)
        for a in range(n + 1) for b in range(n + 1 - a) if a - b <= -1
    )  # fmt: skip
    brute = max(tail((d + limit) / 2, (d - limit) / 2) for d in np.geomspace(limit, upper, 400))
    assert tail(plus, minus) <= brute and trinomial_p(loss, limit, level)[0] == pytest.approx(brute + 0.1 * level, abs=2e-3)
    assert trinomial_p(loss, limit, level)[0] >= brute + 0.1 * level - 1e-9
    assert math.isclose(chernoff_upper(0.0, 50, 0.05), 1 - 0.05 ** (1 / 50), rel_tol=1e-9)


def test_the_trinomial_test_has_power_where_gains_offset_losses():
    rng = np.random.default_rng(0)
    loss = rng.choice([1.0, -1.0, 0.0], p=[0.04, 0.06, 0.90], size=(3000, 50))
    assert (trinomial_p(loss, 0.03, 0.01) < 0.01).mean() > 0.95
    assert (p_values(np.maximum(loss, 0), 0.03, False) > 0.5).all()  # the +1s alone would never pass


def test_flawless_rows_needed_are_just_enough():
    for limit, level in ((0.01, 0.05), (0.003, 0.05), (0.05, 0.2)):
        for signed in (True, False):
            n = samples_needed(limit, level, signed)
            assert p_values(np.zeros((n, 1)), limit, signed, level)[0] <= level < p_values(np.zeros((n - 1, 1)), limit, signed, level)[0]


OK = dict(score=np.zeros((4, 2)), correct=np.ones((4, 3)), cost=COST)
BAD = [
    (dict(score=np.zeros(4)), ValueError, "score: expected [N, K] with at least one row and one exit, got [4]"),
    (dict(score=np.zeros((0, 2)), correct=np.ones((0, 3))), ValueError, "score: expected [N, K] with at least one row and one exit, got [0, 2]"),
    (dict(correct=np.ones((4, 2))), ValueError, "correct: expected [4, 3] (rows, exits and the end), got [4, 2]"),
    (dict(correct=np.full((4, 3), 0.5)), ValueError, "correct: expected only 0 and 1 (or bool)"),
    (dict(cost=[1, 2]), ValueError, "cost: expected 3 numbers, one per exit and one for the end, got [2]"),
    (dict(cost=[1, 2, math.nan]), ValueError, "cost: expected finite numbers >= 0, got [1.0, 2.0, nan]"),
    (dict(max_drop=-0.1), ValueError, "max_drop: expected a number in [0, 1], got -0.1"),
    (dict(max_drop=math.nan), ValueError, "max_drop: expected a number in [0, 1], got nan"),
    (dict(max_drop="1%"), TypeError, "max_drop: expected a number, got str"),
    (dict(confidence=1.0), ValueError, "confidence: expected a number between 0 and 1, or None, got 1.0"),
    (dict(risk="loss"), ValueError, "risk: expected 'accuracy' or 'agreement', got 'loss'"),
    (dict(risk="agreement", correct=np.array([[1, 1, 0]] * 4)), ValueError, "correct: with risk='agreement' the last column"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m[:40] for *_, m in BAD])
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=re.escape(message)):
        thresholds(**{**OK, **change})

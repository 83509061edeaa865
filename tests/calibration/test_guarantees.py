"""Other guarantees, a cost budget, temperatures, the report and the drift watch."""

import copy
import json
import math
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastee
from fastee.calibration import DriftTest, reliability, temperature, thresholds, watch
from fastee.calibration.risk import (
    NUISANCE,
    binomial_tail,
    chernoff_upper,
    conformal_risk,
    hoeffding_bentkus_p,
    p_values,
    trinomial_p,
    upper_bound,
)

COST = [0.3, 0.6, 1.0]


def world(n, seed):
    """Scores that say how likely each exit is right; the end is right in 95 of 100."""
    rng = np.random.default_rng(seed)
    score = np.clip(rng.beta(4, 1, (n, 2)) + [0, 0.1], 0, 1)
    return score, np.column_stack([rng.random((n, 2)) < 0.5 + 0.5 * score, rng.random(n) < 0.95])


# tests


def test_hoeffding_bentkus_is_the_formula_and_never_sharper_than_exact():
    rng = np.random.default_rng(0)
    loss = (rng.random((200, 30)) < np.linspace(0, 0.3, 30)).astype(float)
    p = hoeffding_bentkus_p(loss, 0.1)
    for j in range(30):
        mean, k = loss[:, j].mean(), int(loss[:, j].sum())
        m = min(mean, 0.1)
        h = (m * math.log(m / 0.1) if m else 0.0) + (1 - m) * math.log((1 - m) / 0.9)
        bentkus = math.e * float(binomial_tail(np.array([k]), 200, 0.1)[0])
        assert p[j] == pytest.approx(min(1.0, math.exp(-200 * h), bentkus))
    assert (p >= p_values(loss, 0.1, signed=False) - 1e-12).all()
    assert hoeffding_bentkus_p(np.full((50, 1), 0.05), 0.5)[0] < 1e-6  # losses between 0 and 1


@pytest.mark.parametrize("guarantee", ["ltt", "hoeffding_bentkus"])
def test_the_true_drop_stays_under_the_promise(guarantee):
    score, right = world(200_000, 99)
    broken = 0
    for seed in range(60):
        found = thresholds(*world(1500, seed), COST, max_drop=0.06, confidence=0.9, guarantee=guarantee)
        assert math.isfinite(found.thresholds[0]) or math.isfinite(found.thresholds[1])
        at = np.where(score[:, 0] >= found.thresholds[0], 0, np.where(score[:, 1] >= found.thresholds[1], 1, 2))
        broken += (right[:, 2].mean() - right[np.arange(len(at)), at].mean()) > 0.06
    assert broken <= 6  # 0.1 of 60; the tests are conservative, so far fewer are expected


@pytest.mark.parametrize(("n", "limit", "moved"), [(1, 0.3, 0.5), (40, 0.01, 0.3), (700, 0.002, 0.02), (700, 0.2, 0.9)])
def test_the_trinomial_tail_is_that_of_the_sum(n, limit, moved):
    loss = np.random.default_rng(n).choice([-1.0, 0.0, 1.0], p=[0.4 * moved, 1 - moved, 0.6 * moved], size=(n, 5))
    got = trinomial_p(loss, limit, 0.05)
    for column, p in zip(loss.T, got, strict=True):
        upper = max(limit, chernoff_upper(np.abs(column).sum() / n, n, NUISANCE * 0.05))
        tails = []
        for d in np.geomspace(limit, upper, 200):
            mass = np.ones(1)
            for _ in range(n):
                mass = np.convolve(mass, [(d - limit) / 2, 1 - d, (d + limit) / 2])
            tails.append(mass[: int(column.sum()) + n + 1].sum())
        assert max(tails) + NUISANCE * 0.05 - 1e-9 <= p <= max(1.3 * max(tails), 1e-6) + NUISANCE * 0.05 + 2e-9 or p == 1.0


def test_conformal_risk_control_bounds_the_mean():
    score, right = world(200_000, 99)
    drops, costs = [], []
    for seed in range(30):
        found = thresholds(*world(1500, seed), COST, max_drop=0.06, guarantee="crc")
        at = np.where(score[:, 0] >= found.thresholds[0], 0, np.where(score[:, 1] >= found.thresholds[1], 1, 2))
        drops.append(right[:, 2].mean() - right[np.arange(len(at)), at].mean())
        costs.append(found.cost)
    assert 0.005 < np.mean(drops) <= 0.06
    bold = [thresholds(*world(1500, seed), COST, max_drop=0.06, guarantee="hoeffding_bentkus").cost for seed in range(30)]
    assert np.mean(costs) < np.mean(bold)  # an expectation asks less than a probability
    loss = np.array([[0, 1, 0], [0, 0, 1.0]])
    assert conformal_risk(loss).tolist() == [1 / 3, 2 / 3, 1.0]


def test_upper_bound_is_what_the_test_just_rejects():
    loss = (np.random.default_rng(0).random(800) < 0.03).astype(float)
    bound = upper_bound(loss, 0.05, signed=False)
    assert loss.mean() < bound < 0.06
    assert p_values(loss[:, None], bound + 1e-6, False)[0] <= 0.05 < p_values(loss[:, None], bound - 1e-4, False)[0]
    assert upper_bound(np.empty(0), 0.05, signed=True) == 1.0


def test_a_cost_budget_is_spent_on_the_least_drop():
    score, right = world(3000, 0)
    last = None
    for budget in (0.3, 0.5, 0.7, 0.9, 1.0):
        found = thresholds(score, right, COST, max_drop=None, max_cost=budget)
        assert found.cost <= budget + 0.02 and (budget == 0.3 or found.bound < 1) and found.drop <= found.bound
        assert last is None or found.drop <= last + 0.01
        last = found.drop
    plain = thresholds(score, right, COST, max_drop=None, max_cost=0.6, confidence=None)
    assert plain.cost <= 0.6 and plain.bound == math.inf
    grid = np.quantile(score, np.linspace(0, 1, 25))
    for a in grid:
        for b in grid:
            at = np.where(score[:, 0] >= a, 0, np.where(score[:, 1] >= b, 1, 2))
            if np.asarray(COST)[at].mean() <= 0.6:
                assert plain.drop <= right[:, 2].mean() - right[np.arange(3000), at].mean() + 0.012


# temperatures


def test_temperature_is_recovered():
    rng = np.random.default_rng(0)
    z = 2 * rng.standard_normal((20_000, 5))
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    y = (p.cumsum(1) > rng.random((20_000, 1))).argmax(1)
    assert temperature(3.7 * z, y) == pytest.approx(3.7, rel=0.03) and temperature(0.2 * z, y) == pytest.approx(0.2, rel=0.03)
    bins, error = reliability(p.max(1), p.argmax(1) == y)
    assert error < 0.02 and sum(n for *_, n in bins) == 20_000
    with pytest.raises(ValueError, match=re.escape("y: expected labels in 0..4, got 0..9")):
        temperature(z[:2], [0, 9])
    with pytest.raises(ValueError, match="at least one row of finite logits"):
        temperature(np.full((2, 3), np.nan), [0, 1])


def made():
    body = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    return fastee.attach(body, ["1", "3"], 4, torch.zeros(1, 12))


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    net = made()
    fastee.fit(net, DataLoader(rows(3000, 1), 64, shuffle=True), method="joint", epochs=12, lr=0.01, seed=0)
    return net


def fitted(trained, scale=1.0):
    net = copy.deepcopy(trained)
    with torch.no_grad():
        for head in net.heads:
            head.linear.weight.mul_(scale)
            head.linear.bias.mul_(scale)
    return net


def rows(n, seed, hard=0.5):
    """Easy rows are linear, hard ones products of signs, which the first exit hardly sees; column 0 says which."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 12, generator=g)
    x[:, 0] = x[:, 0].abs() * torch.where(torch.rand(n, generator=g) < hard, -1.0, 1.0)
    simple, product = 2 * (x[:, 1] > 0) + (x[:, 2] > 0), 2 * (x[:, 3] * x[:, 4] > 0) + (x[:, 5] * x[:, 6] > 0)
    return TensorDataset(x, torch.where(x[:, 0] > 0, simple, product).long())


def test_calibrate_fits_temperatures_and_keeps_them(trained, tmp_path):
    net = fitted(trained, scale=8.0)
    loud = fastee.calibrate(net, rows(3000, 2), max_drop=0.05)
    report = fastee.calibrate(net, rows(3000, 2), max_drop=0.05, temperature=True)
    assert all(t > 3 for t in report.temperatures) and loud.temperatures == [1.0, 1.0]
    assert max(report.calibration_error) < 0.05 < max(loud.calibration_error) and report.drop <= 0.05
    x = rows(200, 5).tensors[0]
    before = net(x)
    net.save(tmp_path / "net.safetensors", weights="all")
    again = fastee.load(tmp_path / "net.safetensors", made().backbone)
    after = again(x)
    assert torch.equal(before.exit, after.exit) and torch.equal(before.confidence, after.confidence) and torch.equal(before.logits, after.logits)


def test_the_report_is_saved_and_drawn(trained, tmp_path):
    net = fitted(trained)
    for options in (dict(max_drop=0.05), dict(max_drop=None, max_cost=0.8), dict(max_drop=0.05, measure="entropy", guarantee="crc")):
        report = fastee.calibrate(net, rows(2000, 2), **options)
        report.save(tmp_path / "r.json")
        read = json.loads((tmp_path / "r.json").read_text())
        assert read["thresholds"] == [None if t == math.inf else t for t in report.thresholds] and read["samples"] == 2000
        assert report.curve[0][0] < report.curve[-1][0] and report.curve[0][1] > report.curve[-1][1] and len(report.curve) > 3
        png = fastee.report.calibration_plot(report)
        assert png[:8] == b"\x89PNG\r\n\x1a\n" and len(png) > 10_000


# the watch


def test_without_drift_the_alarm_stays_quiet():
    rung = sum(DriftTest(0.05, level=0.05).observe(np.random.default_rng(seed).random(600) < 0.05) for seed in range(100))
    assert rung <= 11  # P(more than 11 of 100 at 0.05) < 0.5 %


@pytest.mark.parametrize(("before", "limit"), [(0, 40), (2000, 80)])
def test_a_change_is_found_soon_after_a_quiet_time_too(before, limit):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        test = DriftTest(0.02, level=0.01)
        assert not test.observe(rng.random(before) < 0.01)
        late = rng.random(400) < 0.25
        needed = next(i for i in range(400) if test.observe(late[i : i + 1]))
        assert needed <= limit


def test_evidence_is_the_average_of_its_bets():
    test = DriftTest(0.1)
    assert test.evidence == 1.0
    rng = np.random.default_rng(0)
    losses = rng.random(70) < 0.3
    test.observe(losses)
    value, starts = 0.0, range(0, 70, 32)
    for j, start in enumerate(starts, 1):
        rates = [m * 0.1 / (0.9 + m * 0.1) for m in (2, 4, 16)]
        bets = [np.prod([r / 0.1 if v else (1 - r) / 0.9 for v in losses[start:]]) for r in rates]
        value += np.mean(bets) / (j * (j + 1))
    assert test.evidence == pytest.approx(value + 1 / (len(starts) + 1))


def test_a_watched_network_falls_back_under_shift_and_not_without(trained):
    net = fitted(trained)
    report = fastee.calibrate(net, rows(4000, 2), max_drop=0.03, risk="agreement")
    assert report.cost < 0.9
    on = net.thresholds
    calm = watch(net, limit=0.05, rate=0.5, seed=1)
    for i in range(10):
        calm(rows(200, 100 + i).tensors[0])
    assert not calm.audit.alarm and net.thresholds == on and 800 < calm.audit.audits < 1200
    out = calm(rows(200, 100).tensors[0])
    assert torch.equal(out.label, net(rows(200, 100).tensors[0]).label)
    shaken = watch(net, limit=0.05, rate=0.5, seed=1)
    loud = 8 * rows(1000, 300).tensors[0]
    assert float((net(loud).label != net.full(loud).argmax(1)).float().mean()) > 0.08
    with pytest.warns(UserWarning, match="watch: exits and end disagreed on"):
        for i in range(30):
            shaken(8 * rows(200, 200 + i).tensors[0])  # louder inputs make every exit sure of itself
    assert shaken.audit.alarm and net.thresholds == [math.inf, math.inf] and shaken.audit.disagreed > 0.05 * shaken.audit.audits
    seen = shaken.audit.audits
    shaken(rows(200, 1).tensors[0])
    assert shaken.audit.audits == seen  # nothing leaves early any more, so there is nothing to audit


@pytest.mark.parametrize(("call", "message"), [
    (lambda: DriftTest(0.0), "limit: expected a number between 0 and 1, got 0.0"),
    (lambda: DriftTest(0.1, level=2), "level: expected a number between 0 and 1, got 2"),
    (lambda: watch(made(), 0.1, rate=0.0), "rate: expected a number in (0, 1], got 0.0"),
    (lambda: watch(made(), 0.1, fallback=[1.0]), "fallback: expected 2 thresholds, one per exit, got 1"),
    (lambda: thresholds(*world(50, 0), COST, guarantee="hope"), "guarantee: expected one of ['ltt', 'hoeffding_bentkus', 'crc'], got 'hope'"),
    (lambda: thresholds(*world(50, 0), COST, max_cost=0.5), "max_drop: give either max_drop or max_cost, the other None"),
    (lambda: thresholds(*world(50, 0), COST, max_drop=None), "max_drop: give either max_drop or max_cost, the other None"),
    (lambda: thresholds(*world(50, 0), COST, max_drop=None, max_cost=0.1), "max_cost: expected at least the cost of the cheapest exit, 0.3, got 0.1"),
])  # fmt: skip
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_the_drift_evidence_is_the_mixture_of_bets():
    said = np.random.default_rng(3).random(200) < 0.05
    test, limit = DriftTest(0.02), 0.02
    odds = np.array([2.0, 4.0, 16.0]) * limit / (1 - limit)
    rates = odds / (1 + odds)
    for t, value in enumerate(said, 1):
        test.observe(value)
        pays = np.where(said[:t, None], rates / limit, (1 - rates) / (1 - limit))
        begun = range(0, t, 32)
        worth = sum(np.prod(pays[s:], axis=0).mean() / ((j + 1) * (j + 2)) for j, s in enumerate(begun))
        assert test.evidence == pytest.approx(worth + 1 / (len(begun) + 1), rel=1e-9)

"""The papers' tests: statistics by hand, verdicts on made-up rows, the file and the page."""

import math

import numpy as np
import pytest

from benchmarks.papers import SYSTEMS, daisy, distree, hierarchical, jei_dnn, main, system
from benchmarks.papers.common import Row, append, at_thresholds, budget_rule, mean_and_error, paired_interval, read
from benchmarks.papers.page import write
from fastee.errors import FasteeError


def test_the_budget_rule_sends_each_exit_its_share():
    score = np.random.default_rng(0).random((1000, 3))
    q = 0.8
    p = np.array([q, q**2, q**3, q**4])
    p /= p.sum()
    thresholds = budget_rule(score, q)
    left = np.ones(1000, bool)
    for m in range(3):
        leaves = left & (score[:, m] >= thresholds[m])
        assert leaves.sum() == int(1000 * p[m]) and (score[left & ~leaves, m] < score[leaves, m].min()).all()
        left &= ~leaves
    assert budget_rule(score[:3], 0.01).tolist() == [math.inf] * 3 or budget_rule(score[:3], 0.01)[1:].tolist() == [math.inf] * 2
    label, y = np.tile([0, 1, 2, 3], (4, 1)), np.array([0, 1, 2, 3])
    own = np.array([[0.9, 0, 0], [0.1, 0.9, 0], [0.1, 0.1, 0.9], [0.1, 0.1, 0.1]])
    assert at_thresholds(own, label, y, np.array([0.1, 0.2, 0.3, 1.0]), [0.5] * 3) == (1.0, pytest.approx(0.4))


def test_statistics():
    mean, error = mean_and_error([1.0, 2.0, 3.0])
    assert mean == 2.0 and error == pytest.approx(1 / math.sqrt(3)) and math.isnan(mean_and_error([1.0])[1])
    difference = np.random.default_rng(0).normal(0.1, 1.0, 4000)
    low, high = paired_interval(difference)
    assert low < difference.mean() < high and high - low == pytest.approx(2 * 1.96 / math.sqrt(4000), rel=0.1)


def gate_rows(gain):
    rows = []
    for seed in range(3):
        rows += [Row("jei_dnn", "quick", seed, jei_dnn.BUDGET, "official code", 0.5 + 0.4 * c, c, c) for c in (0.2, 0.5, 0.9)]
        rows += [Row("jei_dnn", "quick", seed, jei_dnn.JEI, "official code", 0.5 + 0.4 * c + gain, c, t)
                 for t, c in zip(jei_dnn.TRADES, np.linspace(0.8, 0.3, 8), strict=True)]  # fmt: skip
    return rows


@pytest.mark.parametrize(("gain", "want"), [(0.01, "reproduced"), (0.002, "direction only"), (-0.01, "not reproduced")])
def test_jei_verdicts(gain, want):
    assert jei_dnn.verdict(gate_rows(gain))[0] == want


@pytest.mark.parametrize(("depths", "want"), [
    ([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]], "reproduced"), ([[1, 2, 3, 4, 5], [1, 3, 2, 4, 6]], "direction only"), ([[3, 2, 3, 1, 2]] * 2, "not reproduced"),
])  # fmt: skip
def test_daisy_verdicts(depths, want):
    rows = [Row("daisy", "quick", s, "DAISY", "official code", None, 0.5, snr, {"exit_layer": d}) for s, row in enumerate(depths) for snr, d in zip(daisy.SNR, row, strict=True)]
    assert daisy.verdict(rows)[0] == want


@pytest.mark.parametrize(("costs", "accuracy", "want"), [
    ([0.5, 0.7, 0.9, 1.1], 0.85, "reproduced"), ([0.5, 0.7, 0.9, 1.1], 0.80, "direction only"), ([1.1, 1.0, 0.9, 0.8], 0.85, "not reproduced"),
])  # fmt: skip
def test_hierarchical_verdicts(costs, accuracy, want):
    rows = [Row("hierarchical", "quick", s, "end to end", "baseline", 0.855, 1.0) for s in (0, 1)]
    rows += [Row("hierarchical", "quick", s, hierarchical.OURS, "reconstructed", accuracy, c, r) for s in (0, 1) for c, r in zip(costs, hierarchical.RATES, strict=True)]
    assert hierarchical.verdict(rows)[0] == want


def team_rows(saving, loss):
    rows = []
    for seed in range(3):
        rows.append(Row("distree", "quick", seed, "no exits", "baseline", 0.86, 1.0))
        for method in (distree.DELTA, "entropy", "max_prob", "patience", distree.OURS):
            rows.append(Row("distree", "quick", seed, method, "baseline", 0.86 - loss, 1 - saving - 0.01 * seed))
    return rows


@pytest.mark.parametrize(("saving", "loss", "want"), [
    (0.3, 0.005, "reproduced"), (0.1, 0.005, "direction only"), (0.3, 0.02, "not reproduced"), (-0.02, 0.0, "not reproduced"),
])  # fmt: skip
def test_distree_verdicts(saving, loss, want):
    assert distree.verdict(team_rows(saving, loss))[0] == want


def test_rows_are_kept_and_the_last_one_counts(tmp_path):
    path = tmp_path / "sub" / "papers.jsonl"
    append(path, team_rows(0.1, 0.0))
    append(path, team_rows(0.3, 0.0))
    assert len(path.read_text().splitlines()) == 36 and len(read(path)) == 18 and distree.verdict(read(path))[0] == "reproduced"
    assert all(r.date and r.torch for r in read(path)) and read(tmp_path / "none.jsonl") == []
    path.write_text(path.read_text() + "{nonsense\n")
    with pytest.raises(ValueError, match="line 37: not a row"):
        read(path)


def test_the_page_holds_every_method_and_verdict(tmp_path):
    write(tmp_path / "papers.md", team_rows(0.1, 0.0) + gate_rows(0.01))
    page = (tmp_path / "papers.md").read_text()
    for text in ("**direction only**", "**reproduced**", distree.DELTA, distree.PUBLISHED, "| max_prob, budget rule | official code | 0.2 |", "3 seeds"):
        assert text in page
    assert page.count("## ") == 2


def test_systems(capsys):
    assert main("list", [], True, None) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in SYSTEMS)
    with pytest.raises(FasteeError, match="papers: expected one of .*, got 'jei', did you mean 'jei_dnn'"):
        system("jei")

"""JEI-DNN (ICLR 2024, arXiv 2310.09163): accuracy-cost curve of learned gates against thresholds with heads of the same kind.

Each method's heads are trained its own way (gates: the official SGD; thresholds: `fit(method="frozen")`), equally many epochs, on the same fixed features.

Verdict rule: *reproduced* (shape only) when the mean accuracy over seeds lies at least 0.5 points above the budget-rule max_prob curve at three or more
costs between 30 and 70 % of full; *direction only* when it lies above at three or more; else *not reproduced*.
"""

from __future__ import annotations

import copy

import numpy as np
from torch.utils.data import DataLoader, TensorDataset

import fastee
from benchmarks.papers.common import (
    Row,
    at_thresholds,
    batches,
    budget_rule,
    images,
    mean_and_error,
    relative_cost,
    trained_network,
)
from fastee.training import Gated

TITLE = "JEI-DNN: gates learned with the heads, against thresholds"
PUBLISHED = "curves only (no number in the abstract)"
SEEDS = 5
TRADES = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.5, 3.0)
JEI, BUDGET, OURS = "JEI-DNN", "max_prob, budget rule", "fastee: thresholds searched"


def run(seed: int, quick: bool, console) -> list[Row]:
    size, epochs = ("quick", 6) if quick else ("full", 20)
    net = trained_network(seed, epochs=6 if quick else 15)
    train, val, test = (images(s) for s in ("train", "val", "test"))
    loader = DataLoader(TensorDataset(*train), 250)
    cost = relative_cost(net)
    rows = []
    plain = copy.deepcopy(net)
    fastee.fit(plain, loader, "frozen", epochs=epochs, seed=seed, progress=False)
    score, label, y = fastee.calibration.collect(plain, batches(*val), "max_prob")
    t_score, t_label, t_y = fastee.calibration.collect(plain, batches(*test), "max_prob")
    full = float((t_label[:, -1] == t_y).mean())
    rows.append(Row("jei_dnn", size, seed, "no exits", "baseline", full, 1.0))
    for j in range(1, 40):
        accuracy, spent = at_thresholds(t_score, t_label, t_y, cost, budget_rule(score, j / 20))
        rows.append(Row("jei_dnn", size, seed, BUDGET, "official code", accuracy, spent, j / 20))
    right = label == y[:, None]
    for budget in np.linspace(0.25, 0.95, 15):
        if budget >= cost.min():
            found = fastee.calibration.thresholds(score, right, cost, None, None, max_cost=float(budget))
            accuracy, spent = at_thresholds(t_score, t_label, t_y, cost, found.thresholds)
            rows.append(Row("jei_dnn", size, seed, OURS, "ours", accuracy, spent, round(float(budget), 3)))
    for trade in TRADES:
        gated = copy.deepcopy(net)
        fastee.fit(gated, loader, Gated(trade=trade, phase=20 if quick else 200), epochs=epochs, seed=seed, progress=False, batch_size=64)
        g_score, g_label, g_y = fastee.calibration.collect(gated, batches(*test), "gate")
        accuracy, spent = at_thresholds(g_score, g_label, g_y, cost, [0.0] * net.num_exits)
        rows.append(Row("jei_dnn", size, seed, JEI, "official code", accuracy, spent, trade))
        console.print(f"jei_dnn seed {seed} lambda {trade}: accuracy {accuracy:.4f} at cost {spent:.3f}")
    return rows


def curve(rows: list[Row], method: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the cost and accuracy of a method's points that no cheaper point beats, in the order of cost."""
    points = sorted((r.cost, r.accuracy) for r in rows if r.method == method and r.seed == seed)
    kept: list[tuple[float, float]] = []
    for c, a in points:
        if not kept or a > kept[-1][1]:
            kept.append((c, a))
    return np.array([c for c, _ in kept]), np.array([a for _, a in kept])


def verdict(rows: list[Row]) -> tuple[str, str]:
    """Return (verdict, what it rests on)."""
    seeds = sorted({r.seed for r in rows})
    gains = []
    for trade in TRADES:
        mine = {r.seed: r for r in rows if r.method == JEI and r.point == trade}
        if set(mine) != set(seeds):
            continue
        cost = mean_and_error([mine[s].cost for s in seeds])[0]
        if 0.3 <= cost <= 0.7:
            gain = [mine[s].accuracy - float(np.interp(mine[s].cost, *curve(rows, BUDGET, s))) for s in seeds]
            gains.append((cost, *mean_and_error(gain)))
    said = "; ".join(f"{100 * g:+.2f} ± {100 * e:.2f} points at cost {c:.2f}" for c, g, e in gains) or "no point between 30 and 70 % of the cost"
    above = [g for _, g, _ in gains]
    if sum(g >= 0.005 for g in above) >= 3:
        return "reproduced", said
    return ("direction only" if sum(g > 0 for g in above) >= 3 else "not reproduced"), said

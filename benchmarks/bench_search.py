"""Threshold search over 10,000 rows x 4 exits: one policy, and the whole search, beside greedy searches of the kind that calibrators use."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fastee import ops
from fastee.planning import ThresholdSearch, search_thresholds
from fastee.testing.bench import Case, Context, Group

ROWS, EXITS, CLASSES, MAX_DROP, LEVELS = 10_000, 4, 10, 0.01, 30
GRID = (0.99, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)  # probabilities, from cautious to bold


def heads(seed: int) -> tuple[list[torch.Tensor], torch.Tensor, np.ndarray]:
    """Logits of every exit and of the end, the targets, and costs: a later head is right more often and costs more."""
    g = torch.Generator().manual_seed(seed)
    targets, ease = torch.randint(CLASSES, (ROWS,), generator=g), torch.rand(ROWS, generator=g)
    logits = []
    for k in range(EXITS + 1):
        z = torch.randn(ROWS, CLASSES, generator=g)
        z[torch.arange(ROWS), targets] += 6.0 * ease * (k + 2) / (EXITS + 2)
        logits.append(1.5 * z)
    return logits, targets, np.linspace(1 / (EXITS + 1), 1.0, EXITS + 1)


def scored(logits: list[torch.Tensor], targets: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return (max_prob [N, K], right [N, K + 1]) of logits."""
    stats = [ops.row_stats(z) for z in logits]
    return torch.stack([s.max_prob for s in stats[:-1]], dim=1).numpy(), torch.stack([s.label == targets for s in stats], dim=1).numpy()


def replay(logits: list[torch.Tensor], targets: torch.Tensor, cost: torch.Tensor, thresholds: list[float]) -> tuple[float, float]:
    """Return (mean cost, accuracy), replayed from the logits in vectorised torch at every call, as such calibrators do."""
    chosen = torch.full((len(targets),), EXITS)
    for k in range(EXITS - 1, -1, -1):
        if thresholds[k] < np.inf:
            chosen[torch.softmax(logits[k], dim=-1).max(dim=-1).values.double() >= thresholds[k]] = k
    label = torch.stack([z.argmax(dim=-1) for z in logits])[chosen, torch.arange(len(targets))]
    return cost[chosen].mean().item(), (label == targets).double().mean().item()


def policy(score: np.ndarray, right: np.ndarray, cost: np.ndarray, thresholds: list[float]) -> tuple[float, float]:
    """The same from scores kept: exit by exit over the rows still inside, in numpy."""
    inside, accuracy, spent = np.ones(len(score), dtype=bool), 0, 0.0
    for k, threshold in enumerate(thresholds):
        leave = inside & (score[:, k] >= threshold)
        accuracy += int(right[leave, k].sum())
        spent += float(cost[k]) * int(leave.sum())
        inside &= ~leave
    return (spent + float(cost[-1]) * int(inside.sum())) / len(score), (accuracy + int(right[inside, -1].sum())) / len(score)


def row_by_row(score: torch.Tensor, right: torch.Tensor, cost: list[float], thresholds: list[float]) -> tuple[float, float]:
    """The same from scores and hits kept as tensors, one row and one exit after the other in Python, as MSDNet's evaluation and EENet's after it go."""
    accuracy, spent = 0, 0.0
    for i in range(len(score)):
        k = 0
        while k < EXITS and not score[i][k] >= thresholds[k]:
            k += 1
        accuracy += int(right[i][k])
        spent += cost[k]
    return spent / len(score), accuracy / len(score)


def greedy(evaluate) -> list[float]:
    """Return thresholds of a greedy grid search over ``evaluate(thresholds) -> (cost, accuracy)``: exits in turn, the whole grid each, the boldest
    threshold that keeps the accuracy and saves something stays."""
    thresholds = [np.inf] * EXITS
    floor = evaluate(thresholds)[1] - MAX_DROP
    for k in range(EXITS):
        without = evaluate(thresholds)[0]
        kept = np.inf
        for candidate in GRID:
            cost, accuracy = evaluate([*thresholds[:k], candidate, *thresholds[k + 1 :]])
            if cost < without and accuracy >= floor - 1e-12:
                kept = min(kept, candidate)
        thresholds[k] = kept
    return thresholds


def cases(ctx: Context) -> Iterator[Group]:
    logits, targets, cost = heads(ctx.seed)
    costs = torch.from_numpy(cost)
    score, right = scored(logits, targets)
    search, thresholds = ThresholdSearch(score, right, cost), [0.95, 0.9, 0.8, 0.7]
    by_rows, by_score, by_logits = search.evaluate(thresholds), policy(score, right, cost, thresholds), replay(logits, targets, costs, thresholds)
    one_by_one = torch.from_numpy(score), torch.from_numpy(right), cost.tolist(), thresholds
    if max(abs(a - b) for a, b in zip(row_by_row(*one_by_one), by_score, strict=True)) > 1e-9:
        raise RuntimeError(f"policies disagree: {by_score} and {row_by_row(*one_by_one)}")
    if abs(by_rows[0] - by_score[0]) > 1e-9 or abs(float(right[:, -1].mean()) - by_rows[1] - by_score[1]) > 1e-9 or abs(by_logits[0] - by_score[0]) > 1e-3:
        raise RuntimeError(f"policies disagree: {by_rows}, {by_score} and {by_logits}")
    yield Group("policy", f"{ROWS} x {EXITS}", "fp32", [
        Case("fastee", search.evaluate, [(thresholds,)]),
        Case("numpy", policy, [(score, right, cost, thresholds)], note="from scores"),
        Case("torch", replay, [(logits, targets, costs, thresholds)], note=f"from logits, {CLASSES} classes"),
        Case("row_by_row", row_by_row, [one_by_one], note="from tensors, the way EENet evaluates; our code"),
    ], bars=("<= 50 us",))  # fmt: skip

    from_logits = greedy(lambda t: replay(logits, targets, costs, t))
    cost_found, cost_greedy = search.search(MAX_DROP, grid=[GRID] * EXITS, refine=False), policy(score, right, cost, from_logits)[0]
    if not cost_found.exact or cost_found.cost > cost_greedy + 1e-9:
        raise RuntimeError(f"the search ({cost_found}) loses to the greedy one ({cost_greedy}) on its own grid")
    found = search.search(MAX_DROP, levels=LEVELS)
    yield Group("search_thresholds", f"{ROWS} x {EXITS}", "fp32", [
        Case("fastee", lambda: search_thresholds(*scored(logits, targets), cost, MAX_DROP, levels=LEVELS),
             note=f"from logits, {LEVELS} levels, exhaustive: cost {found.cost:.4f} (grid optimum {found.grid_cost:.4f})"),
        Case("same_grid", lambda: search_thresholds(*scored(logits, targets), cost, MAX_DROP, grid=[GRID] * EXITS, refine=False),
             note=f"from logits, the greedy one's {len(GRID)} levels, exhaustive: cost {cost_found.cost:.4f}"),
        Case("sorted_once", lambda: search.search(MAX_DROP, levels=LEVELS), note="a ThresholdSearch kept, its search alone"),
        Case("greedy", lambda: greedy(lambda t: replay(logits, targets, costs, t)), note=f"from logits in torch: cost {cost_greedy:.4f}"),
        Case("greedy_numpy", lambda: greedy(lambda t: policy(score, right, cost, t)),
             note="scores given, in numpy: the same thresholds"),
    ], baseline="greedy", bars=(">= 20x greedy",))  # fmt: skip

"""search_thresholds(): the cheapest exit thresholds within a budget of lost answers, searched in C++."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastee.planning.problem import core

_MAX_LEVELS = 254


@dataclass(frozen=True)
class SearchReport:
    """`thresholds` [K] (+inf = off); `cost` mean per row; `drop` mean loss against the end; `exits` [K + 1] rows leaving there; `exact`: no vector of the
    grid is cheaper within the budget; `grid_cost`: that of the best vector of the grid, before `refine`; `policies`: vectors weighed one by one."""

    thresholds: list[float]
    cost: float
    drop: float
    exits: list[int]
    exact: bool
    grid_cost: float
    policies: int


class ThresholdSearch:
    """Rows sorted once, for many evaluations and searches.

    `score` [N, K], larger = more confident, NaN never exits; `correct` [N, K + 1] 0/1 (the last column: the end); `cost` [K + 1] of leaving there,
    finite, >= 0.

    >>> s = ThresholdSearch([[0.9], [0.4]], [[1, 1], [0, 1]], [1.0, 3.0])
    >>> s.evaluate([0.5]), s.evaluate([0.0]), s.search(max_drop=0.0).thresholds
    ((2.0, 0.0, [1, 1]), (1.0, 0.5, [2, 0]), [0.9])
    """

    def __init__(self, score: Any, correct: Any, cost: Any):
        u = _floats("score", score)
        if u.ndim != 2 or 0 in u.shape:
            raise ValueError(f"score: expected [N, K] with at least one row and one exit, got {list(u.shape)}")
        right = np.asarray(correct)
        if right.shape != (u.shape[0], u.shape[1] + 1):
            raise ValueError(f"correct: expected {[u.shape[0], u.shape[1] + 1]} (rows, exits and the end), got {list(right.shape)}")
        if right.dtype != np.bool_ and not ((right == 0) | (right == 1)).all():
            raise ValueError("correct: expected only 0 and 1 (or bool)")
        right = right.astype(np.int8)
        c = _floats("cost", cost)
        if c.shape != (u.shape[1] + 1,):
            raise ValueError(f"cost: expected {u.shape[1] + 1} numbers, one per exit and one for the end, got {list(c.shape)}")
        if not (np.isfinite(c) & (c >= 0)).all():
            raise ValueError(f"cost: expected finite numbers >= 0, got {c.tolist()}")
        self.rows, self.exits = u.shape
        self._core = core("search_thresholds").ThresholdSearch(u, np.ascontiguousarray(right[:, -1:] - right[:, :-1]), c)

    def evaluate(self, thresholds: Sequence[float]) -> tuple[float, float, list[int]]:
        """Return (mean cost, mean loss, rows per exit) of thresholds [K]; a row leaves at the first exit whose threshold it reaches."""
        cost, loss, exits = self._core.evaluate(thresholds)
        return cost, loss / self.rows, exits

    def search(self, max_drop: float, *, grid: Sequence[Sequence[float]] | None = None, levels: int = 30, refine: bool = True,
               max_policies: int = 100_000_000) -> SearchReport:  # fmt: skip
        """Return the cheapest thresholds whose mean loss is at most `max_drop`; see `search_thresholds`."""
        budget = _budget(max_drop, self.rows)
        if isinstance(levels, bool) or not isinstance(levels, int):
            raise TypeError(f"levels: expected an int, got {type(levels).__name__}")
        if not 1 <= levels <= _MAX_LEVELS:
            raise ValueError(f"levels: expected an int in 1..{_MAX_LEVELS}, got {levels}")
        if isinstance(max_policies, bool) or not isinstance(max_policies, int):
            raise TypeError(f"max_policies: expected an int, got {type(max_policies).__name__}")
        if not 0 <= max_policies < 1 << 62:
            raise ValueError(f"max_policies: expected an int >= 0, got {max_policies}")
        points = self._core.quantile_grid(levels) if grid is None else [_floats("grid", g).tolist() for g in grid]
        if len(points) != self.exits:
            raise ValueError(f"grid: expected {self.exits} lists of thresholds, one per exit, got {len(points)}")
        for k, list_ in enumerate(points):
            if len(list_) > _MAX_LEVELS or any(math.isnan(t) for t in list_):
                raise ValueError(f"grid[{k}]: expected at most {_MAX_LEVELS} thresholds without NaN, got {len(list_)}")
        found = self._core.search(points, budget, bool(refine), max_policies)
        return SearchReport(found["thresholds"], found["cost"], found["loss"] / self.rows, found["exits"], found["exact"], found["grid_cost"], found["policies"])


def search_thresholds(
    score: Any, correct: Any, cost: Any, max_drop: float = 0.01, *, grid: Sequence[Sequence[float]] | None = None, levels: int = 30, refine: bool = True,
    max_policies: int = 100_000_000,
) -> SearchReport:  # fmt: skip
    """Choose one threshold per exit: the least mean cost such that the mean of ``correct[end] - correct[exit taken]`` is at most `max_drop`.

    Exhaustive over the grid, with bounds that skip what cannot win: `grid` gives the thresholds to try per exit (beside off), None takes `levels`
    scores at even ranks. `refine` then moves one threshold at a time to the best score of any row. Where the grid has more than `max_policies`
    vectors, coordinate descent over the grid replaces the enumeration and `exact` is False. No promise about new rows: that is
    `fastee.calibration.thresholds`.

    >>> import numpy as np
    >>> u = np.linspace(0, 1, 1000)[:, None]
    >>> right = np.hstack([u > 0.5, np.ones((1000, 1))])             # exit 0 is right above 0.5, the end always
    >>> r = search_thresholds(u, right, cost=[1.0, 3.0], max_drop=0.02)
    >>> r.drop, r.exits, r.exact
    (0.02, [520, 480], True)
    """
    return ThresholdSearch(score, correct, cost).search(max_drop, grid=grid, levels=levels, refine=refine, max_policies=max_policies)


def _floats(name: str, value: Any) -> np.ndarray:
    try:
        return np.ascontiguousarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected an array of numbers: {error}") from None


def _budget(max_drop: float, rows: int) -> int:
    if isinstance(max_drop, bool) or not isinstance(max_drop, (int, float, np.floating, np.integer)):
        raise TypeError(f"max_drop: expected a number, got {type(max_drop).__name__}")
    if not 0 <= max_drop <= 1:
        raise ValueError(f"max_drop: expected a number in [0, 1], got {float(max_drop)}")
    return math.floor(float(max_drop) * rows + 1e-9)

"""Search of the thresholds that minimise mean cost within a budget of lost answers; exact per coordinate, deterministic."""

from __future__ import annotations

import numpy as np

OFF = np.inf
SWEEPS = 20
PRICES = 24


def exits_of(score: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return for each row of score [N, K] the first exit whose threshold it reaches, else K. NaN and a threshold of +inf never do."""
    at = np.full(len(score), score.shape[1])
    for k in range(score.shape[1] - 1, -1, -1):
        if thresholds[k] < OFF:
            at[score[:, k] >= thresholds[k]] = k
    return at


class Search:
    """The validation rows, sorted once per exit. `loss` [N, K+1] in {-1, 0, 1}: what leaving at k loses against the end."""

    def __init__(self, score: np.ndarray, loss: np.ndarray, cost: np.ndarray):
        self.score = np.where(np.isnan(score), -np.inf, score)
        self.loss, self.cost, self.n, self.k = loss, cost, *score.shape
        self.order = np.argsort(-self.score, axis=0, kind="stable")

    def value(self, thresholds: np.ndarray) -> tuple[float, float]:
        """Return (mean cost, mean loss)."""
        at = exits_of(self.score, thresholds)
        return float(self.cost[at].mean()), float(self.loss[np.arange(self.n), at].mean())

    def shared(self, budget: float) -> np.ndarray:
        """Return the best single threshold for all exits (exact: every place where a row changes its exit is visited)."""
        best = np.full(self.k, OFF)
        highest = np.maximum.accumulate(self.score, axis=1)
        record = np.ones_like(self.score, dtype=bool)
        record[:, 1:] = self.score[:, 1:] > highest[:, :-1]
        record &= np.isfinite(self.score)
        rows, exits = np.nonzero(record)
        if not len(rows):
            return best
        after = np.full((self.n, self.k), self.k)  # the exit a row takes just above its score at k: its next record
        for k in range(self.k - 2, -1, -1):
            after[:, k] = np.where(record[:, k + 1], k + 1, after[:, k + 1])
        was = after[rows, exits]
        at = np.argsort(-self.score[rows, exits], kind="stable")
        rows, exits, was = rows[at], exits[at], was[at]
        values = self.score[rows, exits]
        saved = np.cumsum(self.cost[exits] - self.cost[was])
        lost = np.cumsum(self.loss[rows, exits] - self.loss[rows, was]) + self.loss[:, self.k].sum()
        last = np.append(values[1:] != values[:-1], True)
        fits = last & (lost <= budget * self.n + 1e-9) & (saved < 0)
        if fits.any():
            best[:] = values[np.flatnonzero(fits)[np.argmin(saved[fits])]]
        return best

    def descend(self, start: np.ndarray, budget: float | None = None, price: float = 0.0) -> np.ndarray:
        """Improve one threshold at a time until none improves: within `budget`, or of cost + `price` * loss without one."""
        theta = start.copy()
        for _ in range(SWEEPS):
            before = theta.copy()
            for k in range(self.k - 1, -1, -1):
                theta[k] = self._best(theta, k, budget, price)
            if np.array_equal(before, theta):
                break
        return theta

    def _best(self, theta: np.ndarray, k: int, budget: float | None, price: float) -> float:
        other = theta.copy()
        other[k] = OFF
        at = exits_of(self.score, other)
        order = self.order[:, k]
        order = order[(at[order] > k) & np.isfinite(self.score[order, k])]  # rows that reach exit k, most confident first
        if not len(order):
            return OFF
        values = self.score[order, k]
        saved = np.cumsum(self.cost[k] - self.cost[at[order]])
        lost = np.cumsum(self.loss[order, k] - self.loss[order, at[order]])
        last = np.append(values[1:] != values[:-1], True)
        base = self.loss[np.arange(self.n), at].sum()
        if budget is None:
            goal, fits = saved + price * lost, last
        else:
            goal, fits = saved, last & (base + lost <= budget * self.n + 1e-9)
        if not fits.any():
            return OFF
        best = np.flatnonzero(fits)[np.argmin(goal[fits])]
        return float(values[best]) if goal[best] < 0 else OFF

    def best(self, budget: float) -> np.ndarray:
        """Return thresholds of least cost with mean loss <= budget: the best of a shared threshold, of a ladder of prices
        for a lost answer, and of the descents from those."""
        off = np.full(self.k, OFF)
        shared = self.shared(budget)
        found = [off, shared, self.descend(shared, budget), self.descend(off, budget)]
        span = float(self.cost.max() - self.cost.min()) or 1.0
        theta = off
        for price in span * np.geomspace(1e3, 1e-1, PRICES):
            theta = self.descend(theta, None, float(price))
            if self.value(theta)[1] > budget + 1e-12:
                break
            found.append(theta)
        found.append(self.descend(found[-1], budget))
        values = [self.value(t) for t in found]
        legal = [i for i, v in enumerate(values) if v[1] <= budget + 1e-12]
        return found[min(legal, key=lambda i: (values[i][0], i))]

    def within_cost(self, budget: float) -> np.ndarray:
        """Return thresholds of least loss among those found with mean cost <= budget, on a ladder of prices for a lost answer; when none
        is that cheap, the exit with the least cost takes every row that it can judge."""
        span = float(self.cost.max() - self.cost.min()) or 1.0
        theta, best = np.full(self.k, OFF), None
        for price in span * np.geomspace(1e3, 1e-3, 4 * PRICES):
            theta = self.descend(theta, None, float(price))
            cost, loss = self.value(theta)
            if cost <= budget + 1e-12 and (best is None or loss < best[0]):
                best = (loss, theta.copy())
        if best is not None:
            return best[1]
        theta = np.full(self.k, OFF)
        theta[int(np.argmin(self.cost[:-1]))] = -np.finfo(np.float64).max
        return theta

    def curve(self) -> list[tuple[float, float]]:
        """Return (mean cost, mean loss) along that ladder, from all exits off to bold, without points that another one beats in both."""
        span = float(self.cost.max() - self.cost.min()) or 1.0
        theta = np.full(self.k, OFF)
        points = [self.value(theta)]
        for price in span * np.geomspace(1e3, 1e-2, PRICES):
            theta = self.descend(theta, None, float(price))
            points.append(self.value(theta))
        kept: list[tuple[float, float]] = []
        for point in sorted(set(points)):
            if not kept or point[1] < kept[-1][1]:
                kept.append(point)
        return kept

    def ladder(self, thresholds: np.ndarray, steps: int) -> list[np.ndarray]:
        """Return `steps` threshold vectors from cautious to `thresholds`: step j lets the most confident j/steps of the rows above
        each threshold pass."""
        rungs = []
        for j in range(1, steps + 1):
            rung = np.full(self.k, OFF)
            for k in range(self.k):
                above = self.score[self.score[:, k] >= thresholds[k], k] if thresholds[k] < OFF else np.empty(0)
                if len(above):
                    take = max(1, round(len(above) * j / steps))
                    rung[k] = np.partition(above, len(above) - take)[len(above) - take]
            rungs.append(rung)
        return rungs

"""Search of the thresholds that minimise mean cost within a budget of lost answers; exact per coordinate, deterministic."""

from __future__ import annotations

import numpy as np

OFF = np.inf
SWEEPS = 20
PRICES = 24
STEPS = 40


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

    def points(self, limit: float = np.inf, prices: int = PRICES) -> list[tuple[float, float, np.ndarray]]:
        """Return (mean cost, mean loss, thresholds) where descents end at falling prices for a lost answer, from every exit off until the loss exceeds
        `limit`, and at the same prices on the way back: from bold thresholds they end elsewhere, on SST-2 up to 8 % cheaper at the same loss."""
        span = float(self.cost.max() - self.cost.min()) or 1.0
        theta = np.full(self.k, OFF)
        found, way = [(*self.value(theta), theta)], []
        for price in span * np.geomspace(1e3, 1e-2, prices):
            theta = self.descend(theta, None, float(price))
            found.append((*self.value(theta), theta))
            if found[-1][1] > limit:
                break
            way.append(float(price))
        for price in reversed(way):
            theta = self.descend(theta, None, price)
            found.append((*self.value(theta), theta))
        return found

    def best(self, budget: float) -> np.ndarray:
        """Return thresholds of least cost with mean loss <= budget: the best of a shared threshold, of `points`, of their `path`, and of descents from those."""
        points, shared = self.points(budget), self.shared(budget)
        known = points + [(*self.value(t), t) for t in (shared, *self.path(points, budget, STEPS))]
        start = self._cheapest(known, budget)
        return self._cheapest(known + [(*self.value(t), t) for t in (self.descend(s, budget) for s in (start, shared, points[0][2]))], budget)

    @staticmethod
    def _cheapest(points: list[tuple[float, float, np.ndarray]], budget: float) -> np.ndarray:
        return min((p for p in points if p[1] <= budget + 1e-12), key=lambda p: p[0])[2]

    def within_cost(self, budget: float) -> np.ndarray:
        """Return thresholds of least loss among those found with mean cost <= budget, on a ladder of prices for a lost answer; when none
        is that cheap, the exit with the least cost takes every row that it can judge."""
        within = [p for p in self.points(prices=4 * PRICES) if p[0] <= budget + 1e-12]
        if within:
            return min(within, key=lambda p: p[1])[2]
        theta = np.full(self.k, OFF)
        theta[int(np.argmin(self.cost[:-1]))] = -np.finfo(np.float64).max
        return theta

    def curve(self) -> list[tuple[float, float]]:
        """Return (mean cost, mean loss) of `points`, without those that another one beats in both."""
        kept: list[tuple[float, float]] = []
        for cost, loss, _ in sorted(self.points(), key=lambda p: p[:2]):
            if not kept or loss < kept[-1][1]:
                kept.append((cost, loss))
        return kept

    def path(self, points: list[tuple[float, float, np.ndarray]], limit: float, steps: int) -> list[np.ndarray]:
        """Return `steps` threshold vectors from almost every exit off to a mean loss of `limit` (or the cheapest point), in even steps of cost along the
        lower hull of `points`: between two corners every exit takes a share of its rows between theirs, so that each step lets few more rows through."""
        hull = points[:1]
        for cost, loss, theta in sorted(points, key=lambda p: (-p[0], p[1])):
            if cost < hull[-1][0]:
                while len(hull) > 1 and (loss - hull[-1][1]) * (hull[-2][0] - hull[-1][0]) <= (hull[-1][1] - hull[-2][1]) * (hull[-1][0] - cost):
                    hull.pop()
                hull.append((cost, loss, theta))
        saved, loss = hull[0][0] - np.array([p[0] for p in hull]), np.array([p[1] for p in hull])
        taken = np.array([(self.score >= p[2]).sum(axis=0) for p in hull])
        least = int(np.argmin(loss))  # from here on the loss rises
        where = np.linspace(0.0, np.interp(limit, loss[least:], saved[least:]), steps + 1)[1:]
        ranks = np.stack([np.interp(where, saved, t) for t in taken.T], axis=1).round().astype(int)
        ranked = np.vstack([np.full((1, self.k), OFF), np.take_along_axis(self.score, self.order, axis=0)])
        return list(np.take_along_axis(ranked, ranks, axis=0))

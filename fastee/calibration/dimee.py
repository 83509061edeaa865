"""DIMEE's offline part: difficulty pools from embeddings, their centroids, the cost of a path, and the search for alpha.

The policy ``dimee`` of the scheduler takes the pool of a sample (`route`) and alpha (`search_alpha`). Pools, routing and costs are
reconstructed: the official code of arXiv 2410.05338 has none of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

EASY, MODERATE, HARD = 0, 1, 2
MOBILE, EDGE, CLOUD = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Pools:
    """Difficulty pools: ``centroids`` [P, D] and ``names`` [P] (0 easy, 1 moderate, 2 hard, rising); an empty pool has no row."""

    centroids: np.ndarray
    names: np.ndarray

    def route(self, embedding: Any) -> np.ndarray:
        """Return the pool [B] int64 (0, 1 or 2) of the nearest centroid for every row of `embedding` [B, D]; ties go to the easier pool.

        Raises ``ValueError`` where D is another one or a number is not finite.

        >>> Pools(np.array([[0.0], [4.0]]), np.array([0, 2])).route([[1.0], [2.0], [3.0]])
        array([0, 0, 2])
        """
        x = _rows("route", "embedding", embedding)
        if x.shape[1] != self.centroids.shape[1]:
            raise ValueError(f"route: embedding must be [B, {self.centroids.shape[1]}] like the centroids, got {list(x.shape)}")
        # Row by row: [B, P, D] of a large set would not fit, and the expanded square loses ties.
        distance = np.stack([((x - c) ** 2).sum(axis=1) for c in self.centroids], axis=1)
        return self.names[distance.argmin(axis=1)].astype(np.int64)


@dataclasses.dataclass(frozen=True)
class AlphaSearch:
    """What `search_alpha` found: ``alpha``, its ``pools``, mean ``reward`` and ``cost``, ``drop`` against all-cloud (nan without `correct`).

    ``table``: the numbers of every candidate (columns alpha, reward, cost, drop).
    """

    alpha: float
    pools: Pools
    reward: float
    cost: float
    drop: float
    table: np.ndarray


def pools(embedding: Any, confidence: Any, alpha: float) -> Pools:
    """Return the centroids of the easy, moderate and hard training samples.

    `embedding` [N, D]; `confidence` [N, >= 2]: of the exits at the mobile and the edge cut, NaN is never sure; `alpha` in (0, inf).
    Easy: sure (>= alpha) at the first; moderate: not there, but at the second; hard: the rest. N >= 1.
    Raises ``ValueError`` naming the argument.

    >>> pools([[0.0], [2.0], [9.0]], [[0.9, 0.9], [0.8, 0.9], [0.1, 0.2]], 0.75).centroids.tolist()
    [[1.0], [9.0]]
    """
    x, c = _rows("pools", "embedding", embedding), _confidence("pools", confidence, 2)
    if not len(x) or len(x) != len(c):
        raise ValueError(f"pools: embedding and confidence must have the same number of rows, at least one, got {len(x)} and {len(c)}")
    if not alpha > 0:
        raise ValueError(f"pools: alpha must be > 0, got {alpha}")
    member = np.where(c[:, 0] >= alpha, EASY, np.where(c[:, 1] >= alpha, MODERATE, HARD))
    names = np.unique(member)
    return Pools(np.stack([x[member == name].mean(axis=0) for name in names]), names)


def last_tier(pool: Any, confidence: Any, alpha: float) -> np.ndarray:
    """Return the tier [N] int64 (0 mobile, 1 edge, 2 cloud) where each sample ends: the first from its pool's on that is sure.

    `pool` [N] int in {0, 1, 2}; `confidence` [N, >= 2] of the mobile's and the edge's exit. ``alpha > 1`` sends everything to the cloud.

    >>> last_tier([0, 0, 1, 2], [[0.9, 0.9], [0.1, 0.9], [0.9, 0.1], [0.9, 0.9]], 0.75)
    array([0, 1, 2, 2])
    """
    c, start = _confidence("last_tier", confidence, 2), np.asarray(pool)
    if start.shape != (len(c),) or not np.isin(start, (EASY, MODERATE, HARD)).all():
        raise ValueError(f"last_tier: pool must be [N] of 0, 1 and 2 for N = {len(c)}, got {list(start.shape)}")
    mobile, edge = (start <= MOBILE) & (c[:, 0] >= alpha), (start <= EDGE) & (c[:, 1] >= alpha)
    return np.where(mobile, MOBILE, np.where(edge, EDGE, CLOUD)).astype(np.int64)


def path_cost(
    pool: Any, tier: Any, layers: tuple[int, int, int] = (3, 6, 12), layer_cost: float | tuple[float, float, float] = 0.1,
    hops: tuple[float, float, float] = (0.3, 0.5, 0.5),
) -> np.ndarray:  # fmt: skip
    """Return the cost [N] float64 of samples that start at the tier of `pool` [N] and end at `tier` [N].

    `layers`: l1 < l2 < L, the cuts and the depth; `layer_cost`: lambda of a layer, one or per tier; `hops`: mobile to edge, mobile to
    cloud, edge to cloud. Layers are not computed again on the next tier: a tier pays those between its cut and the one where the sample
    came in, the first one all from the input on. Raises ``ValueError`` for a negative cost, wrong cuts and a tier below the pool's.

    >>> path_cost([0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]).round(6).tolist()
    [0.3, 0.9, 2.0, 0.9, 2.0, 1.7]
    """
    start, end = np.asarray(pool, np.int64), np.asarray(tier, np.int64)
    if start.shape != end.shape or start.ndim != 1 or not ((start >= 0) & (end <= CLOUD) & (start <= end)).all():
        raise ValueError(f"path_cost: tier must be [N] in pool..2 like pool [N], got {list(end.shape)} and {list(start.shape)}")
    if len(layers) != 3 or not 0 < layers[0] < layers[1] < layers[2]:
        raise ValueError(f"path_cost: layers must be l1 < l2 < L, all > 0, got {layers}")
    price, (me, mc, ec) = np.broadcast_to(np.asarray(layer_cost, np.float64), (3,)), hops
    if not (np.isfinite([*price, me, mc, ec]).all() and min(*price, me, mc, ec) >= 0):
        raise ValueError(f"path_cost: layer_cost and hops must be >= 0 and finite, got {layer_cost} and {hops}")
    into = np.array([0.0, me, mc])[start]
    between = np.where((start <= EDGE) & (end == CLOUD), ec, 0.0) + np.where((start == EASY) & (end >= EDGE), me, 0.0)
    cost, cuts = into + between, np.array([0, *layers])
    for t in (MOBILE, EDGE, CLOUD):
        ran = (start <= t) & (t <= end)
        first = np.where(start == t, 0, cuts[t])  # a tier that begins runs everything up to its cut
        cost = cost + np.where(ran, price[t] * (cuts[t + 1] - first), 0.0)
    return cost


def search_alpha(
    embedding: Any, confidence: Any, classes: int, *, correct: Any = None, max_drop: float | None = None, candidates: Any = None,
    layers: tuple[int, int, int] = (3, 6, 12), layer_cost: float | tuple[float, float, float] = 0.1,
    hops: tuple[float, float, float] = (0.3, 0.5, 0.5),
) -> AlphaSearch:  # fmt: skip
    """Return the alpha with the highest mean of "confidence at the exit taken - cost of the path" on validation rows.

    `embedding` [N, D], `confidence` [N, 3] at l1, l2 and L, `classes` V >= 2: alpha is searched above 1/V, where `max_prob` always lies.
    With `correct` [N, 3] and `max_drop` (in [0, 1]) instead the cheapest alpha whose accuracy is at most `max_drop` below all-cloud.
    `candidates`: None takes 99 even steps of (1/V, 1). Pools are built anew for each; ties go to the smaller alpha. Costs: `path_cost`.
    Raises ``ValueError`` naming the argument, also where no candidate keeps `max_drop`.

    >>> rng = np.random.default_rng(0)
    >>> hard = rng.random((400, 1))
    >>> found = search_alpha(hard, np.clip(1.3 - hard * [[0.9, 0.7, 0.4]], 0.1, 1.0), classes=10)
    >>> 0.1 < found.alpha < 1.0 and found.reward == float(found.table[:, 1].max())
    True
    """
    x, c = _rows("search_alpha", "embedding", embedding), _confidence("search_alpha", confidence, 3)
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 2:
        raise ValueError(f"search_alpha: classes must be an int >= 2, got {classes!r}")
    if (correct is None) != (max_drop is None) or (max_drop is not None and not 0 <= max_drop <= 1):
        given = "no correct" if correct is None else "correct"
        raise ValueError(f"search_alpha: correct and max_drop (in [0, 1]) belong together, got {given} and max_drop {max_drop}")
    right = None if correct is None else np.asarray(correct, np.float64)
    if right is not None and right.shape != (len(c), 3):
        raise ValueError(f"search_alpha: correct must be [{len(c)}, 3], got {list(right.shape)}")
    steps = np.linspace(1 / classes, 1.0, 101)[1:-1] if candidates is None else np.sort(np.asarray(candidates, np.float64).ravel())
    if not len(steps) or not ((steps > 1 / classes) & (steps < 1)).all():
        raise ValueError(f"search_alpha: candidates must lie in (1/classes, 1) = ({1 / classes:.4g}, 1), at least one")
    made, table, at = [], np.empty((len(steps), 4)), np.arange(len(c))
    for i, alpha in enumerate(steps):
        made.append(pools(x, c, alpha))
        pool = made[-1].route(x)
        tier = last_tier(pool, c, alpha)
        cost = path_cost(pool, tier, layers, layer_cost, hops)
        drop = np.nan if right is None else float((right[:, CLOUD] - right[at, tier]).mean())
        table[i] = alpha, float((np.nan_to_num(c[at, tier]) - cost).mean()), float(cost.mean()), drop
    if right is None:
        best = int(table[:, 1].argmax())
    else:
        kept = np.flatnonzero(table[:, 3] <= max_drop)
        if not len(kept):
            raise ValueError(f"search_alpha: no candidate stays within max_drop {max_drop}; the least drop is {table[:, 3].min():.4g}")
        best = int(kept[table[kept, 2].argmin()])
    return AlphaSearch(float(steps[best]), made[best], *map(float, table[best, 1:]), table)


def _rows(call: str, name: str, values: Any) -> np.ndarray:
    x = np.asarray(values, np.float64)
    if x.ndim != 2 or not np.isfinite(x).all():
        raise ValueError(f"{call}: {name} must be [rows, features] and finite, got {list(x.shape)}")
    return x


def _confidence(call: str, values: Any, columns: int) -> np.ndarray:
    c = np.asarray(values, np.float64)
    if c.ndim != 2 or c.shape[1] < columns:
        raise ValueError(f"{call}: confidence must be [N, {columns}], got {list(c.shape)}")
    return c

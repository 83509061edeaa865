"""The planners that ours is compared with, all in the terms of one latency model. Definitions in these terms are reconstructed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

from fastee.errors import did_you_mean


def by_weight(rows: int, weights: Sequence[float]) -> list[int]:
    """Return cuts of `rows` rows in proportion to weights >= 0, every prefix rounded on its own.

    >>> by_weight(10, [3, 0, 1])
    [0, 8, 8, 10]
    """
    return _cuts(rows, _shares(weights))


def _shares(weights: Sequence[float]) -> list[float]:
    """Of every prefix but the last."""
    sums = list(accumulate(weights))
    return [s / sums[-1] for s in sums[:-1]]


def _cuts(rows: int, shares: Sequence[float]) -> list[int]:
    return [0, *[int(rows * s + 0.5) for s in shares], rows]


def water_fill(fixed: Sequence[float], slope: Sequence[float]) -> list[float]:
    """Return shares >= 0 with sum 1 that minimise the largest ``fixed + slope * share`` over those with a share.

    The linear program of CoEdge for one layer; with one resource per node its optimum is the level t at which the shares
    ``(t - fixed) / slope`` of the nodes below t add up to 1, found exactly by adding nodes in the order of `fixed`.

    >>> water_fill([0, 0, 9], [1, 3, 1])
    [0.75, 0.25, 0.0]
    """
    order = sorted((d for d in range(len(slope)) if 0 < slope[d] < math.inf and fixed[d] < math.inf), key=lambda d: fixed[d])
    level = share = 0.0
    for k, d in enumerate(order):
        share += 1.0 / slope[d]
        level += fixed[d] / slope[d]
        t = (1.0 + level) / share
        if k + 1 == len(order) or t <= fixed[order[k + 1]]:
            return [max(0.0, (t - fixed[d]) / slope[d]) if d in order[: k + 1] else 0.0 for d in range(len(slope))]
    raise ValueError("water_fill: no node can take a share")


def _usable(p) -> list[int]:
    return [d for d in range(p.providers) if p.up[d] and p.rates[d] > 0]


def _speeds(p, members: Sequence[int]) -> list[float]:
    return [1.0 / max(p.whole[d], 1e-12) if d in members else 0.0 for d in range(p.providers)]


def _same(p, volumes: Sequence[int], weights: Sequence[float]):
    heights, shares = [p.net.height(b) for b in volumes[1:]], _shares(weights)
    cuts = {h: _cuts(h, shares) for h in set(heights)}
    return tuple(volumes), [cuts[h] for h in heights]


def _layers(p) -> tuple[int, ...]:
    return p.net.cut_points


def offload(p):
    """Everything on the best provider, tried one by one."""
    last = len(p.net.layers)
    plans = [_same(p, (0, last), [float(d == best) for d in range(p.providers)]) for best in _usable(p)]
    return min(plans, key=lambda plan: p.latency(*plan))


def modnn(p):
    """MoDNN: layer by layer, rows in proportion to compute."""
    return _same(p, _layers(p), _speeds(p, _usable(p)))


def mednn(p):
    """MeDNN: as MoDNN, with the number of providers (the k fastest) that is best under the model."""
    order = sorted(_usable(p), key=lambda d: p.whole[d])
    plans = [_same(p, _layers(p), _speeds(p, order[:k])) for k in range(1, len(order) + 1)]
    return min(plans, key=lambda plan: p.latency(*plan))


def coedge(p):
    """CoEdge: layer by layer, one share of the rows per provider by a linear program over compute and bandwidth (see `water_fill`).

    Fixed: what a provider spends on the smallest part of every layer and on halos from both sides; slope: compute of all rows, scatter and
    gather over its link.
    """
    usable, volumes = set(_usable(p)), _layers(p)
    pairs, ends = list(zip(volumes, volumes[1:], strict=False)), (0, len(p.net.layers))
    moved = sum(8.0 * p.net.row_bytes(bound) * p.net.height(bound) for bound in ends)
    halo = sum(8.0 * p.net.row_bytes(a) * sum(max(0, x.kernel - x.stride) for x in p.net.layers[a:b]) for a, b in pairs[1:])
    fixed, slope = [math.inf] * p.providers, [math.inf] * p.providers
    for d in usable:
        least, full = p.compute_range[d]
        fixed[d] = least + halo / p.rates[d]
        slope[d] = max(1e-12, full - least + moved / p.rates[d])
    return _same(p, volumes, water_fill(fixed, slope))


def _equal(p) -> list[float]:
    usable = _usable(p)
    return [float(d in usable) for d in range(p.providers)]


def deepthings(p):
    """DeepThings: one fused volume, equal tiles."""
    return _same(p, (0, len(p.net.layers)), _equal(p))


def deeperthings(p):
    """DeeperThings: the volumes of LC-PSS, equal tiles."""
    return _same(p, p.lcpss(), _equal(p))


def aofl(p):
    """AOFL: the volumes of LC-PSS, rows in proportion to compute."""
    return _same(p, p.lcpss(), _speeds(p, _usable(p)))


BASELINES: dict[str, Callable] = {
    "offload": offload, "modnn": modnn, "mednn": mednn, "coedge": coedge, "deepthings": deepthings, "deeperthings": deeperthings, "aofl": aofl,
}  # fmt: skip


def find(name: str) -> Callable:
    """Return a baseline by name; `ValueError` lists the names."""
    if name not in BASELINES:
        raise ValueError(f"baseline must be one of {', '.join(BASELINES)}, got {name!r}{did_you_mean(str(name), BASELINES)}")
    return BASELINES[name]

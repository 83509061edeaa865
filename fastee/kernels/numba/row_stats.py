"""row_stats: top, runner-up and index in one pass over a row, then s = sum e^u and t = sum u e^u with u = z - top, folded in scratch."""

from __future__ import annotations

import math

import numpy as np

from ._jit import inline, kernel
from ._rows import INF, NAN, ZERO, exp_negative, f4, fold

_LEAST = f4(-104.0)


@inline
def row_stats_into(z, temperature, e, ue, stats, b, rows, second):
    """Write max_prob, margin, entropy, lse (and entropy_p2) of row b into stats [4 or 5, rows] and return its label."""
    top = top2 = -INF
    label, bad = np.int64(0), False
    for c in range(z.size):
        v = z[c] / temperature
        if v > top:
            top2, top, label = top, v, c
        elif v > top2:
            top2 = v
        if not v < INF:
            bad = True
    if bad or top == -INF:
        for k in range(5 if second else 4):
            stats[k * rows + b] = NAN
        return np.int64(-1)
    for c in range(z.size):
        u = max(z[c] / temperature - top, _LEAST)  # -inf would give 0 * inf in ue
        p = exp_negative(u)
        e[c] = p
        ue[c] = u * p
    if second:
        s2 = t2 = 0.0
        for c in range(z.size):
            s2 += np.float64(e[c]) * np.float64(e[c])
            t2 += np.float64(e[c]) * np.float64(ue[c])
        stats[4 * rows + b] = max(f4(math.log(s2) - 2.0 * t2 / s2), ZERO)
    s, t = np.float64(fold(e, z.size)), np.float64(fold(ue, z.size))
    gap = 0.0 if top2 == -INF else math.exp(np.float64(top2 - top))
    stats[b] = f4(1.0 / s)
    stats[rows + b] = f4((1.0 - gap) / s)
    stats[2 * rows + b] = max(f4(math.log(s) - t / s), ZERO)
    stats[3 * rows + b] = f4(np.float64(top) + math.log(s))
    return label


@kernel("void(f4[::1], i8, i8, i8, f4, b1, i8[::1], f4[::1])")
def row_stats(logits, rows, classes, row_stride, temperature, second, label, stats):
    e, ue = np.empty(classes, f4), np.empty(classes, f4)
    for b in range(rows):
        z = logits[b * row_stride : b * row_stride + classes]
        label[b] = row_stats_into(z, temperature, e, ue, stats, b, rows, second)


COMPILED = True

"""exit_head: pool, norm, linear, statistics and rule of one row after the other; with an index also the survivors' order (exit_step)."""

from __future__ import annotations

import math

import numpy as np

from ._jit import inline, kernel
from ._rows import INF, ZERO, f4, fold, total
from .compact import compact_into
from .linear_stats import linear_row
from .pool import pool_row
from .row_stats import row_stats_into


@inline
def normalize(x, kind, weight, bias, eps, scratch):
    """Normalise x in place: kind 1 layer, 2 rms, 3 affine. The variance takes a second pass: one pass loses digits when the mean is large."""
    n = x.size
    if kind != 3:
        shift = total(x, scratch) / f4(n) if kind == 1 else ZERO
        for d in range(n):
            scratch[d] = (x[d] - shift) * (x[d] - shift)
        scale = f4(1.0 / math.sqrt(np.float64(fold(scratch, n)) / n + eps))
        for d in range(n):
            x[d] = (x[d] - shift) * scale
    if weight.size:
        for d in range(n):
            x[d] *= weight[d]
    if bias.size:
        for d in range(n):
            x[d] += bias[d]


@kernel(
    "i8(f4[::1], i8, i8, i8, i8, i8, i8, u1[::1], i8, f4[::1], f4[::1], f8, f4[::1], i8, i8, f4[::1], "
    "i8, f4, f4, i8[::1], f4[::1], f4[::1], u1[::1], f4[::1], i8[::1])"
)
def exit_head(
    x, rows, features, inner, row_stride, feature_stride, inner_stride, mask, norm, norm_weight, norm_bias, eps, weight, classes, weight_stride, bias,
    measure, threshold, temperature, label, confidence, stats, exits, logits, index,
):  # fmt: skip
    pooled, scratch = np.empty(features, f4), np.empty(features, f4)
    e, ue, sums = np.empty(classes, f4), np.empty(classes, f4), np.empty((inner + 1) // 2, f4)
    for b in range(rows):
        keep = mask[b * inner : (b + 1) * inner] if mask.size else mask
        pool_row(x, b * row_stride, features, inner, feature_stride, inner_stride, keep, sums, pooled)
        if norm:
            normalize(pooled, norm, norm_weight, norm_bias, eps, scratch)
        z = logits[b * classes : (b + 1) * classes]
        linear_row(pooled, weight, weight_stride, bias, scratch, z)
        label[b] = row_stats_into(z, temperature, e, ue, stats, b, rows, False)
        if measure == 2:
            u = -stats[2 * rows + b]
        elif measure == 3:
            u = stats[3 * rows + b] * temperature
        else:
            u = stats[measure * rows + b]
        confidence[b] = u
        exits[b] = u >= threshold and threshold != INF  # NaN compares false: it never exits
    return compact_into(exits, rows, 1, True, index) if index.size else 0


COMPILED = True

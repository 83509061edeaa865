"""linear_stats: the logits of one row at a time in scratch, then its statistics."""

from __future__ import annotations

import numpy as np

from ._jit import inline, kernel
from ._rows import dot, f4
from .row_stats import row_stats_into


@inline
def linear_row(x, weight, weight_stride, bias, scratch, z):
    """Write x . weight[c] + bias[c] into z; an empty bias adds nothing."""
    for c in range(z.size):
        z[c] = dot(x, weight[c * weight_stride : c * weight_stride + x.size], scratch)
        if bias.size:
            z[c] += bias[c]


@kernel("void(f4[::1], i8, i8, i8, f4[::1], i8, i8, f4[::1], f4, b1, i8[::1], f4[::1])")
def linear_stats(x, rows, features, row_stride, weight, classes, weight_stride, bias, temperature, second, label, stats):
    scratch, z, e, ue = np.empty((features + 1) // 2, f4), np.empty(classes, f4), np.empty(classes, f4), np.empty(classes, f4)
    for b in range(rows):
        linear_row(x[b * row_stride : b * row_stride + features], weight, weight_stride, bias, scratch, z)
        label[b] = row_stats_into(z, temperature, e, ue, stats, b, rows, second)


COMPILED = True

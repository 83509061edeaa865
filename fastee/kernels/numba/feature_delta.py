"""feature_delta: |a/|a| - b/|b|| per row as the definition says it, without the cancellation of sqrt(2 - 2 cos)."""

from __future__ import annotations

import math

import numpy as np

from ._jit import kernel
from ._rows import INF, NAN, dot, f4, fold


@kernel("void(f4[::1], f4[::1], i8, i8, i8, i8, f4[::1])")
def feature_delta(a, b, rows, features, a_stride, b_stride, out):
    t = np.empty(features, f4)
    for r in range(rows):
        x, y = a[r * a_stride : r * a_stride + features], b[r * b_stride : r * b_stride + features]
        u, v = f4(math.sqrt(dot(x, x, t))), f4(math.sqrt(dot(y, y, t)))
        if u == 0 or v == 0:
            out[r] = INF
            continue
        if u * v == INF:  # a sum of squares beyond fp32: no answer
            out[r] = NAN
            continue
        for d in range(features):
            step = x[d] / u - y[d] / v
            t[d] = step * step
        out[r] = f4(math.sqrt(fold(t, features)))


COMPILED = True

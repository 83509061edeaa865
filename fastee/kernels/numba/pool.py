"""pool: [rows, inner, features] -> [rows, features], where either inner (NCHW) or features (channels-last, tokens) is contiguous."""

from __future__ import annotations

import numpy as np

from ._jit import inline, kernel
from ._rows import ZERO, f4, total

_SHORT = 256


@inline
def pool_row(x, start, features, inner, feature_stride, inner_stride, mask, scratch, out):
    """Write the mean of the row that begins at `start`; an empty mask keeps every token, a row without tokens gives 0 / 0 = NaN."""
    d = 0
    if inner == 1 and mask.size == 0:
        for d in range(features):
            out[d] = x[start + d * feature_stride]
    elif feature_stride != 1:
        while inner < _SHORT and d + 4 <= features:  # four short sums at a time, a chain each: twice as fast as folding each
            at = start + d * feature_stride
            a = b = c = e = ZERO
            p, q = x[at : at + inner], x[at + feature_stride : at + feature_stride + inner]
            r, s = x[at + 2 * feature_stride : at + 2 * feature_stride + inner], x[at + 3 * feature_stride : at + 3 * feature_stride + inner]
            for i in range(inner):
                a += p[i]
                b += q[i]
                c += r[i]
                e += s[i]
            out[d], out[d + 1], out[d + 2], out[d + 3] = a / f4(inner), b / f4(inner), c / f4(inner), e / f4(inner)
            d += 4
        while d < features:
            at = start + d * feature_stride
            out[d] = total(x[at : at + inner], scratch) / f4(inner)
            d += 1
    else:
        kept = 0
        out[:features] = ZERO
        for i in range(inner):
            if mask.size == 0 or mask[i] != 0:
                kept += 1
                token = x[start + i * inner_stride : start + i * inner_stride + features]
                for d in range(features):
                    out[d] += token[d]
        for d in range(features):
            out[d] /= f4(kept)


@kernel("void(f4[::1], i8, i8, i8, i8, i8, i8, u1[::1], f4[::1])")
def pool(x, rows, features, inner, row_stride, feature_stride, inner_stride, mask, out):
    sums = np.empty((inner + 1) // 2, f4)
    for b in range(rows):
        keep = mask[b * inner : (b + 1) * inner] if mask.size else mask
        pool_row(x, b * row_stride, features, inner, feature_stride, inner_stride, keep, sums, out[b * features : (b + 1) * features])


COMPILED = True

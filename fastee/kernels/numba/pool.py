"""pool: [rows, inner, features] -> [rows, features], where either inner (NCHW) or features (channels-last, tokens) is contiguous."""

from __future__ import annotations

from ._jit import inline, kernel
from ._rows import ZERO, f4, total


@inline
def pool_row(x, start, features, inner, feature_stride, inner_stride, mask, out):
    """Write the mean of the row that begins at `start`; an empty mask keeps every token, a row without tokens gives 0 / 0 = NaN."""
    if inner == 1 and mask.size == 0:
        for d in range(features):
            out[d] = x[start + d * feature_stride]
    elif feature_stride != 1:
        for d in range(features):
            at = start + d * feature_stride
            out[d] = total(x[at : at + inner]) / f4(inner)
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
    for b in range(rows):
        keep = mask[b * inner : (b + 1) * inner] if mask.size else mask
        pool_row(x, b * row_stride, features, inner, feature_stride, inner_stride, keep, out[b * features : (b + 1) * features])


COMPILED = True

"""pool: one feature vector per row."""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import ceil_div, launch, power_of_two


@triton.jit
def load_features(x, mask, row, d, live, features, x_row, x_feature, inner, x_inner, POOL: tl.constexpr, BI: tl.constexpr):
    """Return features [R, N] of rows `row` [R] at `d` [N]: as they lie, or the fp32 mean over those of `inner` places that `mask` picks."""
    at = row[:, None] * x_row + d[None, :].to(tl.int64) * x_feature
    here = live[:, None] & (d < features)[None, :]
    if not POOL:
        return tl.load(x + at, here, 0.0)
    else:
        total = tl.zeros((row.shape[0], d.shape[0]), tl.float32)
        found = tl.zeros((row.shape[0],), tl.float32)
        for first in range(0, inner, BI):
            i = first + tl.arange(0, BI)
            keep = live[:, None] & (i < inner)[None, :]
            if mask is not None:
                keep = keep & (tl.load(mask + row[:, None] * inner + i[None, :], keep, 0) != 0)
                found += tl.sum(keep.to(tl.float32), 1)
            value = tl.load(x + at[:, :, None] + i[None, None, :].to(tl.int64) * x_inner, here[:, :, None] & keep[:, None, :], 0.0)
            total += tl.sum(value.to(tl.float32), 2)
        if mask is None:
            found += inner
        return total / found[:, None]


@triton.jit(do_not_specialize=["rows"])
def pool_kernel(x, mask, rows, features, x_row, x_feature, inner, x_inner, out, POOL: tl.constexpr, BD: tl.constexpr, BI: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    pooled = load_features(x, mask, row, d, row < rows, features, x_row, x_feature, inner, x_inner, POOL, BI)
    tl.store(out + row[:, None] * features + d[None, :], pooled.to(tl.float32), (d < features)[None, :])


def inner_tile(inner, x_inner):
    """Return how many places of the pooled extent a program reads at once: along them where they are contiguous, else a few."""
    return min(power_of_two(inner), 64 if x_inner == 1 else 8)


def pool(x, shape, mask, out):
    """Write the pooled features of x to out fp32 [B, D]. `shape` is (rows, features, inner, row stride, feature stride, inner stride)."""
    rows, features, inner, x_row, x_feature, x_inner = shape
    tile = inner_tile(inner, x_inner)
    columns = min(power_of_two(features), max(16, 2048 // tile))
    launch(
        pool_kernel, (rows, ceil_div(features, columns)), x, mask, rows, features, x_row, x_feature, inner, x_inner, out,
        POOL=inner > 1 or mask is not None, BD=columns, BI=tile, num_warps=4,
    )  # fmt: skip

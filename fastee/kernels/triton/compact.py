"""compact: a survivor goes to the next place from the front, any other to the next from the back."""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import ceil_div, launch


@triton.jit
def compact_block(mask, stride, first, before, n, index, FLIP: tl.constexpr, BLOCK: tl.constexpr):
    """Place rows [first, first + BLOCK), `before` of whose predecessors survive; return how many of these do. A row survives whose flag
    differs from FLIP (0 or 1). Flags are read past L1: another program of the launch may have written them."""
    i = first + tl.arange(0, BLOCK).to(tl.int64)
    live = i < n
    keep = (tl.load(mask + i * stride, live, FLIP, cache_modifier=".cg") != 0).to(tl.int32) ^ FLIP
    rank = before + tl.cumsum(keep, 0)  # survivors up to and including this row
    tl.store(index + tl.where(keep != 0, rank - 1, n - 1 - (i - rank)), i, live)
    return tl.sum(keep, 0)


@triton.jit
def compact_all(mask, stride, n, index, count, FLIP: tl.constexpr, BLOCK: tl.constexpr):
    """One program compacts all rows."""
    kept = tl.zeros((), tl.int64)
    for first in range(0, n, BLOCK):
        kept += compact_block(mask, stride, first, kept, n, index, FLIP, BLOCK)
    tl.store(count, kept)


@triton.jit(do_not_specialize=["n"])
def single(mask, stride, n, index, count, BLOCK: tl.constexpr):
    compact_all(mask, stride, n, index, count, 0, BLOCK)


@triton.jit(do_not_specialize=["n"])
def count_blocks(mask, stride, n, counts, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(counts + block, tl.sum((tl.load(mask + i * stride, i < n, 0) != 0).to(tl.int32), 0))


@triton.jit(do_not_specialize=["n"])
def place_blocks(mask, stride, n, counts, index, count, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    before = tl.zeros((), tl.int64)
    for first in range(0, block, BLOCK):
        at = first + tl.arange(0, BLOCK)
        before += tl.sum(tl.load(counts + at, at < block, 0).to(tl.int64), 0)
    kept = compact_block(mask, stride, block.to(tl.int64) * BLOCK, before, n, index, 0, BLOCK)
    if block == tl.num_programs(0) - 1:
        tl.store(count, before + kept)


def scratch(n, tuning):
    """Return how many int32 of scratch memory `compact` wants."""
    return 0 if n <= tuning.compact_single else ceil_div(n, tuning.compact_block)


def compact(mask, index, count, counts, tuning):
    """Order the rows by `mask` (uint8 [B], any stride) into index int64 [B] and count int64 []; `counts` int32 [scratch].

    One launch, two above `compact_single` rows.
    """
    n, stride, block = mask.shape[0], mask.stride(0), tuning.compact_block
    if n <= tuning.compact_single:
        launch(single, (1,), mask, stride, n, index, count, BLOCK=block, num_warps=8)
        return
    blocks = ceil_div(n, block)
    launch(count_blocks, (blocks,), mask, stride, n, counts, BLOCK=block, num_warps=8)
    launch(place_blocks, (blocks,), mask, stride, n, counts, index, count, BLOCK=block, num_warps=8)

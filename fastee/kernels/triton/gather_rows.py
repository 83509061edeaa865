"""gather_rows and scatter_rows: rows move as words as wide as their addresses allow. A row outside of the tensor is left alone."""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import ceil_div, launch, power_of_two


@triton.jit
def gather_kernel(x, x_rows, x_row, words, index, out, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(index + row)
    if (source >= 0) & (source < x_rows):
        tl.store(out + row * words + i, tl.load(x + source * x_row + i, i < words), i < words)


@triton.jit
def winner_kernel(index, out_rows, winner):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(index + row)
    if (target >= 0) & (target < out_rows):
        tl.atomic_max(winner + target, row)


@triton.jit
def scatter_kernel(rows, rows_row, words, index, winner, out, out_rows, out_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(index + row)
    if (target >= 0) & (target < out_rows):
        if tl.load(winner + target) == row:
            tl.store(out + target * out_row + i, tl.load(rows + row * rows_row + i, i < words), i < words)


def _tile(words, width, tuning):
    return min(power_of_two(words), max(1, tuning.copy_bytes // width))


def gather_rows(x, words, index, out, tuning):
    """Copy rows `index` int64 [N] of x to `out`; both are seen as integers, `words` to a row, contiguous but for x's row stride."""
    block = _tile(words, x.element_size(), tuning)
    launch(gather_kernel, (index.shape[0], ceil_div(words, block)), x, x.shape[0], x.stride(0), words, index, out, BLOCK=block, num_warps=4)


def scatter_rows(out, words, index, rows, winner, tuning):
    """Copy `rows` to rows `index` of `out`, the last of those with one index; `winner` is scratch int64 [B] of -1. Two launches."""
    block = _tile(words, out.element_size(), tuning)
    launch(winner_kernel, (index.shape[0],), index, out.shape[0], winner, num_warps=1)
    launch(
        scatter_kernel, (index.shape[0], ceil_div(words, block)),
        rows, rows.stride(0), words, index, winner, out, out.shape[0], out.stride(0),
        BLOCK=block, num_warps=4,
    )  # fmt: skip

"""row_stats: label, probability, margin, entropy and lse of logits that lie in memory."""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import ceil_div, launch, power_of_two
from ._state import INF, condense, finish, load_merged, store_state


@triton.jit(do_not_specialize=["rows"])
def row_stats_kernel(
    logits, stride, rows, classes, temperature, label, stats, state, args,
    SECOND: tl.constexpr, TILES: tl.constexpr, BB: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    live = row < rows
    tile = tl.program_id(1)
    column = tile * BV + tl.arange(0, BV)
    known = live[:, None] & (column < classes)[None, :]
    z = tl.load(logits + row[:, None] * stride + column[None, :], known, -INF).to(tl.float32) / temperature
    top, arg, second, s, t, s2, t2 = condense(z, column, SECOND)
    if TILES > 1:
        size = rows.to(tl.int64) * tl.num_programs(1)
        store_state(state, args, tile.to(tl.int64) * rows + row, size, live, top, arg, second, s, t, s2, t2, SECOND)
    else:
        finish(row, live, rows, top, arg, second, s, t, s2, t2, temperature, 0.0, label, stats, None, None, 0, SECOND)


@triton.jit(do_not_specialize=["rows"])
def merge_kernel(rows, tiles, temperature, label, stats, state, args, SECOND: tl.constexpr, TILES: tl.constexpr):
    """One program merges the states of one row."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    live = row < rows
    top, arg, second, s, t, s2, t2 = load_merged(state, args, row, live, rows, rows.to(tl.int64) * tiles, tiles, TILES, SECOND)
    finish(row, live, rows, top, arg, second, s, t, s2, t2, temperature, 0.0, label, stats, None, None, 0, SECOND)


def tiles(classes, tuning):
    """Return how many tiles a row of logits has: one state each, merged by a second launch when there are several."""
    return ceil_div(classes, tuning.state_columns)


def row_stats(logits, temperature, second, label, stats, state, args, tuning):
    """Write label int64 [B] and stats fp32 [4 or 5, B] of logits [B, C]; scratch: state fp32 [4 or 6, tiles, B], args int32 [tiles, B]."""
    rows, classes = logits.shape
    count = tiles(classes, tuning)
    columns = power_of_two(min(classes, tuning.state_columns))
    block = max(1, 1024 // columns)
    launch(
        row_stats_kernel, (ceil_div(rows, block), count), logits, logits.stride(0), rows, classes, temperature, label, stats, state, args,
        SECOND=second, TILES=count, BB=block, BV=columns, num_warps=8 if columns >= 4096 else 4,
    )  # fmt: skip
    if count > 1:
        launch(
            merge_kernel, (rows,), rows, count, temperature, label, stats, state, args,
            SECOND=second, TILES=power_of_two(count), num_warps=4,
        )  # fmt: skip

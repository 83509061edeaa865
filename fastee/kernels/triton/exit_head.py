"""exit_head: pool, norm, linear, statistics and rule, the logits condensed as they are made; with an index also the order of survivors.

Up to `Tuning.row_classes` classes a program takes one row, pools it and multiplies without tensor cores. More classes go to tiles of
rows x classes on the tensor cores. Whoever finishes last merges: with more than `merge_tiles` tiles the last of every group of them its
group, and the last of those the groups, so that no program merges much. A pooled activation that every tile would have to pool again is
pooled by a launch of its own.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import INTERPRETED
from ._launch import ceil_div, launch, power_of_two
from ._state import INF, condense, finish, load_merged, store_state
from .compact import compact_all
from .pool import inner_tile, load_features, pool

FMA, NARROW, WIDE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # how products are made: without tensor cores, in x's type, in fp32


@triton.jit
def normalized(f, d, features, shift, scale, norm_weight, norm_bias, NORM: tl.constexpr):
    """Return fp32 features [R, N] at `d` after the norm whose `shift` and `scale` [R] are known."""
    f = f.to(tl.float32)
    if NORM == 1:
        f -= shift[:, None]
    if NORM == 1 or NORM == 2:
        f *= scale[:, None]
    if norm_weight is not None:
        f *= tl.load(norm_weight + d, d < features, 0.0).to(tl.float32)[None, :]
    if norm_bias is not None:
        f += tl.load(norm_bias + d, d < features, 0.0).to(tl.float32)[None, :]
    return f


@triton.jit
def last_of(ticket, total):
    """Return whether this program is the last of `total` that come here; what the others wrote before is then visible. Resets `ticket`.

    Nobody waits: each program takes a number and leaves, and the one with the last number does the work that is left.
    """
    tl.debug_barrier()  # every thread's stores come before the one thread that takes the number
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == total - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit(do_not_specialize=["rows"])
def head_kernel(
    x, mask, rows, features, x_row, x_feature, inner, x_inner, norm_weight, norm_bias, eps, weight, weight_row, weight_scale, bias, classes,
    temperature, threshold, label, stats, confidence, exits, logits, index, count, state, args, tickets,
    POOL: tl.constexpr, NORM: tl.constexpr, HOW: tl.constexpr, PRECISION: tl.constexpr, MEASURE: tl.constexpr, SECOND: tl.constexpr,
    BULK: tl.constexpr, TILES: tl.constexpr, GROUP: tl.constexpr,
    BB: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, BI: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (i, j) makes the states of rows [i BB, ...) over classes [j BV, ...). GROUP tiles merge first, or all."""
    row = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    live = row < rows
    tile = tl.program_id(1)
    column = tile * BV + tl.arange(0, BV)
    known = column < classes
    wrow = column.to(tl.int64) * weight_row

    shift, scale = tl.zeros((BB,), tl.float32), tl.zeros((BB,), tl.float32)
    if NORM == 1:
        for first in range(0, features, BD):
            d = first + tl.arange(0, BD)
            shift += tl.sum(load_features(x, mask, row, d, live, features, x_row, x_feature, inner, x_inner, POOL, BI).to(tl.float32), 1)
        shift /= features
    if NORM == 1 or NORM == 2:
        for first in range(0, features, BD):  # the variance takes a second pass: one pass loses digits when the mean is large
            d = first + tl.arange(0, BD)
            f = load_features(x, mask, row, d, live, features, x_row, x_feature, inner, x_inner, POOL, BI).to(tl.float32)
            f = tl.where((d < features)[None, :], f - shift[:, None], 0.0)
            scale += tl.sum(f * f, 1)
        scale = 1.0 / tl.sqrt(scale / features + eps)

    if HOW == FMA:
        products = tl.zeros((BV, BD), tl.float32)  # summed over the lanes of a tile once, at the end
        for first in range(0, features, BD):
            d = first + tl.arange(0, BD)
            f = load_features(x, mask, row, d, live, features, x_row, x_feature, inner, x_inner, POOL, BI)
            f = normalized(f, d, features, shift, scale, norm_weight, norm_bias, NORM)
            w = tl.load(weight + wrow[:, None] + d[None, :], known[:, None] & (d < features)[None, :], 0.0)
            products += f * w.to(tl.float32)
        z = tl.sum(products, 1)[None, :]
    else:
        z = tl.zeros((BB, BV), tl.float32)
        for first in range(0, features, BD):
            d = first + tl.arange(0, BD)
            if BULK:  # x and weight are tensor descriptors; what lies outside of them is 0
                f = x.load([tl.program_id(0) * BB, first])
                w = weight.load([tile * BV, first])
            else:
                f = load_features(x, mask, row, d, live, features, x_row, x_feature, inner, x_inner, POOL, BI)
                w = tl.load(weight + wrow[:, None] + d[None, :], known[:, None] & (d < features)[None, :], 0.0)
            if HOW == NARROW:
                z = tl.dot(f, tl.trans(w.to(f.dtype)), z)
            else:
                f = normalized(f, d, features, shift, scale, norm_weight, norm_bias, NORM)
                z = tl.dot(f, tl.trans(w.to(tl.float32)), z, input_precision=PRECISION)
    if weight_scale is not None:
        z *= tl.load(weight_scale + column, known, 0.0)[None, :]
    if bias is not None:
        z += tl.load(bias + column, known, 0.0).to(tl.float32)[None, :]
    if logits is not None:
        tl.store(logits + row[:, None] * classes + column[None, :], z, live[:, None] & known[None, :])

    z = tl.where(known[None, :], z / temperature, -INF)
    top, arg, second, s, t, s2, t2 = condense(z, column, SECOND)
    done = True
    if TILES > 1:
        tiles = tl.num_programs(1)
        groups = (tiles + GROUP - 1) // GROUP if TILES > GROUP else 0  # their states stand behind those of the tiles
        size = rows.to(tl.int64) * (tiles + groups)
        store_state(state, args, tile.to(tl.int64) * rows + row, size, live, top, arg, second, s, t, s2, t2, SECOND)
        group = tile // GROUP
        first = group * GROUP
        inside = tl.minimum(tiles - first, GROUP)
        own = tickets + 1 + tl.program_id(0) * (groups + 1)
        done = last_of(own + group, inside)
        if done:
            at = first.to(tl.int64) * rows
            top, arg, second, s, t, s2, t2 = load_merged(state + at, args + at, row, live, rows, size, inside, GROUP, SECOND)
            if TILES > GROUP:
                at = tiles.to(tl.int64) * rows
                store_state(state, args, at + group.to(tl.int64) * rows + row, size, live, top, arg, second, s, t, s2, t2, SECOND)
                done = last_of(own + groups, groups)
                if done:
                    top, arg, second, s, t, s2, t2 = load_merged(
                        state + at, args + at, row, live, rows, size, groups, TILES // GROUP, SECOND
                    )
    if done:
        finish(row, live, rows, top, arg, second, s, t, s2, t2, temperature, threshold, label, stats, confidence, exits, MEASURE, SECOND)
        if index is not None:
            if last_of(tickets, tl.num_programs(0)):
                compact_all(exits, 1, rows, index, count, 1, BLOCK)


class Head(NamedTuple):
    """What a head reads. x and `shape` as in `pool`; norm: kind (0 none, 1 layer, 2 rms, 3 affine), weight, bias, eps; weight [C, D]."""

    x: Any
    shape: tuple[int, ...]
    mask: Any  # uint8 [B, inner] or None
    norm: tuple[int, Any, Any, float]
    weight: Any
    weight_scale: Any  # fp32 [C] for int8 weights
    bias: Any
    temperature: float


class Out(NamedTuple):
    """Where a head writes: label int64 [B], stats fp32 [4 or 5, B], and what is wanted of the rest."""

    label: Any
    stats: Any
    confidence: Any = None  # fp32 [B]
    exits: Any = None  # uint8 [B]
    logits: Any = None  # fp32 [B, C]
    index: Any = None  # int64 [B]
    count: Any = None  # int64 []


class Scratch(NamedTuple):
    """Memory of the sizes that `Plan.scratch` gives."""

    state: Any
    args: Any
    tickets: Any
    features: Any


class Plan(NamedTuple):
    """How one head is run, whatever the number of rows."""

    how: int
    pool_first: bool
    BB: int
    BV: int
    BD: int
    tiles: int
    group: int  # tiles that are merged at once
    warps: int
    stages: int
    bulk: bool  # operands may come by bulk copies, where their addresses allow

    def scratch(self, rows: int, features: int, second: bool) -> tuple[int, int, int, int]:
        """Return how much scratch is wanted: fp32 states, int32 class numbers, int32 tickets (zero before and after), fp32 features."""
        groups = ceil_div(self.tiles, self.group) if self.tiles > self.group else 0
        states = rows * (self.tiles + groups) if self.tiles > 1 else 0
        return (6 if second else 4) * states, states, 1 + ceil_div(rows, self.BB) * (1 + groups), rows * features if self.pool_first else 0

    def launches(self) -> int:
        """Return how many launches a head takes."""
        return 1 + self.pool_first


def plan(head: Head, tuning) -> Plan:
    """Choose tiles from the shapes and types of one row."""
    _, features, inner, *_ = head.shape
    classes, item = head.weight.shape[0], head.x.element_size()
    pooled, norm = inner > 1 or head.mask is not None, head.norm[0]
    if classes <= tuning.row_classes:
        tile = power_of_two(classes)
        depth = min(power_of_two(features), max(16, tuning.row_elements // tile))
        if pooled:
            depth = min(depth, max(16, 4096 // inner_tile(inner, head.shape[-1])))
        return Plan(FMA.value, False, 1, tile, depth, 1, 1, tuning.row_warps, 2, False)
    wide = classes > tuning.wide_classes
    rows, columns = tuning.tile_rows, tuning.vocabulary_classes if wide else tuning.tile_classes
    first = pooled and (norm != 0 or rows * features * inner * item > tuning.pooled_bytes)
    # Products of bf16, fp16 and int8 are exact in the tensor cores; anything else is multiplied in fp32.
    narrow = not pooled and norm == 0 and item == 2 and (head.weight_scale is not None or head.weight.dtype == head.x.dtype)
    depth = tuning.vocabulary_features if wide else tuning.tile_features
    if wide and not narrow:
        columns //= 2  # fp32 operands in three parts: 256 columns spilled registers
    tiles = ceil_div(classes, columns)
    group = power_of_two(tiles if tiles <= tuning.merge_tiles else math.isqrt(tiles - 1) + 1)
    return Plan(
        NARROW.value if narrow else WIDE.value, first, rows, columns, depth if narrow else depth // 2, tiles, group,
        tuning.vocabulary_warps if wide else tuning.tile_warps, tuning.vocabulary_stages if wide else tuning.tile_stages,
        tuning.bulk_copies and wide and narrow,
    )  # fmt: skip


def described(t, rows: int, features: int, row_stride: int, block: list[int]):
    """Return a descriptor of t as [rows, features] for bulk copies of `block`, None where 16 bytes do not divide its address or rows."""
    if rows == 0 or t.data_ptr() % 16 or row_stride * t.element_size() % 16:
        return None
    return TensorDescriptor(t, [rows, features], [row_stride, 1], block)


def exit_head(head: Head, how: Plan, measure: int, threshold: float, second: bool, out: Out, scratch: Scratch, tuning) -> None:
    """Run a head and its rule; `measure` 0 max_prob, 1 margin, 2 -entropy, 3 temperature * lse."""
    x, shape, mask, (kind, norm_weight, norm_bias, eps), weight, weight_scale, bias, temperature = head
    if how.pool_first:
        pool(x, shape, mask, scratch.features)
        x, mask, shape = scratch.features, None, (shape[0], shape[1], 1, shape[1], 1, 1)
    rows, features, inner, x_row, x_feature, x_inner = shape
    operands, bulk = (x, weight), None
    if how.bulk and x_feature == 1:
        bulk = described(x, rows, features, x_row, [how.BB, how.BD]), described(weight, *weight.shape, weight.stride(0), [how.BV, how.BD])
    if bulk and None not in bulk:
        operands = bulk
    # The interpreter multiplies the bit patterns of bf16 (triton-lang/triton#11584).
    product, precision = (WIDE.value if how.how == NARROW.value else how.how, "ieee") if INTERPRETED else (how.how, "tf32x3")
    launch(
        head_kernel, (ceil_div(rows, how.BB), how.tiles), operands[0], mask, rows, features, x_row, x_feature, inner, x_inner,
        norm_weight, norm_bias, eps, operands[1], weight.stride(0), weight_scale, bias, weight.shape[0], temperature, threshold,
        out.label, out.stats, out.confidence, out.exits, out.logits, out.index, out.count, scratch.state, scratch.args, scratch.tickets,
        POOL=inner > 1 or mask is not None, NORM=kind, HOW=product, PRECISION=precision, MEASURE=measure, SECOND=second,
        BULK=operands is bulk,
        TILES=max(how.group, power_of_two(how.tiles)), GROUP=how.group, BB=how.BB, BV=how.BV, BD=how.BD,
        BI=inner_tile(inner, x_inner) if how.how == FMA.value else 1,  # 64 rows at once fill the registers
        BLOCK=tuning.step_block, num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip

"""The confidence state of a set of logits: top, its index, runner-up, s = sum e^u, t = sum u e^u with u = z - top; s2, t2 the same of e^2u.

An empty set has top -inf and s 0. NaN and +inf make s NaN and stay NaN through every merge.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(2147483647)  # the index of an empty set
INF = tl.constexpr(float("inf"))


@triton.jit
def condense(z, column, SECOND: tl.constexpr):
    """Return the states of z [R, N], whose columns have the class numbers `column` [N]; -inf stands for no class."""
    top = tl.max(z, 1)
    arg = tl.min(tl.where(z == top[:, None], column[None, :], NONE), 1)
    second = tl.max(tl.where(column[None, :] == arg[:, None], -INF, z), 1)
    u = z - tl.where(top == -INF, 0.0, top)[:, None]
    e = tl.exp(u)
    ue = tl.where(e > 0, u * e, 0.0)  # not -inf * 0
    s, t = tl.sum(e, 1), tl.sum(ue, 1)
    s2, t2 = s, t
    if SECOND:
        s2, t2 = tl.sum(e * e, 1), tl.sum(ue * e, 1)
    return top, arg, second, s, t, s2, t2


@triton.jit
def merge(top, arg, second, s, t, s2, t2, SECOND: tl.constexpr):
    """Return the states of the unions along axis 1 of states [R, N]; the order of N is the order of the sums."""
    best = tl.max(top, 1)
    winner = tl.min(tl.where(top == best[:, None], arg, NONE), 1)
    runner = tl.max(tl.where(arg == winner[:, None], second, top), 1)
    d = top - tl.where(best == -INF, 0.0, best)[:, None]
    f = tl.exp(d)
    empty = s == 0.0
    sums = tl.sum(tl.where(empty, 0.0, f * s), 1)
    moments = tl.sum(tl.where(empty | (f == 0.0), 0.0, f * (t + d * s)), 1)
    sums2, moments2 = sums, moments
    if SECOND:
        sums2 = tl.sum(tl.where(empty, 0.0, f * f * s2), 1)
        moments2 = tl.sum(tl.where(empty | (f == 0.0), 0.0, f * f * (t2 + d * s2)), 1)
    return best, winner, runner, sums, moments, sums2, moments2


@triton.jit
def join(top, arg, second, s, t, top_b, arg_b, second_b, s_b, t_b):
    """Return the union of two states [R] (five numbers); the classes of the first come first."""
    best = tl.maximum(top, top_b)
    winner = tl.where(top_b > top, arg_b, arg)
    runner = tl.maximum(tl.minimum(top, top_b), tl.maximum(second, second_b))
    base = tl.where(best == -INF, 0.0, best)
    d, d_b = top - base, top_b - base
    f, f_b = tl.exp(d), tl.exp(d_b)
    sums = tl.where(s == 0.0, 0.0, f * s) + tl.where(s_b == 0.0, 0.0, f_b * s_b)
    moments = tl.where((s == 0.0) | (f == 0.0), 0.0, f * (t + d * s)) + tl.where((s_b == 0.0) | (f_b == 0.0), 0.0, f_b * (t_b + d_b * s_b))
    return best, winner, runner, sums, moments


@triton.jit
def store_state(state, args, at, size, live, top, arg, second, s, t, s2, t2, SECOND: tl.constexpr):
    """Write states [R] to planes of `size` floats and to `args`."""
    tl.store(args + at, arg, live)
    tl.store(state + at, top, live)
    tl.store(state + size + at, second, live)
    tl.store(state + 2 * size + at, s, live)
    tl.store(state + 3 * size + at, t, live)
    if SECOND:
        tl.store(state + 4 * size + at, s2, live)
        tl.store(state + 5 * size + at, t2, live)


@triton.jit
def load_merged(state, args, row, live, rows, size, tiles, TILES: tl.constexpr, SECOND: tl.constexpr):
    """Return the merged states [R] of `row` [R], whose tiles lie `rows` apart. Past L1: another program may have made them."""
    tile = tl.arange(0, TILES)
    at = row[:, None] + tile[None, :].to(tl.int64) * rows
    here = live[:, None] & (tile < tiles)[None, :]
    arg = tl.load(args + at, here, NONE, cache_modifier=".cg")
    top = tl.load(state + at, here, -INF, cache_modifier=".cg")
    second = tl.load(state + size + at, here, -INF, cache_modifier=".cg")
    s = tl.load(state + 2 * size + at, here, 0.0, cache_modifier=".cg")
    t = tl.load(state + 3 * size + at, here, 0.0, cache_modifier=".cg")
    s2, t2 = s, t
    if SECOND:
        s2 = tl.load(state + 4 * size + at, here, 0.0, cache_modifier=".cg")
        t2 = tl.load(state + 5 * size + at, here, 0.0, cache_modifier=".cg")
    return merge(top, arg, second, s, t, s2, t2, SECOND)


@triton.jit
def entropy_of(top, s, t):
    """Return the entropy in nats, NaN for an invalid row: a NaN or +inf among its logits, or all -inf."""
    return tl.where((s > 0) & (top < INF), tl.log(s) - t / s, float("nan"))


@triton.jit
def finish(
    row, live, rows, top, arg, second, s, t, s2, t2, temperature, threshold, label, stats, confidence, exits,
    MEASURE: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """Write label, statistics [4 or 5 planes of `rows`] and, where there is a rule, score and exit flag of `row` [R]."""
    good = (s > 0) & (top < INF)
    nan = float("nan")
    log_s = tl.log(s)
    max_prob = tl.where(good, 1.0 / s, nan)
    margin = tl.where(good, (1.0 - tl.exp(second - top)) / s, nan)
    entropy = tl.where(good, log_s - t / s, nan)
    lse = tl.where(good, top + log_s, nan)
    tl.store(label + row, tl.where(good, arg, -1).to(tl.int64), live)
    tl.store(stats + row, max_prob, live)
    tl.store(stats + rows + row, margin, live)
    tl.store(stats + 2 * rows + row, entropy, live)
    tl.store(stats + 3 * rows + row, lse, live)
    if SECOND:
        tl.store(stats + 4 * rows + row, tl.where(good, tl.log(s2) - 2 * t2 / s2, nan), live)
    if confidence is not None:
        score = max_prob
        if MEASURE == 1:
            score = margin
        if MEASURE == 2:
            score = -entropy
        if MEASURE == 3:
            score = lse * temperature
        tl.store(confidence + row, score, live)
        tl.store(exits + row, ((score >= threshold) & (threshold != INF)).to(tl.uint8), live)  # NaN compares false: it never exits

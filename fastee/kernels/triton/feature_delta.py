"""feature_delta: |a/|a| - b/|b|| per row as the definition says it, without the cancellation of sqrt(2 - 2 cos)."""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import launch, power_of_two


@triton.jit
def feature_delta_kernel(a, b, a_row, b_row, size, out, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    a += row * a_row
    b += row * b_row
    aa, bb, dd = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        u, v = tl.load(a + i, i < size, 0.0).to(tl.float32), tl.load(b + i, i < size, 0.0).to(tl.float32)
        aa += u * u
        bb += v * v
    u_norm, v_norm = tl.sqrt_rn(tl.sum(aa, 0)), tl.sqrt_rn(tl.sum(bb, 0))
    for first in range(0, size, BLOCK):  # the second reading comes from a cache
        i = first + tl.arange(0, BLOCK)
        u, v = tl.load(a + i, i < size, 0.0).to(tl.float32), tl.load(b + i, i < size, 0.0).to(tl.float32)
        d = tl.div_rn(u, u_norm) - tl.div_rn(v, v_norm)
        dd += tl.where(i < size, d * d, 0.0)
    delta = tl.sqrt_rn(tl.sum(dd, 0))
    delta = tl.where(u_norm * v_norm == float("inf"), float("nan"), delta)  # |a|^2 or |b|^2 beyond fp32: no answer
    tl.store(out + row, tl.where((u_norm == 0) | (v_norm == 0), float("inf"), delta))  # a zero feature has no direction


def feature_delta(a, b, size, out):
    """Write the delta of a and b [B, ...], whose rows of `size` elements are contiguous, to out fp32 [B]."""
    launch(feature_delta_kernel, (a.shape[0],), a, b, a.stride(0), b.stride(0), size, out, BLOCK=min(power_of_two(size), 4096), num_warps=8)

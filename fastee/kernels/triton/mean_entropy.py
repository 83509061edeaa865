"""mean_entropy: the entropy of each frame, then the mean over the real ones."""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import launch, power_of_two
from ._state import INF, NONE, condense, entropy_of, join


@triton.jit
def frames_kernel(logits, stride, frames, classes, mask, temperature, out, BV: tl.constexpr):
    row, frame = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = logits + row * stride + frame.to(tl.int64) * classes
    wanted = True
    if mask is not None:
        wanted = tl.load(mask + row * frames + frame) != 0
    top, arg = tl.full((1,), -INF, tl.float32), tl.full((1,), NONE, tl.int32)
    second, s, t = tl.full((1,), -INF, tl.float32), tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
    if wanted:
        for first in range(0, classes, BV):
            column = first + tl.arange(0, BV)
            z = tl.load(at + column, column < classes, -INF).to(tl.float32) / temperature
            a, b, c, d, e, _, _ = condense(z[None, :], column, False)
            top, arg, second, s, t = join(top, arg, second, s, t, a, b, c, d, e)
    tl.store(out + row * frames + frame + tl.arange(0, 1), entropy_of(top, s, t))


@triton.jit
def mean_kernel(entropy, frames, mask, out, BT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total, found = tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32)
    for first in range(0, frames, BT):
        t = first + tl.arange(0, BT)
        keep = t < frames
        if mask is not None:
            keep = keep & (tl.load(mask + row * frames + t, keep, 0) != 0)
        total += tl.load(entropy + row * frames + t, keep, 0.0)
        found += keep.to(tl.float32)
    tl.store(out + row, tl.sum(total, 0) / tl.sum(found, 0))  # no frame: 0 / 0 = NaN, never exits


def mean_entropy(logits, mask, temperature, entropy, out):
    """Write the mean entropy of logits [B, T, C] to out fp32 [B]; `entropy` is scratch fp32 [B, T]. Two launches."""
    rows, frames, classes = logits.shape
    columns = min(power_of_two(classes), 4096)
    launch(
        frames_kernel, (rows, frames), logits, logits.stride(0), frames, classes, mask, temperature, entropy, BV=columns,
        num_warps=max(1, min(8, columns // 256)),
    )  # fmt: skip
    launch(mean_kernel, (rows,), entropy, frames, mask, out, BT=min(power_of_two(frames), 1024), num_warps=4)

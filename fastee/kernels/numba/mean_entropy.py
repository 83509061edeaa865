"""mean_entropy: the entropies of a row's real frames, averaged; one frame's exponentials are all that is kept."""

from __future__ import annotations

import numpy as np

from ._jit import kernel
from ._rows import ZERO, f4
from .row_stats import row_stats_into


@kernel("void(f4[::1], i8, i8, i8, i8, u1[::1], f4, f4[::1])")
def mean_entropy(logits, rows, frames, classes, row_stride, mask, temperature, out):
    e, ue, stats = np.empty(classes, f4), np.empty(classes, f4), np.empty(4, f4)
    for b in range(rows):
        kept, s = 0, ZERO
        for i in range(frames):
            if mask.size == 0 or mask[b * frames + i] != 0:
                kept += 1
                at = b * row_stride + i * classes
                row_stats_into(logits[at : at + classes], temperature, e, ue, stats, 0, 1, False)
                s += stats[2]
        out[b] = s / f4(kept)  # no frame: 0 / 0 = NaN, never exits


COMPILED = True

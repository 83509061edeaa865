"""Temperature scaling (arXiv 1706.04599) and how far a confidence is from the accuracy it promises."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

LIMIT = math.log(100.0)
_GOLDEN = (math.sqrt(5.0) - 1) / 2


def temperature(logits: Any, y: Any) -> float:
    """Return the temperature in [0.01, 100] that minimises the cross-entropy of logits [N, C] / temperature against labels y [N].

    The loss is convex in 1/temperature, so a golden-section search over its logarithm finds the minimum. Rows with a logit that is not finite are left out;
    raises ``ValueError`` when none is left.

    >>> import numpy as np
    >>> z = np.tile([[2.0, 0.0]], (100, 1))                     # says 0.88 for class 0
    >>> t = temperature(z, np.arange(100) % 4 == 0)             # and is right 75 times of 100
    >>> round(float(1 / (1 + np.exp(-2 / t))), 3)
    0.75
    """
    z, truth = np.asarray(logits, dtype=np.float64), np.asarray(y).astype(np.int64)
    if z.ndim != 2 or truth.shape != z.shape[:1]:
        raise ValueError(f"logits: expected [N, C] with labels [N], got {list(z.shape)} and {list(truth.shape)}")
    keep = np.isfinite(z).all(axis=1)
    z, truth = z[keep], truth[keep]
    if not len(z):
        raise ValueError("logits: expected at least one row of finite logits")
    if truth.min() < 0 or truth.max() >= z.shape[1]:
        raise ValueError(f"y: expected labels in 0..{z.shape[1] - 1}, got {truth.min()}..{truth.max()}")
    z = z - z.max(axis=1, keepdims=True)
    own = z[np.arange(len(z)), truth]

    def loss(log_t: float) -> float:
        scale = math.exp(-log_t)
        return float((np.log(np.exp(z * scale).sum(axis=1)) - own * scale).mean())

    low, high = -LIMIT, LIMIT
    a, b = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    fa, fb = loss(a), loss(b)
    while high - low > 1e-4:
        if fa <= fb:
            high, b, fb = b, a, fa
            a = high - _GOLDEN * (high - low)
            fa = loss(a)
        else:
            low, a, fa = a, b, fb
            b = low + _GOLDEN * (high - low)
            fb = loss(b)
    return math.exp((low + high) / 2)


def reliability(confidence: Any, correct: Any, bins: int = 15) -> tuple[list[tuple[float, float, int]], float]:
    """Return per bin of equal width (mean confidence, accuracy, rows) and the expected calibration error; NaN confidences are left out.

    >>> reliability([0.9, 0.9, 0.1], [1, 0, 0], bins=2)
    ([(0.1, 0.0, 1), (0.9, 0.5, 2)], 0.3)
    """
    u, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    keep = ~np.isnan(u)
    u, right = u[keep], right[keep]
    place = np.clip((u * bins).astype(int), 0, bins - 1)
    rows = np.bincount(place, minlength=bins)
    used = np.flatnonzero(rows)
    mean_u, mean_right = (np.bincount(place, v, bins)[used] / rows[used] for v in (u, right))
    error = float((rows[used] * np.abs(mean_u - mean_right)).sum() / max(1, len(u)))
    return [(float(a), float(b), int(n)) for a, b, n in zip(mean_u, mean_right, rows[used], strict=True)], round(error, 12)

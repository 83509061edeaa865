"""What several kernels share: sums in one fixed order, dot products, exp."""

from __future__ import annotations

import numpy as np

from ._jit import inline

f4, i4 = np.float32, np.int32
ZERO, ONE, INF, NAN = f4(0), f4(1), f4(np.inf), f4(np.nan)

_ROUND = f4(12582912.0)  # 1.5 * 2^23: adding it rounds to the nearest integer, half to even
_LOG2E, _LN2_HIGH, _LN2_LOW = f4(1.44269504088896341), f4(0.693359375), f4(-2.12194440e-4)
_P0, _P1, _P2 = f4(1.9875691500e-4), f4(1.3981999507e-3), f4(8.3334519073e-3)
_P3, _P4, _P5 = f4(4.1665795894e-2), f4(1.6666665459e-1), f4(5.0000001201e-1)
_LOWEST = f4(-87.33)


@inline
def fold(t, n):
    """Sum t[:n] and spoil it: halves are added until one is left. LLVM vectorises these adds without leave to reorder a sum, if
    the halves are slices: over t[i + half] it took 2 to 4 times as long."""
    if n == 0:
        return ZERO
    while n > 1:
        half = (n + 1) // 2
        low, high = t[: n - half], t[half:n]
        for i in range(high.size):
            low[i] += high[i]
        n = half
    return t[0]


@inline
def total(x, t):
    """Sum x, as `fold` does, in scratch of half its length."""
    half = (x.size + 1) // 2
    m = x.size - half
    low, high = x[:m], x[half:]
    for i in range(m):
        t[i] = low[i] + high[i]
    if m < half:
        t[m] = x[m]
    return fold(t, half)


@inline
def dot(x, w, t):
    """Return x . w; t is scratch of half their length. The order depends on the length alone, so a row's logits do not depend on its batch."""
    n = x.size
    half = (n + 1) // 2
    m = n - half
    low_x, high_x, low_w, high_w = x[:m], x[half:n], w[:m], w[half:n]
    for i in range(m):
        t[i] = low_x[i] * low_w[i] + high_x[i] * high_w[i]
    if m < half:
        t[m] = x[m] * w[m]
    return fold(t, half)


@inline
def exp_negative(u):
    """Return e^u for u <= 0 within 3 units in the last place, 0 below -87.33: plain arithmetic, which LLVM vectorises, unlike libm's."""
    k = (u * _LOG2E + _ROUND) - _ROUND
    r = (u - k * _LN2_HIGH) - k * _LN2_LOW
    p = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
    power = i4((i4(max(k, f4(-126.0))) + i4(127)) << i4(23)).view(f4)
    return ((r * r * p + r) + ONE) * power if u > _LOWEST else ZERO

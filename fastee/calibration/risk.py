"""Tests of "the true drop is larger than allowed", valid for any sample size, what they bound, and how many samples they need."""

from __future__ import annotations

import math

import numpy as np

NUISANCE = 0.1  # of the level, spent on not knowing how many rows are lost or gained
OUTSIDE = 1e-10  # probability left out of an exact distribution; less than what is added to each p-value


def binomial_tail(successes: np.ndarray, n: int, p: float) -> np.ndarray:
    """Return P(Bin(n, p) <= k) for each k in `successes`, from exact log masses."""
    top = int(successes.max(initial=0))
    j = np.arange(top + 1)
    log_factorial = np.array([math.lgamma(i + 1.0) for i in range(top + 1)])
    falling = math.lgamma(n + 1.0) - np.array([math.lgamma(n - i + 1.0) for i in range(top + 1)])
    log_mass = falling - log_factorial + j * math.log(p) + (n - j) * math.log1p(-p)
    return np.minimum(1.0, np.cumsum(np.exp(log_mass)))[successes]


def chernoff_upper(share: float, n: int, level: float) -> float:
    """Return what a binomial rate stays under with probability 1 - `level` when `share` of n trials succeeded: n KL(share || rate) = ln(1/level)."""
    low, high, goal = share, 1.0, math.log(1 / level) / n
    for _ in range(40):
        rate = (low + high) / 2
        kl = (share * math.log(share / rate) if share else 0.0) + ((1 - share) * math.log((1 - share) / (1 - rate)) if share < 1 else 0.0)
        low, high = (rate, high) if kl < goal else (low, rate)
    return high


def trinomial_p(loss: np.ndarray, limit: float, level: float) -> np.ndarray:
    """Return one p-value per column of loss [n, J] in {-1, 0, 1} for "its mean is >= limit", for any n (Berger and Boos, JASA 1994).

    Given the rate d of rows with loss +1 or -1, the sum of losses has an exact distribution at the mean `limit`. d is not known, but
    exceeds `chernoff_upper` of the rate seen with probability `level` / 10 at most; so the p-value is the largest tail over all d up to there (on a grid of
    24, one point beyond; that the tail grows with d was seen, not proved) plus level / 10. `level`: at which it will be compared, fixed before the losses are seen.
    """
    n = len(loss)
    if n == 0:
        return np.ones(loss.shape[1])
    total, moved = loss.sum(axis=0), np.abs(loss).sum(axis=0)
    upper = np.array([max(limit, chernoff_upper(k / n, n, NUISANCE * level)) for k in moved])
    grid = np.geomspace(limit, upper.max() * (1 + 1e-12), 24) if upper.max() > limit else np.array([limit])
    # Bernstein: less than OUTSIDE of the sum lies further than `reach` from its mean, so the transform need not span all of -n..n.
    far = -4 / 3 * math.log(OUTSIDE / 2)
    reach = (far + math.sqrt(far * far + 6 * far * n * grid[-1])) / 2
    size = 1 << math.ceil(2 * reach + 2).bit_length()
    low = round(n * limit) - size // 2
    turn = np.exp(-2j * np.pi * np.arange(size // 2 + 1) / size)
    tails = np.empty((len(grid), len(total)))
    for g, d in enumerate(grid):
        plus, minus = (d + limit) / 2, (d - limit) / 2
        mass = np.fft.irfft((plus * turn + (1 - plus - minus) + minus / turn) ** n, size)
        below = np.cumsum(np.roll(mass, -low))  # the sum s stands at s modulo size
        at = total.astype(int) - low
        tails[g] = np.where(at < 0, 0.0, below[np.clip(at, 0, size - 1)])
    allowed = np.searchsorted(grid, upper)[None, :] >= np.arange(len(grid))[:, None]
    return np.minimum(1.0, np.where(allowed, tails, 0.0).max(axis=0) + NUISANCE * level + 1e-9)


def p_values(loss: np.ndarray, limit: float, signed: bool, level: float = 0.05) -> np.ndarray:
    """Return one p-value per column of loss [n, J] for "the true mean is > limit".

    Losses of 0 and 1 are counts: the binomial tail is exact. With ``signed=True`` -1 may occur (an exit that is right where the end is
    wrong) and `trinomial_p` weighs both. `signed` must not be read off the losses, or the level would not hold.
    """
    if not 0 < limit < 1:
        return np.full(loss.shape[1], 1.0 if limit <= 0 else 0.0)
    return trinomial_p(loss, limit, level) if signed else binomial_tail((loss > 0).sum(axis=0), len(loss), limit)


def hoeffding_bentkus_p(loss: np.ndarray, limit: float) -> np.ndarray:
    """Return one p-value per column of loss [n, J] in [0, 1] for "its mean is > limit" (Bates et al., arXiv 2101.02703).

    The smaller of exp(-n KL(min(mean, limit) || limit)) and e P(Bin(n, limit) <= ceil(n mean)).
    """
    n = len(loss)
    if n == 0 or not 0 < limit < 1:
        return np.full(loss.shape[1], 1.0 if limit < 1 else 0.0)
    mean = np.minimum(loss.mean(axis=0), limit)
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = np.where(mean > 0, mean * np.log(mean / limit), 0.0) + (1 - mean) * np.log1p(-mean) - (1 - mean) * math.log1p(-limit)
    bentkus = math.e * binomial_tail(np.ceil(loss.sum(axis=0) - 1e-9).astype(int), n, limit)
    return np.minimum(1.0, np.minimum(np.exp(-n * np.maximum(kl, 0.0)), bentkus))


def conformal_risk(loss: np.ndarray) -> np.ndarray:
    """Return for each column of loss [n, J] in [0, 1], ordered from cautious to bold, a bound on the expected loss of the next row
    (conformal risk control, arXiv 2208.02814): n/(n+1) mean + 1/(n+1) of the losses made monotone along the columns."""
    return (np.maximum.accumulate(loss, axis=1).sum(axis=0) + 1.0) / (len(loss) + 1)


def upper_bound(loss: np.ndarray, level: float, signed: bool) -> float:
    """Return what the mean of loss [n] stays under with probability 1 - `level`: the least limit that `p_values` rejects at `level`."""
    low, high = 0.0, 1.0
    if len(loss) == 0 or p_values(loss[:, None], 1 - 1e-9, signed, level)[0] > level:
        return 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if p_values(loss[:, None], middle, signed, level)[0] > level else (low, middle)
    return high


def samples_needed(limit: float, level: float, signed: bool) -> int:
    """Return how many flawless rows the tests need to reject "the drop is > limit" at `level`."""
    if limit >= 1:
        return 1
    if not signed:
        return math.ceil(math.log(level) / math.log1p(-limit))
    low, high = 1, math.ceil(4 * math.log(level) / math.log1p(-limit))
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if trinomial_p(np.zeros((middle, 1)), limit, level)[0] <= level else (middle + 1, high)
    return low

"""Tests of "the true drop is larger than allowed", valid for any sample size, what they bound, and how many samples they need."""

from __future__ import annotations

import math

import numpy as np


def binomial_tail(successes: np.ndarray, n: int, p: float) -> np.ndarray:
    """Return P(Bin(n, p) <= k) for each k in `successes`, from exact log masses."""
    top = int(successes.max(initial=0))
    j = np.arange(top + 1)
    log_factorial = np.array([math.lgamma(i + 1.0) for i in range(top + 1)])
    falling = math.lgamma(n + 1.0) - np.array([math.lgamma(n - i + 1.0) for i in range(top + 1)])
    log_mass = falling - log_factorial + j * math.log(p) + (n - j) * math.log1p(-p)
    return np.minimum(1.0, np.cumsum(np.exp(log_mass)))[successes]


def betting_p(loss: np.ndarray, limit: float) -> np.ndarray:
    """Return one p-value per column of loss [n, J] in [-1, 1] for "its mean is >= limit".

    The wealth prod(1 - stake_i (loss_i - limit)), stake_i chosen from the rows before i, is a non-negative supermartingale under
    the hypothesis, so 1 / max wealth is a p-value (Ville; Waudby-Smith and Ramdas, arXiv 2010.09686).
    """
    n = len(loss)
    if n == 0:
        return np.ones(loss.shape[1])
    before = np.arange(1, n + 1)[:, None]  # one pseudo-row of mean 0 and variance 1/4 stands before the first
    total = np.cumsum(loss, axis=0) - loss
    mean = total / before
    square = (0.25 + np.cumsum(loss * loss, axis=0) - loss * loss) / before
    variance = np.maximum(square - mean * mean, 1e-12)
    edge = np.maximum(limit - mean, 0.0)
    stake = np.clip(edge / (variance + edge * edge), 0.0, 0.5 / (1.0 - limit))
    wealth = np.cumsum(np.log1p(-stake * (loss - limit)), axis=0)
    return np.minimum(1.0, np.exp(-np.maximum(wealth.max(axis=0), 0.0)))


def p_values(loss: np.ndarray, limit: float, signed: bool) -> np.ndarray:
    """Return one p-value per column of loss [n, J] for "the true mean is > limit".

    Losses of 0 and 1 are counts: the binomial tail is exact. With ``signed=True`` -1 may occur (an exit that is right where the end is
    wrong): then two tests share the level, the binomial tail of the +1s alone and the betting test of the mean. `signed` must not
    be read off the losses, or the level would not hold.
    """
    if not 0 < limit < 1:
        return np.full(loss.shape[1], 1.0 if limit <= 0 else 0.0)
    exact = binomial_tail((loss > 0).sum(axis=0), len(loss), limit)
    if not signed:
        return exact
    return np.minimum(1.0, 2.0 * np.minimum(exact, betting_p(loss, limit)))


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
    if len(loss) == 0 or p_values(loss[:, None], 1 - 1e-9, signed)[0] > level:
        return 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if p_values(loss[:, None], middle, signed)[0] > level else (low, middle)
    return high


def samples_needed(limit: float, level: float, signed: bool) -> int:
    """Return how many flawless rows the tests need to reject "the drop is > limit" at `level`."""
    return 1 if limit >= 1 else math.ceil(math.log(level / (2.0 if signed else 1.0)) / math.log1p(-limit))

"""Tests of "the true drop is larger than allowed", valid for any sample size, and how many samples they need."""

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


def samples_needed(limit: float, level: float, signed: bool) -> int:
    """Return how many flawless rows the tests need to reject "the drop is > limit" at `level`."""
    return 1 if limit >= 1 else math.ceil(math.log(level / (2.0 if signed else 1.0)) / math.log1p(-limit))

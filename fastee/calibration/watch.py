"""Drift watch: a share of the rows that left early is run to the end anyway, and an alarm rings when the two disagree too often."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import numpy as np
import torch

from fastee.nn import EarlyExit, ExitResult

ODDS = np.array([2.0, 4.0, 16.0])  # times the odds of the limit: each bet is the likelihood ratio of such a rate; their wealths are averaged
BLOCK = 32


class DriftTest:
    """A test of "the disagreement rate is at most `limit`" that may be read after every row and forgets no past promise.

    Under that hypothesis the alarm ever rings with probability at most `level`, however long it runs. One bet starts every 32 audits, weighted
    by 1/(j (j + 1)) over starts j, so that a change after a long quiet time is found too (mixture of e-processes; Shin, Ramdas and Rinaldo,
    arXiv 2203.03532). Deterministic.

    >>> import numpy as np
    >>> test = DriftTest(limit=0.02, level=0.01)
    >>> test.observe(np.zeros(500, bool)), test.observe(np.ones(12, bool))
    (False, True)
    """

    def __init__(self, limit: float, level: float = 0.01):
        for name, value in (("limit", limit), ("level", level)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                raise ValueError(f"{name}: expected a number between 0 and 1, got {value!r}")
        self.limit, self.level, self.audits, self.disagreed, self.alarm = limit, level, 0, 0, False
        rate = ODDS * limit / (1 - limit + ODDS * limit)
        self._win, self._lose = (rate / limit).tolist(), ((1 - rate) / (1 - limit)).tolist()
        self._wealth, self._starts = [0.0] * len(ODDS), 0  # per bet, over all starts so far

    @property
    def evidence(self) -> float:
        """The e-value so far: the alarm rings at 1 / level."""
        return sum(self._wealth) / len(self._wealth) + 1.0 / (self._starts + 1)  # the starts that are still to come hold their share

    def observe(self, disagreed: Any) -> bool:
        """Count audited rows [n] (True: exit and end gave different labels) and say whether the alarm has rung."""
        for value in np.atleast_1d(np.asarray(disagreed, dtype=bool)).tolist():
            fresh = 0.0
            if self.audits % BLOCK == 0:
                self._starts += 1
                fresh = 1.0 / (self._starts * (self._starts + 1))
            self.audits += 1
            self.disagreed += value
            self._wealth = [(w + fresh) * pay for w, pay in zip(self._wealth, self._win if value else self._lose, strict=True)]
            self.alarm = self.alarm or self.evidence >= 1.0 / self.level
        return self.alarm


@dataclasses.dataclass
class Audit:
    """``audits`` rows compared, ``disagreed`` of them, ``evidence`` (alarm at 1 / level), ``alarm``."""

    audits: int
    disagreed: int
    evidence: float
    alarm: bool


class Watch:
    """A network that watches itself; made by :func:`watch`, called like the network."""

    def __init__(self, net: EarlyExit, test: DriftTest, rate: float, fallback: list[float], seed: int):
        self.net, self.test, self.rate, self.fallback = net, test, rate, fallback
        self._random = np.random.default_rng(seed)

    def __call__(self, x: Any, **options: Any) -> ExitResult:
        """Answer a batch as the network does; some of its rows are audited afterwards, which costs `rate` of the full network's time."""
        out = self.net(x, **options)
        if self.test.alarm:
            return out
        rows = np.flatnonzero(self._random.random(len(out)) < self.rate)
        if len(rows):
            self._audit(x, out, torch.from_numpy(rows))
        return out

    def _audit(self, x: Any, out: ExitResult, rows: torch.Tensor) -> None:
        rows = rows.to(out.label.device)
        early = out.exit[rows] < self.net.num_exits
        differs = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        if early.any():
            values = tuple(v[rows[early]] for v in self.net.inputs.flat(x))
            with torch.no_grad():
                _, end = self.net.taps(*values)
            differs[early] = end.argmax(1) != out.label[rows[early]]
        if self.test.observe(differs.cpu().numpy()):
            self.net.set_rule(thresholds=self.fallback)
            warnings.warn(
                f"watch: exits and end disagreed on {self.test.disagreed} of {self.test.audits} audited rows, more than the {self.test.limit:g} that was"
                f" promised; the thresholds are now {self.fallback}. Calibrate again on recent data.",
                stacklevel=3,
            )

    @property
    def audit(self) -> Audit:
        """What was seen so far."""
        return Audit(self.test.audits, self.test.disagreed, self.test.evidence, self.test.alarm)


def watch(
    net: EarlyExit, limit: float, rate: float = 0.02, level: float = 0.01, fallback: list[float] | None = None, seed: int = 0
) -> Watch:
    """Return `net` with a drift watch: without labels, it compares early answers with the end's on a share of the rows.

    Args:
        limit: the largest disagreement rate (share of all rows) that is fine, in (0, 1): the `max_drop` of a calibration with ``risk="agreement"``, or
            with some room above the disagreement measured there.
        rate: share of the rows audited, in (0, 1].
        level: the probability that the alarm ever rings while the true rate is at most `limit`.
        fallback: thresholds [K] set when it rings; default: every exit off.

    >>> import fastee, torch                                            # doctest: +SKIP
    >>> safe = fastee.calibration.watch(net, limit=0.02)                # doctest: +SKIP
    >>> out = safe(x); safe.audit.alarm                                 # doctest: +SKIP
    """
    if not isinstance(net, EarlyExit):
        raise TypeError(f"net: expected an EarlyExit from fastee.attach, got {type(net).__name__}")
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= 1:
        raise ValueError(f"rate: expected a number in (0, 1], got {rate!r}")
    fallback = [math.inf] * net.num_exits if fallback is None else [float(t) for t in fallback]
    if len(fallback) != net.num_exits:
        raise ValueError(f"fallback: expected {net.num_exits} thresholds, one per exit, got {len(fallback)}")
    return Watch(net, DriftTest(limit, level), rate, fallback, seed)

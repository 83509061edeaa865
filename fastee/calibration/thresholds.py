"""thresholds(): exit thresholds from arrays, under a budget and with a guarantee."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from fastee.calibration.risk import conformal_risk, hoeffding_bentkus_p, p_values, samples_needed, upper_bound
from fastee.calibration.search import OFF, Search, exits_of

RUNGS = 100
BEYOND = 2.0  # times the budget: a quarter of the rows may make thresholds look twice as bad as they are
GUARANTEES = ("ltt", "hoeffding_bentkus", "crc")


@dataclasses.dataclass
class ThresholdReport:
    """What was chosen and what it does on the given rows.

    ``thresholds`` [K] (+inf = off), ``cost`` mean cost per row, ``drop`` mean loss on the rows, ``bound`` what the true drop stays under
    with the asked confidence (+inf without a guarantee, 0 when every exit is off), ``exits`` [K+1] rows per exit, ``note`` why exits stayed off.
    """

    thresholds: list[float]
    cost: float
    drop: float
    bound: float
    exits: list[int]
    confidence: float | None
    note: str = ""


def thresholds(
    score: Any, correct: Any, cost: Any, max_drop: float | None = 0.01, confidence: float | None = 0.95, *, risk: str = "accuracy",
    guarantee: str = "ltt", max_cost: float | None = None, seed: int = 0,
) -> ThresholdReport:  # fmt: skip
    """Choose one threshold per exit: least mean cost such that the accuracy drop against the end is at most `max_drop`.

    Args:
        score: [N, K], larger = more confident; NaN never exits.
        correct: [N, K+1] bool or 0/1: is the answer of exit k right (last column: the end)? For ``risk="agreement"``: does it equal the end's answer?
        cost: [K+1], cumulative cost of leaving at exit k, >= 0, finite.
        max_drop: in [0, 1].
        confidence: with at least this probability over the draw of the rows the true drop is <= max_drop; None only holds
            the drop on the given rows (and ``bound`` is +inf).
        risk: ``agreement`` promises that the last column is always true, which allows a sharper test.
        guarantee: ``ltt`` as below, with exact binomial and trinomial tests; ``hoeffding_bentkus``, the same with that bound, as most papers print
            it (never sharper); ``crc``, conformal risk control: the *expected* drop is <= max_drop, `confidence` plays no part.
        max_cost: instead of `max_drop` (pass None): the least drop such that the mean cost on the rows is at most this; ``bound`` is then what the
            true drop stays under with `confidence`, from the rows that did not choose.
        seed: of the split below.

    The loss of a row is ``correct[end] - correct[exit taken]`` in {-1, 0, 1}. Method: Learn then Test (arXiv 2110.01052). One quarter of the
    rows (drawn by `seed`) finds a path of thresholds from every exit off to bold, the cheapest for the answers each step loses; the
    others test the path from the cautious end, each rung against "drop > max_drop" at level 1 - confidence, until one is not
    rejected (fixed-sequence testing). The last rung passed, the cheapest, is taken; cost, drop and exits are those on all rows. When no rung passes,
    every threshold is +inf and ``note`` says how many rows the guarantee needs.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> u = rng.random((4000, 1))
    >>> right = np.hstack([u > 0.5, np.ones((4000, 1), bool)])       # exit 0 is right above 0.5, the end always
    >>> r = thresholds(u, right, cost=[1.0, 3.0], max_drop=0.02)
    >>> r.drop <= 0.02, r.bound, 1.5 < r.cost < 2.5
    (True, 0.02, True)
    """
    u, loss, c = _arrays(score, correct, cost)
    if risk not in ("accuracy", "agreement"):
        raise ValueError(f"risk: expected 'accuracy' or 'agreement', got {risk!r}")
    if guarantee not in GUARANTEES:
        raise ValueError(f"guarantee: expected one of {list(GUARANTEES)}, got {guarantee!r}")
    if (max_drop is None) == (max_cost is None):
        raise ValueError("max_drop: give either max_drop or max_cost, the other None")
    signed = risk == "accuracy"
    if not signed and (loss < 0).any():
        raise ValueError("correct: with risk='agreement' the last column (the end agrees with itself) must be all true")
    if max_drop is not None:
        max_drop = _share("max_drop", max_drop)
    if confidence is not None:
        confidence = _share("confidence", confidence)
        if not 0 < confidence < 1:
            raise ValueError(f"confidence: expected a number between 0 and 1, or None, got {confidence}")
    everything = Search(u, loss, c)
    learn, test = split_rows(len(u), seed)
    off = np.full(u.shape[1], OFF)
    if max_cost is not None:
        return _within_cost(everything, learn, test, max_cost, confidence, signed)
    if confidence is None:
        return _report(everything, everything.best(max_drop), math.inf, None, "")
    level = 1.0 - confidence
    if max_drop == 0:
        return _report(everything, off, 0.0, confidence, "no finite number of rows can guarantee max_drop=0; exits stay off")
    if len(learn) == 0:
        return _report(everything, off, 0.0, confidence, _short(len(u), guarantee, max_drop, confidence, signed)[1])
    if guarantee != "ltt":
        loss = np.maximum(loss, 0.0)  # what those two bound: gains do not make up for losses
    search = Search(u[learn], loss[learn], c)
    rungs = search.path(search.points(BEYOND * max_drop), BEYOND * max_drop, RUNGS)
    exits = np.stack([exits_of(everything.score[test], r) for r in rungs], axis=1)
    lost = loss[test][np.arange(len(test))[:, None], exits]
    if guarantee == "crc":
        fails = conformal_risk(lost) > max_drop
    elif guarantee == "hoeffding_bentkus":
        fails = hoeffding_bentkus_p(lost, max_drop) > level
    else:
        fails = p_values(lost, max_drop, signed, level) > level
    passed = int(np.argmax(fails)) if fails.any() else len(rungs)
    if passed == 0:
        needed, short = _short(len(u), guarantee, max_drop, confidence, signed)
        miss = f"the most cautious thresholds already miss max_drop={max_drop:g} on {len(test)} test rows; exits stay off"
        return _report(everything, off, 0.0, confidence, short if len(u) < needed else miss)
    if not (rungs[passed - 1] < OFF).any():
        return _report(everything, off, 0.0, confidence, "no exit saves cost within the budget")
    return _report(everything, rungs[passed - 1], max_drop, confidence, "")


def _short(rows: int, guarantee: str, max_drop: float, confidence: float, signed: bool) -> tuple[int, str]:
    """Return how many rows the guarantee needs at least, and the sentence that says so."""
    if guarantee == "crc":
        needed, promise = math.ceil(1 / max_drop) - 1, "in expectation"
    else:
        needed, promise = samples_needed(max_drop, 1.0 - confidence, signed and guarantee == "ltt"), f"with confidence {confidence:g}"
    needed = rows_for(needed)
    return needed, f"max_drop={max_drop:g} {promise} needs at least {needed} rows, got {rows}; exits stay off"


def split_rows(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the row numbers of the quarter that chooses and of the three quarters that test.

    A quarter and not half: the test wants rows more than the choice does.
    """
    order = np.random.default_rng(seed).permutation(rows)
    return order[: rows // 4], order[rows // 4 :]


def rows_for(tested: int) -> int:
    """Return how many rows leave at least `tested` for the test."""
    return math.ceil(4 * tested / 3)


def _within_cost(everything: Search, learn: np.ndarray, test: np.ndarray, max_cost: Any, confidence: float | None, signed: bool) -> ThresholdReport:
    if isinstance(max_cost, bool) or not isinstance(max_cost, (int, float, np.floating, np.integer)):
        raise TypeError(f"max_cost: expected a number, got {type(max_cost).__name__}")
    if not max_cost >= everything.cost.min():
        raise ValueError(f"max_cost: expected at least the cost of the cheapest exit, {everything.cost.min():g}, got {max_cost}")
    if confidence is None or not len(learn):
        return _report(everything, everything.within_cost(float(max_cost)), math.inf, confidence, "")
    search = Search(everything.score[learn], everything.loss[learn], everything.cost)
    theta = search.within_cost(float(max_cost))
    lost = everything.loss[test, exits_of(everything.score[test], theta)]
    bound = upper_bound(lost, 1.0 - confidence, signed) if (theta < OFF).any() else 0.0
    return _report(everything, theta, bound, confidence, "")


def _report(search: Search, theta: np.ndarray, bound: float, confidence: float | None, note: str) -> ThresholdReport:
    cost, drop = search.value(theta)
    counts = np.bincount(exits_of(search.score, theta), minlength=search.k + 1)
    return ThresholdReport([float(t) for t in theta], cost, drop, bound, counts.tolist(), confidence, note)


def _arrays(score: Any, correct: Any, cost: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    u = np.asarray(score, dtype=np.float64)
    if u.ndim != 2 or 0 in u.shape:
        raise ValueError(f"score: expected [N, K] with at least one row and one exit, got {list(u.shape)}")
    right = np.asarray(correct)
    if right.shape != (u.shape[0], u.shape[1] + 1):
        raise ValueError(f"correct: expected {[u.shape[0], u.shape[1] + 1]} (rows, exits and the end), got {list(right.shape)}")
    if not np.isin(right, (0, 1)).all():
        raise ValueError("correct: expected only 0 and 1 (or bool)")
    right = right.astype(np.float64)
    c = np.asarray(cost, dtype=np.float64)
    if c.shape != (u.shape[1] + 1,):
        raise ValueError(f"cost: expected {u.shape[1] + 1} numbers, one per exit and one for the end, got {list(c.shape)}")
    if not (np.isfinite(c) & (c >= 0)).all():
        raise ValueError(f"cost: expected finite numbers >= 0, got {c.tolist()}")
    return u, right[:, -1:] - right, c


def _share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    value = float(value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
    return value

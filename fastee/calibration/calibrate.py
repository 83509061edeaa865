"""calibrate(): set a network's thresholds from validation data."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from fastee.calibration.search import Search, exits_of
from fastee.calibration.temperature import reliability
from fastee.calibration.temperature import temperature as fit_temperature
from fastee.calibration.thresholds import split_rows
from fastee.calibration.thresholds import thresholds as choose
from fastee.errors import did_you_mean
from fastee.nn import EarlyExit
from fastee.nn.batches import labelled, loader_of
from fastee.nn.early_exit import MEASURES
from fastee.nn.result import judge
from fastee.nn.trace import eval_mode

RISKS = ("accuracy", "agreement")
OBJECTIVES = ("cost", "latency")


@dataclasses.dataclass
class CalibrationReport:
    """What `calibrate` set and what it does on the validation rows.

    ``thresholds`` [K]; ``cost`` mean cost per row, 1.0 = the backbone alone without heads; ``drop`` loss of accuracy (or disagreement) on
    the rows; ``bound`` what the true drop stays under with ``confidence`` (+inf without a guarantee); ``accuracy`` with exits,
    ``full_accuracy`` of the backbone, ``exit_accuracy`` [K+1] if all rows left there; ``exit_shares`` [K+1]; ``samples``; ``note``;
    ``curve`` (cost, drop) that other thresholds reach on these rows; ``reliability`` per exit (mean confidence, accuracy, rows) of 15 bins and
    ``calibration_error`` [K] (both empty for measures that are no probability); ``temperatures`` [K].
    `fastee.report.calibration_plot` draws it, ``save`` writes it as JSON.
    """

    thresholds: list[float]
    cost: float
    drop: float
    bound: float
    accuracy: float
    full_accuracy: float
    exit_accuracy: list[float]
    exit_shares: list[float]
    measure: str
    risk: str
    objective: str
    confidence: float | None
    samples: int
    note: str = ""
    curve: list[tuple[float, float]] = dataclasses.field(default_factory=list, repr=False)
    reliability: list[list[tuple[float, float, int]]] = dataclasses.field(default_factory=list, repr=False)
    calibration_error: list[float] = dataclasses.field(default_factory=list)
    temperatures: list[float] = dataclasses.field(default_factory=list)

    def to_json(self) -> bytes:
        """The report as JSON; +inf is null."""
        return msgspec.json.format(msgspec.json.encode({k: _finite(v) for k, v in dataclasses.asdict(self).items()}))

    def save(self, path: str | os.PathLike) -> None:
        """Write the JSON to `path`."""
        Path(path).write_bytes(self.to_json())


def _finite(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def collect(net: EarlyExit, loader: Any, measure: str | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Run every row through every exit; return score [N, K] fp32, label [N, K+1] int64 and the true y [N] int64.

    Scores come from the very kernels that decide at run time. `measure` None takes the network's.
    """
    was, measure = net.measure, net.measure if measure is None else measure
    net.set_rule(measure=measure)
    try:
        return _collect(net, loader_of(loader), measure)
    finally:
        net.set_rule(measure=was)


def _collect(net: EarlyExit, loader: Any, measure: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    device = next(net.heads.parameters()).device
    scores, labels, truth = [], [], []
    with eval_mode(net):
        for x, y in labelled(loader, net.num_classes, device):
            carry, row_scores, row_labels = net.inputs.flat(x), [], []
            for i in range(net.num_exits):
                carry = net.run_segment(i, carry)
                step = net.exit_step(i, carry, measure=measure, threshold=float("inf"))
                row_scores.append(step.confidence.cpu())
                row_labels.append(step.label.cpu())
            row_labels.append(judge(net.run_segment(net.num_exits, carry)[0], measure)[0].cpu())
            scores.append(torch.stack(row_scores, 1))
            labels.append(torch.stack(row_labels, 1))
            truth.append(y.cpu())
    if not truth:
        raise ValueError("loader: it gave no batch")
    return torch.cat(scores).numpy(), torch.cat(labels).numpy(), torch.cat(truth).numpy()


def calibrate(
    net: EarlyExit,
    loader: Any,
    max_drop: float | None = 0.003,
    confidence: float | None = 0.95,
    measure: str = "max_prob",
    risk: str = "accuracy",
    objective: str = "cost",
    *,
    guarantee: str = "ltt",
    max_cost: float | None = None,
    temperature: bool = False,
    seed: int = 0,
) -> CalibrationReport:
    """Choose and set the thresholds of `net` on held-out data (never the training data) and leave it in eval mode.

    Args:
        loader: DataLoader, Dataset or list of batches; see `fastee.fit`.
        max_drop: largest loss of accuracy against the backbone (``risk="accuracy"``) or largest share of rows whose label differs from the
            backbone's (``"agreement"``).
        confidence: the true drop is <= max_drop with at least this probability (see `fastee.calibration.thresholds`); None only
            holds it on these rows, which needs fewer of them and exits more.
        measure: ``max_prob``, ``margin``, ``entropy``, ``energy``, ``patience``, or ``gate`` after ``fit(method="gated")``.
        objective: ``cost`` minimises multiply-adds, ``latency`` seconds of this machine at batch 1 (`EarlyExit.ensure_profile`).
        guarantee: ``ltt``, ``hoeffding_bentkus`` or ``crc``; see `fastee.calibration.thresholds`.
        max_cost: with ``max_drop=None`` the least drop at this mean cost (1.0 = the backbone alone), in the objective's unit.
        temperature: first fit one temperature per head on the rows that choose, so that confidences are probabilities and comparable between exits.

    With too few rows for the guarantee all exits stay off, a warning and ``report.note`` say how many are needed.
    """
    if not isinstance(net, EarlyExit):
        raise TypeError(f"net: expected an EarlyExit from fastee.attach, got {type(net).__name__}")
    for name, value, known in (("measure", measure, MEASURES), ("risk", risk, RISKS), ("objective", objective, OBJECTIVES)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {list(known)}, got {value!r}{did_you_mean(str(value), known)}")
    net.eval()
    if temperature:
        loader = loader_of(loader)
        _fit_temperatures(net, loader, seed if confidence is not None else None)
    score, label, y = collect(net, loader, measure)
    right = label == y[:, None]
    if risk == "agreement":
        correct = (label == label[:, -1:]) & (label >= 0)
        correct[:, -1] = True
    else:
        correct = right
    cost = _cost(net, objective)
    found = choose(score, correct, cost, max_drop, confidence, risk=risk, guarantee=guarantee, max_cost=max_cost, seed=seed)
    if found.note:
        warnings.warn(f"calibrate: {found.note}", stacklevel=2)
    net.set_rule(measure=measure, thresholds=found.thresholds)
    at = exits_of(score, np.asarray(found.thresholds))
    rows = np.arange(len(y))
    bins = [reliability(score[:, k], right[:, k]) for k in range(net.num_exits)] if measure == "max_prob" else []
    return CalibrationReport(
        found.thresholds, found.cost, found.drop, found.bound, float(right[rows, at].mean()), float(right[:, -1].mean()), right.mean(0).tolist(),
        [n / len(y) for n in found.exits], measure, risk, objective, confidence, len(y), found.note,
        Search(score.astype(np.float64), correct[:, -1:] - correct.astype(np.float64), cost).curve(),
        [b for b, _ in bins], [e for _, e in bins], [h.temperature for h in net.heads],
    )  # fmt: skip


def _fit_temperatures(net: EarlyExit, loader: Any, seed: int | None) -> None:
    """Set each head's temperature from the rows that choose thresholds (all of them without a guarantee): the others must stay unseen."""
    logits: list[list[np.ndarray]] = [[] for _ in net.heads]
    truth = []
    with eval_mode(net):
        for x, y in labelled(loader, net.num_classes, next(net.heads.parameters()).device):
            pooled, _ = net.taps(x)
            for column, head, features in zip(logits, net.heads, pooled, strict=True):
                column.append(head.classify(features).float().cpu().numpy())
            truth.append(y.cpu().numpy())
    if not truth:
        raise ValueError("loader: it gave no batch")
    y = np.concatenate(truth)
    rows = np.arange(len(y)) if seed is None else split_rows(len(y), seed)[0]
    if len(rows):
        for head, column in zip(net.heads, logits, strict=True):
            head.temperature = fit_temperature(np.concatenate(column)[rows], y[rows])


def _cost(net: EarlyExit, objective: str) -> np.ndarray:
    """Cumulative cost [K+1] of leaving at each exit, in units of the backbone alone."""
    if objective == "latency":
        seconds = net.ensure_profile().mean[:, 0, 0]
        return np.cumsum(seconds) / seconds.sum()
    segments, heads = np.array(net.macs["segments"]), np.array([*net.macs["heads"], 0.0])
    return np.cumsum(segments + heads) / max(segments.sum(), 1.0)

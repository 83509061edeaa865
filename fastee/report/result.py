"""The numbers of one run: a row per way of running the same samples, and what they say."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One way of running the samples, times in seconds; a sample without an answer has the latency ``inf``.

    `nodes` and `errors` count the answers per node and the typed errors. `mean`, `p50` and `p99` are of `latency`; a percentile is a value that was seen, never an interpolation. `exits` [K+1] counts
    where samples ended, `depth` is the mean exit counted from 1, `macs` the share of the full network's multiply-adds.
    """

    key: str
    name: str
    how: str
    samples: int
    accuracy: float
    depth: float
    macs: float
    mean: float
    p50: float
    p99: float
    wire_bytes: float
    hits: float
    forced: int
    failed: int
    exits: list[int]
    nodes: dict[str, int] = {}
    errors: dict[str, int] = {}
    latency: list[float]
    correct: list[bool]

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of the accuracy (Wilson 1927)."""
        n, p, z = self.samples, self.accuracy, 1.959964
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return middle - half, middle + half


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One run: `rows` on the emulated cluster, `local` on this machine as it is, and everything needed to read them."""

    title: str
    deadline: float
    exit_names: list[str]
    rows: list[Row]
    local: list[Row]
    calibration: dict
    setting: dict
    machine: dict
    notes: list[str]
    summary: str = ""
    format: int = 1

    def to_json(self) -> bytes:
        """Return the run as one JSON object; what is not finite (a sample without an answer) is null."""
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, text: bytes | str) -> Result:
        """Read what ``to_json`` wrote; raises ``msgspec.ValidationError`` naming the field that does not fit."""
        raw = msgspec.json.decode(text)
        for rows in (raw.get("rows", []), raw.get("local", [])) if isinstance(raw, dict) else ():
            for entry in rows:
                entry["latency"] = [math.inf if x is None else x for x in entry.get("latency", [])]
                entry.update({key: math.nan for key in ("depth", "macs") if entry.get(key, 0) is None})
                entry.update({key: math.inf for key in ("mean", "p50", "p99") if entry.get(key, 0) is None})
        return msgspec.convert(raw, cls)


def row(
    key: str,
    name: str,
    how: str,
    *,
    label: Sequence[int],
    truth: Sequence[int],
    exit: Sequence[int],
    latency: Sequence[float],
    wire_bytes: Sequence[float],
    exit_macs: Sequence[float],
    full_macs: float,
    deadline: float,
    forced: Sequence[bool] | None = None,
    nodes: dict[str, int] | None = None,
    errors: dict[str, int] | None = None,
) -> Row:
    """Return the row of what was measured, one entry per sample.

    `exit` is the 0-based exit taken, -1 where no answer came (wrong, late, infinitely slow); `exit_macs` [K+1] are the
    multiply-adds spent by a sample that ends at each exit, `full_macs` those of the network without exits, `deadline` seconds.
    Raises ``ValueError`` when the lengths differ or there are no samples.
    """
    lengths = {len(label), len(truth), len(exit), len(latency), len(wire_bytes)}
    if len(lengths) != 1 or not len(label):
        raise ValueError(f"label, truth, exit, latency and wire_bytes must be equally many and not empty, got lengths {sorted(lengths)}")
    taken = np.asarray(exit, np.int64)
    if taken.min() < -1 or taken.max() >= len(exit_macs):
        raise ValueError(f"exit must be in -1..{len(exit_macs) - 1}, got {taken.min()}..{taken.max()}")
    answered = taken >= 0
    seconds = np.where(answered, np.asarray(latency, np.float64), np.inf)
    correct = answered & (np.asarray(label) == np.asarray(truth))
    ended = taken[answered]
    return Row(
        key=key,
        name=name,
        how=how,
        samples=len(seconds),
        accuracy=float(correct.mean()),
        depth=float(ended.mean() + 1) if len(ended) else math.nan,
        macs=float(np.asarray(exit_macs, np.float64)[ended].mean() / full_macs) if len(ended) else math.nan,
        mean=float(seconds.mean()),
        p50=float(np.percentile(seconds, 50, method="higher")),
        p99=float(np.percentile(seconds, 99, method="higher")),
        wire_bytes=float(np.mean(wire_bytes)),
        hits=float((seconds <= deadline).mean()),
        forced=int(np.sum(forced)) if forced is not None else 0,
        failed=int((~answered).sum()),
        exits=np.bincount(ended, minlength=len(exit_macs)).tolist(),
        nodes=nodes or {},
        errors=errors or {},
        latency=seconds.tolist(),
        correct=correct.tolist(),
    )


def _times(slow: float, fast: float) -> str:
    """Return how much faster `fast` is than `slow`, in words that do not hide a loss."""
    if not (math.isfinite(slow) and math.isfinite(fast)):
        return "not comparable in latency (samples without an answer)"
    return f"{slow / fast:.2f}x faster" if fast <= slow else f"{fast / slow:.2f}x SLOWER"


def difference(a: Row, b: Row) -> tuple[float, float]:
    """Return (accuracy of `a` minus that of `b`, half of its 95 % interval), paired: both ran the same samples in the same order.

    Normal approximation with at least one discordant pair each way, so that it is never 0 wide.
    """
    if a.samples != b.samples:
        raise ValueError(f"both rows must have run the same samples, got {a.samples} and {b.samples}")
    gained = sum(x and not y for x, y in zip(a.correct, b.correct, strict=True))
    lost = sum(y and not x for x, y in zip(a.correct, b.correct, strict=True))
    n = a.samples
    variance = ((gained + lost + 2) - (gained - lost) ** 2 / n) / n**2
    return (gained - lost) / n, 1.959964 * math.sqrt(variance)


def closing(ours: Row, here: Row, there: Row, calibration: dict) -> str:
    """Return the closing sentence, computed from the rows: mean latency against all here and all there, accuracy, guarantee."""
    points, spread = (100 * x for x in difference(ours, here))
    text = (
        f"{ours.name}: mean latency {1e3 * ours.mean:.1f} ms, {_times(here.mean, ours.mean)} than all here ({1e3 * here.mean:.1f} ms), "
        f"{_times(there.mean, ours.mean)} than all there ({1e3 * there.mean:.1f} ms), at {points:+.2f} points of accuracy "
        f"(95 % interval +-{spread:.2f}) over the same {ours.samples} samples; p99 {1e3 * ours.p99:.1f} ms against {1e3 * here.p99:.1f} ms here and "
        f"{1e3 * there.p99:.1f} ms there; {100 * ours.hits:.1f} % within the deadline."
    )
    if calibration.get("max_drop") is not None:
        bound = calibration.get("bound")
        text += f" Calibrated on {calibration['samples']} validation images to a drop of at most {100 * calibration['max_drop']:.2f} points"
        if bound is not None and math.isfinite(bound) and bound <= calibration["max_drop"]:
            text += f"; guarantee: drop <= {100 * bound:.2f} points with {100 * calibration['confidence']:.0f} % confidence."
        elif bound is not None and math.isfinite(bound):
            text += (
                f"; measured drop there {100 * calibration['drop']:+.2f} points, but NOT guaranteed: the "
                f"{100 * calibration['confidence']:.0f} % bound is {100 * bound:.2f} points."
            )
        else:
            text += f"; measured drop there {100 * calibration['drop']:+.2f} points, without a guarantee."
        if "test_drop" in calibration:
            text += f" Measured drop over all {calibration['test_samples']} test images: {100 * calibration['test_drop']:+.2f} points."
    return text

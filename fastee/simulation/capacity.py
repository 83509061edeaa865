"""Bandwidth over time: mahimahi and CSV files, and made-up radio links. Files are untrusted: sizes and every number are checked."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PACKET_BYTES = 1500
MAX_FILE_BYTES, MAX_SECONDS = 64 << 20, 7 * 86400
_MS = 1_000_000


@dataclass(frozen=True, eq=False)
class CapacityTrace:
    """Bytes that have passed by a time: `at` int64 [P] ns and `cum` int64 [P] bytes, both from 0; linear in between, then repeated.

    >>> CapacityTrace.constant(8e6, seconds=2.0).mean_rate
    8000000.0
    """

    at: np.ndarray
    cum: np.ndarray

    def __post_init__(self):
        at, cum = np.array(self.at), np.array(self.cum)
        if at.dtype.kind not in "iu" or cum.dtype.kind not in "iu":
            raise TypeError(f"CapacityTrace: at and cum must be int64, got {at.dtype} and {cum.dtype}")
        if at.ndim != 1 or at.shape != cum.shape or len(at) < 2 or at[0] != 0 or cum[0] != 0:
            raise ValueError(f"CapacityTrace: at and cum must be [P], P >= 2, from 0, got {list(at.shape)} and {list(cum.shape)}")
        if (np.diff(at) <= 0).any() or (np.diff(cum) < 0).any():
            raise ValueError("CapacityTrace: at must rise and cum must not fall")
        if cum[-1] <= 0 or cum[-1] > 1 << 50 or at[-1] > MAX_SECONDS * 1_000_000_000:
            raise ValueError(f"CapacityTrace: must pass 1..2**50 bytes in at most {MAX_SECONDS} s, got {cum[-1]} bytes in {at[-1] * 1e-9:g} s")
        for name, value in (("at", at), ("cum", cum)):
            value = value.astype(np.int64)
            value.flags.writeable = False
            object.__setattr__(self, name, value)

    @property
    def mean_rate(self) -> float:
        """bit/s over the whole period."""
        return float(self.cum[-1]) * 8e9 / float(self.at[-1])

    @classmethod
    def constant(cls, rate: float, seconds: float = 1.0) -> CapacityTrace:
        """A steady `rate` in bit/s."""
        return cls.steps([rate], seconds)

    @classmethod
    def steps(cls, rates, seconds: float = 1.0) -> CapacityTrace:
        """One rate in bit/s per step of `seconds`."""
        rates = np.asarray(rates, np.float64)
        if rates.ndim != 1 or not len(rates) or not np.isfinite(rates).all() or (rates < 0).any() or (rates > 1e12).any():
            raise ValueError("CapacityTrace: rates must be [P], P >= 1, each in 0..1e12 bit/s")
        if not 1e-6 <= seconds * len(rates) <= MAX_SECONDS:
            raise ValueError(f"CapacityTrace: seconds must make at most {MAX_SECONDS} s in all, got {seconds} * {len(rates)}")
        at = np.rint(np.arange(len(rates) + 1) * (seconds * 1e9)).astype(np.int64)
        return cls(at, np.floor(np.concatenate([[0.0], np.cumsum(rates * seconds / 8.0)])).astype(np.int64))


def parse_mahimahi(text: bytes) -> CapacityTrace:
    """Return the trace of a mahimahi `.up`/`.down` file: one line per chance of a 1,500-byte packet, the millisecond of it.

    The chances of one millisecond are spread evenly over it; the file repeats after its last millisecond.

    >>> parse_mahimahi(b"1\\n1\\n3\\n").cum.tolist()
    [0, 0, 3000, 3000, 4500]
    """
    lines = _lines("mahimahi", text)
    try:
        ms = np.array([int(line) for line in lines if line], dtype=np.int64)
    except (ValueError, OverflowError):
        bad = next(i for i, line in enumerate(lines) if line and not (line.isdigit() and len(line) < 13))
        raise ValueError(f"mahimahi: line {bad + 1} must be a millisecond, got {lines[bad][:40]!r}") from None
    if not len(ms):
        raise ValueError("mahimahi: the file holds no packet")
    if ms[0] < 0 or (np.diff(ms) < 0).any() or ms[-1] > MAX_SECONDS * 1000:
        raise ValueError(f"mahimahi: milliseconds must rise from 0 to at most {MAX_SECONDS * 1000}")
    slots, counts = np.unique(ms, return_counts=True)
    at, cum, total = [0], [0], 0
    for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
        if slot * _MS > at[-1]:
            at.append(slot * _MS)
            cum.append(total)
        total += count * PACKET_BYTES
        at.append((slot + 1) * _MS)
        cum.append(total)
    return CapacityTrace(np.array(at), np.array(cum))


def parse_csv(text: bytes, column: str = "downlink_kbit_s", unit: float = 1e3) -> CapacityTrace:
    """Return the trace of a CSV with a header and one line per second; `column` holds the rate in `unit` bit/s. Empty cells repeat the last.

    >>> parse_csv(b"second,downlink_kbit_s\\n0,8\\n1,16\\n").cum.tolist()
    [0, 1000, 3000]
    """
    lines = [line for line in _lines("csv", text) if line]
    if len(lines) < 2:
        raise ValueError("csv: expected a header and at least one line")
    header = [name.strip() for name in lines[0].split(",")]
    if column not in header:
        raise ValueError(f"csv: column {column!r} is missing, the header is {header[:20]}")
    at, rates = header.index(column), []
    for number, line in enumerate(lines[1:], 2):
        cells = line.split(",")
        cell = cells[at].strip() if len(cells) == len(header) else None
        if cell == "":
            rates.append(rates[-1] if rates else 0.0)
            continue
        try:
            value = float(cell)
        except (TypeError, ValueError):
            raise ValueError(f"csv: line {number} must have {len(header)} cells and a number in {column!r}, got {line[:60]!r}") from None
        if not math.isfinite(value) or not 0 <= value * unit <= 1e12:
            raise ValueError(f"csv: line {number}: {column} must be in 0..{1e12 / unit:g}, got {value}")
        rates.append(value * unit)
    return CapacityTrace.steps(rates)


def read_capacity(path: str | os.PathLike, format: str | None = None) -> CapacityTrace:
    """Read a trace file; `format` "mahimahi" or "csv", by default from the ending (.up/.down, .csv)."""
    path = Path(path)
    kind = format or {".up": "mahimahi", ".down": "mahimahi", ".csv": "csv"}.get(path.suffix)
    if kind not in ("mahimahi", "csv"):
        raise ValueError(f"capacity: format of {path.name!r} must be 'mahimahi' or 'csv', got {format!r}")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"capacity: {path.name!r} has {path.stat().st_size} bytes, at most {MAX_FILE_BYTES} are read")
    return (parse_mahimahi if kind == "mahimahi" else parse_csv)(path.read_bytes())


# mean in units of the asked rate, log-spread of the slow and of the fast part, chance per second of an outage
_RADIO = {"lte": (0.45, 0.35, 0.01), "5g": (0.8, 0.5, 0.02), "wifi": (0.2, 0.3, 0.005)}


def synthetic_capacity(kind: str, rate: float, seconds: float = 60.0, seed: int = 0) -> CapacityTrace:
    """Return a made-up radio link of mean `rate` bit/s in steps of 100 ms: a slow log-normal walk times fast fading, with short outages.

    `kind`: "lte", "5g" (wider swings, more outages) or "wifi". Made up, not measured: no public uplink trace of 5G or Wi-Fi is used.
    """
    if kind not in _RADIO:
        raise ValueError(f"capacity: synthetic must be one of {list(_RADIO)}, got {kind!r}")
    if not 1 <= seconds <= 86400 or not 1e3 <= rate <= 1e12:
        raise ValueError(f"capacity: seconds must be in 1..86400 and rate in 1e3..1e12 bit/s, got {seconds} and {rate}")
    slow, fast, outage = _RADIO[kind]
    rng, steps = np.random.default_rng([seed, len(kind)]), round(seconds * 10)
    walk, noise = 0.0, rng.normal(size=(steps, 2))
    drop, rates = rng.random(steps) < outage / 10, np.empty(steps)
    left = 0
    for i in range(steps):
        walk = 0.98 * walk + math.sqrt(1 - 0.98**2) * noise[i, 0]
        left = 5 if drop[i] else max(0, left - 1)
        rates[i] = math.exp(slow * walk + fast * noise[i, 1]) * (0.02 if left else 1.0)
    return CapacityTrace.steps(rates * (rate / rates.mean()), 0.1)


def _lines(kind: str, text: bytes) -> list[str]:
    if not isinstance(text, (bytes, bytearray)):
        raise TypeError(f"{kind}: text must be bytes, got {type(text).__name__}")
    if len(text) > MAX_FILE_BYTES:
        raise ValueError(f"{kind}: at most {MAX_FILE_BYTES} bytes are read, got {len(text)}")
    try:
        return [line.strip() for line in bytes(text).decode("ascii").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{kind}: byte {error.start} is no ASCII text") from None

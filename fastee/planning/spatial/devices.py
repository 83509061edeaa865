"""Providers and links of a spatial split: seconds per layer and row count, access rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fastee.errors import did_you_mean
from fastee.planning.spatial.geometry import Net
from fastee.scheduling import parse_link

# name: (GMAC/s, seconds per layer, rows that one launch covers); reconstructed, for tests and comparisons
SYNTHETIC = {"xavier": (700.0, 1.2e-4, 4), "tx2": (300.0, 2e-4, 4), "nano": (120.0, 3e-4, 4), "pi": (6.0, 3e-4, 1)}


@dataclass(frozen=True)
class Device:
    """A provider: either the analytic model (`rate` MAC/s, `overhead` s per layer, `quantum` rows) or `measured` row times.

    Analytic: ``overhead + ceil(rows / quantum) * quantum * macs_per_row / rate`` per layer.
    `measured`: {layer name: [(rows, seconds), ...]}, interpolated upward: a row count takes the time of the next measured one at or
    above it, never less than any below it; beyond the last point seconds grow with the rows. `tail_seconds` is then what follows the
    prefix. A layer without points takes the analytic model, or raises `ValueError` when there is none.

    >>> Device.synthetic("nano").overhead
    0.0003
    """

    name: str
    rate: float | None = None
    overhead: float = 0.0
    quantum: int = 1
    measured: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    tail_seconds: float | None = None

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"Device: name must be a non-empty string, got {self.name!r}")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise ValueError(f"Device {self.name!r}: rate must be finite and > 0 MAC/s, got {self.rate}")
        if not 0 <= self.overhead < math.inf:
            raise ValueError(f"Device {self.name!r}: overhead must be finite and >= 0 seconds, got {self.overhead}")
        if isinstance(self.quantum, bool) or not isinstance(self.quantum, int) or self.quantum < 1:
            raise ValueError(f"Device {self.name!r}: quantum must be an integer >= 1, got {self.quantum!r}")
        if self.tail_seconds is not None and not 0 <= self.tail_seconds < math.inf:
            raise ValueError(f"Device {self.name!r}: tail_seconds must be finite and >= 0, got {self.tail_seconds}")
        for layer, points in self.measured.items():
            for rows, seconds in points:
                if isinstance(rows, bool) or not isinstance(rows, (int, np.integer)) or rows < 1 or not 0 <= seconds < math.inf:
                    raise ValueError(f"Device {self.name!r}: measured[{layer!r}] must hold (rows >= 1, finite seconds >= 0), got {(rows, seconds)}")

    @classmethod
    def synthetic(cls, kind: str, name: str | None = None) -> Device:
        """The reconstructed model of a ``xavier``, ``tx2``, ``nano`` or ``pi``."""
        if kind not in SYNTHETIC:
            raise ValueError(f"kind must be one of {', '.join(SYNTHETIC)}, got {kind!r}{did_you_mean(str(kind), SYNTHETIC)}")
        rate, overhead, quantum = SYNTHETIC[kind]
        return cls(name or kind, rate * 1e9, overhead, quantum)

    def table(self, net: Net) -> np.ndarray:
        """Seconds for 0..out_h rows of every layer, along ``net.row_counts``; 0 rows take none."""
        rows = net.row_counts
        if self.rate is not None:
            times = self.overhead + np.ceil(rows / self.quantum) * (self.quantum / self.rate) * net.row_macs_axis
            times[rows == 0] = 0.0
        elif missing := [layer.name for layer in net.layers if not self.measured.get(layer.name)]:
            raise ValueError(f"Device {self.name!r}: no measured points for layer {missing[0]!r} of {net.name!r}, and no rate to estimate it from")
        else:
            times = np.zeros(len(rows))
        if self.measured:
            start = 0
            for layer in net.layers:
                points = self.measured.get(layer.name)
                if points:
                    times[start : start + layer.out_h + 1] = _upward(points, layer.out_h)
                start += layer.out_h + 1
        return times

    def tail(self, net: Net) -> float:
        """Seconds of the net's tail here."""
        if self.tail_seconds is not None:
            return self.tail_seconds
        if net.tail_macs == 0 and net.tail_layers == 0:
            return 0.0
        if self.rate is None:
            raise ValueError(f"Device {self.name!r}: tail_seconds is needed for {net.name!r}, there is no rate to estimate it from")
        return net.tail_layers * self.overhead + net.tail_macs / self.rate


def _upward(points: Sequence[tuple[int, float]], height: int) -> np.ndarray:
    ordered = sorted((int(r), float(t)) for r, t in points)
    at = np.array([r for r, _ in ordered])
    seconds = np.maximum.accumulate([t for _, t in ordered])
    rows = np.arange(height + 1)
    index = np.searchsorted(at, rows)
    out = np.where(index < len(at), seconds[np.minimum(index, len(at) - 1)], seconds[-1] * np.maximum(1.0, rows / at[-1]))
    out[0] = 0.0
    return out


@dataclass(frozen=True)
class Links:
    """Access rates in bit/s: `rates` one per provider (or one for all), `requester` of the node that sends the input (None: no limit).

    `latency`: seconds before the scatter arrives. `contention`: transfers that leave one node are sent one after another, receivers in
    order of their index. A rate of 0 or less means that nothing can be sent there: plans that use the link are infeasible.
    """

    rates: float | Sequence[float]
    requester: float | None = None
    latency: float = 0.0
    contention: bool = False

    def __post_init__(self):
        if not 0 <= _number("latency", self.latency) < math.inf:
            raise ValueError(f"links: latency must be finite and >= 0 seconds, got {self.latency}")
        if not isinstance(self.contention, bool):
            raise TypeError(f"links: contention must be a bool, got {type(self.contention).__name__}")
        if self.requester is not None:
            _number("requester", self.requester)

    @classmethod
    def of(cls, links, providers: int) -> Links:
        """Return `links` with one rate per provider; takes Links, a rate, a sequence of rates or a string such as ``"50mbit 1ms"``."""
        if isinstance(links, str):
            rate, delay = parse_link(links)
            links = cls(rate, latency=delay)
        elif not isinstance(links, cls):
            links = cls(links)
        rates = links.rates
        many = isinstance(rates, (Sequence, np.ndarray)) and not isinstance(rates, str)
        rates = tuple(_number("rates", r) for r in rates) if many else (_number("rates", rates),) * providers
        if len(rates) != providers:
            raise ValueError(f"links: rates must hold one value per provider ({providers}), got {len(rates)}")
        return cls(rates, links.requester, links.latency, links.contention)


def _number(name: str, value) -> float:
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"links: {name} must be a number, got {type(value).__name__}")
    if math.isnan(value):
        raise ValueError(f"links: {name} must not be NaN")
    return float(value)

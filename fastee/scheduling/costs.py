"""Energy and money: what a second of compute and a byte sent cost at each node, beside time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_FIELDS = ("watts", "joules_per_byte", "price_per_second", "price_per_byte")


@dataclass(frozen=True)
class Costs:
    """Prices per node, each [N] and >= 0 (None: free).

    `watts` while a segment runs there, `joules_per_byte` sent from there, `price_per_second` of compute, `price_per_byte` sent.
    `QoS.energy_weight` (accuracy per joule) and `QoS.money_weight` (accuracy per unit of money) turn them into the scheduler's
    utility; `QoS.cost_weight` (accuracy per second) must then be > 0, because prices are counted in seconds' worth.

    >>> Costs(watts=[5, 200]).in_seconds(2, cost_weight=0.1, energy_weight=0.001, money_weight=0)[0]
    [0.05, 2.0]
    """

    watts: Sequence[float] | None = None
    joules_per_byte: Sequence[float] | None = None
    price_per_second: Sequence[float] | None = None
    price_per_byte: Sequence[float] | None = None

    def in_seconds(self, nodes: int, cost_weight: float, energy_weight: float, money_weight: float) -> tuple[list[float], list[float]]:
        """(seconds' worth of one second of compute, seconds' worth of one byte sent), each [N], beside the time itself."""
        watts, joules, seconds, sent = (self._array(name, nodes) for name in _FIELDS)
        if not cost_weight > 0:
            raise ValueError(f"Costs: QoS.cost_weight must be > 0 where energy or money count, got {cost_weight}")
        compute = (energy_weight * watts + money_weight * seconds) / cost_weight
        return compute.tolist(), ((energy_weight * joules + money_weight * sent) / cost_weight).tolist()

    def _array(self, name: str, nodes: int) -> np.ndarray:
        value = getattr(self, name)
        if value is None:
            return np.zeros(nodes)
        try:
            array = np.array(value, dtype=np.float64)
        except (TypeError, ValueError):
            raise TypeError(f"Costs: {name} must be {nodes} numbers, got {type(value).__name__}") from None
        if array.shape != (nodes,):
            raise ValueError(f"Costs: {name} must have shape [{nodes}], got {list(array.shape)}")
        if not (np.isfinite(array) & (array >= 0)).all():
            raise ValueError(f"Costs: {name} must be finite and >= 0, got {array.tolist()}")
        return array

"""What the user promises: how late, how often, how wrong."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

NO_DEADLINE = (1 << 63) - 1
_WEIGHTS = ("cost_weight", "energy_weight", "money_weight", "weight")


@dataclass(frozen=True)
class QoS:
    """A latency and accuracy promise.

    `deadline`: seconds from admission to the answer, None for none. `hit_rate`: share of tasks that must make it, in
    [0.5, 1): an action is taken only if it finishes in time with this probability. `max_drop`: largest expected accuracy
    loss, in [0, 1], of an exit that the gain table takes below its threshold (None: no limit). `cost_weight`: accuracy
    that one second of a task's time is worth, >= 0; it acts where the profile has a gain table. `energy_weight`, `money_weight`:
    accuracy that a joule, a unit of money is worth, >= 0; they act with `Scheduler(costs=...)`. `weight`: what this class's accuracy
    counts beside that of other classes, >= 0.

    >>> QoS(deadline=0.02, hit_rate=0.99).deadline_ns
    20000000
    """

    deadline: float | None = None
    hit_rate: float = 0.99
    max_drop: float | None = None
    cost_weight: float = 0.0
    energy_weight: float = 0.0
    money_weight: float = 0.0
    weight: float = 1.0

    def __post_init__(self):
        for name in ("deadline", "hit_rate", "max_drop", *_WEIGHTS):
            value = getattr(self, name)
            if value is None and name in ("deadline", "max_drop"):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"QoS: {name} must be a number, got {type(value).__name__}")
            object.__setattr__(self, name, float(value))
        if self.deadline is not None and not self.deadline > 0:
            raise ValueError(f"QoS: deadline must be > 0 seconds or None, got {self.deadline}")
        if not 0.5 <= self.hit_rate < 1:
            raise ValueError(f"QoS: hit_rate must be in [0.5, 1), got {self.hit_rate}")
        if self.max_drop is not None and not 0 <= self.max_drop <= 1:
            raise ValueError(f"QoS: max_drop must be in [0, 1] or None, got {self.max_drop}")
        for name in _WEIGHTS:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"QoS: {name} must be finite and >= 0, got {getattr(self, name)}")

    @property
    def deadline_ns(self) -> int:
        """The deadline in nanoseconds; 2**63 - 1 stands for none."""
        if self.deadline is None or self.deadline * 1e9 >= NO_DEADLINE:
            return NO_DEADLINE
        return max(1, round(self.deadline * 1e9))

    @property
    def quantile(self) -> float:
        """z such that a normal time stays below mean + z * spread with probability `hit_rate`."""
        return statistics.NormalDist().inv_cdf(self.hit_rate)

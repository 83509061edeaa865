"""The ways to train exits, as data: what `fit(method=...)` takes by name or as an object with its own settings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from fastee.errors import did_you_mean


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Heads alone, on a backbone that stays bit for bit as it was. `weights`: one per exit."""

    weights: Sequence[float] | None = None
    name: ClassVar[str] = "frozen"
    lr: ClassVar[float] = 0.01


@dataclasses.dataclass(frozen=True)
class Joint:
    """Heads and backbone. `weights`: one per exit and one for the end (last), None for ones, or ``"pabee"``: sum_i i CE_i / sum_i i,
    which DIMEE uses too (arXiv 2006.04152)."""

    weights: Sequence[float] | str | None = None
    name: ClassVar[str] = "joint"
    lr: ClassVar[float] = 0.001


@dataclasses.dataclass(frozen=True)
class Distill:
    """Every exit learns from a teacher's logits: alpha T^2 KL(teacher/T, exit/T) + (1 - alpha) CE (arXiv 1503.02531).

    `teacher`: a module with the backbone's inputs that answers logits [B, C], or None for the network's own end. With ``backbone=True`` all is
    trained (the end by CE alone); then `beta` adds beta |unit(P_m f_m) - unit(f_T)|^2, where f is what a classifier's last linear
    layer reads and P_m a projection of the exit that lives during training only (feature transfer, as in NoNN, arXiv 1907.11804).
    """

    alpha: float = 0.9
    temperature: float = 4.0
    beta: float = 0.0
    teacher: nn.Module | None = None
    backbone: bool = False
    weights: Sequence[float] | None = None
    name: ClassVar[str] = "distill"
    lr: ClassVar[float] = 0.01

    def __post_init__(self):
        _number("alpha", self.alpha, 0, 1)
        _number("temperature", self.temperature, 0, math.inf, open_low=True)
        _number("beta", self.beta, 0, math.inf)
        if self.teacher is not None and not isinstance(self.teacher, nn.Module):
            raise TypeError(f"teacher: expected a module or None, got {type(self.teacher).__name__}")
        if self.beta and not self.backbone:
            raise ValueError(
                "beta: on a fixed backbone feature transfer could train nothing but its own projections; pass backbone=True or beta=0"
            )


@dataclasses.dataclass(frozen=True)
class Gated:
    """JEI-DNN (arXiv 2310.09163): heads and learned gates by turns, on a fixed backbone; afterwards the measure is ``gate``.

    `trade` weighs cost against cross-entropy and so sets the place on the accuracy-cost curve. `weighting`: ``"detached"`` lets the exit
    probabilities weigh the heads' losses, ``"code"`` is the official code's, where they cancel. `warm_up` epochs at most train the heads
    first, each until its held-out accuracy has not risen for 2 epochs; then gates and heads take turns of `phase` batches. Held out is the
    `val_loader`, or a tenth of the training features.
    """

    trade: float = 0.7
    weighting: str = "detached"
    warm_up: int = 6
    phase: int = 200
    name: ClassVar[str] = "gated"
    lr: ClassVar[float] = 0.01

    def __post_init__(self):
        _number("trade", self.trade, 0, math.inf)
        if self.weighting not in ("detached", "code"):
            raise ValueError(f"weighting: expected 'detached' or 'code', got {self.weighting!r}")
        for name, low in (("warm_up", 0), ("phase", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}")


METHODS = {m.name: m for m in (Frozen, Joint, Distill, Gated)}


def method_of(method: Any) -> Frozen | Joint | Distill | Gated:
    """Return the settings behind a name or settings object."""
    if type(method) in METHODS.values():
        return method
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(
            f"method: expected one of {list(METHODS)} or an object of fastee.training, got {method!r}{did_you_mean(str(method), list(METHODS))}"
        )
    return METHODS[method]()


def weights_of(weights: Any, count: int, method: str) -> list[float]:
    """Return `count` checked loss weights: ones for None, 1..count over their sum for "pabee"."""
    if weights is None:
        return [1.0] * count
    if weights == "pabee":
        return [2.0 * (i + 1) / (count * (count + 1)) for i in range(count)]
    if isinstance(weights, str):
        raise ValueError(f"weights: expected {count} numbers, None or 'pabee', got {weights!r}")
    values = [float(w) for w in weights]
    if len(values) != count or not all(0 <= w < math.inf for w in values) or not any(values):
        raise ValueError(f"weights: expected {count} numbers >= 0, not all zero, for method={method!r}, got {values}")
    return values


def _number(name: str, value: Any, low: float, high: float, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    if not (low < value if open_low else low <= value) or not value <= high or value == math.inf:
        limit = "> 0" if open_low else f"in [{low}, {high}]" if high < math.inf else f">= {low}"
        raise ValueError(f"{name}: expected a finite number {limit}, got {value}")

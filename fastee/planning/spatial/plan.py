"""A spatial plan: volumes, the rows of each provider, the latency expected, and why."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from fastee.errors import CheckpointMismatch

if TYPE_CHECKING:
    from fastee.planning.spatial.planner import SpatialPlanner

_FORMAT, _VERSION = "fastee-spatial-plan", 1


class _Json(msgspec.Struct, forbid_unknown_fields=True):
    format: str
    version: int
    net: str
    fingerprint: str
    devices: list[str]
    volumes: list[int]
    splits: list[list[int]]
    latency: float | None
    method: str
    finish: list[list[float | None]]
    compared: dict[str, float | None]
    root: int


@dataclass(frozen=True, eq=False)
class SpatialPlan:
    """Which provider produces which rows of which layers.

    `volumes`: 0 = p_0 < ... < p_K = L, volume j holds layers p_{j-1}+1 .. p_j. `splits`: per volume N + 1 cuts 0 = e_0 <= ... <= e_N =
    rows; provider d produces rows [e_d, e_{d+1}) of the volume's output, an empty range leaves it out. `latency`: seconds under the model
    it was made with, +inf when it cannot run. `finish`: seconds until each provider has finished each volume. `compared`: latency of what it
    was compared with, by name. `method`: what found it.
    """

    net: str
    fingerprint: str
    devices: tuple[str, ...]
    volumes: tuple[int, ...]
    splits: tuple[tuple[int, ...], ...]
    latency: float
    method: str
    root: int
    finish: tuple[tuple[float, ...], ...]
    compared: dict[str, float] = field(default_factory=dict)
    planner: SpatialPlanner | None = field(default=None, repr=False)

    def rows(self, volume: int, provider: int) -> tuple[int, int]:
        """The output rows [lo, hi) of a volume that a provider produces."""
        cuts = self.splits[volume]
        return cuts[provider], cuts[provider + 1]

    def replan(self, links=None, lost: Sequence[str | int] = (), back: Sequence[str | int] = (), budget: float | None = None) -> SpatialPlan:
        """A new plan after changed rates or lost or returned providers, warm-started from this one (see `SpatialPlanner.replan`)."""
        if self.planner is None:
            raise ValueError("replan: this plan was read from a file and has no planner; call plan_spatial(..., candidates=[plan])")
        return self.planner.replan(links=links, lost=lost, back=back, budget=budget, start=self)

    def explain(self) -> str:
        """Why this plan, in words and numbers: what it was compared with, and per volume rows and finish times of every provider."""
        ms = lambda t: "never" if not t < math.inf else f"{t * 1e3:.2f} ms"
        used = [d for d in range(len(self.devices)) if any(c[d] < c[d + 1] for c in self.splits)]
        count = len(self.volumes) - 1
        speed = f" ({1 / self.latency:.1f} images/s)" if 0 < self.latency < math.inf else ""
        lines = [f"{self.net} on {len(self.devices)} providers: {ms(self.latency)}{speed}, found by {self.method}; "
                 f"{len(used)} of them used, {count} volume{'s' * (count > 1)}, answers gathered at {self.devices[self.root]}."]  # fmt: skip
        for name, other in sorted(self.compared.items(), key=lambda item: item[1]):
            ratio = f"{other / self.latency:.2f}x this plan" if 0 < self.latency < math.inf and other < math.inf else "cannot run"
            lines.append(f"  {name:<14}{ms(other):>12}  {ratio}")
        for j, cuts in enumerate(self.splits):
            lines.append(f"layers {self.volumes[j] + 1}..{self.volumes[j + 1]}, {cuts[-1]} rows:")
            for d in used:
                share = f"rows {cuts[d]}..{cuts[d + 1] - 1}" if cuts[d] < cuts[d + 1] else "nothing"
                lines.append(f"  {self.devices[d]:<14}{share:<16} done after {ms(self.finish[j][d])}")
        last = max(used, key=lambda d: self.finish[-1][d]) if used else self.root
        lines.append(f"Last to finish its rows: {self.devices[last]}; unused: {', '.join(n for d, n in enumerate(self.devices) if d not in used) or 'none'}.")
        return "\n".join(lines)

    def to_json(self) -> bytes:
        """The plan as JSON (UTF-8), without its planner."""
        finite = lambda t: t if t < math.inf else None
        return msgspec.json.encode(_Json(
            _FORMAT, _VERSION, self.net, self.fingerprint, list(self.devices), list(self.volumes), [list(c) for c in self.splits], finite(self.latency),
            self.method, [[finite(t) for t in row] for row in self.finish], {k: finite(v) for k, v in self.compared.items()}, self.root))  # fmt: skip

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan as JSON."""
        Path(path).write_bytes(self.to_json())

    @classmethod
    def from_json(cls, data: bytes | str) -> SpatialPlan:
        """Read what `to_json` wrote; anything else raises `CheckpointMismatch` or `ValueError`."""
        try:
            j = msgspec.json.decode(data, type=_Json)
        except msgspec.MsgspecError as error:
            raise ValueError(f"SpatialPlan: not a plan: {error}") from None
        if j.format != _FORMAT or j.version != _VERSION:
            raise CheckpointMismatch(f"SpatialPlan: got format {j.format!r} version {j.version}, expected {_FORMAT!r} version {_VERSION}")
        n, k = len(j.devices), len(j.volumes) - 1
        rising = lambda values, strict: all(a < b if strict else a <= b for a, b in zip(values, values[1:], strict=False))
        good = k >= 1 and n >= 1 and len(j.splits) == len(j.finish) == k and all(len(c) == n + 1 and c[0] == 0 and rising(c, False) for c in j.splits)
        if not good or j.volumes[0] != 0 or not rising(j.volumes, True) or not all(len(f) == n for f in j.finish) or not 0 <= j.root < n:
            raise ValueError("SpatialPlan: volumes, splits, finish, root and devices do not fit each other")
        time = lambda t: math.inf if t is None else t
        return cls(j.net, j.fingerprint, tuple(j.devices), tuple(j.volumes), tuple(map(tuple, j.splits)), time(j.latency), j.method, j.root,
                   tuple(tuple(time(t) for t in row) for row in j.finish), {name: time(t) for name, t in j.compared.items()})  # fmt: skip

    @classmethod
    def load(cls, path: str | os.PathLike) -> SpatialPlan:
        """Read a plan that `save` wrote."""
        return cls.from_json(Path(path).read_bytes())

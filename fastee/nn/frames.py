"""Frame exits (DAISY, arXiv 2406.05464): a sequence encoder stops at the first layer whose branch is sure of the frames' pseudo-labels."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastee import ops
from fastee.errors import did_you_mean

RANGES = ("avg", "min-max", "threshold")
BATCH_MODES = ("all", "per_sample")


@dataclasses.dataclass
class FrameResult:
    """``feature`` [B, T, D] for the downstream task, ``exit`` int64 [B] (layers run, 1..L), ``entropy`` fp32 [B] (mean over real frames at the last
    branch asked; NaN where none was), ``branches`` number of branch evaluations of the batch."""

    feature: Tensor
    exit: Tensor
    entropy: Tensor
    branches: int


class FrameExits(nn.Module):
    """An encoder ``stem -> layers`` with one branch (norm and linear to V clusters) per layer.

    `stem` maps the input to [B, T, D] (it is feature 0), each of the L `layers` maps [B, T, D] to [B, T, D], called as ``layer(h)`` or, when a mask is given and
    `masked` is true, as ``layer(h, mask)``, mask bool [B, T] true for real frames. Its feature after m layers is sum_{k<=m} softmax(w[0..m])_k h_k,
    w learned with the downstream task (`per_exit`: one row of w per exit).

    While `collect` is on, every layer's branch is asked and exits are counted; afterwards only those in `exit_range`, and the last of the range always exits.
    Branches ask fastee.ops.mean_entropy; a row of NaN never exits early.
    """

    def __init__(
        self, stem: nn.Module, layers: Sequence[nn.Module], features: int, clusters: int, *, threshold: float = 0.5, masked: bool = False, per_exit: bool = False
    ):  # fmt: skip
        super().__init__()
        if not layers:
            raise ValueError("layers: expected at least one")
        for name, value in (("features", features), ("clusters", clusters)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        self.stem, self.layers = stem, nn.ModuleList(layers)
        self.branches = nn.ModuleList(nn.Sequential(nn.LayerNorm(features), nn.Linear(features, clusters)) for _ in layers)
        n = len(layers)
        self.mix = nn.Parameter(torch.zeros(n if per_exit else 1, n + 1))
        self.masked, self.collect = masked, False
        self.register_buffer("counts", torch.zeros(n, dtype=torch.int64))
        self.set_rule(threshold)

    def set_rule(self, threshold: float, range: str = "avg", share: float = 0.2, batch_mode: str = "all") -> FrameExits:
        """Set the entropy threshold (nats; -1: full depth, +inf: the first branch asked), how the range is taken from the counted exits (``avg``: floor
        and ceil of their mean, ``min-max``, ``threshold``: layers with more than `share` of them), and whether the rows of a batch leave together
        (``all``, as published) or each for itself (``per_sample``); return the module."""
        for name, value, known in (("range", range, RANGES), ("batch_mode", batch_mode, BATCH_MODES)):
            if value not in known:
                raise ValueError(f"{name}: expected one of {list(known)}, got {value!r}{did_you_mean(str(value), known)}")
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or math.isnan(threshold):
            raise ValueError(f"threshold: expected a number, got {threshold!r}")
        self.threshold, self.range, self.share, self.batch_mode = float(threshold), range, share, batch_mode
        return self

    @property
    def exit_range(self) -> list[int]:
        """The layers (1..L) whose branch is asked; empty without counted exits: full depth."""
        counts = self.counts.tolist()
        total = sum(counts)
        if not total:
            return []
        mean = sum(m * c for m, c in enumerate(counts, 1)) / total
        if self.range == "avg":
            return sorted({math.floor(mean), math.ceil(mean)})
        used = [m for m, c in enumerate(counts, 1) if c]
        if self.range == "min-max":
            return list(range(used[0], used[-1] + 1))
        return [m for m, c in enumerate(counts, 1) if c / total > self.share]

    def hidden(self, x: Any, mask: Tensor | None = None) -> list[Tensor]:
        """Return all L+1 features [B, T, D], the stem's first."""
        out = [self.stem(x)]
        for layer in self.layers:
            out.append(self._layer(layer, out[-1], mask))
        return out

    def _layer(self, layer: nn.Module, h: Tensor, mask: Tensor | None) -> Tensor:
        return layer(h, mask) if self.masked and mask is not None else layer(h)

    def weights(self, exit: int) -> Tensor:
        """Return the mixing weights [exit + 1] of the features up to layer `exit`; they sum to 1."""
        return torch.softmax(self.mix[exit - 1 if len(self.mix) > 1 else 0, : exit + 1], 0)

    def forward(self, x: Any, mask: Tensor | None = None) -> FrameResult:
        """Encode a batch; see the class. Gradients reach `mix` and what the downstream task adds, never decide an exit."""
        if mask is not None and not bool(mask.to(torch.bool).any(1).all()):
            raise ValueError(f"mask: row {int((~mask.to(torch.bool).any(1)).nonzero()[0])} has no real frame")
        n, ask = len(self.layers), self.exit_range
        asked = list(range(1, n + 1)) if self.collect else ask
        last = n if self.collect or not ask else max(ask)
        if not asked:
            warnings.warn("FrameExits: no exits were counted (or none is in the range), so every input runs to full depth", stacklevel=2)
        h = self.stem(x)
        rows, kept, total = torch.arange(len(h), device=h.device), [h], len(h)
        exit_, entropy = torch.full((total,), n, device=h.device), torch.full((total,), math.nan, device=h.device)
        done: list[tuple[Tensor, Tensor]] = []
        evaluations = 0
        for m in range(1, n + 1):
            h = self._layer(self.layers[m - 1], h, mask)
            kept.append(h)
            leave = torch.zeros(len(rows), dtype=torch.bool, device=h.device)
            if m in asked:
                with torch.no_grad():
                    found = ops.mean_entropy(self.branches[m - 1](h), mask)
                evaluations += 1
                entropy[rows] = found
                leave = (self._pooled(found, mask, h) if self.batch_mode == "all" else found) <= self.threshold
            if m == last:
                leave = torch.ones_like(leave)
            if not bool(leave.any()):
                continue
            exit_[rows[leave]] = m
            w = self.weights(m)
            done.append((rows[leave], sum(w[k] * f[leave] for k, f in enumerate(kept))))
            if bool(leave.all()):
                break
            rows, kept = rows[~leave], [f[~leave] for f in kept]
            h, mask = kept[-1], None if mask is None else mask[~leave]
        feature = done[0][1] if len(done) == 1 else h.new_empty(total, *h.shape[1:]).index_copy(0, torch.cat([r for r, _ in done]), torch.cat([f for _, f in done]))
        if self.collect and total:
            together = self.batch_mode == "all"
            self.counts += torch.bincount(exit_[:1] - 1 if together else exit_ - 1, minlength=n).to(self.counts)
        return FrameResult(feature, exit_, entropy, evaluations)

    @staticmethod
    def _pooled(found: Tensor, mask: Tensor | None, h: Tensor) -> Tensor:
        """The mean over all real frames of the batch, for every row."""
        frames = torch.full((len(found),), float(h.shape[1]), device=found.device) if mask is None else mask.to(torch.bool).sum(1).to(found)
        return ((found * frames).sum() / frames.sum().clamp_min(1)).expand(len(found))

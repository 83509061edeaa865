"""A team of small students with joined exits (NoNN, arXiv 1907.11804; DistrEE, arXiv 2502.15735): each runs alone, an aggregator joins what
they see at each depth and stops them once that no longer changes."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastee import ops
from fastee.nn.early_exit import EarlyExit
from fastee.nn.result import ExitResult


class Branch(nn.Module):
    """What a student shows of a feature map [B, C, H, W]: 1x1 convolution to its share of the teacher's channels, norm, ReLU, mean: [B, P]."""

    def __init__(self, channels: int, share: int):
        super().__init__()
        self.channels, self.share = channels, share
        self.conv, self.norm = nn.Conv2d(channels, share, 1, bias=False), nn.BatchNorm2d(share)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x))).mean((2, 3))


class StudentTeam(nn.Module):
    """N students, M exits; row by row the team answers at the first exit where the joined feature has settled.

    `students`: networks of `fastee.attach`, each with the same number M >= 1 of exits, whose outputs are maps [B, C, H, W]; only their segments up to the last
    exit run, their own heads and ends do not. `groups`: the teacher's channels that each student imitates (see `fastee.training.partition`).

    In train mode ``team(x)`` returns per exit (joined feature [B, P], logits [B, C]). In eval mode it answers an `ExitResult`; its confidence is
    -Delta, Delta = |unit(F_m) - unit(F_{m-1})| by `fastee.ops.feature_delta`, -inf at the first exit, and a row leaves when Delta < delta_m.
    """

    def __init__(self, students: Sequence[EarlyExit], groups: Sequence[Sequence[int]], num_classes: int):
        super().__init__()
        if not students or len(students) != len(groups) or not all(len(g) for g in groups):
            raise ValueError(f"groups: expected one non-empty list of channels per student ({len(students)}), got {[len(g) for g in groups]}")
        if len({s.num_exits for s in students}) != 1:
            raise ValueError(f"students: expected the same number of exits in each, got {[s.num_exits for s in students]}")
        self.num_exits, self.num_classes = students[0].num_exits, num_classes
        self.groups = [list(map(int, g)) for g in groups]
        self.students = nn.ModuleList(students)
        branches, self._branch_macs = [], []
        for student, group in zip(students, groups, strict=True):
            with torch.no_grad():
                maps = _maps(student)
            for m, t in enumerate(maps):
                if t.ndim != 4:
                    raise ValueError(f"students: exit {student.exit_names[m]!r} gives {list(t.shape)}, expected a map [B, C, H, W]")
            branches.append(nn.ModuleList(Branch(t.shape[1], len(group)) for t in maps))
            self._branch_macs.append([t.shape[1] * len(group) * t.shape[2] * t.shape[3] for t in maps])
        self.branches = nn.ModuleList(branches)
        width = sum(map(len, self.groups))
        self.heads = nn.ModuleList(nn.Linear(width, num_classes) for _ in range(self.num_exits))
        self.delta = [0.0] * self.num_exits

    def set_delta(self, delta: float | Sequence[float]) -> StudentTeam:
        """Set the largest change of the joined feature that counts as settled, one number or one per exit (the first is never used), and return the team."""
        values = [float(delta)] * self.num_exits if isinstance(delta, (int, float)) else [float(d) for d in delta]
        if len(values) != self.num_exits or not all(d >= 0 for d in values):
            raise ValueError(f"delta: expected {self.num_exits} numbers >= 0, got {values}")
        self.delta = values
        return self

    @property
    def macs(self) -> list[float]:
        """Multiply-adds per row until each exit [M], of all students, branches and heads."""
        steps = [
            sum(s.macs["segments"][m] + b[m] for s, b in zip(self.students, self._branch_macs, strict=True))
            + self.heads[m].in_features * self.num_classes
            for m in range(self.num_exits)
        ]
        return [float(sum(steps[: m + 1])) for m in range(self.num_exits)]

    def run_student(self, i: int, m: int, carry: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Run segment `m` of student `i` (0-based) and return its carry and what it shows, f [B, P_i]."""
        carry = self.students[i].run_segment(m, carry)
        return carry, self.branches[i][m](carry[0])

    def join(self, features: Sequence[Tensor | None]) -> Tensor:
        """Return the joined feature [B, P]; a student that did not answer (None) counts as zeros."""
        known = next(f for f in features if f is not None)
        parts = [known.new_zeros(len(known), len(g)) if f is None else f for f, g in zip(features, self.groups, strict=True)]
        return torch.cat(parts, 1)

    def change(self, joined: Tensor, before: Tensor, both: Collection[int]) -> Tensor:
        """Return Delta [B] between two joined features over the students that answered both times; +inf where nothing can be compared."""
        if not both:
            return torch.full((len(joined),), math.inf, device=joined.device)
        if len(both) < len(self.groups):
            columns = torch.tensor([i in both for i, g in enumerate(self.groups) for _ in g], device=joined.device)
            joined, before = joined[:, columns], before[:, columns]
        return ops.feature_delta(joined, before)

    def forward(self, *x: Any, lost: Sequence[Collection[int]] | None = None) -> Any:
        """Answer a batch; `lost`: per exit the students that do not answer there (they may answer again later)."""
        values = self.students[0].inputs.flat(x[0] if len(x) == 1 else x)
        if self.training:
            return self._train(values)
        with torch.no_grad():
            return self._run(values, lost or [()] * self.num_exits)

    def _train(self, values: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
        carries, out = [values] * len(self.students), []
        for m, head in enumerate(self.heads):
            shown = [self.run_student(i, m, c) for i, c in enumerate(carries)]
            carries = [c for c, _ in shown]
            joined = self.join([f for _, f in shown])
            out.append((joined, head(joined)))
        return out

    def _run(self, values: tuple[Tensor, ...], lost: Sequence[Collection[int]]) -> ExitResult:
        total, n = len(values[0]), len(self.students)
        logits = values[0].new_empty(total, self.num_classes, dtype=self.heads[0].weight.dtype)
        label = torch.full((total,), -1, dtype=torch.int64, device=logits.device)
        confidence = torch.full((total,), math.nan, device=logits.device)
        exit_ = torch.full_like(label, self.num_exits - 1)
        rows, carries = torch.arange(total, device=logits.device), [values] * n
        before: Tensor | None = None
        answered: set[int] = set()
        forced = torch.zeros(total, dtype=torch.bool, device=logits.device)
        for m, head in enumerate(self.heads):
            if not len(rows):
                break
            shown = [self.run_student(i, m, c) for i, c in enumerate(carries)]
            carries = [c for c, _ in shown]
            here = set(range(n)) - set(lost[m])
            if not here:
                if m == 0:
                    raise ValueError("lost: no student answered at the first exit, so there is no answer")
                forced[rows], exit_[rows] = True, m - 1
                break
            joined = self.join([f if i in here else None for i, (_, f) in enumerate(shown)])
            z = head(joined)
            delta = torch.full((len(rows),), math.inf, device=z.device) if before is None else self.change(joined, before, here & answered)
            logits[rows], label[rows], confidence[rows], exit_[rows] = z, ops.row_stats(z).label, -delta, m
            stay = torch.nonzero(~(delta < self.delta[m])).flatten()
            rows, before, answered = rows[stay], joined[stay], here
            carries = [tuple(t[stay] for t in c) for c in carries]
        return ExitResult(logits, label, confidence, exit_, forced)


def _maps(student: EarlyExit) -> list[Tensor]:
    carry, out = student.inputs.example, []
    for m in range(student.num_exits):
        carry = student.run_segment(m, carry)
        out.append(carry[0])
    return out

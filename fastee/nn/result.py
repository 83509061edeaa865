"""What a network with exits answers: a light object that makes its tensors when they are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastee import ops
from fastee.nn.trace import logits_of


class ExitResult:
    """The answers of B rows, in the order of the input.

    ``.logits`` [B, C] of the exit that each row took, ``.label`` int64 [B], ``.confidence`` fp32 [B] (the score of the
    network's measure, larger = more confident), ``.exit`` int64 [B] (0-based; K is the backbone's own end), ``.forced``
    bool [B] (left because of the deadline). Read once, kept. A row with NaN logits has label -1.
    """

    __slots__ = ("_logits", "_label", "_confidence", "_exit", "_forced", "_source", "__weakref__")

    def __init__(self, logits: Tensor, label: Tensor, confidence: Tensor, exit: Tensor, forced: Tensor | None = None):
        self._logits, self._label, self._confidence, self._exit = logits, label, confidence, exit
        self._forced = torch.zeros(len(label), dtype=torch.bool, device=label.device) if forced is None else forced
        self._source = None

    @classmethod
    def _of(cls, source: Any) -> ExitResult:
        result = cls.__new__(cls)
        result._source = source
        return result

    @property
    def logits(self) -> Tensor:
        try:
            return self._logits
        except AttributeError:
            self._logits = self._source.logits()
        return self._logits

    @property
    def label(self) -> Tensor:
        try:
            return self._label
        except AttributeError:
            self._decide()
        return self._label

    @property
    def confidence(self) -> Tensor:
        try:
            return self._confidence
        except AttributeError:
            self._decide()
        return self._confidence

    @property
    def exit(self) -> Tensor:
        try:
            return self._exit
        except AttributeError:
            self._decide()
        return self._exit

    @property
    def forced(self) -> Tensor:
        try:
            return self._forced
        except AttributeError:
            self._decide()
        return self._forced

    def _decide(self) -> None:
        self._label, self._confidence, self._exit, self._forced = self._source.decisions()

    def __len__(self) -> int:
        return self.label.shape[0]

    __iter__ = None  # len() alone would make it iterable by index

    def __repr__(self) -> str:
        rows = len(self)
        shares = torch.bincount(self.exit).tolist() if rows else []
        logits = self.logits
        return f"ExitResult({rows} rows, {logits.shape[1]} classes, rows per exit {shares})"

    def __reduce__(self):
        return ExitResult, (self.logits, self.label, self.confidence, self.exit, self.forced)


class Whole:
    """Every row ran to the end: only the backbone's own answer is held."""

    __slots__ = ("output", "end", "measure")

    def __init__(self, output: Any, end: int, measure: str):
        self.output, self.end, self.measure = output, end, measure

    def logits(self) -> Tensor:
        return logits_of(self.output)

    def decisions(self):
        label, confidence = judge(self.logits(), self.measure)
        rows = label.shape[0]
        exit_ = torch.full((rows,), self.end, dtype=torch.int64, device=label.device)
        return label, confidence, exit_, torch.zeros(rows, dtype=torch.bool, device=label.device)


class Parts:
    """Groups of rows that left together: (exit, rows or None for all, positions in the step or None, step, forced)."""

    __slots__ = ("rows", "parts")

    def __init__(self, rows: int, parts: list[tuple[int, Tensor | None, Tensor | None, Any, Any]]):
        self.rows, self.parts = rows, parts

    def logits(self) -> Tensor:
        pieces = [_pick(step.logits, at) for _, _, at, step, _ in self.parts]
        if len(pieces) == 1 and self.parts[0][1] is None:
            return pieces[0]
        dtype = pieces[0].dtype
        for p in pieces[1:]:
            dtype = torch.promote_types(dtype, p.dtype)
        out = pieces[0].new_empty((self.rows, pieces[0].shape[1]), dtype=dtype)
        for (_, rows, *_), piece in zip(self.parts, pieces, strict=True):
            out[rows] = piece.to(dtype)
        return out

    def decisions(self):
        k, rows, at, step, late = self.parts[0]
        if rows is None and len(self.parts) == 1:  # they all left together, as a batch of one does: nothing to put together
            label = _pick(step.label, at)
            forced = torch.zeros_like(label, dtype=torch.bool)
            return label, _pick(step.confidence, at), torch.full_like(label, k), forced if late is None else forced | late
        first = step.label
        label = torch.empty(self.rows, dtype=torch.int64, device=first.device)
        confidence = torch.empty(self.rows, dtype=torch.float32, device=first.device)
        exit_, forced = torch.empty_like(label), torch.zeros(self.rows, dtype=torch.bool, device=first.device)
        for k, rows, at, step, late in self.parts:
            where = slice(None) if rows is None else rows
            label[where], confidence[where], exit_[where] = _pick(step.label, at), _pick(step.confidence, at), k
            if late is not None:
                forced[where] = late
        return label, confidence, exit_, forced


class End:
    """The backbone's own end, seen like the step of an exit."""

    __slots__ = ("logits", "measure", "_judged")

    def __init__(self, logits: Tensor, measure: str):
        self.logits, self.measure, self._judged = logits, measure, None

    @property
    def label(self) -> Tensor:
        return self._judge()[0]

    @property
    def confidence(self) -> Tensor:
        return self._judge()[1]

    def _judge(self):
        if self._judged is None:
            self._judged = judge(self.logits, self.measure)
        return self._judged


def _pick(values: Tensor, at: Tensor | None) -> Tensor:
    return values if at is None else values[at]


def judge(logits: Tensor, measure: str) -> tuple[Tensor, Tensor]:
    """Return (label int64 [B], score fp32 [B]) of logits [B, C]; measures that remember score the end by max_prob."""
    stats = ops.row_stats(logits.detach() if logits.requires_grad else logits)
    if measure == "entropy":
        return stats.label, -stats.entropy
    return stats.label, stats.lse if measure == "energy" else stats.margin if measure == "margin" else stats.max_prob

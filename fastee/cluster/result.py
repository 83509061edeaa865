"""What a cluster answers for a batch: an ExitResult with the journey of every row."""

from __future__ import annotations

import torch

from fastee.cluster.client import TaskAnswer
from fastee.nn.result import ExitResult


class _Answers:
    """The rows, and the tensors made of them."""

    __slots__ = ("rows", "num_classes")

    def __init__(self, rows: list[TaskAnswer | Exception], num_classes: int):
        self.rows, self.num_classes = rows, num_classes

    def column(self, name: str, missing: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([missing if isinstance(a, Exception) else getattr(a, name) for a in self.rows], dtype=dtype)

    def logits(self) -> torch.Tensor:
        found = [None if isinstance(a, Exception) else a.logits for a in self.rows]
        dtype = next((row.dtype for row in found if row is not None), torch.float32)
        nothing = torch.full((self.num_classes,), float("nan"), dtype=dtype)
        return torch.stack([nothing if row is None else row for row in found]) if found else torch.empty(0, self.num_classes)

    def decisions(self):
        return (
            self.column("label", -1, torch.int64),
            self.column("confidence", float("nan"), torch.float32),
            self.column("exit", -1, torch.int64),
            self.column("forced", False, torch.bool),
        )


class ClusterResult(ExitResult):
    """An :class:`~fastee.ExitResult` of B rows plus, per row, what its journey cost.

    ``.latency`` fp64 [B] seconds, ``.node`` int64 [B] (index of the node where the row ended), ``.wire_bytes`` int64 [B], ``.forced``
    bool [B], ``.errors`` list of None or the typed error. A row with an error has label, exit and node -1 and NaN elsewhere. Tensors are
    made when they are read.
    """

    __slots__ = ("_journey",)

    def __init__(self, answers: list[TaskAnswer | Exception], num_classes: int):
        self._source = _Answers(answers, num_classes)
        self._journey: dict[str, torch.Tensor] = {}

    def __reduce__(self):
        return ClusterResult, (self._source.rows, self._source.num_classes)

    @property
    def errors(self) -> list[Exception | None]:
        return [a if isinstance(a, Exception) else None for a in self._source.rows]

    @property
    def latency(self) -> torch.Tensor:
        return self._of_journey("latency", float("nan"), torch.float64)

    @property
    def node(self) -> torch.Tensor:
        return self._of_journey("node", -1, torch.int64)

    @property
    def wire_bytes(self) -> torch.Tensor:
        return self._of_journey("wire_bytes", 0, torch.int64)

    def _of_journey(self, name: str, missing: float, dtype: torch.dtype) -> torch.Tensor:
        if name not in self._journey:
            self._journey[name] = self._source.column(name, missing, dtype)
        return self._journey[name]

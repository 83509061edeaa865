"""What a cluster answers for a batch: an ExitResult with the journey of every row."""

from __future__ import annotations

import torch

from fastee.cluster.client import TaskAnswer
from fastee.nn.result import ExitResult


class ClusterResult(ExitResult):
    """An :class:`~fastee.ExitResult` of B rows plus, per row, what its journey cost.

    ``.latency`` fp64 [B] seconds, ``.node`` int64 [B] (index of the node where the row ended), ``.wire_bytes`` int64 [B], ``.forced``
    bool [B], ``.errors`` list of None or the typed error. A row with an error has label, exit and node -1 and NaN elsewhere.
    """

    __slots__ = ("latency", "node", "wire_bytes", "errors")

    def __init__(self, answers: list[TaskAnswer | Exception], num_classes: int):
        good = [a if isinstance(a, TaskAnswer) else None for a in answers]
        dtype = next((a.logits.dtype for a in good if a), torch.float32)
        nothing = torch.full((num_classes,), float("nan"), dtype=dtype)

        def column(name: str, missing: float, kind: torch.dtype) -> torch.Tensor:
            return torch.tensor([getattr(a, name) if a else missing for a in good], dtype=kind)

        nan = float("nan")
        super().__init__(
            torch.stack([a.logits if a else nothing for a in good]) if good else torch.empty(0, num_classes),
            column("label", -1, torch.int64),
            column("confidence", nan, torch.float32),
            column("exit", -1, torch.int64),
            column("forced", False, torch.bool),
        )
        self.latency = column("latency", nan, torch.float64)
        self.node = column("node", -1, torch.int64)
        self.wire_bytes = column("wire_bytes", 0, torch.int64)
        self.errors = [a if isinstance(a, Exception) else None for a in answers]

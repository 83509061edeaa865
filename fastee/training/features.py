"""What a fixed backbone gives its heads: pooled features, computed once and kept, or batch by batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastee.nn import EarlyExit
from fastee.nn.batches import labelled
from fastee.nn.trace import eval_mode, logits_of

CACHE_BYTES = 1 << 30


class Features:
    """Batches ``([K features [B, D_k], logits [B, C] of the teacher], labels [B])``; the teacher is the backbone's own end unless given.

    `cache` keeps one pass over the loader in memory (None: when it fits in 1 GiB), shuffled anew every epoch; without, every epoch
    runs the backbone again, in the loader's order.
    """

    def __init__(
        self,
        net: EarlyExit,
        loader: Any,
        batch_size: int,
        cache: bool | None,
        teacher: nn.Module | None = None,
        name: str = "loader",
    ):
        self.net, self.loader, self.batch_size, self.teacher, self.name = net, loader, batch_size, teacher, name
        self.labels: Tensor | None = None
        self.columns: list[Tensor] = []
        self.cached = cache is not False
        if self.cached:
            self._fill(CACHE_BYTES if cache is None else math.inf)

    def __len__(self) -> int:
        return 0 if self.labels is None else len(self.labels)

    def _pass(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        for x, y in labelled(self.loader, self.net.num_classes, next(self.net.heads.parameters()).device, self.name):
            pooled, end = self.net.taps(x)
            if self.teacher is not None:
                with eval_mode(self.teacher):
                    end = logits_of(self.net.inputs.call(self.teacher, self.net.inputs.flat(x)))
                if end.shape != (len(y), self.net.num_classes):
                    raise ValueError(
                        f"teacher: expected logits {[len(y), self.net.num_classes]}, got {list(end.shape)}"
                    )
            yield [*(p.float() for p in pooled), end.float()], y

    def _fill(self, limit: float) -> None:
        parts, labels, used = [], [], 0
        for columns, y in self._pass():
            used += sum(c.numel() * c.element_size() for c in columns)
            if used > limit:
                self.cached = False
                return
            parts.append(columns)
            labels.append(y)
        if not labels:
            raise ValueError(f"{self.name}: it gave no batch")
        self.labels = torch.cat(labels)
        self.columns = [torch.cat(c) for c in zip(*parts, strict=True)]

    def split(self, share: float) -> tuple[Features, Features]:
        """Return two disjoint halves of a cached set, the second with `share` of the rows (at least one), drawn by torch's generator."""
        order = torch.randperm(len(self)).to(self.labels.device)
        cut = len(self) - max(1, round(share * len(self)))
        return self._take(order[:cut]), self._take(order[cut:])

    def _take(self, rows: Tensor) -> Features:
        part = object.__new__(Features)
        part.__dict__.update(self.__dict__, labels=self.labels[rows], columns=[c[rows] for c in self.columns])
        return part

    def steps(self) -> int | None:
        if self.labels is not None:
            return math.ceil(len(self.labels) / self.batch_size)
        return len(self.loader) if hasattr(self.loader, "__len__") else None

    def batches(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        if self.labels is None:
            yield from ((c, y) for c, y in self._pass() if len(y) > 1)  # a batch norm cannot learn from one row
            return
        order = torch.randperm(len(self.labels)).to(self.labels.device)
        for rows in order.split(self.batch_size):
            if len(rows) > 1 or len(order) == 1:
                yield [c[rows] for c in self.columns], self.labels[rows]

"""What ops return. The native results (``fastee._hot``) have the same attributes and make their tensors on first access."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastee import native
from fastee.reference import RowStats


class ExitHeadResult(NamedTuple):
    label: Tensor  # int64 [B]
    confidence: Tensor  # fp32 [B]
    exits: Tensor  # bool [B]
    stats: RowStats
    logits: Tensor | None = None


class ExitStepResult(NamedTuple):
    label: Tensor
    confidence: Tensor
    exits: Tensor
    stats: RowStats
    index: Tensor  # int64 [B]: survivors in order, then the rest reversed
    count: int | Tensor  # survivors; an int in eager mode, a 0-d tensor inside a compiled graph or on a GPU
    logits: Tensor | None = None


class ExitPackResult(NamedTuple):
    label: Tensor
    confidence: Tensor
    exits: Tensor
    stats: RowStats
    index: Tensor
    count: int | Tensor
    wire: Tensor  # uint8 [nbytes]: the survivors' scales, then their data
    packed: QuantizedRows  # the same bytes as rows
    logits: Tensor | None = None


class CompactResult(NamedTuple):
    index: Tensor
    count: int | Tensor


class QuantizedRows(NamedTuple):
    """Rows on the grid of `format` with their scales; `fastee.ops.dequantize_rows` gives the values back."""

    data: Tensor  # int8, float8_e4m3fn or bfloat16 in the shape of the source; int4: uint8 [B, ceil(row / 2)]
    scale: Tensor  # fp32 [B], or [B, groups]; [0] for bf16
    format: str = "int8"
    group: int | None = None
    shape: tuple[int, ...] | None = None  # of the source; None: that of data

    @property
    def nbytes(self) -> int:
        """Bytes of the payload and its scales."""
        return self.data.numel() * self.data.element_size() + self.scale.numel() * self.scale.element_size()


ROWS = (QuantizedRows,) if native.hot is None else (QuantizedRows, native.hot.Rows)

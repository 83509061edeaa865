"""The operations, one file each: docstring, checks, torch registration, ordered backends. Definitions: ``fastee.reference``."""

from fastee.dispatch import explain
from fastee.reference import Norm, RowStats

from .compact import compact
from .exit_head import exit_head
from .exit_pack import exit_pack
from .exit_step import exit_step
from .feature_delta import feature_delta
from .gather_rows import gather_rows, scatter_rows
from .linear_stats import linear_stats
from .mean_entropy import mean_entropy
from .pack_planes import PackedPlanes, pack_planes, unpack_planes
from .pool import pool
from .quantize_rows import dequantize_rows, quantize_rows
from .results import CompactResult, ExitHeadResult, ExitPackResult, ExitStepResult, QuantizedRows
from .row_stats import row_stats

__all__ = [
    "CompactResult", "ExitHeadResult", "ExitPackResult", "ExitStepResult", "Norm", "PackedPlanes", "QuantizedRows", "RowStats", "compact", "dequantize_rows", "exit_head",
    "exit_pack", "exit_step", "explain", "feature_delta", "gather_rows", "linear_stats", "mean_entropy", "pack_planes", "pool", "quantize_rows", "row_stats", "scatter_rows", "unpack_planes",
]  # fmt: skip

"""Every op in a few lines of torch: the definition that all backends are tested against. Imports nothing of fastee."""

from .compact import compact
from .exit_head import exit_head, score
from .exit_step import exit_step
from .feature_delta import feature_delta
from .gather_rows import gather_rows, scatter_rows
from .linear_stats import linear_stats
from .mean_entropy import mean_entropy
from .norm import Norm, normalize
from .pool import pool
from .quantize_rows import dequantize_rows, quantize_rows
from .row_stats import RowStats, row_stats

__all__ = [
    "Norm", "RowStats", "compact", "dequantize_rows", "exit_head", "exit_step", "feature_delta", "gather_rows", "linear_stats", "mean_entropy", "normalize", "pool",
    "quantize_rows", "row_stats", "scatter_rows", "score",
]  # fmt: skip

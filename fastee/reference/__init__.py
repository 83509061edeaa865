"""Every op in a few lines of torch: the definition that all backends are tested against. Imports nothing of fastee."""

from .compact import compact
from .exit_head import exit_head, score
from .exit_pack import exit_pack
from .exit_step import exit_step
from .feature_delta import feature_delta
from .gather_rows import gather_rows, scatter_rows
from .linear_stats import linear_stats
from .mean_entropy import mean_entropy
from .norm import Norm, normalize
from .pack_planes import pack_planes, read_planes_header, unpack_planes
from .pool import pool
from .quantize_rows import dequantize_rows, quantize_rows
from .row_stats import RowStats, row_stats

__all__ = [
    "Norm", "RowStats", "compact", "dequantize_rows", "exit_head", "exit_pack", "exit_step", "feature_delta", "gather_rows", "linear_stats", "mean_entropy", "normalize", "pack_planes", "pool",
    "quantize_rows", "read_planes_header", "row_stats", "scatter_rows", "score", "unpack_planes",
]  # fmt: skip

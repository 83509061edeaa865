"""Tolerances, edge inputs and the benchmark harness: what fastee's own tests and benchmarks stand on, for users too."""

from fastee.testing.inputs import (
    CLASS_COUNTS,
    MASK_SIZES,
    edge_logits,
    edge_masks,
    edge_rows,
    float64_stats,
    half_dominant,
    stats_in,
)
from fastee.testing.tolerances import (
    assert_compacted,
    assert_decisions_match,
    assert_quantized,
    assert_stats_close,
    floor,
)

__all__ = [
    "CLASS_COUNTS",
    "MASK_SIZES",
    "assert_compacted",
    "assert_decisions_match",
    "assert_quantized",
    "assert_stats_close",
    "edge_logits",
    "edge_masks",
    "edge_rows",
    "float64_stats",
    "floor",
    "half_dominant",
    "stats_in",
]

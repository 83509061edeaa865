"""Networks with exits as files that run without their code: ``export``, ``load_exported``, ``SegmentRunner``."""

from fastee.exporting.export import export
from fastee.exporting.runner import SegmentRunner, load_exported

__all__ = ["SegmentRunner", "export", "load_exported"]

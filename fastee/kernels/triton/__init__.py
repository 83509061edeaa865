"""The ops as Triton kernels. A file holds an op's kernels and its launcher, which takes tensors, allocates nothing and never synchronises.

Every kernel runs on the current stream and may be captured in a CUDA graph. Tiles and summation orders depend on shapes of one row and
on the `Tuning` alone, so a row's answer does not depend on the batch it stands in. This file imports neither triton nor torch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
KERNELS = tuple(sorted(p.stem for p in HERE.glob("*.py") if not p.stem.startswith("_")))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # triton reads it when a kernel is decorated: a process is either or


@functools.cache
def missing() -> str | None:
    """Say why Triton's kernels cannot run here, None when they can."""
    return None if importlib.util.find_spec("triton") else "triton is not installed: pip install triton"


@functools.cache
def load(kernel: str) -> ModuleType:
    """Import a kernel's module; the kernels are compiled on their first launch with a new signature."""
    return importlib.import_module(f"{__name__}.{kernel}")

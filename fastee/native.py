"""Finds the native parts (libfastee through ``_hot``, the scheduler through ``_C``) and explains itself when they are missing."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

REPAIR = "run `make build` in the source tree, or `FASTEE_BUILD=cpu pip install --force-reinstall --no-deps .` (CMake and a C++20 compiler needed)"

hot: ModuleType | None = None  # the C ABI's hot calls, None when not built
core: ModuleType | None = None  # the pybind11 module, None when not built
reason: dict[str, str] = {}  # part -> why it is missing


def _load(part: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"fastee.{part}")
    except ImportError as error:
        reason[part] = str(error)
        return None


if os.environ.get("FASTEE_NATIVE", "1") == "0":
    reason["_hot"] = reason["_C"] = "switched off by FASTEE_NATIVE=0"
else:
    hot, core = _load("_hot"), _load("_C")


def isa() -> str | None:
    """Return the instruction set that the CPU kernels run on now (``scalar``, ``avx2``, ``avx512`` ...), None without native parts."""
    return hot.isa() if hot else None


def isas() -> list[str]:
    """Return the instruction sets that this build holds and this CPU can run, best first."""
    return hot.isas() if hot else []

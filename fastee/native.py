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


def get_num_threads() -> int:
    """Return how many threads a large native call uses, its own included; 1 without native parts.

    >>> import fastee
    >>> fastee.native.get_num_threads() >= 1
    True
    """
    return hot.get_num_threads() if hot else 1


def set_num_threads(count: int) -> None:
    """Let large native calls use `count` threads; 0 = ``FASTEE_NUM_THREADS``, else the cores that this process may use.

    Results are the same bits for every count. Small calls (batch 1 among them) stay on their own thread, idle workers sleep, and a
    child process after a fork starts without workers. Without native parts there is nothing to set. Raises `TypeError` when `count`
    is not an int, `ValueError` when it is negative or beyond 1024.

    >>> import fastee
    >>> fastee.native.set_num_threads(0)
    """
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"set_num_threads: count must be an int, got {type(count).__name__}")
    if not 0 <= count <= 1024:
        raise ValueError(f"set_num_threads: count must lie in [0, 1024], got {count}")
    if hot:
        hot.set_num_threads(count)

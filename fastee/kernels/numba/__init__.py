"""The ops compiled by numba: fast exit checks from a plain install, without CMake or a C++ compiler.

Importing a kernel's module compiles it (seconds, once per machine) or loads it from numba's cache (milliseconds). This file imports
neither numba nor numpy, so that asking costs nothing. ``python -m fastee.kernels.numba`` compiles everything.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
KERNELS = tuple(sorted(p.stem for p in HERE.glob("*.py") if not p.stem.startswith("_")))


@functools.cache
def missing() -> str | None:
    """Say why numba's kernels cannot run here, None when they can."""
    return None if importlib.util.find_spec("numba") else "numba is not installed: pip install numba"


@functools.cache
def stamp() -> str:
    """Return what compiled code depends on: these sources, numba, Python and the processor."""
    what = hashlib.sha256(f"{HERE} {importlib.metadata.version('numba')} {sys.version} {_processor()}".encode())
    for path in sorted(HERE.glob("*.py")):
        what.update(path.read_bytes())
    return what.hexdigest()[:16]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line for line in lines if line.startswith(("model name", "CPU part")))
    except (OSError, StopIteration):
        return platform.processor()


def _marks() -> list[Path]:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return [HERE / "__pycache__", Path(cache) / "fastee" / "numba"]


def _name(kernel: str) -> str:
    return f"{kernel}-{stamp()}.compiled"


def mark(kernel: str) -> None:
    """Note that `kernel` lies compiled in numba's cache."""
    for folder in _marks():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob(f"{kernel}-*.compiled"):
                old.unlink(missing_ok=True)
            (folder / _name(kernel)).touch()
            return
        except OSError:
            continue


def loaded(kernel: str) -> bool:
    """Say whether `kernel` is compiled in this process."""
    return hasattr(sys.modules.get(f"{__name__}.{kernel}"), "COMPILED")


@functools.cache
def on_disk(kernel: str) -> bool:
    """Say whether `kernel` was found compiled in numba's cache; looked up once per process."""
    return any((folder / _name(kernel)).exists() for folder in _marks())


@functools.cache
def load(kernel: str) -> ModuleType:
    """Import a kernel's module, which compiles it or loads its compiled code."""
    return importlib.import_module(f"{__name__}.{kernel}")

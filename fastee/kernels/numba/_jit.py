"""How a kernel is compiled: one signature, at import, kept on disk where that is possible.

No fastmath: NaN and -inf have meaning here, and a sum keeps its order. The GIL is free while a kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable

import numba

from . import mark, stamp

OPTIONS = {"nogil": True, "error_model": "numpy"}  # a division by zero gives inf or NaN, as in torch

inline = numba.njit(**OPTIONS)  # for what kernels call; compiled into each of them


def kernel(signature: str) -> Callable:
    """Compile a function for `signature` now, or load it as it was compiled before."""

    def compiled(function: Callable) -> Callable:
        try:
            made = numba.njit(cache=True, **OPTIONS)(function)
            # numba compares the date of the function's own file; what it calls stands in other files of this folder.
            made._cache._cache_file._source_stamp = stamp()
            made.compile(signature)
            mark(function.__module__.rpartition(".")[2])
        except (RuntimeError, OSError, AttributeError):  # no place to keep it, a full disk, another numba: compile for this process
            made = numba.njit(**OPTIONS)(function)
            made.compile(signature)
        made.disable_compile()
        return made

    return compiled

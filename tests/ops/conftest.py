"""One body per op, every way of running it: the reference, numba, and the native kernels on each instruction set of this CPU."""

import pytest

from fastee import native
from fastee.kernels import numba, triton

WAYS = ["reference", "numba", "triton", *[f"cpu-{isa}" for isa in ("scalar", "emu16", "neon", "avx2", "avx512")]]


@pytest.fixture(params=WAYS)
def way(request):
    """Select the instruction set of the parameter and return the name for ``backend=``."""
    backend, _, isa = request.param.partition("-")
    if backend == "cpu":
        if native.hot is None:
            pytest.skip(f"native parts: {native.reason['_hot']}")
        if isa not in native.isas():
            pytest.skip(f"this CPU or build has no {isa} (it has {', '.join(native.isas())})")
        before = native.isa()
        native.hot.select_isa(isa)
        yield backend
        native.hot.select_isa(before)
    else:
        if backend == "numba" and numba.missing():
            pytest.skip(numba.missing())
        if backend == "triton" and (triton.missing() or not triton.INTERPRETED):
            pytest.skip(triton.missing() or "triton's kernels run in a process of its own: tests/compile/test_interpreter.py")
        yield backend


@pytest.fixture
def every_isa():
    """Return a function that runs a callable once per instruction set of this CPU and lists (name, result)."""
    if native.hot is None:
        pytest.skip(f"native parts: {native.reason['_hot']}")

    def run(f):
        before = native.isa()
        try:
            results = []
            for isa in native.isas():
                native.hot.select_isa(isa)
                results.append((isa, f()))
            return results
        finally:
            native.hot.select_isa(before)

    return run

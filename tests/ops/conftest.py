"""One body per op, every way of running it: the reference, numba, and the native kernels on each instruction set of this CPU.

With FASTEE_TEST_DEVICE=cuda (`make test-gpu`) the device backends run on that device: inputs and results are moved around every call.
With FASTEE_TEST_DEVICE=emulated the CUDA library's own sources, compiled for the host, take the place of libfastee_cuda.
"""

import contextlib
import os
import types
from pathlib import Path

import pytest
import torch

from fastee import dispatch, native, ops
from fastee.errors import BackendUnavailable
from fastee.kernels import cuda, numba, triton
from fastee.ops import _cuda
from fastee.testing.device import on_device

DEVICE = os.environ.get("FASTEE_TEST_DEVICE")
EMULATED = Path(__file__).resolve().parents[2] / "build" / "libfastee_cuda_emulated.so" if DEVICE == "emulated" else None
MOVED = ("cuda",) if EMULATED else ("triton", "cuda")
WAYS = ["reference", "numba", "triton", "cuda", *[f"cpu-{isa}" for isa in ("scalar", "emu16", "neon", "avx2", "avx512")]]


def moved(function):
    """Return an op whose device backends are called on DEVICE; what such a backend declines is a skip."""
    there = on_device(function, "cpu" if EMULATED else DEVICE)

    def call(*args, backend=None, **kwargs):
        if backend not in MOVED:
            return function(*args, backend=backend, **kwargs)
        try:
            return there(*args, backend=backend, **kwargs)
        except BackendUnavailable as why:
            pytest.skip(str(why))

    return call


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch):
    """Move every call of a device backend to DEVICE, if there is one."""
    if EMULATED:
        monkeypatch.setattr(cuda, "PATH", EMULATED)
        monkeypatch.setattr(cuda, "missing", lambda: None)
        monkeypatch.setattr(_cuda, "HOME", "cpu")
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0))
    if DEVICE:
        for name in dispatch._ops:
            monkeypatch.setattr(ops, name, moved(getattr(ops, name)))


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
        if backend == "cuda" and not DEVICE:
            pytest.skip("needs a CUDA device: make test-gpu")
        if backend == "triton" and (triton.missing() or not (triton.INTERPRETED or (DEVICE and not EMULATED))):
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

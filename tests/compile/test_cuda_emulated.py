"""The CUDA backend from Python to the kernels without a device: the bodies of tests/ops over the sources of libfastee_cuda for the host.

csrc/tests/cuda tests the kernels through their C ABI; here the ops, their ctypes structures and what they allocate are run as well.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastee import native

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "build" / "libfastee_cuda_emulated.so"
FILES = ["exit_head", "exit_pack", "rows", "pack_planes", "narrow_types", "bad_input", "cuda_library"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not LIBRARY.exists(), reason=f"{LIBRARY.name} is not built: make build")
@pytest.mark.skipif(native.hot is None, reason=f"native parts: {native.reason.get('_hot')}")
def test_ops_on_the_emulated_device():
    # shape2 of exit_pack is 28 s of fibers, and no other way through the kernel than the other shapes
    selected = ["-k", "cuda and not (test_equals_the_separate_calls and shape2)"]
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *selected]
    command += [str(ROOT / "tests" / "ops" / f"test_{name}.py") for name in FILES]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "FASTEE_TEST_DEVICE": "emulated"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 200, run.stdout[-2000:]

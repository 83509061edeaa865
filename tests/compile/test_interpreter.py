"""Every Triton kernel in Triton's interpreter: the bodies of tests/ops, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastee.kernels import triton

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(triton.missing() is not None, reason=str(triton.missing()))
def test_ops_in_the_interpreter():
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    command = [
        sys.executable,
        "-W",
        "ignore::RuntimeWarning",
        "-m",
        "pytest",
        "-q",
        "-n2",
        "-p",
        "no:cacheprovider",
        "-k",
        "triton",
        "tests/ops",
    ]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 400, run.stdout[-2000:]
    assert "process of its own" not in run.stdout  # nothing was skipped for want of the interpreter

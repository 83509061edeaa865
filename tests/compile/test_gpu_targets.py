"""`make test-gpu` and `make bench-gpu` where there is no GPU: they say why, and what holds them together holds."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def make(*arguments, **environment):
    return subprocess.run(["make", "-C", ROOT, *arguments], env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device here")
@pytest.mark.parametrize("target", ["test-gpu", "bench-gpu"])
def test_a_target_says_why_it_skips(target):
    run = make(target)
    said = run.stdout + run.stderr
    assert run.returncode == 0 and re.search(rf"^{target}: skipped: torch .* sees no CUDA device$", run.stdout, re.M), said


FAKE = """#!/bin/sh
# Stands in for python: the device is there; the parts end as FAKE says.
case "$*" in
  *here.py*) echo "a device" ;;
  *sanitizer*not*|*"not sanitizer"*) echo ran device; exit ${DEVICE:-0} ;;
  *tests/ops*) echo ran ops; exit ${OPS:-0} ;;
  *sanitizer*) echo ran sanitizer; exit ${SANITIZER:-0} ;;
  *benchmarks.gpu*) echo "ran bench $PYTHONPATH"; exit ${BENCH:-0} ;;
esac
"""


@pytest.mark.skipif(shutil.which("make") is None or shutil.which("timeout") is None, reason="make or timeout is not installed")
def test_a_part_that_fails_stops_no_other(tmp_path):
    """With a python and a cmake that only say what they were asked."""
    for name, text in (("python", FAKE), ("cmake", "#!/bin/sh\nexit 0\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    tools = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": "/carried"}
    fake = f"GPU_PY={tmp_path / 'python'}"
    good = make("test-gpu", fake, **tools)
    assert good.returncode == 0, good.stdout + good.stderr
    assert re.findall(r"^ran (\w+)", good.stdout, re.M) == ["device", "ops", "sanitizer"]
    bad = make("test-gpu", fake, **tools, DEVICE="1", SANITIZER="7")
    assert bad.returncode != 0 and re.findall(r"^ran (\w+)", bad.stdout, re.M) == ["device", "ops", "sanitizer"]
    assert re.search(r"^test-gpu: failed; exit 1 of .*not sanitizer.*; exit 7 of .*sanitizer", bad.stdout, re.M), bad.stdout
    bench = make("bench-gpu", fake, **tools)
    assert bench.returncode == 0 and f"ran bench {ROOT}:/carried" in bench.stdout  # packages that were carried along are found
    assert make("bench-gpu", fake, **tools, BENCH="1").returncode != 0


BREAKING = """
import os, torch, pytest

@pytest.fixture(autouse=True)
def device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    yield

def sick():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

torch.cuda.synchronize = getattr(torch.cuda, "sound", lambda: None)

def test_breaks():
    torch.cuda.synchronize = sick
    assert False, "the first failure"

@pytest.mark.parametrize("n", range(6))
def test_runs_in_a_sound_process(n):
    torch.cuda.synchronize()
"""


def test_a_worker_with_a_broken_device_is_replaced(tmp_path):
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    (tmp_path / "test_it.py").write_text(BREAKING)
    command = [sys.executable, "-m", "pytest", "-q", "-n1", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path]
    for plugin, counts in ((["-p", "tests.gpu.sticky"], "1 failed, 6 passed"), ([], "7 failed")):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        run = subprocess.run(command + plugin, cwd=ROOT, env=environment, capture_output=True, text=True)
        told = run.stdout + run.stderr
        assert counts in told and "the first failure" in told, told
        assert ("broke the device: CUDA error: an illegal memory access" in told) == bool(plugin)

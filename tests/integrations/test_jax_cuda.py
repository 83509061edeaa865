"""The jax targets for CUDA without a device: what they lower to, and the same handlers run over the emulated one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="needs jax: pip install 'fastee[jax]'")
from jax import export  # noqa: E402

from fastee.errors import BackendUnavailable  # noqa: E402
from fastee.integrations import jax as fj  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
EMULATED = ROOT / "build" / "libfastee_jax_emulated.so"
X, W = np.ones((4, 8), "f"), np.ones((3, 8), "f")


@pytest.fixture
def built(monkeypatch):
    """A build with CUDA targets: those over the emulated device, which nothing here runs."""
    if not EMULATED.exists():
        pytest.skip(f"{EMULATED.name} is not built: make build with jax installed")
    monkeypatch.setitem(fj._LIBRARIES, "cuda", (EMULATED, ""))
    fj._library.cache_clear()
    yield
    fj._library.cache_clear()


def lowered(function, *args):
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def targets(text):
    return re.findall(r"stablehlo.custom_call @fastee_(\w+)", text)


def test_the_ops_lower_to_their_targets(built):
    step = lowered(lambda x, w: fj.exit_step(x, w, pool="none"), X, W)
    assert targets(step) == ["exit_head", "compact"] and "stablehlo.compare" in step, "the kernel takes no threshold from device memory"
    assert step.count("output_operand_alias<") == 2, "the zeroed memory is written in place"
    assert targets(lowered(fj.linear_stats, X, W)) == ["exit_head"]
    assert targets(lowered(fj.quantize_rows, X)) == ["quantize_rows"]
    head = lowered(lambda x, w: fj.exit_head(x, w, pool="none", measure="energy", temperature=2.0), X, W)
    attributes = re.search(r"mhlo.backend_config = \{([^}]*)\}", head)[1]
    assert {"pool = 4 : i32", "measure = 3 : i32", "norm = 0 : i32"} <= set(attributes.split(", ")) and "temperature = 2.0" in attributes
    assert "tensor<4x2xi32>" in head, "labels of 64 bits, as pairs of words"


def test_one_export_serves_both_platforms(built):
    custom = [export.DisabledSafetyCheck.custom_call(f"fastee_{name}") for name in ("exit_head", "compact")]
    index = jax.jit(lambda x, w: fj.exit_step(x, w, pool="none").index)
    both = export.export(index, platforms=("cpu", "cuda"), disabled_checks=custom)(X, W)
    assert both.platforms == ("cpu", "cuda") and sorted(targets(both.mlir_module())) == ["compact"] * 2 + ["exit_head"] * 2
    if (ROOT / "fastee" / "libfastee_jax.so").exists():
        assert both.call(X, W).tolist() == fj.exit_step(X, W, pool="none").index.tolist()


@pytest.mark.parametrize("name, call", {
    "pool": lambda: fj.pool(X, "none"), "row_stats": lambda: fj.row_stats(X), "gather_rows": lambda: fj.gather_rows(X, np.array([1])),
    "feature_delta": lambda: fj.feature_delta(X, X), "mean_entropy": lambda: fj.mean_entropy(X[None]),
    "dequantize_rows": lambda: fj.dequantize_rows(fj.QuantizedRows(X.astype("i1"), X[:, :1])),
}.items())  # fmt: skip
def test_an_op_without_a_kernel_is_refused_when_it_is_lowered(built, name, call):
    with pytest.raises(BackendUnavailable, match=f"{name} has no CUDA target, only exit_head, compact, quantize_rows have"):
        lowered(call)


def test_a_build_without_cuda_says_what_to_do(monkeypatch):
    monkeypatch.setitem(fj._LIBRARIES, "cuda", ("libfastee_jax_none.so", fj._LIBRARIES["cuda"][1]))
    fj._library.cache_clear()
    with pytest.raises(ImportError, match=r"libfastee_jax_none.so is not built: install jax first, then FASTEE_BUILD=cuda pip install"):
        lowered(fj.compact, X[:, 0] > 0)
    fj._library.cache_clear()


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_devices_own_handlers_compile():
    """What the emulated build leaves out is how XLA's stream comes in."""
    jaxlib = Path(pytest.importorskip("jaxlib").__file__).parent
    folders = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}", "-isystem", str(jaxlib / "include")]
    flags = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-DFASTEE_HOME=kDLCUDA"]
    command = ["c++", *flags, *folders, str(ROOT / "csrc" / "bindings" / "jax" / "jax_cuda.cc")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]


def test_the_handlers_over_the_emulated_device():
    """The machine code's arity, attributes, working memory and results are the CPU's, under XLA's own calls."""
    if not EMULATED.exists():
        pytest.skip(f"{EMULATED.name} is not built: make build with jax installed")
    from tests.integrations.jax_cuda import CHECKS

    # one operation at a time, as on a stream: the emulation is no device for two
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0"}
    command = [sys.executable, "-m", "tests.integrations.jax_cuda", str(EMULATED)]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr[-4000:]
    assert run.stdout.split() == [check.__name__ for check in CHECKS]

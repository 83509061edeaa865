"""The CUDA targets of fastee.integrations.jax on a device. The same checks run without one in tests/integrations/test_jax_cuda.py."""

from pathlib import Path

import pytest

import fastee

jax = pytest.importorskip("jax", reason="needs jax: pip install 'fastee[jax]'")
from tests.integrations import jax_cuda  # noqa: E402


def missing() -> str | None:
    if not (Path(fastee.__file__).parent / "libfastee_jax_cuda.so").exists():
        return "libfastee_jax_cuda.so is not built"
    return None if jax.default_backend() == "gpu" else "jax sees no CUDA device: pip install 'jax[cuda13]'"


pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.mark.parametrize("check", jax_cuda.CHECKS, ids=lambda check: check.__name__)
def test_on_a_device(check):
    check()


def test_a_jit_program_of_checks_stays_on_the_device():
    """One program with a head, the survivors' order and a gather of jax: no value comes to the host in between."""
    x, w = jax.device_put(jax_cuda.arrays((64, 32), (10, 32)))

    @jax.jit
    def program(x, w):
        step = jax_cuda.fj.exit_step(x, w, pool="none", threshold=0.3)
        return x[step.index], step.count

    with jax.transfer_guard("disallow"):
        rows, count = jax.block_until_ready(program(x, w))
    assert rows.shape == x.shape and 0 <= int(count) <= 64

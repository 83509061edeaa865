"""The kernels on 64-bit ARM: cross-built, run under qemu-user, and the same bits as on this machine."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "build" / "test_kernel_bits"
NEEDED = ("aarch64-linux-gnu-g++", "qemu-aarch64", "cmake")
absent = [tool for tool in NEEDED if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(absent), reason=f"the cross build needs {', '.join(absent)} (Debian: apt-get install g++-aarch64-linux-gnu qemu-user)"),
    pytest.mark.skipif(not HERE.exists(), reason="build/test_kernel_bits is not built (make build)"),
]


def output(*command):
    run = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


@pytest.fixture(scope="module")
def neon():
    """Build what the kernels need for AArch64 in build-neon (incremental) and return that folder."""
    ninja = ROOT / ".venv" / "bin" / "ninja"
    make = [f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja.exists() else []
    output("flock", ".build.lock", "cmake", "--preset", "neon", *make)
    output("flock", ".build.lock", "cmake", "--build", "--preset", "neon", "--target", "test_kernel_bits", "test_c_abi", "test_thread_pool")
    return ROOT / "build-neon"


def test_neon_gives_the_bits_of_this_machine(neon):
    def bits(printed):
        return [line for line in printed.splitlines() if line.startswith("bits ")]

    there, here = output("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", neon / "test_kernel_bits"), output(HERE)
    assert "isas neon,scalar,emu16" in there
    assert len(bits(here)) > 40 and bits(there) == bits(here)


@pytest.mark.parametrize("program", ["test_c_abi", "test_thread_pool"])
def test_programs_pass_on_neon(neon, program):
    assert "passed (0 failed)" in output("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", neon / program)

"""examples/c: a C99 program of fastee.h alone, built by find_package(fastee), and refused by a library of another ABI."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("cc") is None, reason="needs CMake and a C compiler"),
    pytest.mark.skipif(not (ROOT / "build" / "cmake_install.cmake").exists(), reason="needs the build folder"),
]


def run(*command):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=280)


def built(*command):
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefix")
    built("cmake", "--install", ROOT / "build", "--component", "dev", "--prefix", folder)
    return folder


def program(prefix, folder, include=None):
    flags = "-Wall -Wextra -Werror -pedantic" + (f" -I{include}" if include else "")
    built("cmake", "-S", ROOT / "examples/c", "-B", folder, f"-DCMAKE_PREFIX_PATH={prefix}", f"-DCMAKE_C_FLAGS={flags}")
    built("cmake", "--build", folder)
    return folder / "exit_check"


def test_the_example_runs_on_the_header_alone(prefix, tmp_path):
    done = run(program(prefix, tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["0 0.9998 1", "0 0.3333 0", "2 0.9998 1", "-1 nan 0", "stay 2: rows 1 3, 127 127 127"]
    assert "measure" in done.stderr and done.stderr.startswith("1 exit_head: ")


def test_a_program_of_another_abi_refuses_the_library(prefix, tmp_path):
    newer = shutil.copytree(prefix / "include", tmp_path / "newer")
    header = newer / "fastee" / "fastee.h"
    text = header.read_text()
    assert "#define FASTEE_ABI_VERSION 1\n" in text
    header.write_text(text.replace("#define FASTEE_ABI_VERSION 1\n", "#define FASTEE_ABI_VERSION 2\n"))
    done = run(program(prefix, tmp_path / "build", newer))
    assert done.returncode == 2 and done.stderr == "libfastee has ABI 1, this program needs 2\n"


def test_find_package_names_a_component_that_is_not_there(prefix, tmp_path):
    (tmp_path / "CMakeLists.txt").write_text("cmake_minimum_required(VERSION 3.20)\nproject(x LANGUAGES C)\nfind_package(fastee REQUIRED COMPONENTS cuda)\n")
    done = run("cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    assert done.returncode != 0 and "fastee has no component 'cuda'; it has: runner" in done.stderr

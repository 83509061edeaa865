"""Every block of the cookbook runs: Python in a process of its own, and the C++ program behind a Python block prints what that one did."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "cookbook").glob("*.md"))
NEEDS = {"bert": ["transformers"], "llm": ["transformers"], "jax": ["jax", "flax"], "onnx": ["onnxruntime", "onnxscript"]}
FILES = {"cmake": "CMakeLists.txt", "cpp": "main.cc"}


def blocks(page):
    """Return each Python block of a page with the files of the C++ project that follows it."""
    found = []
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.S | re.M):
        if language == "python":
            found.append((text, {}))
        else:
            found[-1][1][FILES[language]] = text
    return found


SLOW = [pytest.mark.slow, pytest.mark.timeout(900)]  # AOTInductor and libtorch's headers take about 40 s of processor time
BLOCKS = [(p.stem, i, *block) for p in PAGES for i, block in enumerate(blocks(p))]


def test_every_page_but_the_list_has_a_block():
    assert {stem for stem, *_ in BLOCKS} == {p.stem for p in PAGES} - {"README"} and len(BLOCKS) >= 7
    assert {stem for stem, *_ in BLOCKS} >= {"deadline", "bert", "onnx", "jax", "llm", "cluster", "benchmark"}
    assert [(stem, sorted(files)) for stem, _, _, files in BLOCKS if files] == [("onnx", ["CMakeLists.txt", "main.cc"])]


def run(folder, *command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=600, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("stem, number, block, files", [pytest.param(*b, id=f"{b[0]}-{b[1]}", marks=SLOW if b[3] else ()) for b in BLOCKS])
def test_the_page_runs(stem, number, block, files, tmp_path):
    missing = [m for m in NEEDS.get(stem, []) if importlib.util.find_spec(m) is None]
    if missing:
        pytest.skip(f"needs {missing}")
    program = tmp_path / f"{stem}_{number}.py"
    program.write_text(block)
    printed = run(tmp_path, sys.executable, program)
    if not files:
        return
    if shutil.which("cmake") is None or shutil.which("g++") is None or not (ROOT / "build" / "cmake_install.cmake").exists():
        pytest.skip("its C++ program needs CMake, g++ and the build folder")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    run(tmp_path, "cmake", "--install", ROOT / "build", "--component", "dev", "--prefix", "prefix")
    paths = f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'};{torch.utils.cmake_prefix_path}"
    run(tmp_path, "cmake", "-S", ".", "-B", "build", paths, "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror")
    run(tmp_path, "cmake", "--build", "build")
    assert run(tmp_path, "build/app") == printed and {line.split()[0] for line in printed.splitlines()} == {"0", "1"}

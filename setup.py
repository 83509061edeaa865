"""FASTEE_BUILD=auto|cpu|cuda|none: auto builds the native parts when CMake and a C++ compiler are there, none never does."""

import os
import shutil
import sys

from setuptools import find_packages, setup

choice = os.environ.get("FASTEE_BUILD", "auto")
if choice not in ("auto", "cpu", "cuda", "none"):
    sys.exit(f"FASTEE_BUILD must be auto, cpu, cuda or none, got {choice!r}")
tools = shutil.which("cmake") and any(shutil.which(c) for c in (os.environ.get("CXX", "c++"), "g++", "clang++"))
cuda = {"cuda": "ON", "cpu": "OFF"}.get(choice, "AUTO")  # auto: with nvcc and an NVIDIA device (cmake/cuda.cmake)
native = choice in ("cpu", "cuda") or (choice == "auto" and tools)
if not native:
    print(
        "fastee: pure-Python install (no native kernels). Every op works through numba, about 10 times slower per exit check "
        "(compile its kernels once: `python -m fastee.kernels.numba`), or through torch, 10 to 100 times slower; the scheduler "
        "runs in Python (about 20 us a decision). For the native parts: install CMake and a C++20 compiler, then "
        "`pip install --force-reinstall --no-deps .`",
        file=sys.stderr,
    )
# `fastee bench` is the checkout's benchmarks folder, installed as fastee.benchmarks
setup(
    packages=[*find_packages(include=["fastee", "fastee.*"]), "fastee.benchmarks", "fastee.benchmarks.peers"],
    package_dir={"fastee.benchmarks": "benchmarks"},
    **({"cmake_source_dir": ".", "cmake_args": [f"-DFASTEE_CUDA={cuda}"]} if native else {}),
)

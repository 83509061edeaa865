"""The house's rules in C++: which room may include which, and that kernels know nothing of frameworks. (Python: lint-imports.)"""

import re
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"
ROOMS = {  # room -> rooms it may include
    "include": {"fastee"},
    "core": {"core", "cpu", "fastee"},  # core/dispatch.cc and core/api.cc call the kernels' table
    "cpu": {"cpu"},
    "cuda": {"cuda", "cpu", "core", "fastee"},  # cpu/kernels.h: the plain structures that describe arguments
    "sched": {"sched"},
    "plan": {"plan", "sched"},
    "sim": {"sim", "sched", "plan"},
    "net": {"net", "core", "fastee"},
}
FOREIGN = re.compile(r"#include\s*<(Python\.h|torch/|ATen/|pybind11/|cuda|zmq)")
CLOCKS = re.compile(r"#include\s*<chrono>|\bclock_gettime\b|steady_clock|system_clock|\b(std::)?time\((nullptr|NULL|0)\)")


def sources(room):
    return [p for p in (CSRC / room).rglob("*") if p.suffix in (".h", ".cc", ".cuh", ".cu")]


def test_rooms_include_only_what_they_may():
    for room, allowed in ROOMS.items():
        for path in sources(room):
            text = path.read_text()
            foreign = [f for f in FOREIGN.findall(text) if not (room == "cuda" and f == "cuda")]
            assert not foreign, f"{path}: {foreign}"
            for included in re.findall(r'#include\s*"([^"]+)"', text):
                first = included.split("/")[0] if "/" in included else room
                assert first in allowed, f"{path.relative_to(CSRC)} includes {included}; {room} may include {sorted(allowed)}"


def test_the_scheduler_reads_no_clock():
    for room in ("sched", "plan", "sim"):
        for path in sources(room):
            assert not CLOCKS.search(path.read_text()), path


def test_kernels_hold_no_containers():
    # A std:: template instantiated under -mavx512f may become the copy that every caller runs.
    for path in sources("cpu"):
        standard = set(re.findall(r"#include\s*<([^>]+)>", path.read_text()))
        assert standard <= {"cstdint", "immintrin.h", "arm_neon.h"}, f"{path}: {standard}"

"""What the build promises: only isa_*.cc hold wide instructions, the C header is C, the library exports its ABI and nothing else."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "fastee" / "libfastee.so"
OBJECTS = ROOT / "build" / "CMakeFiles" / "fastee.dir"

needs_build = pytest.mark.skipif(not LIBRARY.exists(), reason="native parts are not built")


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@needs_build
@pytest.mark.skipif(shutil.which("objdump") is None or not OBJECTS.exists(), reason="needs objdump and the build folder")
def test_wide_registers_stay_in_their_own_objects():
    for built in OBJECTS.rglob("*.o"):
        code = output("objdump", "-d", "--no-show-raw-insn", str(built))
        allowed = {"isa_avx512.cc.o": r"%[zy]mm|%k[1-7]", "isa_avx2.cc.o": r"%ymm"}.get(built.name)
        zmm, ymm = re.search(r"%zmm|%k[1-7]\b", code), re.search(r"%ymm", code)
        assert not zmm or built.name == "isa_avx512.cc.o", built.name
        assert not ymm or built.name in ("isa_avx512.cc.o", "isa_avx2.cc.o"), built.name
        if allowed:
            assert re.search(allowed, code), f"{built.name} holds no wide instruction at all"


@needs_build
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_exported_symbols_are_the_c_abi():
    exported = {line.split()[-1] for line in output("nm", "-D", "--defined-only", str(LIBRARY)).splitlines()}
    header = (ROOT / "csrc/include/fastee/fastee.h").read_text()
    declared = set(re.findall(r"FASTEE_API [\w\s*]+?\*?\s?(fastee_\w+)\(", header))
    assert len(declared) > 10 and {s for s in exported if s.startswith("fastee_")} == declared
    assert not {s for s in exported if s.startswith("_ZN6fastee")}


@needs_build
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_a_c_program_uses_the_header_alone(tmp_path):
    source = tmp_path / "program.c"
    source.write_text(
        '#include "fastee/fastee.h"\n#include <stdio.h>\n'
        "int main(void) {\n"
        "  unsigned char keep[4] = {0, 1, 0, 1}; int64_t shape[1] = {4}, index[4], count;\n"
        "  DLTensor mask = {keep, {kDLCPU, 0}, 1, {kDLUInt, 8, 1}, shape, 0, 0};\n"
        '  if (fastee_compact(&mask, index, &count, 0)) { puts(fastee_last_error()); return 1; }\n'
        '  printf("%d %d %d %d %d\\n", (int)count, (int)index[0], (int)index[1], (int)index[2], (int)index[3]);\n'
        "  mask.dtype.code = kDLFloat;\n"
        "  fastee_status s = fastee_compact(&mask, index, &count, 0);\n"
        '  printf("%d %s\\n", (int)s, fastee_last_error());\n  return 0;\n}\n'
    )
    program = tmp_path / "program"
    folder = str(LIBRARY.parent)
    output("gcc", "-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{ROOT / 'csrc/include'}", str(source), "-o", str(program), f"-L{folder}", "-lfastee", f"-Wl,-rpath,{folder}")
    lines = output(str(program)).splitlines()
    assert lines == ["2 1 3 2 0", "2 compact: mask must be bool or uint8 [B], got float8 [4]"]

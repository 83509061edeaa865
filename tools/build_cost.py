"""What a clean native build with its tests costs: CPU seconds of each unit and of all, no cache in between. `python tools/build_cost.py`"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def children() -> float:
    """Return the CPU seconds, user's and system's, of the children waited for so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def launch(log: str, command: list[str]) -> int:
    """Run one compiler call for CMake and append `seconds source` to the log."""
    code = subprocess.call(command)
    source = next((part for part in command if part.endswith((".cc", ".cxx", ".c", ".cu"))), "?")
    with open(log, "a") as file:  # one short line: written at once
        file.write(f"{children():.2f} {Path(source).name}\n")
    return code


def main() -> None:
    """Build a copy of the tracked files in a temporary folder and print the units, dearest first, and the sum."""
    os.environ["CCACHE_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        tree, log = Path(folder) / "tree", Path(folder) / "log"
        for name in subprocess.run(["git", "ls-files", "csrc", "cmake", "fastee", "CMakeLists.txt"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
        launcher = f"{sys.executable};{Path(__file__).resolve()};{log}"
        configure = ["cmake", "-S", tree, "-B", tree / "build", "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}", "-DFASTEE_WERROR=ON"]
        subprocess.run([*configure, *(f"-DCMAKE_{language}_COMPILER_LAUNCHER={launcher}" for language in ("C", "CXX"))], check=True, stdout=subprocess.DEVNULL)
        before = children()
        subprocess.run(["cmake", "--build", tree / "build"], check=True, stdout=subprocess.DEVNULL)
        total, units = children() - before, sorted(((float(line.split()[0]), line.split()[1]) for line in log.read_text().splitlines()), reverse=True)
    for seconds, source in units:
        print(f"{seconds:7.2f}  {source}")
    print(f"{total:7.2f}  CPU seconds in all, {len(units)} units, links and Cython included")


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else main())

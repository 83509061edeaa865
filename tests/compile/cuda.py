"""Compile every ``csrc/cuda/*.cu`` to machine code and read what its kernels need. No GPU is wanted, only nvcc.

``python -m tests.compile.cuda`` prints what `resources.json` holds under "cuda"; ``--write`` puts it there.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESOURCES = Path(__file__).with_name("resources.json")
TARGETS = (80, 90, 100)
NVCC = shutil.which("nvcc") or (shutil.which("/usr/local/cuda/bin/nvcc"))
FLAGS = [
    "-std=c++20",
    "-O3",
    "-fmad=false",
    "--extended-lambda",
    "-DFASTEE_HOME=kDLCUDA",
    f"-I{ROOT / 'csrc'}",
    f"-I{ROOT / 'csrc/include'}",
    "-Werror=all-warnings",
]


def release() -> str:
    """Return nvcc's release, as resources depend on it."""
    return re.search(r"release ([\d.]+)", subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout)[1]


def cuobjdump() -> str | None:
    """Return the disassembler: the toolkit's, or the one that Triton brings."""
    if tool := shutil.which("cuobjdump"):
        return tool
    try:
        import triton
    except ImportError:
        return None
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(tool) if tool.exists() else None


def sources() -> list[Path]:
    return sorted(p for p in (ROOT / "csrc" / "cuda").glob("*.cu") if "__global__" in _closure(p))


def _closure(path: Path) -> str:
    text = path.read_text()
    return text + "".join(_closure(ROOT / "csrc" / name) for name in re.findall(r'#include "(cuda/kernels/[^"]+)"', text))


def build(source: Path, capability: int, folder: Path) -> dict[str, dict[str, int]]:
    """Compile one file for one architecture into `folder`; return {kernel: registers, shared bytes that are static, stack and spilled bytes of a thread}."""
    cubin = folder / f"{source.stem}.sm_{capability}.cubin"
    command = [NVCC, *FLAGS, f"-arch=sm_{capability}", "-cubin", "-Xptxas=-v", str(source), "-o", str(cubin)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{run.stderr}")
    out = {}
    for entry in run.stderr.split("Compiling entry function '")[1:]:
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        shared = re.search(r"(\d+) bytes smem", entry)
        out[_name(entry.split("'", 1)[0])] = {
            "registers": int(re.search(r"Used (\d+) registers", entry)[1]), "shared": int(shared[1]) if shared else 0,
            "stack": int(spills[1]), "spilled": int(spills[2]) + int(spills[3]),
        }  # fmt: skip
    return out


def _name(mangled: str) -> str:
    """Return a kernel's own name and integer arguments: exit_pack<2,4>."""
    name = ""
    rest = re.sub(r"^_ZN", "", mangled)
    while match := re.match(r"(\d+)", rest):
        length, at = int(match[1]), match.end()
        name, rest = rest[at : at + length], rest[at + length :]
    numbers = re.match(r"I((?:Li\d+E)+)E", rest)
    return f"{name}<{','.join(re.findall('Li([0-9]+)E', numbers[1]))}>" if numbers else name


def measure(folder: Path, targets=TARGETS, workers=2) -> dict[str, dict[str, dict[str, int]]]:
    """Return {kernel: {"sm_80": {...}, ...}}; the cubins stay in `folder`."""
    jobs = [(source, capability) for source in sources() for capability in targets]
    with ThreadPoolExecutor(workers) as pool:
        made = list(pool.map(lambda job: build(*job, folder), jobs))
    out: dict[str, dict] = {}
    for (_, capability), kernels in zip(jobs, made, strict=True):
        for kernel, needs in kernels.items():
            out.setdefault(kernel, {})[f"sm_{capability}"] = needs
    return out


def sass(folder: Path) -> dict[str, str]:
    """Return {"exit_pack<2,4> sm_90": machine code}, of the cubins in `folder`."""
    out = {}
    for cubin in sorted(folder.glob("*.cubin")):
        told = subprocess.run([cuobjdump(), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
        for part in told.split("Function : ")[1:]:
            out[f"{_name(part.split(None, 1)[0])} {cubin.suffixes[0][1:]}"] = part
    return out


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        made = {"version": release(), "kernels": measure(Path(scratch))}
    if "--write" in sys.argv:
        whole = json.loads(RESOURCES.read_text()) if RESOURCES.exists() else {}
        RESOURCES.write_text(json.dumps({**whole, "cuda": made}, indent=1, sort_keys=True) + "\n")
    else:
        print(json.dumps(made, indent=1, sort_keys=True))

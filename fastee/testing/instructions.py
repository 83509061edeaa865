"""Instructions per call by callgrind: the signal that a shared machine cannot disturb.

The process runs itself again under valgrind; only the loop is instrumented, through valgrind's client requests, which are five
instructions that do nothing on the bare CPU (valgrind.h). The count is (I(2n) - I(n)) / n, so that entering and leaving cancel out.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fastee.testing.bench import Case, quiet

_DUMP, _START, _STOP = 0x43540000, 0x43540004, 0x43540005  # callgrind.h: 'C','T' << 16, then the enumeration
# mov rax, rdi; xor edx, edx; push rbx; rol rdi, 3; rol rdi, 13; rol rdi, 61; rol rdi, 51; xchg rbx, rbx; pop rbx; mov rax, rdx; ret
_CODE = bytes.fromhex("4889f8 31d2 53 48c1c703 48c1c70d 48c1c73d 48c1c733 4887db 5b 4889d0 c3")
CALLS = 20


def unavailable() -> str | None:
    """Return why instructions cannot be counted here, None when they can."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"callgrind client requests are written for x86-64, this is {platform.machine()}"
    return None if shutil.which("valgrind") else "valgrind is not installed"


class Callgrind:
    """Client requests to the callgrind that runs this process."""

    def __init__(self):
        self._page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._page.write(_CODE)
        at = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        self._call = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p)(at)

    def request(self, code: int) -> None:
        """Send one client request without arguments."""
        arguments = (ctypes.c_uint64 * 6)(code)
        self._call(ctypes.addressof(arguments))


def count_in_this_process(case: Case, calls: int = CALLS) -> None:
    """Run under callgrind: dump profiles of `calls` and of 2 x `calls` calls of the case (after three warm ones)."""
    grind, feed = Callgrind(), itertools.cycle(case.inputs)

    def run(n: int) -> None:
        for args in itertools.islice(feed, n):
            case.fn(*args, **case.kwargs)

    with quiet():
        run(3)
        grind.request(_START)
        for n in (1, calls, 2 * calls):  # the first dump only clears what starting left in the counters
            run(n)
            grind.request(_DUMP)
        grind.request(_STOP)


def count_named(command: list[str], timeout: float = 900.0) -> dict[str, float]:
    """Run ``python <command>`` under callgrind and return instructions per call by name.

    The command calls `count_in_this_process` once per case and prints the case's name, one a line, and nothing else.
    """
    with tempfile.TemporaryDirectory() as folder:
        grind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/out", "--quiet"]
        env = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*grind, sys.executable, *command], capture_output=True, text=True, timeout=timeout, env=env)
        if done.returncode:
            raise RuntimeError(f"the run under valgrind failed ({done.returncode}): {(done.stderr or done.stdout).strip()[-500:]}")
        files = sorted(Path(folder).glob("out.*"), key=lambda p: int(p.suffix[1:]))
        totals = [int(re.search(r"^totals: (\d+)", f.read_text(), re.M)[1]) for f in files]
    per_call = [(b - a) / CALLS for a, b in zip(totals[1::3], totals[2::3], strict=True)]
    return dict(zip(done.stdout.splitlines(), per_call, strict=True))

"""The one place where kernels are launched."""

from __future__ import annotations

import re
from typing import Any

# Errors after which no call of this process succeeds any more; CUDA reports them at some later call.
STICKY = r"illegal memory access|illegal instruction|misaligned address|invalid address space|invalid program counter|device-side assert|"
STICKY += r"unspecified launch failure|hardware stack error|launch timed out|uncorrectable ECC"
_before: str | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launch `kernel` on the current stream; a grid with a zero launches nothing. Tests replace this to see what is launched.

    `RuntimeError` names the launch; for a sticky error, which an earlier kernel has made, also the launch before it.
    """
    global _before
    if 0 in grid:
        return
    name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
    try:
        kernel[grid](*args, **{"enable_fp_fusion": True, **meta})  # said, for Triton 3.10 turns the default around: decisions would change
    except RuntimeError as why:
        text = f"{name}: {why}"
        if re.search(STICKY, str(why)):
            text += "; it is sticky: a kernel queued earlier broke the device's context, and this process cannot use the device any more "
            text += f"(fastee's launch before this one: {_before or 'none'}). CUDA_LAUNCH_BLOCKING=1 or compute-sanitizer finds the kernel"
        raise RuntimeError(text) from why
    _before = name


def ceil_div(n: int, by: int) -> int:
    return -(-n // by)


def power_of_two(n: int) -> int:
    """Return the smallest power of two >= n, 1 for n <= 1."""
    return 1 << max(0, n - 1).bit_length()

"""The one place where kernels are launched."""

from __future__ import annotations

from typing import Any


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launch `kernel` on the current stream; a grid with a zero launches nothing. Tests replace this to see what is launched."""
    if 0 not in grid:
        kernel[grid](*args, enable_fp_fusion=True, **meta)  # said, for Triton 3.10 turns the default around: decisions would change


def ceil_div(n: int, by: int) -> int:
    return -(-n // by)


def power_of_two(n: int) -> int:
    """Return the smallest power of two >= n, 1 for n <= 1."""
    return 1 << max(0, n - 1).bit_length()

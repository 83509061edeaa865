"""compact: a survivor goes to the next place from the front, any other to the next from the back."""

from __future__ import annotations

from ._jit import inline, kernel


@inline
def compact_into(mask, n, stride, flip, index):
    """Order the rows by mask != flip and return how many come first."""
    k = 0
    for i in range(n):
        keep = (mask[i * stride] != 0) != flip
        index[k if keep else n - 1 - (i - k)] = i
        k += keep
    return k


@kernel("i8(u1[::1], i8, i8, i8[::1])")
def compact(mask, n, stride, index):
    return compact_into(mask, n, stride, False, index)


COMPILED = True

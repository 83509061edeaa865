"""gather_rows and scatter_rows: rows of any dtype, moved as bytes. The index is looked at first, so that a wrong one writes nothing."""

from __future__ import annotations

from ._jit import inline, kernel


@inline
def outside(index, rows):
    """Return the position of the first entry outside [0, rows), -1 when there is none."""
    for i in range(index.size):
        if index[i] < 0 or index[i] >= rows:
            return i
    return -1


@kernel("i8(u1[::1], i8, i8, i8, i8[::1], u1[::1])")
def gather_rows(x, rows, row_bytes, row_stride, index, out):
    bad = outside(index, rows)
    if bad < 0:
        for i in range(index.size):
            source = x[index[i] * row_stride : index[i] * row_stride + row_bytes]
            target = out[i * row_bytes : (i + 1) * row_bytes]
            for k in range(row_bytes):
                target[k] = source[k]
    return bad


@kernel("i8(u1[::1], i8, i8, i8, i8[::1], u1[::1], i8)")
def scatter_rows(out, rows, row_bytes, row_stride, index, source_rows, source_stride):
    bad = outside(index, rows)
    if bad < 0:
        for i in range(index.size):
            source = source_rows[i * source_stride : i * source_stride + row_bytes]
            target = out[index[i] * row_stride : index[i] * row_stride + row_bytes]
            for k in range(row_bytes):
                target[k] = source[k]
    return bad


COMPILED = True

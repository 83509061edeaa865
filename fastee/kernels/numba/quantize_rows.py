"""quantize_rows and dequantize_rows: max|x| of a group, then round half to even. The maximum is taken over the bits as integers, which
order like the magnitudes, put inf and NaN on top, and vectorise."""

from __future__ import annotations

import numpy as np

from ._jit import kernel
from ._rows import NAN, ONE, ZERO, f4, i4

_LARGEST_SCALE = f4(float.fromhex("0x1.0204060000000p+121"))  # 127 times the next float is inf
_MAGNITUDE, _INF_BITS = i4(0x7FFFFFFF), i4(0x7F800000)
_TINY, _LIFT, _LIMIT = f4(2.0**-100), f4(2.0**64), f4(127.0)


@kernel("void(f4[::1], i8, i8, i8, i8, i1[::1], f4[::1])")
def quantize_int8(x, rows, row, row_stride, group, data, scale):
    bits = x.view(np.int32)
    groups = row // group
    for b in range(rows):
        for g in range(groups):
            start, to = b * row_stride + g * group, b * row + g * group
            source, raw, q = x[start : start + group], bits[start : start + group], data[to : to + group]
            largest = i4(0)
            for i in range(group):
                largest = max(largest, raw[i] & _MAGNITUDE)
            top = i4(largest).view(f4)
            good = largest < _INF_BITS
            scale[b * groups + g] = min(top / _LIMIT, _LARGEST_SCALE) if good else NAN
            tiny = _LIFT if top < _TINY else ONE  # keeps 127 / top finite; a power of two, so exact
            inverse = _LIMIT / (top * tiny) if good and top > ZERO else ZERO
            if inverse == ZERO:
                q[:] = 0
            else:
                for i in range(group):
                    v = np.rint(source[i] * tiny * inverse)
                    q[i] = np.int8(max(min(v, _LIMIT), -_LIMIT))


@kernel("void(i1[::1], i8, i8, i8, i8, f4[::1], f4[::1])")
def dequantize_int8(data, rows, row, row_stride, group, scale, out):
    groups = row // group
    for b in range(rows):
        for g in range(groups):
            start, to, s = b * row_stride + g * group, b * row + g * group, scale[b * groups + g]
            source, target = data[start : start + group], out[to : to + group]
            for i in range(group):
                target[i] = f4(source[i]) * s


COMPILED = True

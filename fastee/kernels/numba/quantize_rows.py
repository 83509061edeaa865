"""quantize_rows and dequantize_rows: max|x| of a group, then every value on the format's grid, half to even. The maximum is taken over
the bits as integers, which order like the magnitudes, put inf and NaN on top, and vectorise."""

from __future__ import annotations

import numpy as np

from ._jit import inline, kernel
from ._rows import NAN, ONE, ZERO, f4, i4

_MAGNITUDE, _INF_BITS = i4(0x7FFFFFFF), i4(0x7F800000)
_TINY, _LIFT = f4(2.0**-100), f4(2.0**64)
_INT8, _INT4, _E4M3 = f4(127.0), f4(7.0), f4(448.0)
# The largest scales: limit times the next float is inf.
_INT8_SCALE, _INT4_SCALE, _E4M3_SCALE = (f4(float.fromhex(h)) for h in ("0x1.020406p+121", "0x1.249248p+125", "0x1.249248p+119"))


def _e4m3_values() -> np.ndarray:
    code = np.arange(128)
    values = np.where(code < 8, code / 8 * 2.0**-6, (1 + code % 8 / 8) * 2.0 ** (code // 8 - 7.0))
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


_VALUES = _e4m3_values()


@inline
def grid_of(bits, limit, largest_scale):
    """Return (scale, tiny, inverse) of a group: x * tiny * inverse lies on [-limit, limit]; inverse 0 for zeros and for NaN or inf."""
    largest = i4(0)
    for i in range(bits.size):
        largest = max(largest, bits[i] & _MAGNITUDE)
    top = i4(largest).view(f4)
    if largest >= _INF_BITS:
        return NAN, ONE, ZERO
    tiny = _LIFT if top < _TINY else ONE  # keeps limit / top finite; a power of two, so exact
    return min(top / limit, largest_scale), tiny, limit / (top * tiny) if top > ZERO else ZERO


@inline
def level(x, tiny, inverse, limit):
    """Return x on the grid; its product may pass the limit by one rounding."""
    return max(min(np.rint(x * tiny * inverse), limit), -limit)


@kernel("void(f4[::1], i8, i8, i8, i8, i1[::1], f4[::1])")
def quantize_int8(x, rows, row, row_stride, group, data, scale):
    bits, groups = x.view(np.int32), row // group
    for b in range(rows):
        for g in range(groups):
            start, to = b * row_stride + g * group, b * row + g * group
            source, q = x[start : start + group], data[to : to + group]
            scale[b * groups + g], tiny, inverse = grid_of(bits[start : start + group], _INT8, _INT8_SCALE)
            if inverse == ZERO:
                q[:] = 0
            else:
                for i in range(group):
                    q[i] = np.int8(level(source[i], tiny, inverse, _INT8))


@kernel("void(i1[::1], i8, i8, i8, i8, f4[::1], f4[::1])")
def dequantize_int8(data, rows, row, row_stride, group, scale, out):
    groups = row // group
    for b in range(rows):
        for g in range(groups):
            start, to, s = b * row_stride + g * group, b * row + g * group, scale[b * groups + g]
            source, target = data[start : start + group], out[to : to + group]
            for i in range(group):
                target[i] = f4(source[i]) * s


@kernel("void(f4[::1], i8, i8, i8, i8, u1[::1], f4[::1])")
def quantize_int4(x, rows, row, row_stride, group, data, scale):
    """Two values to a byte, the even one in the low nibble; above an odd last value stands 0."""
    bits, groups, width = x.view(np.int32), row // group, (row + 1) // 2
    data[: rows * width] = 0
    for b in range(rows):
        for g in range(groups):
            start = b * row_stride + g * group
            scale[b * groups + g], tiny, inverse = grid_of(bits[start : start + group], _INT4, _INT4_SCALE)
            if inverse != ZERO:
                for i in range(group):
                    at = g * group + i
                    nibble = i4(level(x[start + i], tiny, inverse, _INT4)) & 15
                    data[b * width + at // 2] |= np.uint8(nibble << (4 * (at & 1)))


@kernel("void(u1[::1], i8, i8, i8, i8, f4[::1], f4[::1])")
def dequantize_int4(data, rows, row, row_stride, group, scale, out):
    groups = row // group
    for b in range(rows):
        for i in range(row):
            nibble = (np.int64(data[b * row_stride + i // 2]) >> (4 * (i & 1))) & 15
            out[b * row + i] = f4((nibble ^ 8) - 8) * scale[b * groups + i // group]


@inline
def e4m3_of(v):
    """Return the OCP e4m3fn code of v, |v| <= 448: a carry into bit 20 of the fp32 pattern, below 2^-6 an addition whose last place is 2^-9."""
    bits = np.int64(f4(v).view(np.int32))
    magnitude = bits & 0x7FFFFFFF
    if abs(v) < f4(2.0**-6):
        code = np.int64(f4(abs(v) + f4(16384.0)).view(np.int32)) & 0xFF
    else:
        code = (magnitude + 0x7FFFF - (120 << 23) + ((magnitude >> 20) & 1)) >> 20
    return np.uint8(code | ((bits >> 24) & 0x80))


@kernel("void(f4[::1], i8, i8, i8, i8, u1[::1], f4[::1])")
def quantize_e4m3(x, rows, row, row_stride, group, data, scale):
    """Zeros keep their sign; a group with NaN or inf has scale NaN and codes 0."""
    bits, groups = x.view(np.int32), row // group
    for b in range(rows):
        for g in range(groups):
            start, to = b * row_stride + g * group, b * row + g * group
            s, tiny, inverse = grid_of(bits[start : start + group], _E4M3, _E4M3_SCALE)
            scale[b * groups + g] = s
            for i in range(group):
                v = max(min(x[start + i] * tiny * inverse, _E4M3), -_E4M3)
                data[to + i] = e4m3_of(v) if s == s else np.uint8(0)


@kernel("void(u1[::1], i8, i8, i8, i8, f4[::1], f4[::1])")
def dequantize_e4m3(data, rows, row, row_stride, group, scale, out):
    groups = row // group
    for b in range(rows):
        for i in range(row):
            out[b * row + i] = _VALUES[data[b * row_stride + i]] * scale[b * groups + i // group]


@kernel("void(i4[::1], i8, i8, i8, i2[::1])")
def quantize_bf16(bits, rows, row, row_stride, data):
    """Rounds half to even; a NaN keeps its sign and upper payload and becomes quiet."""
    for b in range(rows):
        source, target = bits[b * row_stride : b * row_stride + row], data[b * row : (b + 1) * row]
        for i in range(row):
            v = np.int64(source[i])
            quiet, rounded = (v >> 16) | 0x40, (v + 0x7FFF + ((v >> 16) & 1)) >> 16
            target[i] = np.int16(quiet if (v & 0x7FFFFFFF) > 0x7F800000 else rounded)


@kernel("void(i2[::1], i8, i8, i8, i4[::1])")
def dequantize_bf16(data, rows, row, row_stride, bits):
    for b in range(rows):
        source, target = data[b * row_stride : b * row_stride + row], bits[b * row : (b + 1) * row]
        for i in range(row):
            target[i] = i4(i4(source[i]) << i4(16))


COMPILED = True

"""pack_planes and unpack_planes, block by block; the layout stands in the definition of the op. Types: 0 fp32, 1 bf16, 2 fp16, all as uint32."""

from __future__ import annotations

import numpy as np

from ._jit import inline, kernel

BLOCK, HEAD = 2048, 12  # values, bytes


@inline
def exponent_of(v, kind):
    return ((v >> 10) & 31) if kind == 2 else (((v >> 16) if kind == 0 else v) >> 7) & 255


@inline
def put_planes(code, i, step, at, out):
    """Set bit i of the three planes of `step` bytes that begin at `at`."""
    for k in range(3):
        out[at + k * step + i // 8] |= np.uint8(((code >> k) & 1) << (i & 7))


@inline
def take_planes(data, i, step, at):
    bit = i & 7
    first, second, third = data[at + i // 8] >> bit, data[at + step + i // 8] >> bit, data[at + 2 * step + i // 8] >> bit
    return (np.int64(first) & 1) | ((np.int64(second) & 1) << 1) | ((np.int64(third) & 1) << 2)


@inline
def pack_block(v, kind, seen, code, out):
    """Write a block into zeroed `out` and return its bytes, a multiple of 4."""
    n, width, step = v.size, 4 if kind == 0 else 2, 8 * ((v.size + 63) // 64)
    seen[:] = 0
    code[:] = 7
    for i in range(0, n, n // 512 | 1):
        seen[exponent_of(np.int64(v[i]), kind)] += 1
    table = np.empty(7, np.uint8)
    for c in range(7):
        best = 0
        for e in range(1, 256):
            if seen[e] > seen[best]:
                best = e
        seen[best] = -1
        code[best] = c
        table[c] = best
    escapes, lowest, highest = 0, 255, 0
    for i in range(n):
        exponent = exponent_of(np.int64(v[i]), kind)
        if code[exponent] == 7:
            escapes += 1
            lowest, highest = min(lowest, exponent), max(highest, exponent)
    lowest = lowest if escapes else 0
    narrow = highest - lowest < 16
    low = HEAD + 3 * step * (2 if kind == 2 else 1)
    end = low + n * (3 if kind == 0 else 1)
    listed = (escapes + 1) // 2 if narrow else escapes
    if end + listed - HEAD >= n * width:
        for i in range(n):
            for k in range(width):
                out[HEAD + i * width + k] = np.uint8((np.int64(v[i]) >> (8 * k)) & 255)
        return (HEAD + n * width + 3) // 4 * 4
    out[:7] = table
    out[7], out[8], out[9] = 2 if narrow else 1, np.uint8(escapes & 255), np.uint8(escapes >> 8)
    out[10] = lowest if narrow else 0
    escape = 0
    for i in range(n):
        value = np.int64(v[i])
        exponent = exponent_of(value, kind)
        put_planes(code[exponent], i, step, HEAD, out)
        if code[exponent] == 7:
            if narrow:
                out[end + escape // 2] |= np.uint8((exponent - lowest) << (4 * (escape & 1)))
            else:
                out[end + escape] = exponent
            escape += 1
        top = (value >> 16) if kind == 0 else value
        if kind == 2:
            put_planes(((top >> 8) & 3) | ((top >> 13) & 4), i, step, HEAD + 3 * step, out)
            out[low + i] = np.uint8(top & 255)
        else:
            out[low + i] = np.uint8((top & 0x7F) | ((top >> 8) & 0x80))
        if kind == 0:
            out[low + n + 2 * i], out[low + n + 2 * i + 1] = np.uint8(value & 255), np.uint8((value >> 8) & 255)
    return (end + listed + 3) // 4 * 4


@kernel("i8(u4[::1], i8, u4[::1], u1[::1])")
def pack_planes(v, kind, offsets, out):
    """Fill offsets [blocks + 1] and the blocks into zeroed `out`; return the blocks' bytes."""
    seen, code, at = np.empty(256, np.int64), np.empty(256, np.int64), 0
    for b in range(offsets.size - 1):
        offsets[b] = at // 4
        at += pack_block(v[b * BLOCK : min((b + 1) * BLOCK, v.size)], kind, seen, code, out[at:])
    offsets[offsets.size - 1] = at // 4
    return at


@inline
def unpack_block(data, n, kind, out):
    """Fill out[:n] and return True, False when the block's sizes or escapes do not fit."""
    width, step = 4 if kind == 0 else 2, 8 * ((n + 63) // 64)
    if data[7] == 0 and data.size == (HEAD + n * width + 3) // 4 * 4:
        for i in range(n):
            value = np.int64(0)
            for k in range(width):
                value |= np.int64(data[HEAD + i * width + k]) << (8 * k)
            out[i] = value
        return True
    escapes = np.int64(data[8]) | (np.int64(data[9]) << 8)
    low = HEAD + 3 * step * (2 if kind == 2 else 1)
    end = low + n * (3 if kind == 0 else 1)
    narrow = data[7] == 2
    listed = (escapes + 1) // 2 if narrow else escapes
    if (data[7] != 1 and not narrow) or data.size != (end + listed + 3) // 4 * 4:
        return False
    found = 0
    for i in range(8 * step):
        found += take_planes(data, i, step, HEAD) == 7
    if found != escapes:
        return False
    escape = 0
    for i in range(n):
        code = take_planes(data, i, step, HEAD)
        if code == 7:
            if narrow:
                exponent = (np.int64(data[10]) + ((np.int64(data[end + escape // 2]) >> (4 * (escape & 1))) & 15)) & 255
            else:
                exponent = np.int64(data[end + escape])
            escape += 1
        else:
            exponent = np.int64(data[code])
        byte = np.int64(data[low + i])
        if kind == 2:
            extra = take_planes(data, i, step, HEAD + 3 * step)
            out[i] = byte | ((extra & 3) << 8) | ((exponent & 31) << 10) | ((extra & 4) << 13)
        else:
            top = (byte & 0x7F) | (exponent << 7) | ((byte & 0x80) << 8)
            if kind == 0:
                top = (top << 16) | np.int64(data[low + n + 2 * i]) | (np.int64(data[low + n + 2 * i + 1]) << 8)
            out[i] = top
    return True


@kernel("i8(u1[::1], i8[::1], i8, i8, i8, i8, u4[::1])")
def unpack_planes(data, offsets, kind, total, first, count, out):
    """Fill out [count] with the values from `first` on; return the first damaged block, -1 when there is none."""
    values = np.empty(BLOCK, np.uint32)
    stop = first + count
    for b in range(first // BLOCK, (stop + BLOCK - 1) // BLOCK if count else 0):
        start, end = offsets[b], offsets[b + 1]
        n = min(BLOCK, total - b * BLOCK)
        if not (0 <= start and start + HEAD <= end and end <= data.size and unpack_block(data[start:end], n, kind, values)):
            return b
        for i in range(max(first, b * BLOCK), min(stop, b * BLOCK + n)):
            out[i - first] = values[i - b * BLOCK]
    return -1


COMPILED = True

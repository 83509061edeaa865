"""quantize_rows and dequantize_rows, fused with a gather: bit for bit what `fastee.reference` defines, so without fused multiply-adds."""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import ceil_div, launch, power_of_two

INT8, INT4, FP8, BF16 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
FORMATS = {"int8": INT8.value, "int4": INT4.value, "fp8_e4m3": FP8.value, "bf16": BF16.value}
# Largest magnitude on the grid of a format, and the largest scale with which that stays finite.
GRIDS = {
    0: (127.0, float.fromhex("0x1.020406p+121")),
    1: (7.0, float.fromhex("0x1.249248p+125")),
    2: (448.0, float.fromhex("0x1.249248p+119")),
}
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to the nearest integer, half to even, into the low bits


@triton.jit
def to_e4m3(v, NATIVE: tl.constexpr):
    """Return the e4m3 codes (uint8) of v, |v| <= 448, half to even."""
    if NATIVE:
        return v.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = v.to(tl.int32, bitcast=True)
        sign, a = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
        normal = ((a + 0x7FFFF + ((a >> 20) & 1)) >> 20) - (120 << 3)
        low = (a.to(tl.float32, bitcast=True) * 512.0 + ROUND).to(tl.int32, bitcast=True) & 0xFF  # below 2^-6 the step is 2^-9
        return (sign | tl.where(a < 0x3C800000, low, normal)).to(tl.uint8)


@triton.jit
def from_e4m3(code):
    """Return the fp32 values of e4m3 codes (int32 0..255)."""
    sign, a = (code & 0x80) << 24, code & 0x7F
    normal = ((a + (120 << 3)) << 20).to(tl.float32, bitcast=True)
    value = tl.where(a < 8, a.to(tl.float32) * 0.001953125, normal)
    value = tl.where(a == 0x7F, float("nan"), value)
    return (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def on_grid(v, top, limit, FORMAT: tl.constexpr, NATIVE: tl.constexpr):
    """Return the codes of v [G, N] whose groups have the largest magnitudes `top` [G]: uint8, int4 in the low nibble."""
    tiny = tl.where(top < 7.888609052210118e-31, 18446744073709551616.0, 1.0)  # 2^-100, 2^64: keeps limit / top finite, and is exact
    good = top < float("inf")  # NaN compares false
    inverse = tl.where(good & (top > 0), tl.div_rn(tl.zeros_like(top) + limit, top * tiny), 0.0)
    scaled = v * tiny[:, None] * inverse[:, None]
    scaled = tl.where(good[:, None], tl.minimum(tl.maximum(scaled, -limit), limit), 0.0)
    if FORMAT == FP8:
        return to_e4m3(scaled, NATIVE)
    else:
        return ((scaled + ROUND).to(tl.int32, bitcast=True) & 0xFF).to(tl.uint8)


@triton.jit
def magnitude(v):
    """Return |v| with NaN as +inf: a maximum that ignores NaN must not lose it."""
    return tl.where(v == v, tl.abs(v), float("inf"))


@triton.jit
def store_codes(data, code, group, first, live, length, FORMAT: tl.constexpr):
    """Write codes [G, N] of elements [first, first + N) of groups `group` [G] of `length`; int4 joins pairs, which lie in one group."""
    if FORMAT == INT4:
        low, high = tl.split(tl.reshape(code, (code.shape[0], code.shape[1] // 2, 2)))
        pair = first // 2 + tl.arange(0, code.shape[1] // 2)
        here = live[:, None] & (2 * pair < length)[None, :]
        tl.store(data + group[:, None] * ((length + 1) // 2) + pair[None, :], (low & 15) | (high << 4), here)
    else:
        i = first + tl.arange(0, code.shape[1])
        tl.store(data + group[:, None] * length + i[None, :], code, live[:, None] & (i < length)[None, :])


@triton.jit
def quantize_kernel(
    x, x_row, index, count, groups, length, row_bytes, limit, largest, data, scale,
    FORMAT: tl.constexpr, NATIVE: tl.constexpr, WIRE: tl.constexpr, ONCE: tl.constexpr, BG: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Program (i, j): groups [j BG, ...) of row i. ONCE: a group fits in a tile, else it is read twice."""
    row = tl.program_id(0).to(tl.int64)
    source, rows = row, tl.num_programs(0).to(tl.int64)
    if count is not None:
        rows = tl.load(count)
    if row < rows:
        if index is not None:
            source = tl.load(index + row)
        if WIRE:  # behind the scales of all rows
            data += tl.multiple_of(rows * groups * 4, 4)
        data += row * row_bytes
        group = tl.program_id(1) * BG + tl.arange(0, BG).to(tl.int64)
        live = group < groups
        at = x + source * x_row + group[:, None] * length
        if ONCE:
            i = tl.arange(0, BL)
            v = tl.load(at + i[None, :], live[:, None] & (i < length)[None, :], 0.0).to(tl.float32)
            top = tl.max(magnitude(v), 1)
            store_codes(data, on_grid(v, top, limit, FORMAT, NATIVE), group, 0, live, length, FORMAT)
        else:
            top = tl.zeros((BG,), tl.float32)
            for first in range(0, length, BL):
                i = first + tl.arange(0, BL)
                v = tl.load(at + i[None, :], live[:, None] & (i < length)[None, :], 0.0).to(tl.float32)
                top = tl.maximum(top, tl.max(magnitude(v), 1))
            for first in range(0, length, BL):
                i = first + tl.arange(0, BL)
                v = tl.load(at + i[None, :], live[:, None] & (i < length)[None, :], 0.0).to(tl.float32)
                store_codes(data, on_grid(v, top, limit, FORMAT, NATIVE), group, first, live, length, FORMAT)
        step = tl.div_rn(top, tl.zeros_like(top) + limit)
        step = tl.where(top < float("inf"), tl.minimum(step, largest), float("nan"))
        tl.store(scale + row * groups + group, step, live)


@triton.jit
def round_kernel(x, x_row, index, count, size, data, BLOCK: tl.constexpr):
    """bf16: the upper half of the fp32 pattern, half to even; a NaN becomes quiet and keeps its sign and upper payload."""
    row = tl.program_id(0).to(tl.int64)
    source, rows = row, tl.num_programs(0).to(tl.int64)
    if count is not None:
        rows = tl.load(count)
    if row < rows:
        if index is not None:
            source = tl.load(index + row)
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        v = tl.load(x + source * x_row + i, i < size, 0.0).to(tl.float32)
        bits = v.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(data + row * size + i, tl.where(v == v, rounded, (bits >> 16) | 0x40).to(tl.int16), i < size)


@triton.jit
def join_kernel(codes, count, groups, size, data, WIRE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    if count is not None:
        rows = tl.load(count)
    if row < rows:
        if WIRE:
            data += rows * groups * 4
        pair = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        low = tl.load(codes + row * size + 2 * pair, 2 * pair < size, 0)
        high = tl.load(codes + row * size + 2 * pair + 1, 2 * pair + 1 < size, 0)
        tl.store(data + row * ((size + 1) // 2) + pair, (low & 15) | (high << 4), 2 * pair < size)


@triton.jit
def dequantize_kernel(data, data_row, scale, groups, length, size, out, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = i < size
    if FORMAT == BF16:
        value = (tl.load(data + row * data_row + i, here, 0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        if FORMAT == INT8:
            value = tl.load(data + row * data_row + i, here, 0).to(tl.int8, bitcast=True).to(tl.float32)
        elif FORMAT == FP8:
            value = from_e4m3(tl.load(data + row * data_row + i, here, 0).to(tl.int32))
        else:
            nibble = (tl.load(data + row * data_row + i // 2, here, 0).to(tl.int32) >> ((i & 1) * 4)) & 15
            value = ((nibble ^ 8) - 8).to(tl.float32)
        value *= tl.load(scale + row * groups + i // length, here, 0.0)
    tl.store(out + row * size + i, value, here)


def split_int4(group_count, length):
    """Say whether pairs of an int4 row may lie in two groups: it is then quantised to bytes, which a second launch joins."""
    return group_count > 1 and length % 2 == 1


def quantize_rows(x, rows, groups, length, index, count, format, data, scale, codes, native_fp8, wire, tuning):
    """Quantise `rows` rows of `groups` x `length` elements of x (contiguous but for the row stride).

    index int64 picks the rows and count int64 [] how many of them count (None: all); data is bytes (int16 for bf16); `codes`: scratch
    bytes for rows that `split_int4` names; `wire`: data begins behind the scales of the `count` rows, in one piece.
    """
    kind, size = FORMATS[format], groups * length
    if kind == BF16.value:
        block = min(power_of_two(size), 4096)
        launch(round_kernel, (rows, ceil_div(size, block)), x, x.stride(0), index, count, size, data, BLOCK=block, num_warps=4)
        return
    limit, largest = GRIDS[kind]
    joined = codes is not None
    once = length <= tuning.group_elements
    tile = max(2, power_of_two(length) if once else tuning.group_elements // 2)
    many = min(power_of_two(groups), max(1, tuning.group_tile // tile))
    launch(
        quantize_kernel, (rows, ceil_div(groups, many)), x, x.stride(0), index, count, groups, length,
        size if joined or kind != INT4.value else (size + 1) // 2, limit, largest, codes if joined else data, scale,
        FORMAT=INT8.value if joined else kind, NATIVE=native_fp8, WIRE=wire and not joined, ONCE=once, BG=many, BL=tile,
        num_warps=8 if tile * many > 4096 else 4, enable_fp_fusion=False,
    )  # fmt: skip
    if joined:
        block = min(power_of_two((size + 1) // 2), 4096)
        launch(join_kernel, (rows, ceil_div((size + 1) // 2, block)), codes, count, groups, size, data, WIRE=wire, BLOCK=block, num_warps=4)


def dequantize_rows(data, rows, groups, length, scale, format, out):
    """Write the fp32 values of `rows` rows of `groups` x `length` codes; data as bytes (int16 for bf16) with contiguous rows."""
    size = groups * length
    block = min(power_of_two(size), 4096)
    launch(
        dequantize_kernel, (rows, ceil_div(size, block)), data, data.stride(0), scale, groups, length, size, out,
        FORMAT=FORMATS[format], BLOCK=block, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip

"""pack_planes and unpack_planes: the byte format of `fastee.reference.pack_planes`, a program per block of 2,048 values.

Packing takes three launches: the blocks' code tables and sizes, where each block begins, the blocks themselves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import ceil_div, launch, power_of_two

FP32, FP16 = tl.constexpr(0), tl.constexpr(2)  # kinds: 0 fp32, 1 bf16, 2 fp16
HEAD, BLOCK = tl.constexpr(12), tl.constexpr(2048)
ROW = 16 + BLOCK.value  # scratch bytes of a block: code table, form, lowest escape; the escapes in order


@triton.jit
def split_value(v, KIND: tl.constexpr):
    """Return the upper 16 bits (int32) of values and their exponents."""
    top = (v >> 16) & 0xFFFF if KIND == FP32 else v & 0xFFFF
    exponent = (top >> 10) & 31 if KIND == FP16 else (top >> 7) & 255
    return top, exponent


@triton.jit
def bit_plane(bits):
    """Return the bytes [256] of bits [2048] (int32 0 or 1), value i in bit i % 8 of byte i / 8."""
    return tl.sum(tl.reshape(bits, (256, 8)) << tl.arange(0, 8)[None, :], 1).to(tl.uint8)


@triton.jit
def sizes_kernel(values, count, tables, sizes, KIND: tl.constexpr, ROW: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    n = tl.minimum(count - block * BLOCK, BLOCK).to(tl.int32)
    top, exponent = split_value(tl.load(values + block * BLOCK + i, i < n, 0).to(tl.int32), KIND)
    every = (n // 512) | 1
    votes = tl.histogram(tl.where((i < n) & (i % every == 0), exponent, 256), 512)  # who does not vote goes to a bin of its own
    bin = tl.arange(0, 512)
    rank = tl.where(bin < 256, votes * 256 + (255 - bin), -1)  # the smaller exponent first among equals
    escape = i < n
    for k in tl.static_range(7):
        best = tl.max(rank, 0)
        exponent_k = 255 - (best & 255)
        rank = tl.where(rank == best, -1, rank)
        escape = escape & (exponent != exponent_k)
        tl.store(tables + block * ROW + k, exponent_k.to(tl.uint8))
    escapes = tl.sum(escape.to(tl.int32), 0)
    lowest, highest = tl.min(tl.where(escape, exponent, 255), 0), tl.max(tl.where(escape, exponent, 0), 0)
    narrow = highest < lowest + 16
    words = (n + 63) // 64
    coded = 24 * words + n + tl.where(narrow, (escapes + 1) // 2, escapes)
    raw = 2 * n
    if KIND == FP32:
        coded += 2 * n
        raw = 4 * n
    if KIND == FP16:
        coded += 24 * words
    tl.store(tables + block * ROW + 7, tl.where(coded < raw, 1 + narrow.to(tl.int32), 0).to(tl.uint8))
    tl.store(tables + block * ROW + 8, tl.where(narrow & (escapes > 0), lowest, 0).to(tl.uint8))
    tl.store(sizes + block, (tl.minimum(coded, raw) + HEAD + 3) // 4)


@triton.jit
def offsets_kernel(sizes, blocks, count, offsets, header, nbytes, KIND: tl.constexpr, BLOCKS: tl.constexpr):
    total = tl.zeros((), tl.int32)
    for first in range(0, blocks, BLOCKS):
        i = first + tl.arange(0, BLOCKS)
        size = tl.load(sizes + i, i < blocks, 0)
        tl.store(offsets + i, total + tl.cumsum(size, 0) - size, i < blocks)
        total += tl.sum(size, 0)
    tl.store(offsets + blocks, total)
    i = tl.arange(0, 16)
    magic = tl.where(
        i == 0, 70, tl.where(i == 1, 80, tl.where(i == 2, 76, tl.where(i == 3, 78, tl.where(i == 4, 2, tl.where(i == 5, KIND, 0)))))
    )
    number = (tl.zeros((16,), tl.int64) + count) >> (8 * tl.maximum(i - 8, 0)).to(tl.int64)
    tl.store(header + i, tl.where(i < 8, magic.to(tl.int64), number & 255).to(tl.uint8))
    tl.store(nbytes, total.to(tl.int64) * 4 + 16 + 4 * (blocks + 1))


@triton.jit
def store_low_bytes(out, v, i, n, WIDTH: tl.constexpr):
    """Write the low WIDTH bytes of v [2048], little-endian: an address here may be odd."""
    for k in tl.static_range(WIDTH):
        tl.store(out + i * WIDTH + k, ((v >> (8 * k)) & 255).to(tl.uint8), i < n)


@triton.jit
def pack_kernel(values, count, tables, offsets, out, KIND: tl.constexpr, ROW: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    n = tl.minimum(count - block * BLOCK, BLOCK).to(tl.int32)
    v = tl.load(values + block * BLOCK + i, i < n, 0).to(tl.int32)
    top, exponent = split_value(v, KIND)
    begin = tl.load(offsets + block).to(tl.int64) * 4
    end = tl.load(offsets + block + 1).to(tl.int64) * 4
    at = out + begin
    k = tl.arange(0, 16)
    table = tables + block * ROW
    form = tl.load(table + 7).to(tl.int32)
    if form == 0:
        used = (4 * n if KIND == FP32 else 2 * n) + HEAD
        tl.store(at + k, tl.zeros((16,), tl.uint8), k < HEAD)
        store_low_bytes(at + HEAD, v, i, n, 4 if KIND == FP32 else 2)
    else:
        code = tl.full((BLOCK,), 7, tl.int32)
        for j in tl.static_range(7):
            code = tl.where(exponent == tl.load(table + j).to(tl.int32), j, code)
        escape = ((code == 7) & (i < n)).to(tl.int32)
        code = tl.where(i < n, code, 0)
        step = 8 * ((n + 63) // 64)
        byte = tl.arange(0, 256)
        planes = at + HEAD
        for bit in tl.static_range(3):
            tl.store(planes + bit * step + byte, bit_plane((code >> bit) & 1), byte < step)
        used = 3 * step + HEAD
        low = (top & 0x7F) | ((top >> 8) & 0x80)
        if KIND == FP16:
            low = top & 0xFF
            extra = tl.where(i < n, ((top >> 8) & 3) | ((top >> 13) & 4), 0)
            for bit in tl.static_range(3):
                tl.store(planes + 3 * step + bit * step + byte, bit_plane((extra >> bit) & 1), byte < step)
            used += 3 * step
        tl.store(at + used + i, low.to(tl.uint8), i < n)
        used += n
        if KIND == FP32:
            store_low_bytes(at + used, v, i, n, 2)
            used += 2 * n
        escapes = tl.sum(escape, 0)
        lowest = tl.load(table + 8).to(tl.int32)
        tl.store(table + 16 + tl.cumsum(escape, 0) - escape, (exponent - lowest).to(tl.uint8), escape != 0)
        tl.debug_barrier()  # one thread's escape is another's neighbour
        if form == 1:
            tl.store(at + used + i, tl.load(table + 16 + i, i < escapes, 0), i < escapes)
            used += escapes
        else:
            nibble = tl.load(table + 16 + 2 * i, 2 * i < escapes, 0) | tl.load(table + 17 + 2 * i, 2 * i + 1 < escapes, 0) << 4
            tl.store(at + used + i, nibble, 2 * i < escapes)
            used += (escapes + 1) // 2
        codes = tl.load(table + k, k < 8, 0).to(tl.int32)
        head = tl.where(k < 8, codes, tl.where(k == 8, escapes & 255, tl.where(k == 9, escapes >> 8, tl.where(k == 10, lowest, 0))))
        tl.store(at + k, head.to(tl.uint8), k < HEAD)
    tl.store(at + used + k, tl.zeros((16,), tl.uint8), begin + used + k < end)


@triton.jit
def plane_bit(planes, i, here):
    """Return bit i of a plane, as int32."""
    return (tl.load(planes + i // 8, here, 0).to(tl.int32) >> (i % 8)) & 1


@triton.jit
def load_low_bytes(data, i, here, WIDTH: tl.constexpr):
    v = tl.zeros((BLOCK,), tl.int32)
    for k in tl.static_range(WIDTH):
        v |= tl.load(data + i * WIDTH + k, here, 0).to(tl.int32) << (8 * k)
    return v


@triton.jit
def unpack_kernel(data, payload, total, offsets, first, start, count, out, damaged, KIND: tl.constexpr):
    """Unpack block `start` + i; no byte is read outside of the payload. A damaged block is noted (the smallest number) and not written."""
    block = start + tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    n = tl.minimum(total - block * BLOCK, BLOCK).to(tl.int32)
    width: tl.constexpr = 4 if KIND == FP32 else 2
    # Offsets are unsigned: one of 2^31 words or more, as damaged bytes may claim, is no negative number.
    begin = (tl.load(offsets + block).to(tl.int64) & 0xFFFFFFFF) * 4
    end = (tl.load(offsets + block + 1).to(tl.int64) & 0xFFFFFFFF) * 4
    size = end - begin
    done = tl.zeros((), tl.int32)
    if (begin <= end) & (end <= payload) & (size >= HEAD):
        at = data + begin
        here = i < n
        kind = tl.load(at + 7).to(tl.int32)
        escapes = tl.load(at + 8).to(tl.int32) | tl.load(at + 9).to(tl.int32) << 8
        step = 8 * ((n + 63) // 64)
        low_at = (6 * step if KIND == FP16 else 3 * step) + HEAD
        high_at = low_at + (3 * n if KIND == FP32 else n)
        v = tl.zeros((BLOCK,), tl.int32)
        if (kind == 0) & (size == (n * width + HEAD + 3) // 4 * 4):
            v = load_low_bytes(at + HEAD, i, here, width)
            done += 1
        listed = escapes if kind == 1 else (escapes + 1) // 2
        if ((kind == 1) | (kind == 2)) & (size == (high_at + listed + 3) // 4 * 4):
            inside = i < 8 * step
            code = (
                plane_bit(at + HEAD, i, inside)
                | plane_bit(at + HEAD + step, i, inside) << 1
                | plane_bit(at + HEAD + 2 * step, i, inside) << 2
            )
            escape = (code == 7).to(tl.int32)
            if tl.sum(escape, 0) == escapes:
                place = tl.cumsum(escape, 0) - escape
                known = tl.load(at + code, (code < 7) & here, 0).to(tl.int32)
                if kind == 1:
                    other = tl.load(at + high_at + place, (code == 7) & here, 0).to(tl.int32)
                else:
                    other = tl.load(at + high_at + place // 2, (code == 7) & here, 0).to(tl.int32)
                    other = (((other >> (4 * (place & 1))) & 15) + tl.load(at + 10).to(tl.int32)) & 255
                exponent = tl.where(code == 7, other, known)
                low = tl.load(at + low_at + i, here, 0).to(tl.int32)
                if KIND == FP16:
                    extra = at + HEAD + 3 * step
                    high = (
                        plane_bit(extra, i, inside) << 8
                        | plane_bit(extra + step, i, inside) << 9
                        | plane_bit(extra + 2 * step, i, inside) << 15
                    )
                    v = low | high | (exponent & 31) << 10
                else:
                    v = (low & 0x7F) | exponent << 7 | (low & 0x80) << 8
                    if KIND == FP32:
                        v = v << 16 | load_low_bytes(at + low_at + n, i, here, 2)
                done += 1
        target = block * BLOCK + i - first
        if done > 0:
            tl.store(out + target, v.to(out.dtype.element_ty), here & (target >= 0) & (target < count))
    if done == 0:
        tl.atomic_min(damaged, block)


def blocks(count):
    """Return how many blocks `count` values make."""
    return ceil_div(count, BLOCK.value)


def capacity(count, item_size):
    """Return (bytes of the header and offsets, bytes that the packed form of `count` values can have at most)."""
    start = 16 + 4 * (blocks(count) + 1)
    return start, start + 12 * blocks(count) + count * item_size + 4


def pack_planes(values, kind, tables, sizes, data, offsets, nbytes):
    """Pack `values` (the bits, int32 or int16 [N], contiguous; kind 0 fp32, 1 bf16, 2 fp16) into data uint8 [capacity].

    offsets: int32 view of data behind the 16 bytes of the header; nbytes int64 []: how many bytes are used. Scratch: tables uint8
    [blocks, ROW], sizes int32 [blocks].
    """
    count = values.numel()
    number = blocks(count)
    start, _ = capacity(count, 0)
    launch(sizes_kernel, (number,), values, count, tables, sizes, KIND=kind, ROW=ROW, num_warps=8)
    launch(
        offsets_kernel,
        (1,),
        sizes,
        number,
        count,
        offsets,
        data,
        nbytes,
        KIND=kind,
        BLOCKS=min(4096, max(16, power_of_two(number))),
        num_warps=8,
    )
    launch(pack_kernel, (number,), values, count, tables, offsets, data[start:], KIND=kind, ROW=ROW, num_warps=8)


def unpack_planes(payload, total, kind, offsets, first, out, damaged):
    """Unpack values [first, first + out.numel()) of `total` into out (int32 or int16); damaged int64 [] gets the first damaged block."""
    count = out.numel()
    start, stop = first // BLOCK.value, ceil_div(first + count, BLOCK.value)
    launch(
        unpack_kernel,
        (stop - start if count else 0,),
        payload,
        payload.numel(),
        total,
        offsets,
        first,
        start,
        count,
        out,
        damaged,
        KIND=kind,
        num_warps=8,
    )

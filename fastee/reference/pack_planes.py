"""Lossless float planes, version 2. Everything little-endian; a block holds the next 2,048 values (the last one may hold fewer).

    bytes    content
    4        "FPLN"
    1, 1, 2  version 2; element type 0 fp32, 1 bf16, 2 fp16; 0
    8        values
    4 (N+1)  where each of the N blocks begins, and where the last one ends, in 4 bytes from the first block
    ...      the blocks, each a multiple of 4 bytes, filled up with zeros

    a block of n values, W = ceil(n / 64):
    7        the exponents that the codes 0 to 6 stand for: the commonest of every s-th value, s = n // 512 | 1 (odd, so that it meets every
             channel of channels-last memory), the smaller one first among equals
    1        form. 0: raw, taken unless coding shrinks: the values as they are follow a head of zeros. 1: escapes are bytes. 2: escapes are
             nibbles, taken when their exponents, 0 to 15 above the lowest of them, allow it
    2        escapes
    1, 1     form 2: the lowest exponent among the escapes (0 without any), else 0; 0
    3 x 8 W  bits 0, 1, 2 of the codes: value i is bit i % 64 of word i / 64; code 7 is an escape, values past the end have code 0
    3 x 8 W  fp16 only, in the same way: mantissa bits 8 and 9, the sign
    n        fp32, bf16: sign and upper seven mantissa bits of each value; fp16: its lower eight mantissa bits
    2 n      fp32 only: the lower 16 mantissa bits
    ...      the exponents of the escapes in order: form 1 a byte each; form 2 what is above the lowest, escape 2i in bits 0 to 3 of byte i,
             escape 2i + 1 in bits 4 to 7 (0 behind an odd last one)
"""

import numpy as np
import torch
from torch import Tensor

BLOCK, HEAD = 2048, 12  # values, bytes
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _planes(codes: np.ndarray) -> bytes:
    words = np.zeros(-len(codes) % 64 + len(codes), np.uint8)
    words[: len(codes)] = codes
    return b"".join(np.packbits(words >> k & 1, bitorder="little").tobytes() for k in range(3))


def _codes(data: bytes, n: int) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(data, np.uint8).reshape(3, -1), axis=1, bitorder="little")[:, :n]
    return bits[0] | bits[1] << 1 | bits[2] << 2


def _nibbles(a: np.ndarray) -> np.ndarray:
    a = np.append(a, np.zeros(len(a) % 2, np.uint8))
    return a[::2] | a[1::2] << 4


def pack_block(v: np.ndarray, kind: int) -> bytes:
    top = (v >> 16 if kind == 0 else v).astype(np.uint16)
    exponent = (top >> 10 & 31 if kind == 2 else top >> 7 & 255).astype(np.uint8)
    seen = np.bincount(exponent[:: len(v) // 512 | 1], minlength=256)
    table = np.argsort(-seen, kind="stable")[:7].astype(np.uint8)
    code = np.full(256, 7, np.uint8)
    code[table] = np.arange(7)
    codes = code[exponent]
    low = (top if kind == 2 else top & 0x7F | top >> 8 & 0x80).astype(np.uint8).tobytes()
    extra = _planes((top >> 8 & 3 | top >> 13 & 4).astype(np.uint8)) if kind == 2 else b""
    halves = (v & 0xFFFF).astype("<u2").tobytes() if kind == 0 else b""
    escapes = exponent[codes == 7]
    lowest, highest = (int(escapes.min()), int(escapes.max())) if len(escapes) else (0, 0)
    narrow = highest - lowest < 16
    listed = _nibbles(escapes - np.uint8(lowest)) if narrow else escapes
    coded = _planes(codes) + extra + low + halves + listed.tobytes()
    if len(coded) >= v.nbytes:
        return _padded(bytes(HEAD) + v.tobytes())
    return _padded(table.tobytes() + bytes([1 + narrow]) + len(escapes).to_bytes(2, "little") + bytes([lowest * narrow, 0]) + coded)


def unpack_block(data: bytes, n: int, kind: int) -> np.ndarray:
    dtype, width = ("<u4", 4) if kind == 0 else ("<u2", 2)
    if data[7] == 0 and len(data) == (HEAD + n * width + 3) // 4 * 4:
        return np.frombuffer(data, dtype, n, HEAD)
    step, escapes = 24 * ((n + 63) // 64), int.from_bytes(data[8:10], "little")
    at = HEAD + step * (2 if kind == 2 else 1)
    end, listed = at + n * (3 if kind == 0 else 1), escapes if data[7] == 1 else (escapes + 1) // 2
    if data[7] not in (1, 2) or len(data) != (end + listed + 3) // 4 * 4:
        raise ValueError("its sizes do not fit")
    codes = _codes(data[HEAD : HEAD + step], n)
    if np.unpackbits(np.bitwise_and.reduce(np.frombuffer(data, np.uint8, step, HEAD).reshape(3, -1))).sum() != escapes:
        raise ValueError("its escapes do not fit")
    exponent = np.frombuffer(data[:7] + b"\0", np.uint8)[codes].astype(np.uint32)
    others = np.frombuffer(data, np.uint8, listed, end)
    if data[7] == 2:
        others = np.stack((others & 15, others >> 4), -1).reshape(-1) + np.uint8(data[10])  # wraps
    exponent[codes == 7] = others[: int((codes == 7).sum())]
    low = np.frombuffer(data, np.uint8, n, at).astype(np.uint32)
    if kind == 2:
        extra = _codes(data[HEAD + step : at], n).astype(np.uint32)
        return (low | (extra & 3) << 8 | (exponent & 31) << 10 | (extra & 4) << 13).astype(dtype)
    top = low & 0x7F | exponent << 7 | (low & 0x80) << 8
    return (top << 16 | np.frombuffer(data, "<u2", n, at + n)).astype(dtype) if kind == 0 else top.astype(dtype)


def pack_planes(h: Tensor) -> Tensor:
    kind = TYPES.index(h.dtype)
    v = h.detach().contiguous().reshape(-1).view(torch.int32 if kind == 0 else torch.int16).numpy().view("<u4" if kind == 0 else "<u2")
    blocks = [pack_block(v[i : i + BLOCK], kind) for i in range(0, len(v), BLOCK)]
    offsets = np.cumsum([0, *(len(b) // 4 for b in blocks)]).astype("<u4").tobytes()
    head = b"FPLN" + bytes([2, kind, 0, 0]) + len(v).to_bytes(8, "little")
    return torch.frombuffer(bytearray(head + offsets + b"".join(blocks)), dtype=torch.uint8)


def read_planes_header(data: bytes) -> tuple[int, int, np.ndarray, int]:
    """Return (element type, values, byte offsets of the blocks, where the first one begins); ValueError for anything else."""
    if len(data) < 16 or data[:4] != b"FPLN" or data[4] != 2 or data[5] > 2 or data[6:8] != b"\0\0":
        raise ValueError("unpack_planes: data holds no packed planes: its header is not that of version 2")
    count = int.from_bytes(data[8:16], "little", signed=True)
    if count < 0 or count // BLOCK > len(data) // 4:
        raise ValueError(f"unpack_planes: data holds no packed planes: {count} values in {len(data)} bytes")
    blocks = (count + BLOCK - 1) // BLOCK
    start = 16 + 4 * (blocks + 1)
    offsets = np.frombuffer(data, "<u4", blocks + 1, 16).astype(np.int64) * 4 if start <= len(data) else np.array([-1])
    if offsets[0] != 0 or start + offsets[-1] != len(data):
        raise ValueError("unpack_planes: data holds no packed planes: its blocks do not end where it does")
    return data[5], count, offsets, start


def unpack_planes(data: Tensor, first: int = 0, count: int | None = None) -> Tensor:
    raw = data.contiguous().numpy().tobytes()
    kind, total, offsets, start = read_planes_header(raw)
    stop, values = total if count is None else first + count, []
    for b in range(first // BLOCK, -(-stop // BLOCK) if stop > first else 0):
        try:
            if not 0 <= offsets[b] <= offsets[b + 1] <= len(raw) - start or offsets[b + 1] - offsets[b] < HEAD:
                raise ValueError("its offsets do not fit")
            values.append(unpack_block(raw[start + offsets[b] : start + offsets[b + 1]], min(BLOCK, total - b * BLOCK), kind))
        except ValueError as why:
            raise ValueError(f"unpack_planes: data holds no packed planes: block {b} is damaged") from why
    flat = np.concatenate(values) if values else np.empty(0, "<u4" if kind == 0 else "<u2")
    at = first % BLOCK
    return torch.from_numpy(flat[at : at + stop - first].view("<i4" if kind == 0 else "<i2").copy()).view(TYPES[kind])

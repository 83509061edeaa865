"""How a carry (tuple of tensors) becomes payload bytes and back: one registered codec per wire id."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from fastee.cluster.frame import MAX_PAYLOAD, Frame, TensorEntry
from fastee.errors import FrameError, did_you_mean

Carry = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Codec:
    """One way to pack a tensor: ``accepts`` says whether it applies, ``size`` the packed bytes for (dtype, shape), None where they depend on the
    values (``unpack`` then checks them itself)."""

    id: int
    name: str
    accepts: Callable[[torch.Tensor], bool]
    size: Callable[[torch.dtype, tuple[int, ...]], int | None]
    pack: Callable[[torch.Tensor], list[Any]]
    unpack: Callable[[memoryview, TensorEntry], torch.Tensor]


CODECS: dict[str, Codec] = {}
_BY_ID: dict[int, Codec] = {}


def register(codec: Codec) -> Codec:
    """Add a codec; its id (0..254) is what stands on the wire and must never be reused."""
    if codec.name in CODECS or codec.id in _BY_ID or not 0 <= codec.id < 255:
        raise ValueError(f"codec: id {codec.id} and name {codec.name!r} must be free and the id within 0..254")
    CODECS[codec.name] = _BY_ID[codec.id] = codec
    return codec


def codec_id(name: str) -> int:
    """Return the wire id of a codec's name; raises ``ValueError`` for an unknown one."""
    if name not in CODECS:
        raise ValueError(f"codec: got {name!r}, expected one of {sorted(CODECS)}{did_you_mean(str(name), CODECS)}")
    return CODECS[name].id


def codec_name(number: int) -> str:
    """Return the name of a wire id; raises ``FrameError`` for an unknown one."""
    if number not in _BY_ID:
        raise FrameError(f"frame: codec id {number} is unknown, expected one of {sorted(_BY_ID)}")
    return _BY_ID[number].name


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


_NUMPY = {torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.int8}


def _bytes_of(x: torch.Tensor) -> Any:
    """The memory of a contiguous tensor as bytes, without a copy."""
    if x.dtype in _NUMPY and x.numel():
        return memoryview(x.numpy()).cast("B")  # half the price of two views by torch
    return x.reshape(-1).view(torch.uint8).numpy() if x.numel() else np.empty(0, np.uint8)


def _load(view: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not view.readonly and view.nbytes:
        # The native endpoint's buffers are writable, aligned to 64 bytes and this frame's own: the tensor lies in them and keeps them.
        flat = torch.frombuffer(view, dtype=torch.uint8)
        if flat.data_ptr() % dtype.itemsize == 0:
            return flat.view(dtype).view(shape)
    # pyzmq's start at any address (17 of 20 at odd ones), which typed loads may not: copy into torch's own memory.
    out = torch.empty(shape, dtype=dtype)
    if out.numel():
        _bytes_of(out)[:] = np.frombuffer(view, np.uint8)
    return out


def _unpack_raw(view: memoryview, entry: TensorEntry) -> torch.Tensor:
    if entry.dtype is torch.bool and view.nbytes and np.frombuffer(view, np.uint8).max() > 1:
        raise FrameError("frame: a bool tensor holds bytes other than 0 and 1")
    return _load(view, entry.dtype, entry.shape)


def _quantized(number: int, format: str, data_dtype: torch.dtype, row_bytes: Callable[[int], int]) -> Codec:
    """Return the codec of a format of `fastee.ops.quantize_rows`: the rows' fp32 scales (not for bf16), then their data."""
    scale_bytes = 0 if format == "bf16" else 4

    def size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
        return shape[0] * (scale_bytes + row_bytes(_numel(shape[1:])))

    def pack(x: torch.Tensor) -> list[Any]:
        from fastee import ops

        q = ops.quantize_rows(x.float(), format)
        return [_bytes_of(q.scale), _bytes_of(q.data)]

    def unpack(view: memoryview, entry: TensorEntry) -> torch.Tensor:
        from fastee import ops

        rows, row = entry.shape[0], _numel(entry.shape[1:])
        scale = _load(view[: scale_bytes * rows], torch.float32, (rows if scale_bytes else 0,))
        data = _load(view[scale_bytes * rows :], data_dtype, (rows, row_bytes(row) // data_dtype.itemsize))
        return ops.dequantize_rows(ops.QuantizedRows(data, scale, format, None, (rows, row))).to(entry.dtype).view(entry.shape)

    # Under 8 values a row the 4-byte scale eats the gain; integers and masks must stay exact.
    return Codec(number, format, lambda x: x.is_floating_point() and 2 <= x.ndim <= 8 and x.numel() >= 8 * x.shape[0] > 0, size, pack, unpack)


def _pack_planes(x: torch.Tensor) -> list[Any]:
    from fastee import ops

    return [ops.pack_planes(x).data.numpy()]


def _unpack_planes(view: memoryview, entry: TensorEntry) -> torch.Tensor:
    from fastee import ops

    if entry.dtype not in PLANES_DTYPES:
        raise FrameError(f"frame: {entry.dtype} cannot be packed as planes")
    data = _load(view, torch.uint8, (view.nbytes,))
    if view.nbytes < 16 or int.from_bytes(view[8:16], "little") != entry.numel:
        raise FrameError(f"frame: the planes do not hold the {entry.numel} values of shape {entry.shape}")
    try:
        flat = ops.unpack_planes(data)
    except ValueError as why:
        raise FrameError(f"frame: {why}") from None
    if flat.dtype != entry.dtype:
        raise FrameError(f"frame: the planes hold {flat.dtype}, the table says {entry.dtype}")
    return flat.view(entry.shape)


RAW = register(
    Codec(
        0,
        "raw",
        accepts=lambda x: True,
        size=lambda dtype, shape: _numel(shape) * dtype.itemsize,
        pack=lambda x: [_bytes_of(x)],
        unpack=_unpack_raw,
    )
)
INT8 = register(_quantized(1, "int8", torch.int8, lambda row: row))
INT4 = register(_quantized(2, "int4", torch.uint8, lambda row: (row + 1) // 2))
FP8_E4M3 = register(_quantized(3, "fp8_e4m3", torch.float8_e4m3fn, lambda row: row))
BF16 = register(_quantized(4, "bf16", torch.bfloat16, lambda row: 2 * row))
PLANES_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLANES = register(
    Codec(
        5,
        "planes",
        accepts=lambda x: x.dtype in PLANES_DTYPES and x.numel() >= 256,  # lossless; the header and one block's table take 40 bytes
        size=lambda dtype, shape: None,
        pack=_pack_planes,
        unpack=_unpack_planes,
    )
)


@lru_cache(256)
def _entry(dtype: torch.dtype, shape: torch.Size, packing: int, nbytes: int) -> TensorEntry:
    return TensorEntry(dtype, tuple(shape), packing, nbytes)


def pack(carry: Sequence[torch.Tensor], codec: str = "raw") -> tuple[tuple[TensorEntry, ...], Any]:
    """Return (table, payload) of a carry: every tensor the codec accepts is packed with it, the others travel raw.

    >>> table, payload = pack((torch.zeros(2, 16),), "int8")
    >>> table[0].nbytes                      # two fp32 scales and 32 int8 values
    40
    """
    chosen = CODECS[codec] if codec in CODECS else _BY_ID[codec_id(codec)]
    table, blobs = [], []
    for x in carry:
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"carry: got {type(x).__name__} among its values, expected tensors only")
        x = x.detach().cpu().contiguous()
        how = chosen if chosen is RAW or chosen.accepts(x) else RAW
        parts = how.pack(x)
        table.append(_entry(x.dtype, x.shape, how.id, sum(map(len, parts))))
        blobs += parts
    payload = memoryview(blobs[0]) if len(blobs) == 1 else b"".join(blobs)
    return tuple(table), payload


def unpack(frame: Frame) -> Carry:
    """Return the carry of a decoded frame, in memory of its own; raises ``FrameError`` for sizes that contradict each other."""
    view, at, carry = memoryview(frame.payload), 0, []
    for number, entry in enumerate(frame.tensors):
        codec_name(entry.packing)
        how = _BY_ID[entry.packing]
        if how is not RAW and (not entry.dtype.is_floating_point or not entry.shape):
            raise FrameError(f"frame: tensor {number} of {entry.dtype}, shape {entry.shape} cannot be packed as {how.name}")
        if (size := how.size(entry.dtype, entry.shape)) is not None and size != entry.nbytes:
            raise FrameError(
                f"frame: tensor {number} has {entry.nbytes} bytes, {how.name} of {entry.dtype} {entry.shape} needs "
                f"{size}"
            )
        if entry.numel * entry.dtype.itemsize > 4 * MAX_PAYLOAD:
            raise FrameError(f"frame: tensor {number} unpacks to more than {4 * MAX_PAYLOAD} bytes")
        if at + entry.nbytes > view.nbytes:
            raise FrameError(f"frame: the payload ends inside tensor {number}")
        carry.append(how.unpack(view[at : at + entry.nbytes], entry))
        at += entry.nbytes
    return tuple(carry)


def unpack_answer(frame: Frame) -> tuple[torch.Tensor, int, float, int, int, bool]:
    """Return logits [C], label, confidence, exit, wire bytes and forced of an ANSWER; raises ``FrameError`` for a frame that holds anything else."""
    found = frame.answer() if not isinstance(frame, Frame) else None
    if found is not None:
        return found
    values = unpack(frame)
    if len(values) != 3 or values[0].ndim != 2 or [v.numel() for v in values[1:]] != [1, 1]:
        raise FrameError(f"frame: an answer holds logits [1, C], label and confidence, got {[list(v.shape) for v in values]}")
    return values[0][0], int(values[1]), float(values[2]), frame.exit, frame.wire_bytes, frame.forced


def packed_bytes(carry: Sequence[torch.Tensor], codec: str) -> int:
    """Return the payload bytes of a carry under a codec, scales included, header not."""
    table, _ = pack(carry, codec)
    return sum(t.nbytes for t in table)

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from fastee import dispatch, native, reference

from . import _check, _cpu, _cuda, _library, _numba, _triton

TYPES = (torch.float32, torch.bfloat16, torch.float16)


class PackedPlanes(NamedTuple):
    """A float tensor packed without loss; `fastee.ops.unpack_planes` gives it back bit for bit."""

    data: Tensor  # uint8 [nbytes], header included: these bytes alone say dtype and number of values
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the packed tensor, header included."""
        return self.data.numel()


def _check_pack(h):
    return (_check.tensor("pack_planes", "h", h, TYPES, "[...]", tuple(range(17))),), {}


def _check_unpack(p, start=0, stop=None):
    if isinstance(p, PackedPlanes):
        data, shape = p
    elif isinstance(p, Tensor):
        data, shape = p, None
    else:
        raise TypeError(f"unpack_planes: p must be a PackedPlanes or a uint8 tensor [n], got {_check.show(p)}")
    data = _check.tensor("unpack_planes", "data", data, (torch.uint8,), "[n]", 1)
    if data.device.type not in ("cpu", "cuda"):
        raise ValueError(f"unpack_planes: data must be on cpu or a CUDA device, got {data.device}")
    data = data.contiguous()
    kind, total = _info(data)
    if shape is not None and (math.prod(shape) != total or min(shape, default=0) < 0):
        raise ValueError(f"unpack_planes: p.shape must hold the {total} packed values, got {list(shape)}")
    for name, value in (("start", start), ("stop", stop)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise TypeError(f"unpack_planes: {name} must be an int, got {_check.show(value)}")
    end = total if stop is None else stop
    if not 0 <= start <= end <= total:
        raise ValueError(f"unpack_planes: start and stop must lie in order within the {total} packed values, got {start} and {end}")
    return (data, TYPES[kind], shape if (start, end) == (0, total) else None, start, end - start), {}


def _info(data):
    if native.hot is None or data.device.type != "cpu":
        kind, total, *_ = reference.read_planes_header(memoryview(_begin(data)))
        return kind, total
    bits, bfloat, count = native.hot.planes_info(data)
    return (0 if bits == 32 else 1 if bfloat else 2), count


def _begin(data) -> np.ndarray:
    """Return packed bytes of which only the header and the offsets are brought from a device (and it is waited for)."""
    if data.device.type == "cpu":
        return data.numpy()
    out = np.zeros(data.numel(), np.uint8)  # pages that are never touched cost nothing
    out[:16] = data[:16].cpu().numpy()
    values = int.from_bytes(out[8:16].tobytes(), "little", signed=True)
    blocks = -(-values // 2048)
    if 0 <= blocks <= out.size // 4:
        stop = 16 + 4 * (blocks + 1)
        out[:stop] = data[:stop].cpu().numpy()
    return out


def _run_unpack(data, dtype, shape, first, count):
    flat = native.hot.unpack_planes(data, first, first + count)
    return flat if shape is None else flat.view(shape)


def _reference_unpack(data, dtype, shape, first, count):
    flat = reference.unpack_planes(data.cpu(), first, count).to(data.device)
    return flat if shape is None else flat.view(shape)


def _cuda_unpack(data, dtype, shape, first, count):
    return _cuda.unpack_planes(data, dtype, _info(data)[1], shape, first, count)


def _triton_unpack(data, dtype, shape, first, count):
    kind, total = _info(data)
    return _triton.unpack_planes(data, kind, total, shape, first, count)


def _numba_pack(h):
    kind, count = TYPES.index(h.dtype), h.numel()
    values = _numba.flat(h.contiguous(), torch.int32 if kind == 0 else torch.int16).view("u4" if kind == 0 else "u2").astype(np.uint32, copy=False)
    blocks = -(-count // 2048)
    start = 16 + 4 * (blocks + 1)
    out = np.zeros(start + 16 * blocks + count * h.element_size(), np.uint8)
    out[:8], out[8:16].view("<i8")[0] = (*b"FPLN", 2, kind, 0, 0), count
    size = _numba.kernel("pack_planes")(values, kind, out[16 : 16 + 4 * (blocks + 1)].view("<u4"), out[start:])
    return torch.from_numpy(out[: start + size].copy())


def _numba_unpack(data, dtype, shape, first, count):
    raw = data.numpy()
    kind, total, offsets, start = reference.read_planes_header(memoryview(raw))
    out = np.empty(count, np.uint32)
    damaged = _numba.kernel("pack_planes", "unpack_planes")(raw[start:], offsets, kind, total, first, count, out)
    if damaged >= 0:
        raise ValueError(f"unpack_planes: data holds no packed planes: block {damaged} is damaged")
    bits = out.view(np.int32) if kind == 0 else out.astype(np.uint16).view(np.int16)
    return torch.from_numpy(bits).view(dtype).view(-1 if shape is None else shape)


_pack = dispatch.register(
    dispatch.Op(
        "pack_planes",
        (
            dispatch.Backend("cuda", _cuda.pack_planes, _cuda.elsewhere),
            dispatch.Backend("triton", lambda h: _triton.pack_planes(h, TYPES.index(h.dtype)), _triton.elsewhere),
            dispatch.Backend("cpu", lambda h: native.hot.pack_planes(h.detach().contiguous()), _cpu.elsewhere),
            dispatch.Backend("numba", _numba_pack, _numba.elsewhere, lambda h: _numba.not_ready("pack_planes")),
            dispatch.Backend("reference", lambda h: reference.pack_planes(h.cpu()).to(h.device)),
        ),
        _check_pack,
    )
)
_unpack = dispatch.register(
    dispatch.Op(
        "unpack_planes",
        (
            dispatch.Backend("cuda", _cuda_unpack, lambda data, *rest: _cuda.elsewhere(data)),
            dispatch.Backend("triton", _triton_unpack, lambda data, *rest: _triton.elsewhere(data)),
            dispatch.Backend("cpu", _run_unpack, lambda data, *rest: _cpu.elsewhere(data)),
            dispatch.Backend("numba", _numba_unpack, _numba.elsewhere, lambda *a: _numba.not_ready("pack_planes")),
            dispatch.Backend("reference", _reference_unpack),
        ),
        _check_unpack,
    )
)


def _flat_unpack(data, shape):
    args, _ = _check_unpack(PackedPlanes(data, tuple(shape)))
    return dispatch.choose(_unpack, args, {}).run(*args)


_library.define(
    "pack_planes(Tensor h) -> Tensor",
    lambda h: dispatch.choose(_pack, (h,), {}).run(h).clone(),
    lambda h: h.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8),
)
_library.define(
    "unpack_planes(Tensor data, SymInt[] shape, ScalarType dtype) -> Tensor",
    lambda data, shape, dtype: _flat_unpack(data, shape).view(dtype),
    lambda data, shape, dtype: data.new_empty(shape, dtype=dtype),
)


_direct_pack = dispatch.direct("direct_pack_planes")
_direct_unpack = dispatch.direct("direct_unpack_planes")


def pack_planes(h: Tensor, *, backend: str | None = None) -> PackedPlanes:
    """Pack a float tensor without loss: sign and mantissa as they are, exponents as 3-bit codes per block of 2,048 values.

    h is fp32, bf16 or fp16 of any shape (non-contiguous: copied). The codes stand for the block's seven commonest exponents, found
    by sampling; other exponents are listed behind the block. A block that would not shrink is stored raw. Typical
    bf16 activations shrink to 0.70 to 0.71, fp16 to 0.89, fp32 to 0.85. Byte layout: ``fastee/reference/pack_planes.py``. Empty tensors give the
    header alone. Raises `TypeError` for another dtype, `ValueError` above 16 GiB.

    >>> import torch, fastee
    >>> h = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    >>> p = fastee.ops.pack_planes(h)
    >>> p.nbytes < 0.75 * h.nbytes, torch.equal(fastee.ops.unpack_planes(p), h)
    (True, True)
    """
    if backend is None and not is_dynamo_compiling():
        data = _direct_pack(h)
        if data is not None:
            return PackedPlanes(data, tuple(h.shape))
    args, options = _check_pack(h)
    if is_compiling():
        return PackedPlanes(torch.ops.fastee.pack_planes(h), tuple(h.shape))
    return PackedPlanes(dispatch.choose(_pack, args, options, backend).run(h), tuple(h.shape))


def unpack_planes(p: PackedPlanes | Tensor, start: int = 0, stop: int | None = None, *, backend: str | None = None) -> Tensor:
    """Return the tensor that `p` was packed from, bit for bit: NaN payloads, -0 and denormals included.

    `p` may also be the packed bytes alone (uint8 [n]); the result is then flat. `start` and `stop` pick a range of the flat values:
    only the blocks that hold it are read, and the result is flat. Any bytes are safe to hand in: what is no packed tensor
    raises `ValueError`.

    >>> import torch, fastee
    >>> p = fastee.ops.pack_planes(torch.arange(5000.0))
    >>> fastee.ops.unpack_planes(p, 4096, 4099).tolist()
    [4096.0, 4097.0, 4098.0]
    """
    if backend is None and not is_dynamo_compiling():
        data, shape = p if isinstance(p, PackedPlanes) else (p, None)
        result = _direct_unpack(data, shape, start, stop)
        if result is not None:
            return result
    args, options = _check_unpack(p, start, stop)
    return dispatch.choose(_unpack, args, options, backend).run(*args)

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from fastee import dispatch, native, reference

from . import _check, _cpu, _cuda, _library, _numba, _triton
from .results import ROWS, QuantizedRows

FORMATS = ("int8", "int4", "fp8_e4m3", "bf16")
DTYPES = {"int8": torch.int8, "int4": torch.uint8, "fp8_e4m3": torch.float8_e4m3fn, "bf16": torch.bfloat16}


def _check_quantize(x, format="int8", group=None):
    x = _check.tensor("quantize_rows", "x", x, _check.FLOATS, "[B, ...]", tuple(range(1, 9)))
    _check.word("quantize_rows", "format", format, FORMATS)
    if group is not None:
        if not isinstance(group, int) or isinstance(group, bool):
            raise TypeError(f"quantize_rows: group must be None or an int, got {_check.show(group)}")
        row = x.shape[1:].numel()
        if group <= 0 or row % group:
            raise ValueError(f"quantize_rows: group must divide the {row} elements of a row, got {group}")
    if format == "bf16" and group is not None:
        raise ValueError(f"quantize_rows: group must be None for bf16, which has no scales, got {group}")
    return (x, format, group), {}


def _check_dequantize(q):
    if not isinstance(q, ROWS):
        raise TypeError(f"dequantize_rows: q must be a QuantizedRows, got {_check.show(q)}")
    _check.word("dequantize_rows", "q.format", q.format, FORMATS)
    data, scale, group, format = q.data, q.scale, q.group, q.format
    data = _check.tensor("dequantize_rows", "data", data, (DTYPES[format],), "[B, ...]", tuple(range(1, 9)))
    scale = _check.tensor("dequantize_rows", "scale", scale, (torch.float32,), "[B] or [B, groups]", (1, 2))
    if format == "int4" and q.shape is None:
        raise ValueError("dequantize_rows: q.shape must be the shape of the rows for int4, got None")
    shape = tuple(data.shape if q.shape is None else q.shape)
    row = math.prod(shape[1:])
    if list(data.shape) != ([shape[0], (row + 1) // 2] if format == "int4" else list(shape)):
        raise ValueError(f"dequantize_rows: data must be that of {format} rows of shape {list(shape)}, got {_check.show(data)}")
    wanted = [data.shape[0]] if group is None else [data.shape[0], row // group if group > 0 and row % group == 0 else -1]
    if list(scale.shape) != (wanted if format != "bf16" else [0]):
        wanted = wanted if format != "bf16" else [0]
        raise ValueError(f"dequantize_rows: scale must be {wanted} for data {_check.show(data)} and group {group}, got {_check.show(scale)}")
    _check.same_device("dequantize_rows", "data", data, scale=scale)
    return (data, scale, group, format, shape), {}


def _empty(x: Tensor, format: str, group: int | None) -> tuple[Tensor, Tensor]:
    row = x.shape[1:].numel()
    shape = (x.shape[0], (row + 1) // 2) if format == "int4" else x.shape
    scales = (0,) if format == "bf16" else (x.shape[0],) if group is None else (x.shape[0], row // group)
    return x.new_empty(shape, dtype=DTYPES[format]), x.new_empty(scales, dtype=torch.float32)


def _bytes(data: Tensor) -> Tensor:
    return data.view(torch.uint8) if data.dtype == torch.float8_e4m3fn else data


def _run_quantize(x, format, group):
    data, scale = _empty(x, format, group)
    native.hot.quantize_rows(x.detach(), format, group or 0, _bytes(data), scale)
    return QuantizedRows(data, scale, format, group, tuple(x.shape))


def _run_dequantize(data, scale, group, format, shape):
    out = torch.empty(shape, dtype=torch.float32)
    native.hot.dequantize_rows(_bytes(data), scale, format, group or 0, out)
    return out


@_numba.widening
def _numba_quantize(x, format, group):
    (data, scale), row = _empty(x, format, group), x.shape[1:].numel()
    kernel, sizes = _numba.kernel("quantize_rows", f"quantize_{format.removeprefix('fp8_')}"), (x.shape[0], row, x.stride(0))
    if format == "bf16":
        kernel(_numba.flat(x, torch.int32), *sizes, _numba.flat(data, torch.int16))
    elif row == 0:
        scale.zero_()
    else:
        kernel(_numba.flat(x), *sizes, group or row, _numba.flat(_bytes(data)), _numba.flat(scale))
    return QuantizedRows(data, scale, format, group, tuple(x.shape))


def _numba_dequantize(data, scale, group, format, shape):
    out, row = torch.empty(shape, dtype=torch.float32), math.prod(shape[1:])
    kernel, sizes = _numba.kernel("quantize_rows", f"dequantize_{format.removeprefix('fp8_')}"), (shape[0], row, data.stride(0))
    if format == "bf16":
        kernel(_numba.flat(data, torch.int16), *sizes, _numba.flat(out, torch.int32))
    elif row:
        kernel(_numba.flat(_bytes(data)), *sizes, group or row, _numba.flat(scale), _numba.flat(out))
    return out


def _cuda_quantize(x, format, group):
    data, scale = _empty(x, format, group)
    _cuda.quantize_rows(x, format, group, data, scale)
    return QuantizedRows(data, scale, format, group, tuple(x.shape))


def _triton_quantize(x, format, group):
    data, scale = _empty(x, format, group)
    _triton.quantize_rows(x, format, group, data, scale)
    return QuantizedRows(data, scale, format, group, tuple(x.shape))


def _triton_dequantize_declines(data, scale, *rest):
    return _triton.elsewhere(data) or _cpu.contiguous_rows("data", data) or (None if scale.is_contiguous() else "scale is not contiguous")


def _numba_quantize_declines(x, format, group):
    return _numba.floats(x) or _cpu.contiguous_rows("x", x)


def _numba_dequantize_declines(data, scale, group, format, shape):
    return _numba.elsewhere(data) or _cpu.contiguous_rows("data", data) or (None if scale.is_contiguous() else "scale is not contiguous")


def _numba_dequantize_yields(data, scale, *rest):
    return "torch is as fast below 16,384 elements" if data.numel() < 16_384 else _numba.not_ready("quantize_rows")


def _cpu_dequantize_declines(data, scale, *rest):
    return _cpu.elsewhere(data) or _cpu.contiguous_rows("data", data) or (None if scale.is_contiguous() else "scale is not contiguous")


def _reference_quantize(x, format, group):
    return QuantizedRows(*reference.quantize_rows(x, format, group), format, group, tuple(x.shape))


_quantize = dispatch.register(
    dispatch.Op(
        "quantize_rows",
        (
            dispatch.Backend("cuda", _cuda_quantize, lambda x, f, g: _cuda.floats(x) or _cpu.contiguous_rows("x", x)),
            dispatch.Backend("triton", _triton_quantize, lambda x, f, g: _triton.floats(x) or _cpu.contiguous_rows("x", x)),
            dispatch.Backend("cpu", _run_quantize, lambda x, f, g: _cpu.floats(x) or _cpu.contiguous_rows("x", x)),
            dispatch.Backend("numba", _numba_quantize, _numba_quantize_declines, lambda *a: _numba.not_ready("quantize_rows")),
            dispatch.Backend("reference", _reference_quantize),
        ),
        _check_quantize,
    )
)
_dequantize = dispatch.register(
    dispatch.Op(
        "dequantize_rows",
        (
            dispatch.Backend("triton", _triton.dequantize_rows, _triton_dequantize_declines),
            dispatch.Backend("cpu", _run_dequantize, _cpu_dequantize_declines),
            dispatch.Backend("numba", _numba_dequantize, _numba_dequantize_declines, _numba_dequantize_yields),
            dispatch.Backend("reference", reference.dequantize_rows),
        ),
        _check_dequantize,
    )
)


def _flat_quantize(x, format, group):
    return tuple(dispatch.choose(_quantize, (x, format, group), {}).run(x, format, group)[:2])


def _flat_dequantize(data, scale, group, format="int8", shape=None):
    args = (data, scale, group, format, tuple(data.shape if shape is None else shape))
    return dispatch.choose(_dequantize, args, {}).run(*args)


_library.define("quantize_rows(Tensor x, str format, int? group) -> (Tensor, Tensor)", _flat_quantize, _empty)
_library.define(
    'dequantize_rows(Tensor data, Tensor scale, int? group, str format="int8", SymInt[]? shape=None) -> Tensor',
    _flat_dequantize,
    lambda q, s, g, f="int8", shape=None: q.new_empty(q.shape if shape is None else shape, dtype=torch.float32),
)


_direct_quantize = dispatch.direct("direct_quantize")
_direct_dequantize = dispatch.direct("direct_dequantize")


def quantize_rows(x: Tensor, format: str = "int8", group: int | None = None, *, backend: str | None = None) -> QuantizedRows:
    """Compress each row of x [B, ...] (fp32/bf16/fp16/fp64) to a coarser grid with one fp32 scale per row, or per `group` elements of it.

    max = the largest |x| of the group, scale = max / limit, q = round_half_even(x * (limit / max)), value = q * scale.

    ==========  =====  ==================================================================================================
    format      limit  `data`
    ==========  =====  ==================================================================================================
    int8        127    int8 in the shape of x
    int4        7      uint8 [B, ceil(row / 2)], two's complement: element 2i in bits 0-3 of byte i, element 2i + 1 in bits
                       4-7; those are 0 behind an odd last element. Groups follow each other without padding
    fp8_e4m3    448    float8_e4m3fn in the shape of x (OCP): bit 7 sign, bits 6-3 exponent (bias 7), bits 2-0 mantissa; a
                       zero keeps its sign
    bf16        -      bfloat16 in the shape of x, the upper half of the fp32 pattern rounded half to even, without scales
                       (``.scale`` is [0], `group` must be None); a NaN becomes quiet, its sign and upper payload stay
    ==========  =====  ==================================================================================================

    A group of zeros has scale 0; one with NaN or inf has scale NaN and q 0, so that it comes back as NaN. Rows shorter
    than 2^63 elements; B = 0 gives empty results. Raises `ValueError` when `group` does not divide the row.

    >>> import torch, fastee
    >>> q = fastee.ops.quantize_rows(torch.tensor([[1.0, -2.0]]))
    >>> q.data.tolist(), q.nbytes
    ([[64, -127]], 6)
    >>> fastee.ops.quantize_rows(torch.tensor([[1.0, -7.0, 3.0]]), "int4").data.tolist()  # 1 | -7 << 4, 3
    [[145, 3]]
    """
    if backend is None and not is_dynamo_compiling():
        result = _direct_quantize(x, format, group)
        if result is not None:
            return result
    args, options = _check_quantize(x, format, group)
    if is_compiling():
        return QuantizedRows(*torch.ops.fastee.quantize_rows(*args), format, group, tuple(args[0].shape))
    return dispatch.choose(_quantize, args, options, backend).run(*args)


def dequantize_rows(q: QuantizedRows, *, backend: str | None = None) -> Tensor:
    """Return the fp32 tensor that `q` stands for, ``value * scale`` per row or group, in the shape of the source.

    >>> import torch, fastee
    >>> fastee.ops.dequantize_rows(fastee.ops.quantize_rows(torch.tensor([[127.0, -127.0]]))).tolist()
    [[127.0, -127.0]]
    """
    if backend is None and isinstance(q, ROWS) and not is_dynamo_compiling():
        result = _direct_dequantize(q)
        if result is not None:
            return result
    args, options = _check_dequantize(q)
    if is_compiling():
        return torch.ops.fastee.dequantize_rows(*args)
    return dispatch.choose(_dequantize, args, options, backend).run(*args)

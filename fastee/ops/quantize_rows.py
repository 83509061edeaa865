from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastee import dispatch, native, reference

from . import _check, _cpu, _library, _numba
from .results import QuantizedRows

FORMATS = ("int8",)


def _check_quantize(x, format="int8", group=None):
    x = _check.tensor("quantize_rows", "x", x, _check.FLOATS, "[B, ...]", tuple(range(1, 9)))
    _check.word("quantize_rows", "format", format, FORMATS)
    if group is not None:
        if not isinstance(group, int) or isinstance(group, bool):
            raise TypeError(f"quantize_rows: group must be None or an int, got {_check.show(group)}")
        row = x.shape[1:].numel()
        if group <= 0 or row % group:
            raise ValueError(f"quantize_rows: group must divide the {row} elements of a row, got {group}")
    return (x, format, group), {}


def _check_dequantize(q):
    if not isinstance(q, QuantizedRows):
        raise TypeError(f"dequantize_rows: q must be a QuantizedRows, got {_check.show(q)}")
    _check.word("dequantize_rows", "q.format", q.format, FORMATS)
    data, scale, group = q.data, q.scale, q.group
    data = _check.tensor("dequantize_rows", "data", data, (torch.int8,), "[B, ...]", tuple(range(1, 9)))
    scale = _check.tensor("dequantize_rows", "scale", scale, (torch.float32,), "[B] or [B, groups]", (1, 2))
    row = data.shape[1:].numel()
    wanted = [data.shape[0]] if group is None else [data.shape[0], row // group if group > 0 and row % group == 0 else -1]
    if list(scale.shape) != wanted:
        raise ValueError(f"dequantize_rows: scale must be {wanted} for data {_check.show(data)} and group {group}, got {_check.show(scale)}")
    _check.same_device("dequantize_rows", "data", data, scale=scale)
    return (data, scale, group), {}


def _scales(x: Tensor, group: int | None) -> Tensor:
    shape = (x.shape[0],) if group is None else (x.shape[0], x.shape[1:].numel() // group)
    return x.new_empty(shape, dtype=torch.float32)


def _run_quantize(x, format, group):
    data, scale = torch.empty(x.shape, dtype=torch.int8), _scales(x, group)
    native.hot.quantize_rows(x.detach(), "int8", group or 0, data, scale)
    return QuantizedRows(data, scale, format, group)


def _run_dequantize(data, scale, group):
    out = torch.empty(data.shape, dtype=torch.float32)
    native.hot.dequantize_rows(data, scale, "int8", group or 0, out)
    return out


@_numba.widening
def _numba_quantize(x, format, group):
    data, scale, row = torch.empty(x.shape, dtype=torch.int8), _scales(x, group), x.shape[1:].numel()
    _numba.kernel("quantize_rows", "quantize_int8")(_numba.flat(x), x.shape[0], row, x.stride(0), group or row, _numba.flat(data), _numba.flat(scale))
    return QuantizedRows(data, scale, format, group)


def _numba_dequantize(data, scale, group):
    out, row = torch.empty(data.shape, dtype=torch.float32), data.shape[1:].numel()
    _numba.kernel("quantize_rows", "dequantize_int8")(
        _numba.flat(data), data.shape[0], row, data.stride(0), group or row, _numba.flat(scale), _numba.flat(out)
    )
    return out


def _numba_dequantize_declines(data, scale, group):
    return _numba.elsewhere(data) or _cpu.contiguous_rows("data", data) or (None if scale.is_contiguous() else "scale is not contiguous")


def _numba_dequantize_yields(data, scale, group):
    return "torch is as fast below 16,384 elements" if data.numel() < 16_384 else _numba.not_ready("quantize_rows")


_quantize = dispatch.register(
    dispatch.Op(
        "quantize_rows",
        (
            dispatch.Backend("cpu", _run_quantize, lambda x, f, g: _cpu.plain(x) or _cpu.contiguous_rows("x", x)),
            dispatch.Backend(
                "numba", _numba_quantize, lambda x, f, g: _numba.floats(x) or _cpu.contiguous_rows("x", x), lambda x, f, g: _numba.not_ready("quantize_rows")
            ),
            dispatch.Backend("reference", lambda x, f, g: QuantizedRows(*reference.quantize_rows(x, f, g), f, g)),
        ),
        _check_quantize,
    )
)
_dequantize = dispatch.register(
    dispatch.Op(
        "dequantize_rows",
        (
            dispatch.Backend(
                "cpu",
                _run_dequantize,
                lambda q, s, g: (
                    f"tensor on {q.device}"
                    if q.device.type != "cpu"
                    else _cpu.missing() or _cpu.contiguous_rows("data", q) or (None if s.is_contiguous() else "scale is not contiguous")
                ),
            ),
            dispatch.Backend("numba", _numba_dequantize, _numba_dequantize_declines, _numba_dequantize_yields),
            dispatch.Backend("reference", reference.dequantize_rows),
        ),
        _check_dequantize,
    )
)
_library.define(
    "quantize_rows(Tensor x, str format, int? group) -> (Tensor, Tensor)",
    lambda x, f, g: tuple(dispatch.choose(_quantize, (x, f, g), {}).run(x, f, g)[:2]),
    lambda x, f, g: (torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format), _scales(x, g)),
)
_library.define(
    "dequantize_rows(Tensor data, Tensor scale, int? group) -> Tensor",
    lambda q, s, g: dispatch.choose(_dequantize, (q, s, g), {}).run(q, s, g),
    lambda q, s, g: torch.empty_like(q, dtype=torch.float32, memory_format=torch.contiguous_format),
)


_direct_quantize = dispatch.direct("direct_quantize")
_direct_dequantize = dispatch.direct("direct_dequantize")


def quantize_rows(x: Tensor, format: str = "int8", group: int | None = None, *, backend: str | None = None) -> QuantizedRows:
    """Compress each row of x [B, ...] (fp32/bf16/fp16/fp64) to int8 with one fp32 scale per row, or per `group` elements of it.

    q = round_half_even(x * (127 / max|x|)) in [-127, 127], scale = max|x| / 127, so ``q * scale`` is within half a step. A row
    (group) of zeros has scale 0; one with NaN or inf has scale NaN and q 0, so that it comes back as NaN. Rows shorter
    than 2^63 elements; B = 0 gives empty results. Raises `ValueError` when `group` does not divide the row.

    >>> import torch, fastee
    >>> q = fastee.ops.quantize_rows(torch.tensor([[1.0, -2.0]]))
    >>> q.data.tolist(), q.nbytes
    ([[64, -127]], 6)
    """
    compiling = is_compiling()
    if _direct_quantize is not None and backend is None and group is None and format == "int8" and not compiling:
        result = _direct_quantize(x)
        if result is not None:
            return QuantizedRows(*result)
    args, options = _check_quantize(x, format, group)
    if compiling:
        return QuantizedRows(*torch.ops.fastee.quantize_rows(*args), format, group)
    return dispatch.choose(_quantize, args, options, backend).run(*args)


def dequantize_rows(q: QuantizedRows, *, backend: str | None = None) -> Tensor:
    """Return the fp32 tensor that `q` stands for, ``data * scale`` per row or group.

    >>> import torch, fastee
    >>> fastee.ops.dequantize_rows(fastee.ops.quantize_rows(torch.tensor([[127.0, -127.0]]))).tolist()
    [[127.0, -127.0]]
    """
    compiling = is_compiling()
    if _direct_dequantize is not None and backend is None and type(q) is QuantizedRows and q.format == "int8" and not compiling:
        result = _direct_dequantize(q.data, q.scale, q.group)
        if result is not None:
            return result
    args, options = _check_dequantize(q)
    if compiling:
        return torch.ops.fastee.dequantize_rows(*args)
    return dispatch.choose(_dequantize, args, options, backend).run(*args)

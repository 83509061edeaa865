from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastee import dispatch, native, reference

from . import _check, _cpu, _library, _numba, _triton


def _index(op: str, index) -> Tensor:
    return _check.tensor(op, "index", index, (torch.int64,), "[N]", 1)


def _in_range(op: str, index: Tensor, rows: int) -> None:
    # On a device this waits for it. A graph that is being captured cannot: there a row outside is left alone.
    if index.numel() and not is_compiling() and not (index.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        low, high = (int(n) for n in torch.stack(index.aminmax()).tolist())
        if low < 0 or high >= rows:
            raise ValueError(f"{op}: index must lie in [0, {rows}), got {low if low < 0 else high}")


def _check_gather(x, index):
    if not isinstance(x, Tensor) or x.dim() < 1:
        raise TypeError(f"gather_rows: x must be a tensor [B, ...], got {_check.show(x)}")
    index = _index("gather_rows", index)
    _check.same_device("gather_rows", "x", x, index=index)
    return (x, index), {}


def _check_scatter(out, index, rows):
    for name, value in (("out", out), ("rows", rows)):
        if not isinstance(value, Tensor) or value.dim() < 1:
            raise TypeError(f"scatter_rows: {name} must be a tensor [B, ...], got {_check.show(value)}")
    index = _index("scatter_rows", index)
    if rows.dtype != out.dtype or rows.shape[1:] != out.shape[1:] or rows.shape[0] != index.shape[0]:
        wanted = [index.shape[0], *out.shape[1:]]
        raise ValueError(f"scatter_rows: rows must be {str(out.dtype).removeprefix('torch.')} {wanted}, got {_check.show(rows)}")
    _check.same_device("scatter_rows", "out", out, index=index, rows=rows)
    return (out, index, rows), {}


def _gather_layout(x, index):
    if x.requires_grad and torch.is_grad_enabled():
        return "x requires grad"
    return _cpu.contiguous_rows("x", x) or (None if index.is_contiguous() else "index is not contiguous")


def _run_gather(x, index):
    out = x.new_empty(index.shape[0], *x.shape[1:])
    native.hot.gather_rows(x.detach(), index, out)
    return out


def _out_of_range(op: str, rows: int, index: Tensor, bad: int) -> None:
    if bad >= 0:
        raise ValueError(f"{op}: index must lie in [0, {rows}), got {int(index[bad])}")


def _numba_gather(x, index):
    out, row = x.new_empty(index.shape[0], *x.shape[1:]), x.shape[1:].numel() * x.element_size()
    stride = x.stride(0) * x.element_size()
    bad = _numba.kernel("gather_rows")(_numba.flat(x, torch.uint8), x.shape[0], row, stride, index.numpy(), _numba.flat(out, torch.uint8))
    _out_of_range("gather_rows", x.shape[0], index, bad)
    return out


def _triton_gather(x, index):
    _in_range("gather_rows", index, x.shape[0])
    return _triton.gather_rows(x, index)


def _triton_scatter(out, index, rows):
    _in_range("scatter_rows", index, out.shape[0])
    return _triton.scatter_rows(out, index, rows)


def _reference_gather(x, index):
    _in_range("gather_rows", index, x.shape[0])
    return reference.gather_rows(x, index)


def _scatter_layout(out, index, rows):
    if (out.requires_grad or rows.requires_grad) and torch.is_grad_enabled():
        return "a tensor requires grad"
    why = _cpu.contiguous_rows("out", out) or _cpu.contiguous_rows("rows", rows)
    return why or (None if index.is_contiguous() else "index is not contiguous")


def _run_scatter(out, index, rows):
    native.hot.scatter_rows(out.detach(), index, rows.detach())
    return out


def _numba_scatter(out, index, rows):
    size, row = out.element_size(), out.shape[1:].numel() * out.element_size()
    bad = _numba.kernel("gather_rows", "scatter_rows")(
        _numba.flat(out, torch.uint8), out.shape[0], row, out.stride(0) * size, index.numpy(), _numba.flat(rows, torch.uint8), rows.stride(0) * size
    )
    _out_of_range("scatter_rows", out.shape[0], index, bad)
    return out


def _reference_scatter(out, index, rows):
    _in_range("scatter_rows", index, out.shape[0])
    return reference.scatter_rows(out, index, rows)


_gather = dispatch.register(
    dispatch.Op(
        "gather_rows",
        (
            dispatch.Backend("triton", _triton_gather, lambda x, i: _triton.elsewhere(x) or _gather_layout(x, i)),
            dispatch.Backend("cpu", _run_gather, lambda x, i: _cpu.elsewhere(x) or _gather_layout(x, i)),
            dispatch.Backend("numba", _numba_gather, lambda x, i: _numba.elsewhere(x) or _gather_layout(x, i), lambda x, i: _numba.MOVES),
            dispatch.Backend("reference", _reference_gather),
        ),
        _check_gather,
    )
)
_scatter = dispatch.register(
    dispatch.Op(
        "scatter_rows",
        (
            dispatch.Backend("triton", _triton_scatter, lambda out, i, rows: _triton.elsewhere(out) or _scatter_layout(out, i, rows)),
            dispatch.Backend("cpu", _run_scatter, lambda out, i, rows: _cpu.elsewhere(out) or _scatter_layout(out, i, rows)),
            dispatch.Backend(
                "numba", _numba_scatter, lambda out, i, rows: _numba.elsewhere(out) or _scatter_layout(out, i, rows), lambda out, i, rows: _numba.MOVES
            ),
            dispatch.Backend("reference", _reference_scatter),
        ),
        _check_scatter,
    )
)
_library.define(
    "gather_rows(Tensor x, Tensor index) -> Tensor",
    lambda x, index: dispatch.choose(_gather, (x, index), {}).run(x, index),
    lambda x, index: x.new_empty(index.shape[0], *x.shape[1:]),
)


def _flat_scatter(out, index, rows):
    dispatch.choose(_scatter, (out, index, rows), {}).run(out, index, rows)


_library.define("scatter_rows(Tensor(a!) out, Tensor index, Tensor rows) -> ()", _flat_scatter, lambda out, index, rows: None)


def gather_rows(x: Tensor, index: Tensor, *, backend: str | None = None) -> Tensor:
    """Return rows `index` (int64 [N], any order, repeats allowed) of x [B, ...] of any dtype, as a new contiguous tensor.

    Raises `ValueError` when an index lies outside [0, B). N = 0 gives an empty tensor. Differentiable through the reference.

    >>> import torch, fastee
    >>> fastee.ops.gather_rows(torch.tensor([[1], [2], [3]]), torch.tensor([2, 0])).flatten().tolist()
    [3, 1]
    """
    args, options = _check_gather(x, index)
    if is_compiling():
        return torch.ops.fastee.gather_rows(x, index)
    return dispatch.choose(_gather, args, options, backend).run(*args)


def scatter_rows(out: Tensor, index: Tensor, rows: Tensor, *, backend: str | None = None) -> Tensor:
    """Write rows [N, ...] into rows `index` (int64 [N]) of `out` [B, ...] and return `out`.

    With a repeated index the last row wins. Raises `ValueError` when an index lies outside [0, B) or shapes differ; then
    nothing is written.

    >>> import torch, fastee
    >>> fastee.ops.scatter_rows(torch.zeros(3, 1), torch.tensor([2]), torch.ones(1, 1)).flatten().tolist()
    [0.0, 0.0, 1.0]
    """
    args, options = _check_scatter(out, index, rows)
    if is_compiling():
        torch.ops.fastee.scatter_rows(out, index, rows)
        return out
    return dispatch.choose(_scatter, args, options, backend).run(*args)

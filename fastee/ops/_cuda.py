"""The CUDA backend: what it takes, and memory for its kernels, which allocate nothing themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from fastee.kernels import cuda
from fastee.reference import RowStats

from . import _triton
from .results import ROWS, CompactResult, ExitHeadResult, ExitStepResult

HOME = "cuda"  # where tensors lie; the tests that load the emulated library (csrc/tests/cuda) say "cpu"
MOST_FEATURES = 20_480
# Products from which Triton's tensor cores, or cuBLAS, are taken instead. An estimate: 2^26 at a third of an H200's fp32 rate are 7 us.
MOST_PRODUCTS = 1 << 26


def elsewhere(*tensors: Tensor | None) -> str | None:
    """Decline tensors that are on no CUDA device."""
    if cuda.missing():
        return cuda.missing()
    return next((f"tensor on {t.device}" for t in tensors if t is not None and t.device.type != HOME), None)


def floats(*tensors: Tensor | None) -> str | None:
    """Decline what is not fp32, bf16 or fp16 on a CUDA device."""
    for t in tensors:
        if t is not None and t.dtype not in _triton.FLOATS:
            return f"dtype {str(t.dtype).removeprefix('torch.')} (this backend computes fp32)"
    return elsewhere(*tensors)


def wide(features: int) -> str | None:
    return f"{features} features (this backend takes at most {MOST_FEATURES})" if features > MOST_FEATURES else None


def large(x: Tensor, weight) -> str | None:
    """Yield a head whose products are many."""
    w = weight.data if isinstance(weight, ROWS) else weight
    if x.shape[0] * w.numel() > MOST_PRODUCTS:
        return f"{x.shape[0] * w.numel()} products: from {MOST_PRODUCTS} on tensor cores are faster"
    return None


def _sync(x: Tensor, rows: int) -> Tensor:
    taken = _triton._tickets.take(x, cuda.sync_bytes(rows) // 4 + 1)
    return taken[taken.data_ptr() % 8 // 4 :]


def compact(mask):
    index, count = torch.empty(mask.shape[0], dtype=torch.int64, device=mask.device), torch.empty((), dtype=torch.int64, device=mask.device)
    with _triton.on(mask):
        cuda.compact(mask, index, count, _sync(mask, mask.shape[0] // 4096 + 1))
    return CompactResult(index, count)


def quantize_rows(x, format, group, data, scale):
    """Quantise into `data` and `scale` as the op makes them."""
    cuda.quantize_rows(x.detach(), format, group, data, scale)


def _run(x, weight, bias, pool, norm, measure, threshold, temperature, mask, logits, step, pack=None):
    norm = norm or _triton.NO_NORM
    weight, scale = (weight.data, weight.scale.contiguous()) if isinstance(weight, ROWS) else (weight, None)
    small = [None if t is None else t.detach().float() for t in (bias, norm.weight, norm.bias)]  # the C ABI takes these in fp32 only
    with _triton.on(x):
        sync = _sync(x, x.shape[0])
        rule = (measure, threshold, temperature, _triton.flags(mask), logits, step, sync, pack)
        label, confidence, exits, stats, index, count, z = cuda.exit_head(
            x.detach(), weight.detach(), scale, small[0], pool, norm.kind, small[1], small[2], norm.eps, *rule
        )
    parts = (label, confidence, exits.view(torch.bool), RowStats(label, *stats))
    return ExitStepResult(*parts, index, count, z) if step else ExitHeadResult(*parts, z)


def head(x, weight, bias, pool, norm, measure, threshold, temperature, mask, logits, step):
    """Run exit_head, or exit_step with `step`."""
    return _run(x, weight, bias, pool, norm, measure, threshold, temperature, mask, logits, step)


class _Wire(_triton.DevicePack):
    """Scales of all rows have room before the data, and stand directly before it: the survivors' bytes begin behind the room left free."""

    @property
    def wire(self) -> Tensor:
        count, rows = int(self.count), self.label.numel()
        at = 4 * self._scales * (rows - count)
        return self.buffer[at : at + count * (4 * self._scales + self._row_bytes)]


def exit_pack(x, weight, bias, pool, norm, measure, threshold, temperature, mask, logits, format, group, dtype):
    rows, row = x.shape[0], x.shape[1:].numel()
    scales = 0 if format == "bf16" else row // (group or row)
    row_bytes = (row + 1) // 2 if format == "int4" else row * dtype.itemsize
    buffer = torch.empty(rows * (4 * scales + row_bytes), dtype=torch.uint8, device=x.device)
    extent = torch.empty(2, dtype=torch.int64, device=x.device)
    step = _run(x, weight, bias, pool, norm, measure, threshold, temperature, mask, logits, True, (format, group, buffer, extent))
    return _Wire(step, buffer, tuple(x.shape[1:]), row_bytes, scales, format, group, dtype)


def pack_planes(h):
    """Pack on the device; the length is read once, at the end."""
    with _triton.on(h):
        values = h.detach().contiguous()
        data, nbytes = cuda.pack_planes(values, _sync(values, values.numel() // 2048 + 1))
    return data[: int(nbytes)]


def unpack_planes(data, dtype, total, shape, first, count):
    """Unpack on the device; whether the bytes were sound is read once, at the end."""
    out = torch.empty(count if shape is None else shape, dtype=dtype, device=data.device)
    data = data if data.data_ptr() % 4 == 0 else data.clone()
    damaged = int(cuda.unpack_planes(data, total, first, out))
    if damaged >= 0:
        raise ValueError(f"unpack_planes: data holds no packed planes: block {damaged} is damaged")
    return out

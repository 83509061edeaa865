"""The Triton backend: what it takes, and memory for its kernels, which allocate nothing themselves."""

from __future__ import annotations

import contextlib
import functools
import importlib
from typing import Any

import torch
from torch import Tensor, bfloat16, float16, float32

from fastee.kernels import triton
from fastee.reference import Norm, RowStats

from ._rows import walk
from .results import ROWS, CompactResult, ExitHeadResult, ExitPackResult, ExitStepResult, QuantizedRows

FLOATS = (float32, bfloat16, float16)
NORMS = {"": 0, "layer": 1, "rms": 2, "affine": 3}
MEASURES = ("max_prob", "margin", "entropy", "energy")
NO_NORM = Norm("", None, None, 0.0)
OLDEST = (8, 0)


@functools.cache
def _device(index: int) -> str | None:
    if torch.version.hip:
        return "the kernels are written for CUDA devices, this is a HIP one"
    capability = torch.cuda.get_device_capability(index)
    return None if capability >= OLDEST else f"compute capability {capability[0]}.{capability[1]} (8.0 or newer is needed)"


def elsewhere(*tensors: Tensor | None) -> str | None:
    """Decline tensors that no kernel reaches; their dtype does not matter."""
    if triton.missing():
        return triton.missing()
    for t in tensors:
        if t is None:
            continue
        if t.device.type == "cuda":
            if _device(t.device.index):
                return _device(t.device.index)
        elif t.device.type != "cpu" or not triton.INTERPRETED:
            return f"tensor on {t.device} (this backend runs on CUDA devices, and on the CPU under TRITON_INTERPRET=1)"
    return None


def floats(*tensors: Tensor | None) -> str | None:
    """Decline what is not fp32, bf16 or fp16 on a CUDA device."""
    for t in tensors:
        if t is not None and t.dtype not in FLOATS:
            return f"dtype {str(t.dtype).removeprefix('torch.')} (this backend computes fp32)"
    return elsewhere(*tensors)


def kernel(module: str, name: str | None = None) -> Any:
    """Return a launcher."""
    return getattr(triton.load(module), name or module)


def on(x: Tensor):
    """Launch inside this: on the device of x and its current stream."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def tuning(x: Tensor) -> Any:
    """Return the heuristics for the device of x."""
    return importlib.import_module("fastee.kernels.triton._tuning").tuning(
        _name(x.device.index) if x.device.type == "cuda" else "interpreter"
    )


@functools.cache
def _name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def native_fp8(x: Tensor) -> bool:
    """Say whether the device rounds to e4m3 in one instruction."""
    return x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) >= (8, 9)


class _Tickets:
    """Zeroed counters; every kernel leaves them zero.

    Launches on one stream follow each other and may share. A captured launch gets counters that nobody else ever gets: its graph may
    be replayed on any stream.
    """

    CHUNK = 1 << 16

    def __init__(self) -> None:
        self._streams: dict[tuple[int, int], Tensor] = {}
        self._chunks: dict[int, tuple[Tensor, int]] = {}

    def take(self, x: Tensor, size: int) -> Tensor:
        if x.device.type != "cuda":
            return torch.zeros(size, dtype=torch.int32)
        device = x.device.index
        if torch.cuda.is_current_stream_capturing():
            chunk, used = self._chunks.get(device, (None, 0))
            if chunk is None or used + size > chunk.numel():
                return torch.zeros(size, dtype=torch.int32, device=x.device)  # set to zero by every replay
            self._chunks[device] = chunk, used + size
            return chunk[used : used + size]
        if device not in self._chunks:
            self._chunks[device] = torch.zeros(self.CHUNK, dtype=torch.int32, device=x.device), 0
        key = device, torch.cuda.current_stream(x.device).cuda_stream
        held = self._streams.get(key)
        if held is None or held.numel() < size:
            held = self._streams[key] = torch.zeros(max(1024, 2 * size), dtype=torch.int32, device=x.device)
        return held


_tickets = _Tickets()


def number(count: Tensor) -> int | Tensor:
    """A count as results hold it: an int in this machine's memory, a 0-d tensor on a device."""
    return int(count) if count.device.type == "cpu" else count


def flags(mask: Tensor | None) -> Tensor | None:
    """Return a token mask as contiguous bytes."""
    return None if mask is None else mask.to(torch.bool).contiguous().view(torch.uint8)


def _prepare(x, weight, bias, pool, norm, temperature, mask):
    head, (what, shape) = kernel("exit_head", "Head"), walk(x.detach(), pool)
    norm = norm or NO_NORM
    scale = None
    if isinstance(weight, ROWS):
        weight, scale = weight.data, weight.scale.contiguous()
    parts = (NORMS[norm.kind], norm.weight, norm.bias, norm.eps)
    made = head(what, shape, flags(mask), parts, weight.detach(), scale, bias, temperature)
    return made, kernel("exit_head", "plan")(made, tuning(x))


def _memory(made, how, rows, second, x, step, logits):
    state, args, tickets, features = how.scratch(rows, made.shape[1], second)
    new = lambda *size, dtype=float32: torch.empty(size, dtype=dtype, device=x.device)
    scratch = kernel("exit_head", "Scratch")(new(state), new(args, dtype=torch.int32), _tickets.take(x, tickets), new(features))
    label, stats = new(rows, dtype=torch.int64), new(5 if second else 4, rows)
    if step is None:
        return kernel("exit_head", "Out")(label, stats), scratch
    index, count = (new(rows, dtype=torch.int64), new(dtype=torch.int64)) if step else (None, None)
    out = kernel("exit_head", "Out")(
        label, stats, new(rows), new(rows, dtype=torch.uint8), new(rows, made.weight.shape[0]) if logits else None, index, count
    )
    return out, scratch


def head(x, weight, bias, pool, norm, measure, threshold, temperature, mask, logits, step):
    """Run exit_head, or exit_step with `step`."""
    with on(x):
        made, how = _prepare(x, weight, bias, pool, norm, temperature, mask)
        out, scratch = _memory(made, how, x.shape[0], False, x, step, logits)
        if step:
            kernel("exit_step")(made, how, MEASURES.index(measure), threshold, out, scratch, tuning(x))
        else:
            kernel("exit_head")(made, how, MEASURES.index(measure), threshold, False, out, scratch, tuning(x))
    return _result(out, step)


def _result(out, step):
    parts = (out.label, out.confidence, out.exits.view(torch.bool), RowStats(out.label, *out.stats))
    return ExitStepResult(*parts, out.index, number(out.count), out.logits) if step else ExitHeadResult(*parts, out.logits)


def linear_stats(x, weight, bias, temperature, second_moment):
    with on(x):
        made, how = _prepare(x, weight, bias, "none", None, temperature, None)
        out, scratch = _memory(made, how, x.shape[0], second_moment, x, None, False)
        kernel("linear_stats")(made, how, second_moment, out, scratch, tuning(x))
    return RowStats(out.label, *out.stats)


def row_stats(logits, temperature, second_moment):
    rows, classes = logits.shape
    with on(logits):
        tiles = kernel("row_stats", "tiles")(classes, tuning(logits))
        states = rows * tiles if tiles > 1 else 0
        new = lambda *size, dtype=float32: torch.empty(size, dtype=dtype, device=logits.device)
        label, stats = new(rows, dtype=torch.int64), new(5 if second_moment else 4, rows)
        kernel("row_stats")(
            logits.detach(), temperature, second_moment, label, stats, new(6 * states), new(states, dtype=torch.int32), tuning(logits)
        )
    return RowStats(label, *stats)


def compact(mask):
    index, count = torch.empty(mask.shape[0], dtype=torch.int64, device=mask.device), torch.empty((), dtype=torch.int64, device=mask.device)
    with on(mask):
        counts = torch.empty(kernel("compact", "scratch")(mask.shape[0], tuning(mask)), dtype=torch.int32, device=mask.device)
        kernel("compact")(mask.view(torch.uint8), index, count, counts, tuning(mask))
    return CompactResult(index, number(count))


def pool(x, kind, mask):
    what, shape = walk(x.detach(), kind)
    out = torch.empty(shape[0], shape[1], device=x.device)
    with on(x):
        kernel("pool")(what, shape, flags(mask), out)
    return out


def feature_delta(a, b):
    out = torch.empty(a.shape[0], device=a.device)
    with on(a):
        kernel("feature_delta")(a.detach(), b.detach(), a.shape[1:].numel(), out)
    return out


def mean_entropy(logits, mask, temperature):
    out = torch.empty(logits.shape[0], device=logits.device)
    with on(logits):
        scratch = torch.empty(logits.shape[:2], device=logits.device)
        kernel("mean_entropy")(logits.detach(), flags(mask), temperature, scratch, out)
    return out


def _words(*tensors: Tensor) -> tuple[list[Tensor], int]:
    """Return tensors [B, ...] with contiguous rows as 2-d integers, the widest that all addresses allow, and how many make a row."""
    bytes_ = [t.as_strided((t.shape[0], t.shape[1:].numel()), (t.stride(0), 1)).view(torch.uint8) for t in tensors]
    places = [n for t in bytes_ for n in (t.shape[1], t.stride(0), t.data_ptr())]
    wide = next(d for d in (torch.int64, torch.int32, torch.int16, torch.uint8) if all(n % d.itemsize == 0 for n in places))
    return [t.view(wide) for t in bytes_], bytes_[0].shape[1] // wide.itemsize


def gather_rows(x, index):
    out = x.new_empty(index.shape[0], *x.shape[1:])
    if out.numel():
        with on(x):
            (source, target), words = _words(x.detach(), out)
            kernel("gather_rows")(source, words, index, target, tuning(x))
    return out


def scatter_rows(out, index, rows):
    if rows.numel():
        with on(out):
            (target, source), words = _words(out.detach(), rows.detach())
            winner = torch.full((out.shape[0],), -1, dtype=torch.int64, device=out.device)
            kernel("gather_rows", "scatter_rows")(target, words, index, source, winner, tuning(out))
    return out


def _as_rows(x: Tensor) -> Tensor:
    return x.detach().as_strided((x.shape[0], x.shape[1:].numel()), (x.stride(0), 1))


def _codes(rows, groups, length, format, device) -> Tensor | None:
    split = format == "int4" and kernel("quantize_rows", "split_int4")(groups, length)
    return torch.empty(rows, groups * length, dtype=torch.uint8, device=device) if split else None


def quantize_rows(x, format, group, data, scale):
    """Quantise into `data` and `scale` as the op makes them."""
    row = x.shape[1:].numel()
    if row == 0:
        scale.zero_()
        return
    length = group or row
    flat = data.view(torch.int16 if format == "bf16" else torch.uint8)
    with on(x):
        codes = _codes(x.shape[0], row // length, length, format, x.device)
        kernel("quantize_rows")(
            _as_rows(x), x.shape[0], row // length, length, None, None, format, flat, scale, codes, native_fp8(x), False, tuning(x)
        )


def dequantize_rows(data, scale, group, format, shape):
    out = torch.empty(shape, dtype=float32, device=data.device)
    if out.numel():
        row = out.shape[1:].numel()
        codes = _as_rows(data).view(torch.int16 if format == "bf16" else torch.uint8)
        with on(data):
            kernel("quantize_rows", "dequantize_rows")(codes, shape[0], row // (group or row), group or row, scale, format, out)
    return out


class DevicePack:
    """An `ExitPackResult` whose survivors lie in a buffer for all rows: nobody waits until `wire` or `packed` is read.

    ``.buffer`` uint8: ``.wire`` are its first bytes, as many as ``.count`` (0-d tensor on the device) says.
    """

    def __init__(
        self,
        step: ExitStepResult,
        buffer: Tensor,
        row: tuple[int, ...],
        row_bytes: int,
        scales: int,
        format: str,
        group: int | None,
        dtype: torch.dtype,
    ):
        self.label, self.confidence, self.exits, self.stats, self.index, self.count, self.logits = step
        self.buffer, self._made = buffer, None
        self._row, self._row_bytes, self._scales, self._format, self._group, self._dtype = row, row_bytes, scales, format, group, dtype

    @property
    def wire(self) -> Tensor:
        return self.buffer[: int(self.count) * (4 * self._scales + self._row_bytes)]

    @property
    def packed(self) -> QuantizedRows:
        if self._made is None:
            count, wire = int(self.count), self.wire
            cut = 4 * self._scales * count
            scale = wire[:cut].view(float32)
            shape = (count, self._row_bytes) if self._format == "int4" else (count, *self._row)
            grouped = scale.view(count, self._scales) if self._group else scale
            self._made = QuantizedRows(wire[cut:].view(self._dtype).view(shape), grouped, self._format, self._group, (count, *self._row))
        return self._made

    def __iter__(self):
        return iter(
            ExitPackResult(self.label, self.confidence, self.exits, self.stats, self.index, self.count, self.wire, self.packed, self.logits)
        )


def exit_pack(x, weight, bias, pool, norm, measure, threshold, temperature, mask, logits, format, group, dtype):
    rows, row = x.shape[0], x.shape[1:].numel()
    length = group or row
    scales = 0 if format == "bf16" else row // length
    row_bytes = (row + 1) // 2 if format == "int4" else row * dtype.itemsize
    with on(x):
        made, how = _prepare(x, weight, bias, pool, norm, temperature, mask)
        out, scratch = _memory(made, how, rows, False, x, True, logits)
        buffer = torch.empty(rows * (4 * scales + row_bytes), dtype=torch.uint8, device=x.device)
        codes = _codes(rows, row // length, length, format, x.device)
        kernel("exit_pack")(
            made, how, MEASURES.index(measure), threshold, out, scratch, _as_rows(x), row // length, length, format,
            buffer[: 4 * scales * rows].view(float32), buffer.view(torch.int16) if format == "bf16" else buffer, codes,
            native_fp8(x), tuning(x),
        )  # fmt: skip
    return DevicePack(_result(out, True), buffer, tuple(x.shape[1:]), row_bytes, scales, format, group, dtype)


def pack_planes(h, kind):
    """Pack on the device; the length is read once, at the end."""
    values = h.detach().contiguous().reshape(-1)
    values = values.view(torch.int32 if kind == 0 else torch.int16)
    start, size = kernel("pack_planes", "capacity")(values.numel(), values.element_size())
    new = lambda *shape, dtype=torch.uint8: torch.empty(shape, dtype=dtype, device=h.device)
    blocks, row = kernel("pack_planes", "blocks")(values.numel()), kernel("pack_planes", "ROW")
    data, nbytes = new(size), new(dtype=torch.int64)
    with on(h):
        kernel("pack_planes")(
            values, kind, new(blocks, row), new(blocks, dtype=torch.int32), data, data[16:start].view(torch.int32), nbytes
        )
    return data[: int(nbytes)].clone()


def unpack_planes(data, kind, total, shape, first, count):
    bits, dtype = (torch.int32, float32) if kind == 0 else (torch.int16, (bfloat16, float16)[kind - 1])
    out, damaged = torch.empty(count, dtype=bits, device=data.device), torch.full((), 1 << 62, dtype=torch.int64, device=data.device)
    start, _ = kernel("pack_planes", "capacity")(total, 0)
    data = data if data.data_ptr() % 4 == 0 else data.clone()
    with on(data):
        kernel("pack_planes", "unpack_planes")(data[start:], total, kind, data[16:start].view(torch.int32), first, out, damaged)
    if int(damaged) < 1 << 62:
        raise ValueError(f"unpack_planes: data holds no packed planes: block {int(damaged)} is damaged")
    return out.view(dtype).view(-1 if shape is None else shape)

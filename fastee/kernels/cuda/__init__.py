"""libfastee_cuda: device kernels behind a C ABI (``csrc/include/fastee/cuda.h``), called through ctypes, which wants no compiler here.

A call costs some microseconds of Python; inside a CUDA graph, where checks belong, it costs nothing. Kernels know tensors and numbers,
nothing of fastee. `sync` is zeroed memory, aligned to 8 bytes, for `sync_bytes` of the rows; launches that share it follow each other.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_uint8, c_uint16, c_uint64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

PATH = Path(__file__).resolve().parents[2] / "libfastee_cuda.so"
POOLS = ("mean", "mean_tokens", "cls", "last", "none")
NORMS = ("", "layer", "rms", "affine")
MEASURES = ("max_prob", "margin", "entropy", "energy")
FORMATS = ("int8", "int4", "fp8_e4m3", "bf16")
REPAIR = "FASTEE_BUILD=cuda pip install --no-build-isolation --no-deps . (nvcc and CMake needed)"
_ABI = 1
_CODES = {
    torch.float32: (2, 32), torch.float16: (2, 16), torch.bfloat16: (4, 16), torch.int8: (0, 8), torch.int64: (0, 64), torch.uint8: (1, 8),
    torch.bool: (6, 8), torch.float8_e4m3fn: (1, 8),
}  # fmt: skip


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p), ("device_type", c_int32), ("device_id", c_int32), ("ndim", c_int32), ("code", c_uint8), ("bits", c_uint8),
        ("lanes", c_uint16), ("shape", ctypes.POINTER(c_int64)), ("strides", ctypes.POINTER(c_int64)), ("byte_offset", c_uint64),
    ]  # fmt: skip


_Tensor = ctypes.POINTER(DLTensor)


class _Stats(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("label", "max_prob", "margin", "entropy", "lse", "entropy_p2")]


class _Head(ctypes.Structure):
    _fields_ = [
        ("pool", c_int32), ("norm", c_int32), ("measure", c_int32), ("norm_eps", c_float), ("temperature", c_float), ("threshold", c_float),
        ("weight", _Tensor), ("bias", _Tensor), ("norm_weight", _Tensor), ("norm_bias", _Tensor), ("mask", _Tensor), ("weight_scale", _Tensor),
    ]  # fmt: skip


class _HeadOut(ctypes.Structure):
    _fields_ = [("stats", _Stats), *((name, c_void_p) for name in ("confidence", "exits", "logits", "index", "count"))]


class _Memory(ctypes.Structure):
    _fields_ = [("sync", c_void_p), ("sync_bytes", c_int64), ("scratch", c_void_p), ("scratch_bytes", c_int64)]


class _Stage(ctypes.Structure):
    _fields_ = [("rows", ctypes.POINTER(c_int64)), ("graphs", ctypes.POINTER(c_void_p)), ("buckets", c_int32), ("count", c_void_p)]


@functools.cache
def _load() -> ctypes.CDLL | str:
    if not PATH.exists():
        return f"libfastee_cuda is not built ({PATH} is missing): {REPAIR}"
    try:
        library = ctypes.CDLL(str(PATH))
    except OSError as error:
        return f"libfastee_cuda does not load ({error}): {REPAIR}"
    library.fastee_cuda_last_error.restype = ctypes.c_char_p
    for name in ("sync_bytes", "scratch_bytes"):
        getattr(library, f"fastee_cuda_{name}").restype = c_int64
    library.fastee_cuda_sync_bytes.argtypes = [c_int64]
    library.fastee_cuda_scratch_bytes.argtypes = [c_int64] * 4
    if (found := library.fastee_cuda_abi_version()) != _ABI:
        return f"libfastee_cuda has ABI {found}, this package needs {_ABI}: {REPAIR}"
    return library


def missing() -> str | None:
    """Return why no kernel can be called here, None when they can."""
    library = _load()
    if isinstance(library, str):
        return library
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def _call(name: str, *args) -> None:
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(library)
    status = getattr(library, f"fastee_cuda_{name}")(*args)
    if status:
        raise {2: TypeError, 5: RuntimeError}.get(status, ValueError)(library.fastee_cuda_last_error().decode())


def _view(t: Tensor) -> DLTensor:
    n = t.dim()
    sizes = (c_int64 * (2 * n + 1))(*t.shape, *t.stride(), 0)
    shape = ctypes.cast(sizes, ctypes.POINTER(c_int64))
    strides = ctypes.cast(ctypes.byref(sizes, 8 * n), ctypes.POINTER(c_int64))
    view = DLTensor(t.data_ptr(), 2, t.device.index or 0, n, *_CODES[t.dtype], 1, shape, strides, 0)
    view.keep = sizes
    return view


def _pointer(t: Tensor | None):
    return None if t is None else ctypes.pointer(_view(t))


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _stream(t: Tensor) -> c_void_p:
    return c_void_p(torch.cuda.current_stream(t.device).cuda_stream)


def sync_bytes(rows: int) -> int:
    """Return how many zeroed bytes a call for so many rows needs; it leaves them zero."""
    return _load().fastee_cuda_sync_bytes(rows)


def _memory(sync: Tensor, scratch: int = 0) -> tuple[_Memory, Tensor]:
    space = torch.empty(max(scratch, 1), dtype=torch.uint8, device=sync.device)
    return _Memory(sync.data_ptr(), sync.nbytes, space.data_ptr(), space.numel()), space


def compact(mask: Tensor, index: Tensor, count: Tensor, sync: Tensor) -> None:
    """Order the rows of `mask` [B] into `index` int64 [B]; `count` int64 [] on the device."""
    with torch.cuda.device(mask.device):
        memory, _ = _memory(sync)
        _call("compact", _pointer(mask), c_void_p(index.data_ptr()), c_void_p(count.data_ptr()), ctypes.byref(memory), _stream(mask))


def quantize_rows(x: Tensor, format: str, group: int | None, data: Tensor, scale: Tensor) -> None:
    """Quantise the rows of x into `data` and `scale`."""
    with torch.cuda.device(x.device):
        _call(
            "quantize_rows",
            _pointer(x),
            FORMATS.index(format),
            c_int64(group or 0),
            _pointer(data),
            _pointer(scale) if format != "bf16" else None,
            _stream(x),
        )


def exit_head(
    x,
    weight,
    weight_scale,
    bias,
    pool,
    norm,
    norm_weight,
    norm_bias,
    eps,
    measure,
    threshold,
    temperature,
    mask,
    logits,
    step,
    sync,
    pack=None,
):
    """Run one exit on the current stream.

    Returns label, confidence, exits (uint8), stats fp32 [4, B], index, count (0-d, both None without `step`) and logits or None. With
    `pack` = (format, group, buffer, extent) the survivors' rows go into `buffer`, and where into `extent` int64 [2].
    """
    rows, classes = x.shape[0], weight.shape[0]
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=x.device)
    with torch.cuda.device(x.device):
        label, confidence, exits, stats = new(rows, dtype=torch.int64), new(rows), new(rows, dtype=torch.uint8), new(4, rows)
        index, count = (new(rows, dtype=torch.int64), new(dtype=torch.int64)) if step else (None, None)
        z = new(rows, classes) if logits else None
        parts = [_pointer(t) for t in (weight, bias, norm_weight, norm_bias, mask, weight_scale)]
        head = _Head(POOLS.index(pool), NORMS.index(norm), MEASURES.index(measure), eps, temperature, threshold, *parts)
        out = _HeadOut(
            _Stats(label.data_ptr(), *(s.data_ptr() for s in stats), None), *(_address(t) for t in (confidence, exits, z, index, count))
        )
        format, group, buffer, extent = pack or (None,) * 4
        if rows == 0:  # torch gives no address of what is empty, and the C ABI takes no NULL
            for number in (count, extent):
                if number is not None:
                    number.zero_()
            return label, confidence, exits, stats, index, count, z
        groups = 0 if format in (None, "bf16") else x.shape[1:].numel() // (group or x.shape[1:].numel())
        memory, keep = _memory(sync, _load().fastee_cuda_scratch_bytes(rows, weight.shape[1], classes, groups))
        tail = (ctypes.byref(memory), _stream(x))
        if pack is None:
            _call("exit_head", _pointer(x), ctypes.byref(head), ctypes.byref(out), *tail)
        else:
            wire = (c_void_p(buffer.data_ptr()), c_int64(buffer.numel()), c_void_p(extent.data_ptr()))
            _call("exit_pack", _pointer(x), ctypes.byref(head), FORMATS.index(format), c_int64(group or 0), ctypes.byref(out), *wire, *tail)
    return label, confidence, exits, stats, index, count, z


def pack_planes(h: Tensor, sync: Tensor) -> tuple[Tensor, Tensor]:
    """Pack contiguous h; returns a buffer uint8 with room for any content, and how many bytes of it count (int64 [], on the device)."""
    n = h.numel()
    blocks = -(-n // 2048)
    out = torch.empty(16 + 4 * (blocks + 1) + 16 * blocks + n * h.element_size(), dtype=torch.uint8, device=h.device)
    nbytes = torch.empty((), dtype=torch.int64, device=h.device)
    with torch.cuda.device(h.device):
        memory, _ = _memory(sync)
        _call(
            "pack_planes",
            _pointer(h),
            c_void_p(out.data_ptr()),
            c_int64(out.numel()),
            c_void_p(nbytes.data_ptr()),
            ctypes.byref(memory),
            _stream(h),
        )
    return out, nbytes


def unpack_planes(data: Tensor, count: int, first: int, out: Tensor) -> Tensor:
    """Write values [first, first + out.numel()) of the `count` that `data` holds; returns the first damaged block (int64 [], -1: none)."""
    damaged = torch.empty((), dtype=torch.int64, device=data.device)
    with torch.cuda.device(data.device):
        place = (c_void_p(data.data_ptr()), c_int64(data.numel()), c_int64(count), c_int64(first))
        _call("unpack_planes", *place, _pointer(out), c_void_p(damaged.data_ptr()), _stream(data))
    return damaged


class ExitGraph:
    """Captured stages as one CUDA graph that skips on the device what nobody needs.

    Stage 0 always runs. A later stage runs when the stage before it left anyone, in the smallest of its buckets that holds them; with it
    stands or falls all that comes behind. `stages` holds (buckets, count) per stage: buckets {rows: graph}, graph a
    ``torch.cuda.CUDAGraph(keep_graph=True)`` captured for so many rows (torch >= 2.8), count the int64 0-d device tensor into which its
    check writes how many stay (None for the last). The graphs, and through them their memory, are kept alive here.

    Raises `ValueError` for stages that do not fit together, `RuntimeError` where CUDA refuses (a driver older than 12.4; 12.8 for more
    than one bucket).
    """

    def __init__(self, stages: Sequence[tuple[dict[int, torch.cuda.CUDAGraph], Tensor | None]]) -> None:
        self._stages, table = list(stages), (_Stage * len(stages))()
        self._handle = c_void_p()
        for slot, (buckets, count) in zip(table, self._stages, strict=True):
            rows = sorted(buckets)
            slot.rows = (c_int64 * len(rows))(*rows)
            slot.graphs = (c_void_p * len(rows))(*(buckets[r].raw_cuda_graph() for r in rows))
            slot.buckets, slot.count = len(rows), _address(count)
        _call("exit_graph_create", table, len(stages), ctypes.byref(self._handle))

    def replay(self) -> None:
        """Queue one run on the current stream."""
        _call("exit_graph_launch", self._handle, c_void_p(torch.cuda.current_stream().cuda_stream))

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            _load().fastee_cuda_exit_graph_destroy(self._handle)

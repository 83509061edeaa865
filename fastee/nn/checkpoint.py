"""save() and load(): one safetensors file; everything that is not a tensor stands as JSON in its metadata. No pickle."""

from __future__ import annotations

import hashlib
import math
import os
import struct
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

import fastee
from fastee.errors import CannotCut, CheckpointMismatch
from fastee.nn.attach import attach
from fastee.nn.early_exit import EarlyExit, update_with_tensors

FORMAT = 1
MAX_HEADER = 16 << 20  # a header is a few KB; a file that claims more is not ours
MAX_EXAMPLE = 1 << 26
DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)}  # fmt: skip


class _Input(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    dtype: str
    shape: list[int]  # of one row, without the batch


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    fastee: str
    torch: str
    weights: str
    backbone: str  # hash of the names and shapes of its state
    backbone_weights: str  # hash of its values
    exits: list[str]
    pool: list[str]
    norm: str | None
    mask: str | None
    num_classes: int
    measure: str
    thresholds: list[float | None]  # null is +inf, which JSON lacks
    inputs_kind: str
    inputs: list[_Input]
    gates: bool = False
    temperatures: list[float] = []  # one per head; empty means 1
    head: str = "linear"


def architecture(backbone: nn.Module) -> str:
    """Return a hash of the names and shapes of a module's state."""
    lines = [f"{k}:{list(v.shape)}" for k, v in sorted(backbone.state_dict().items())]
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _values(backbone: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    update_with_tensors(digest, backbone.state_dict())
    return digest.hexdigest()


def save(net: EarlyExit, path: str | os.PathLike, weights: str = "heads") -> None:
    """Write heads, exits and rule (with ``weights="all"`` the backbone too) to one ``.safetensors`` file, atomically."""
    if weights not in ("heads", "all"):
        raise ValueError(f"weights: expected 'heads' or 'all', got {weights!r}")
    if not isinstance(net.options["head"], str):
        raise ValueError("net: its exits have heads of different kinds, or branches of your own, which this file cannot describe; keep net.state_dict()")
    header = _Header(
        FORMAT, fastee.__version__, str(torch.__version__), weights, architecture(net.backbone), _values(net.backbone), list(net.exit_names),
        net.options["pool"], net.options["norm"], net.options["mask"], net.num_classes, net.measure,
        [None if t == math.inf else t for t in net.thresholds], net.inputs.kind,
        [_Input(n, str(v.dtype).removeprefix("torch."), list(v.shape[1:])) for n, v in zip(net.inputs.names, net.inputs.example, strict=True)],
        all(h.gate is not None for h in net.heads), [h.temperature for h in net.heads],
        net.options["head"],
    )  # fmt: skip
    path = Path(path)
    state = {k: v.detach().cpu().contiguous().clone() for k, v in _tensors(net, weights).items()}
    part = path.with_name(path.name + f".{os.getpid()}.part")
    try:
        save_file(state, part, metadata={"fastee": msgspec.json.encode(header).decode()})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _tensors(net: EarlyExit, weights: str) -> dict[str, torch.Tensor]:
    prefixes = ("heads.",) if weights == "heads" else ("heads.", "backbone.")
    return {k: v for k, v in net.state_dict().items() if k.startswith(prefixes)}


def load(path: str | os.PathLike, backbone: nn.Module, example: Any = None, strict: bool = True) -> EarlyExit:
    """Return `backbone` with the exits, heads and rule that `EarlyExit.save` wrote, in eval mode.

    The file must have been written for this architecture and, with ``strict=True`` and heads only, for these weights. `example` replaces
    the synthetic input (seeded normal floats, ones elsewhere) with which the backbone is traced again. Nothing in the
    file is executed. Raises `CheckpointMismatch` with the reason, ``FileNotFoundError`` when there is no file.
    """
    header, tensors = _read(Path(path))
    if header.backbone != architecture(backbone):
        raise CheckpointMismatch(f"{path}: written for another backbone (names or shapes of its weights differ from {type(backbone).__name__})")
    if strict and header.weights == "heads" and header.backbone_weights != _values(backbone):
        raise CheckpointMismatch(
            f"{path}: its heads were trained on other weights of this backbone; load those weights first, or pass strict=False to use the heads anyway"
        )
    try:
        net = attach(
            backbone, header.exits, header.num_classes, _example(path, header, backbone) if example is None else example,
            pool=header.pool, norm=header.norm, mask=header.mask, head=header.head,
        )  # fmt: skip
        if len(header.temperatures) not in (0, net.num_exits) or not all(0 < t < math.inf for t in header.temperatures):
            raise ValueError(f"temperatures: expected {net.num_exits} positive numbers, got {header.temperatures}")
        for head, value in zip(net.heads, header.temperatures, strict=False):
            head.temperature = value
        if header.gates:
            for head in net.heads:
                head.add_gate()
        net.set_rule(measure=header.measure, thresholds=[math.inf if t is None else t for t in header.thresholds])
    except CannotCut:
        raise
    except (TypeError, ValueError) as error:
        raise CheckpointMismatch(f"{path}: does not fit this backbone: {error}") from error
    wanted = _tensors(net, header.weights)
    missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or unknown:
        raise CheckpointMismatch(f"{path}: tensors missing {missing[:5]}, unknown {unknown[:5]}")
    for name, t in wanted.items():
        if t.shape != tensors[name].shape or t.dtype.is_floating_point != tensors[name].dtype.is_floating_point:
            got = f"{tensors[name].dtype} {list(tensors[name].shape)}"
            raise CheckpointMismatch(f"{path}: tensor {name!r} is {got}, expected {t.dtype} {list(t.shape)}")
    with torch.no_grad():
        for name, t in wanted.items():
            t.copy_(tensors[name])
    return net.eval()


def _read(path: Path) -> tuple[_Header, dict[str, torch.Tensor]]:
    with path.open("rb") as file:
        start, size = file.read(8), path.stat().st_size
    if len(start) < 8:
        raise CheckpointMismatch(f"{path}: {size} bytes are no safetensors file")
    length = struct.unpack("<Q", start)[0]
    if length > min(MAX_HEADER, size - 8):
        raise CheckpointMismatch(f"{path}: its header claims {length} bytes, at most {min(MAX_HEADER, size - 8)} are possible here")
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            if "fastee" not in meta:
                raise CheckpointMismatch(f"{path}: a safetensors file, but not written by fastee (no 'fastee' entry in its metadata)")
            header = msgspec.json.decode(meta["fastee"], type=_Header)
            tensors = {k: file.get_tensor(k) for k in file.keys()}
    except SafetensorError as error:
        raise CheckpointMismatch(f"{path}: not a readable safetensors file: {error}") from error
    except msgspec.DecodeError as error:
        raise CheckpointMismatch(f"{path}: its 'fastee' metadata is malformed: {error}") from error
    if header.format != FORMAT:
        raise CheckpointMismatch(f"{path}: format {header.format}, this fastee reads format {FORMAT}")
    if header.weights not in ("heads", "all"):
        raise CheckpointMismatch(f"{path}: weights must be 'heads' or 'all', got {header.weights!r}")
    if header.inputs_kind not in ("single", "tuple", "dict") or not header.inputs:
        raise CheckpointMismatch(f"{path}: it describes no usable model inputs")
    return header, tensors


def _example(path, header: _Header, backbone: nn.Module) -> Any:
    device = next((t.device for t in backbone.parameters()), torch.device("cpu"))
    random, values = torch.Generator().manual_seed(0), {}
    for i in header.inputs:
        if i.dtype not in DTYPES or any(d < 0 for d in i.shape) or math.prod(i.shape) > MAX_EXAMPLE:
            raise CheckpointMismatch(f"{path}: input {i.name!r} has an impossible description: {i.dtype} {i.shape}")
        dtype = DTYPES[i.dtype]
        if dtype.is_floating_point:
            value = torch.randn(2, *i.shape, generator=random).to(dtype)
        else:
            value = torch.ones(2, *i.shape, dtype=dtype)
        values[i.name] = value.to(device)
    if header.inputs_kind == "dict":
        return values
    return next(iter(values.values())) if header.inputs_kind == "single" else tuple(values.values())

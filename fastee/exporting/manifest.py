"""``exits.json``: what an exported folder says of itself. Read as a stranger's file: nothing is opened before it is checked."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from fastee.errors import CheckpointMismatch, did_you_mean
from fastee.nn.heads import POOLS

FORMAT = 1
MAX_MANIFEST = 4 << 20  # a manifest is a few KB; one that is larger is not ours
KINDS = {"torch": "pt2", "aoti": "pt2", "onnx": "onnx"}  # format -> suffix of a segment's file
MEASURES = ("max_prob", "margin", "entropy", "energy")
NORMS = ("layer", "rms")
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_NAME = re.compile(r"[a-z0-9_]+\.(pt2|onnx|safetensors)")


class Port(msgspec.Struct, forbid_unknown_fields=True):
    """A tensor that enters a segment: its shape is that of one row; a null is a size that may vary."""

    name: str
    dtype: str
    shape: list[int | None]


class File(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    digest: str  # sha1 of its bytes, which libtorch can compute too: parts of two exports do not mix


class Part(msgspec.Struct, forbid_unknown_fields=True):
    """One segment: its file and what it takes; it gives what the next one takes, the last one the logits."""

    file: File
    inputs: list[Port]


class Exit(msgspec.Struct, forbid_unknown_fields=True):
    """One exit's head without its numbers, which stand in the heads' file under this exit's number."""

    name: str
    pool: str
    norm: str | None
    eps: float
    activation: str | None  # between the two layers of a head that has two
    temperature: float
    mask: int | None  # which entry of the carry masks the pooled tokens


class Manifest(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    kind: str
    fastee: str
    torch: str
    fingerprint: str
    num_classes: int
    measure: str
    thresholds: list[float | None]  # null is +inf, which JSON lacks
    inputs_kind: str
    segments: list[Part]
    exits: list[Exit]
    heads: File


def digest_of(path: Path) -> str:
    digest = hashlib.sha1(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / "exits.json").write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))


def read_manifest(
    folder: Path, fingerprint: str | None = None, kinds: tuple[str, ...] = tuple(KINDS), programs: bool = True
) -> Manifest:
    """Return the checked manifest of an exported folder whose files are all there, complete and of one export.

    `fingerprint`: refuse a folder that was exported from another network (`EarlyExit.fingerprint`). `programs`: False where the
    segments' files lie elsewhere; the heads' file must be here all the same. Raises `CheckpointMismatch` with
    the reason, ``FileNotFoundError`` where there is no ``exits.json``.
    """
    path = folder / "exits.json"
    size = path.stat().st_size
    if size > MAX_MANIFEST:
        raise CheckpointMismatch(f"{path}: {size} bytes, expected at most {MAX_MANIFEST}")
    try:
        m = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except msgspec.DecodeError as error:
        raise CheckpointMismatch(f"{path}: malformed: {error}") from None

    def expect(fine: bool, what: str) -> None:
        if not fine:
            raise CheckpointMismatch(f"{path}: {what}")

    expect(m.format == FORMAT, f"format {m.format}, this fastee reads format {FORMAT}")
    expect(m.kind in KINDS, f"kind must be one of {list(KINDS)}, got {m.kind!r}{did_you_mean(m.kind, KINDS)}")
    expect(m.kind in kinds, f"kind {m.kind!r} does not run here, expected {' or '.join(map(repr, kinds))}; export again with format={kinds[0]!r}")
    count = len(m.exits)
    expect(count > 0 and len(m.segments) == count + 1, f"expected one segment more than exits, got {len(m.segments)} and {count}")
    expect(len(m.thresholds) == count, f"expected {count} thresholds, one per exit, got {len(m.thresholds)}")
    expect(all(t is None or not math.isnan(t) for t in m.thresholds), f"thresholds must be numbers, got {m.thresholds}")
    expect(m.measure in MEASURES, f"measure must be one of {list(MEASURES)}, got {m.measure!r}{did_you_mean(m.measure, MEASURES)}")
    expect(m.inputs_kind in ("single", "tuple", "dict"), f"inputs_kind must be single, tuple or dict, got {m.inputs_kind!r}")
    expect(1 <= m.num_classes <= 1 << 24, f"num_classes must lie in [1, 2^24], got {m.num_classes}")
    for i, part in enumerate(m.segments):
        expect(len(part.inputs) > 0, f"segment {i} takes nothing")
        for port in part.inputs:
            expect(port.dtype in DTYPES, f"segment {i}: input {port.name!r} has the unknown dtype {port.dtype!r}")
            expect(all(d is None or d >= 0 for d in port.shape), f"segment {i}: input {port.name!r} has the impossible shape {port.shape}")
    for i, exit_ in enumerate(m.exits):
        expect(exit_.pool in POOLS, f"exit {i}: pool must be one of {list(POOLS)}, got {exit_.pool!r}{did_you_mean(exit_.pool, POOLS)}")
        expect(exit_.norm is None or exit_.norm in NORMS, f"exit {i}: norm must be null or one of {list(NORMS)}, got {exit_.norm!r}")
        expect(exit_.activation in (None, "none", "relu"), f"exit {i}: activation must be null, none or relu, got {exit_.activation!r}")
        expect(0 < exit_.temperature < math.inf, f"exit {i}: temperature must be positive, got {exit_.temperature}")
        expect(0 <= exit_.eps < math.inf, f"exit {i}: eps must not be negative, got {exit_.eps}")
        carried = len(m.segments[i + 1].inputs)
        expect(exit_.mask is None or 0 <= exit_.mask < carried, f"exit {i}: mask must be an entry of its carry of {carried}, got {exit_.mask}")
    if fingerprint is not None:
        expect(m.fingerprint == fingerprint, f"exported from the network {m.fingerprint}, expected {fingerprint}: other weights, exits or code")
    for file in (*(p.file for p in m.segments if programs), m.heads):
        expect(_NAME.fullmatch(file.name) is not None, f"{file.name!r} is no name of an exported file")
        if not (folder / file.name).is_file():
            raise CheckpointMismatch(f"{folder / file.name}: missing; the export is incomplete")
        if (got := digest_of(folder / file.name)) != file.digest:
            raise CheckpointMismatch(f"{folder / file.name}: not the file of this export (its digest is {got}, expected {file.digest})")
    return m


class Head(msgspec.Struct):
    """The numbers of one head: first layer (its norm apart), and the second of a head that has two."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    norm_weight: torch.Tensor | None
    norm_bias: torch.Tensor | None
    last_weight: torch.Tensor | None
    last_bias: torch.Tensor | None


def read_heads(folder: Path, manifest: Manifest) -> list[Head]:
    """Return the heads' tensors; shapes are held against the manifest and each other."""
    path, heads = folder / manifest.heads.name, []
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise CheckpointMismatch(f"{path}: not a readable safetensors file: {error}") from None
    known = {f"{i}.{field}" for i in range(len(manifest.exits)) for field in Head.__struct_fields__}
    if unknown := sorted(tensors.keys() - known):
        raise CheckpointMismatch(f"{path}: unknown tensors {unknown[:5]}")
    for i, exit_ in enumerate(manifest.exits):
        head = Head(*(tensors.get(f"{i}.{field}") for field in Head.__struct_fields__))
        last = head.weight if head.last_weight is None else head.last_weight
        sizes = [] if head.weight is None else [head.weight.ndim == 2, last.ndim == 2 and last.shape[0] == manifest.num_classes]
        if sizes and all(sizes):
            (first, features), two = head.weight.shape, head.last_weight is not None
            vectors = ((head.bias, first), (head.norm_weight, features), (head.norm_bias, features), (head.last_bias, last.shape[0]))
            sizes += [v is None or list(v.shape) == [n] for v, n in vectors]
            sizes += [two == (exit_.activation is not None), not two or last.shape[1] == first, two or head.last_bias is None]
        if not sizes or not all(sizes):
            raise CheckpointMismatch(f"{path}: the tensors of exit {i} ({exit_.name!r}) do not make a head of {manifest.num_classes} classes")
        heads.append(head)
    return heads

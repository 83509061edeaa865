"""Which input rows an output row needs: the Vertical-Splitting Law, exact for convolutions, pooling, residual and branching blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

KINDS = ("conv", "max_pool", "avg_pool", "add", "cat", "pointwise")


def out_rows(rows: int, kernel: int, stride: int, padding: int, dilation: int = 1, ceil_mode: bool = False) -> int:
    """Return the output rows of a convolution or pooling over `rows` input rows, by torch's rule.

    With `ceil_mode` the last window may hang over the bottom, but must start inside the input or its top padding.

    >>> out_rows(7, kernel=3, stride=2, padding=0), out_rows(8, kernel=3, stride=2, padding=0, ceil_mode=True)
    (3, 4)
    """
    span = rows + 2 * padding - dilation * (kernel - 1) - 1
    out = -(-span // stride) + 1 if ceil_mode else span // stride + 1
    return out - 1 if ceil_mode and (out - 1) * stride >= rows + padding else out


@dataclass(frozen=True)
class Layer:
    """One layer, as far as its rows matter: kernel, stride, top padding and dilation of the height, and what an output row costs.

    `row_bytes` of its output on a link, `row_macs` multiply-adds; `inputs` are indices of producing layers, -1 is the net's input.
    ``add``, ``cat`` and ``pointwise`` have kernel 1.
    """

    name: str
    kind: str
    kernel: int
    stride: int
    padding: int
    dilation: int
    in_h: int
    out_h: int
    channels: int
    row_bytes: float
    row_macs: float
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Net:
    """The spatial prefix of a CNN in topological order, and what follows it: `tail_macs` in `tail_layers` layers, run whole on the root.

    `ValueError` names the layer whose rows do not fit its inputs.

    >>> from fastee.planning.spatial import vgg16
    >>> net = vgg16()
    >>> len(net.layers), round(net.macs / 1e9, 2), net.cut_points[:3]
    (18, 15.35, (0, 1, 2))
    """

    name: str
    layers: tuple[Layer, ...]
    input_h: int
    input_row_bytes: float
    tail_macs: float = 0.0
    tail_layers: int = 0

    def __post_init__(self):
        if not self.layers:
            raise ValueError(f"Net {self.name!r}: layers must not be empty")
        for i, layer in enumerate(self.layers):
            if layer.kind not in KINDS:
                raise ValueError(f"Net {self.name!r}: layer {layer.name!r} is of kind {layer.kind!r}, expected one of {', '.join(KINDS)}")
            for field in ("kernel", "stride", "dilation", "in_h", "out_h"):
                if getattr(layer, field) < 1:
                    raise ValueError(f"Net {self.name!r}: {field} of layer {layer.name!r} must be >= 1, got {getattr(layer, field)}")
            if layer.padding < 0 or not 0 < layer.row_bytes < float("inf") or not 0 <= layer.row_macs < float("inf"):
                raise ValueError(f"Net {self.name!r}: layer {layer.name!r} needs padding >= 0, row_bytes > 0 and row_macs >= 0, both finite")
            if not layer.inputs or not all(-1 <= u < i for u in layer.inputs):
                raise ValueError(f"Net {self.name!r}: inputs of layer {layer.name!r} must be among -1..{i - 1}, got {layer.inputs}")
            for u in layer.inputs:
                rows = self.input_h if u < 0 else self.layers[u].out_h
                if rows != layer.in_h:
                    raise ValueError(f"Net {self.name!r}: layer {layer.name!r} expects {layer.in_h} rows, its input has {rows}")

    @cached_property
    def macs(self) -> float:
        """Multiply-adds of the prefix, unsplit."""
        return sum(layer.row_macs * layer.out_h for layer in self.layers)

    @cached_property
    def cut_points(self) -> tuple[int, ...]:
        """The bounds where a volume may end: after that many layers a single tensor is all that later layers read."""
        last_use = [0] * (len(self.layers) + 1)
        for i, layer in enumerate(self.layers):
            for u in layer.inputs:
                last_use[u + 1] = i
        points, deepest = [], 0
        for bound in range(len(self.layers) + 1):
            if bound in (0, len(self.layers)) or deepest < bound:
                points.append(bound)
            deepest = max(deepest, last_use[bound])
        return tuple(points)

    def height(self, bound: int) -> int:
        """Rows of the tensor at a cut point."""
        return self.input_h if bound == 0 else self.layers[bound - 1].out_h

    def row_bytes(self, bound: int) -> float:
        """Bytes of one row of the tensor at a cut point."""
        return self.input_row_bytes if bound == 0 else self.layers[bound - 1].row_bytes

    @cached_property
    def row_counts(self) -> np.ndarray:
        """0..out_h of every layer, one after the other: the axis of every time table."""
        return np.concatenate([np.arange(layer.out_h + 1) for layer in self.layers])

    @cached_property
    def row_macs_axis(self) -> np.ndarray:
        """`row_macs` of the layer that each entry of `row_counts` belongs to."""
        return np.repeat([layer.row_macs for layer in self.layers], [layer.out_h + 1 for layer in self.layers])

    @cached_property
    def fingerprint(self) -> str:
        """32 hex characters that change with any shape or cost of the net."""
        import hashlib

        return hashlib.sha256(repr((self.layers, self.input_h, self.input_row_bytes, self.tail_macs, self.tail_layers)).encode()).hexdigest()[:32]


def input_rows(layer: Layer, rows: tuple[int, int]) -> tuple[int, int]:
    """Return the input rows [lo, hi) that output rows [lo, hi) of a layer need; empty maps to (0, 0).

    ``[max(0, h0*S - P), min(H_in, (h1-1)*S - P + Q*(F-1) + 1))``; rows that lie wholly in the padding need none.
    """
    if rows[0] >= rows[1]:
        return 0, 0
    lo = max(0, rows[0] * layer.stride - layer.padding)
    hi = min(layer.in_h, (rows[1] - 1) * layer.stride - layer.padding + layer.dilation * (layer.kernel - 1) + 1)
    return (lo, hi) if lo < hi else (0, 0)


def part_padding(layer: Layer, rows: tuple[int, int]) -> tuple[int, int]:
    """Return the (top, bottom) rows of padding that a part applies by itself to produce output rows [lo, hi)."""
    if rows[0] >= rows[1]:
        return 0, 0
    start = rows[0] * layer.stride - layer.padding
    end = (rows[1] - 1) * layer.stride - layer.padding + layer.dilation * (layer.kernel - 1) + 1
    top = min(end, 0) - start if start < 0 else 0
    return top, end - max(start, layer.in_h) if end > layer.in_h else 0


def vsl(net: Net, begin: int, end: int, rows: tuple[int, int]) -> tuple[dict[int, tuple[int, int]], tuple[int, int]]:
    """Return ({layer: output rows it must produce}, rows of the volume's input) for output rows [lo, hi) of volume [begin, end).

    From the last layer back to the first; at a fork the hull of what all consumers need. Layers that nobody needs are absent.

    >>> from fastee.planning.spatial import vgg16
    >>> vsl(vgg16(), 0, 3, (0, 56))
    ({2: (0, 56), 1: (0, 112), 0: (0, 113)}, (0, 114))
    """
    need: dict[int, tuple[int, int]] = {}
    if rows[0] < rows[1]:
        need[end - 1] = (int(rows[0]), int(rows[1]))
    source = (0, 0)
    for i in range(end - 1, begin - 1, -1):
        if i not in need:
            continue
        wanted = input_rows(net.layers[i], need[i])
        if wanted[0] >= wanted[1]:
            continue
        for u in net.layers[i].inputs:
            have = need.get(u, (0, 0)) if u >= begin else source
            hull = wanted if have[0] >= have[1] else (min(have[0], wanted[0]), max(have[1], wanted[1]))
            if u >= begin:
                need[u] = hull
            else:
                source = hull
    return need, source


def check_plan(net: Net, providers: int, volumes: Sequence[int], splits: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Return volumes and splits as tuples of ints; `TypeError` or `ValueError` says what makes them no plan for `net` and `providers`."""
    volumes = tuple(_int("volumes", v) for v in volumes)
    last = len(net.layers)
    if len(volumes) < 2 or volumes[0] != 0 or volumes[-1] != last:
        raise ValueError(f"volumes must go from 0 to {last}, got {list(volumes)}")
    points = set(net.cut_points)
    for a, b in zip(volumes, volumes[1:], strict=False):
        if b <= a:
            raise ValueError(f"volumes must rise, got {b} after {a}")
        if b not in points:
            raise ValueError(f"volumes: several tensors cross after layer {b}, a volume cannot end there (cut points: {list(net.cut_points)})")
    if len(splits) != len(volumes) - 1:
        raise ValueError(f"splits must hold one cut vector per volume ({len(volumes) - 1}), got {len(splits)}")
    out = []
    for j, cuts in enumerate(splits):
        cuts, height = tuple(_int(f"splits[{j}]", e) for e in cuts), net.height(volumes[j + 1])
        if len(cuts) != providers + 1:
            raise ValueError(f"splits[{j}] must hold {providers + 1} rows for {providers} providers, got {len(cuts)}")
        if cuts[0] != 0 or cuts[-1] != height:
            raise ValueError(f"splits[{j}] must go from 0 to {height}, got {cuts[0]}..{cuts[-1]}")
        for a, b in zip(cuts, cuts[1:], strict=False):
            if b < a:
                raise ValueError(f"splits[{j}] must not fall, got {b} after {a}")
        out.append(cuts)
    return volumes, tuple(out)


def _int(name: str, value) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must hold integers, got {type(value).__name__}")
    return int(value)

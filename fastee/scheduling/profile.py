"""Measured costs of a network on nodes and links, and the function that measures them."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from fastee.errors import CheckpointMismatch
from fastee.scheduling.links import parse_link

MAX_SEGMENTS, MAX_NODES, MAX_CODECS, MAX_BATCH_SIZES = 1024, 1024, 64, 64
_FORMAT, _VERSION = "fastee-profile", 1
_MAX_JSON_BYTES = 256 << 20
_SCALE_BYTES = 4  # one fp32 scale per row of a quantised tensor


class _Json(msgspec.Struct, forbid_unknown_fields=True):
    format: str
    version: int
    fingerprint: str
    nodes: list[str]
    batch_sizes: list[int]
    mean: list[list[list[float]]]
    spread: list[list[list[float]]]
    codecs: list[str]
    wire_bytes: list[list[float]]
    codec_seconds: list[list[float]]
    bandwidth: list[list[float]]
    delay: list[list[float]]
    gain: list[list[float]] | None = None
    gain_range: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True, eq=False)
class Profile:
    """Costs per segment, node, batch size, cut, codec and link; every array is checked, copied, float64 and read-only.

    S segments, N nodes, NB batch sizes, NC codecs, K = S - 1 exits.
    `mean`, `spread` [S, N, NB]: seconds (mean and standard deviation) of a segment with its head at that batch size.
    `wire_bytes` [S, NC]: bytes per sample of the carry that enters segment s (s = 0: the model's input).
    `codec_seconds` [S, NC]: encode plus decode. `bandwidth` [N, N] bit/s from row to column, 0 = no link; `delay` [N, N]
    one-way seconds; both diagonals are ignored. `gain` [K, bins] or None: expected accuracy gain of going on from exit k when
    its confidence lies in that bin; the bins divide `gain_range` evenly, values outside fall into the first or last one.

    >>> p = Profile(nodes=("here",), batch_sizes=(1,), mean=[[[.001]], [[.002]]], spread=[[[0]], [[0]]], codecs=("raw",),
    ...             wire_bytes=[[784], [4096]], codec_seconds=[[0], [0]], bandwidth=[[0]], delay=[[0]])
    >>> p.num_segments, p.num_exits, Profile.from_json(p.to_json()) == p
    (2, 1, True)
    """

    nodes: Sequence[str]
    batch_sizes: Sequence[int]
    mean: np.ndarray
    spread: np.ndarray
    codecs: Sequence[str]
    wire_bytes: np.ndarray
    codec_seconds: np.ndarray
    bandwidth: np.ndarray
    delay: np.ndarray
    gain: np.ndarray | None = None
    fingerprint: str = ""
    gain_range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        put = lambda name, value: object.__setattr__(self, name, value)
        put("nodes", _names("nodes", self.nodes, MAX_NODES))
        put("codecs", _names("codecs", self.codecs, MAX_CODECS))
        put("batch_sizes", _batch_sizes(self.batch_sizes))
        if not isinstance(self.fingerprint, str):
            raise TypeError(f"Profile: fingerprint must be a string, got {type(self.fingerprint).__name__}")
        n, nb, nc = len(self.nodes), len(self.batch_sizes), len(self.codecs)
        put("mean", _array("mean", self.mean, (None, n, nb), "[S, nodes, batch_sizes]"))
        s = len(self.mean)
        if not 1 <= s <= MAX_SEGMENTS:
            raise ValueError(f"Profile: mean must have 1..{MAX_SEGMENTS} segments, got {s}")
        put("spread", _array("spread", self.spread, (s, n, nb), "[S, nodes, batch_sizes]"))
        put("wire_bytes", _array("wire_bytes", self.wire_bytes, (s, nc), "[S, codecs]"))
        put("codec_seconds", _array("codec_seconds", self.codec_seconds, (s, nc), "[S, codecs]"))
        put("bandwidth", _array("bandwidth", self.bandwidth, (n, n), "[nodes, nodes]"))
        put("delay", _array("delay", self.delay, (n, n), "[nodes, nodes]"))
        low, high = (float(v) for v in self.gain_range)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"Profile: gain_range must be two finite numbers, low < high, got {self.gain_range}")
        put("gain_range", (low, high))
        if self.gain is not None:
            if s == 1:
                raise ValueError("Profile: gain must be None for a network without exits (one segment)")
            put("gain", _array("gain", self.gain, (s - 1, None), "[exits, bins]", low=-1.0))

    @property
    def num_segments(self) -> int:
        return len(self.mean)

    @property
    def num_exits(self) -> int:
        """K, the attached heads; the end of the network is not counted."""
        return len(self.mean) - 1

    def check(self, net) -> None:
        """Raise CheckpointMismatch unless `net` has as many segments and the fingerprint this profile was measured with ("": not asked)."""
        if self.num_segments != net.num_segments:
            raise CheckpointMismatch(f"profile: this network has {net.num_segments} segments, the profile {self.num_segments}")
        if self.fingerprint not in ("", net.fingerprint):
            raise CheckpointMismatch(f"profile: measured for the network {self.fingerprint!r}, this one is {net.fingerprint!r}; measure it, or where only "
                                     "weights changed, take dataclasses.replace(profile, fingerprint=net.fingerprint)")  # fmt: skip

    def to_json(self) -> bytes:
        """The profile as JSON (UTF-8)."""
        lists = {k: getattr(self, k).tolist() for k in ("mean", "spread", "wire_bytes", "codec_seconds", "bandwidth", "delay")}
        gain = None if self.gain is None else self.gain.tolist()
        return msgspec.json.encode(_Json(
            format=_FORMAT, version=_VERSION, fingerprint=self.fingerprint, nodes=list(self.nodes), codecs=list(self.codecs),
            batch_sizes=list(self.batch_sizes), gain=gain, gain_range=self.gain_range, **lists))

    @classmethod
    def from_json(cls, data: bytes | str) -> Profile:
        """Read what `to_json` wrote; anything else raises ValueError naming the field."""
        if not isinstance(data, (bytes, bytearray, memoryview, str)):
            raise TypeError(f"from_json: data must be bytes or str, got {type(data).__name__}")
        if len(data) > _MAX_JSON_BYTES:
            raise ValueError(f"from_json: data must have at most {_MAX_JSON_BYTES} bytes, got {len(data)}")
        try:
            j = msgspec.json.decode(data, type=_Json)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:  # ValidationError is a DecodeError
            raise ValueError(f"from_json: not a profile: {error}") from None
        if j.format != _FORMAT or j.version != _VERSION:
            raise CheckpointMismatch(f"from_json: expected {_FORMAT} version {_VERSION}, got {j.format[:40]!r} version {j.version}")
        fields = {k: getattr(j, k) for k in cls.__dataclass_fields__}
        return cls(**fields)

    def save(self, path: str | os.PathLike) -> None:
        """Write the JSON to `path`."""
        Path(path).write_bytes(self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Profile:
        """Read a file that `save` wrote."""
        return cls.from_json(Path(path).read_bytes())

    def __eq__(self, other) -> bool:
        return isinstance(other, Profile) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())


def _names(what: str, names, limit: int) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"Profile: {what} must be a sequence of names, got {type(names).__name__}")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"Profile: {what} must hold strings, got {type(name).__name__}")
    if not 1 <= len(names) <= limit or len(set(names)) != len(names):
        raise ValueError(f"Profile: {what} must be 1..{limit} different names, got {list(names)[:20]}")
    return tuple(names)


def _batch_sizes(sizes) -> tuple[int, ...]:
    if isinstance(sizes, str) or not isinstance(sizes, Sequence):
        raise TypeError(f"batch_sizes must be a sequence of ints, got {type(sizes).__name__}")
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)):
            raise TypeError(f"batch_sizes must hold ints, got {type(size).__name__}")
    rising = all(a < b for a, b in zip(sizes, sizes[1:], strict=False))
    if not 1 <= len(sizes) <= MAX_BATCH_SIZES or not rising or sizes[0] < 1 or sizes[-1] > 1 << 30:
        raise ValueError(f"batch_sizes must be 1..{MAX_BATCH_SIZES} rising ints >= 1, got {list(sizes)[:20]}")
    return tuple(int(size) for size in sizes)


def _array(name: str, value, shape: tuple, meaning: str, low: float = 0.0) -> np.ndarray:
    try:
        array = np.array(value, dtype=np.float64, order="C")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"Profile: {name} must be an array of numbers {meaning}: {error}") from None
    fits = array.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, array.shape, strict=True))
    if not fits or array.size == 0:
        want = ", ".join("any" if d is None else str(d) for d in shape)
        raise ValueError(f"Profile: {name} must have shape {meaning} = [{want}], got {list(array.shape)}")
    bad = ~(np.isfinite(array) & (array >= low))
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"Profile: {name}{list(at)} must be finite and >= {low:g}, got {array[at]}")
    array.flags.writeable = False
    return array


def profile(
    net,
    example,
    nodes: Sequence[str] = ("here",),
    batch_sizes: Sequence[int] = (1, 8, 32),
    slowdown: Sequence[float] | Mapping[str, float] | None = None,
    link: str | Mapping[tuple[str, str], str] | None = None,
    *,
    repeats: int = 15,
    warmup: int = 3,
    progress: bool = False,
) -> Profile:
    """Measure `net` on this machine, with as many threads as torch is set to, and return its Profile.

    Per batch size every segment with its head runs `warmup` unmeasured and `repeats` measured times, segments in turn; the
    profile holds the median and 1.4826 * the median absolute deviation. `example` is a batch (tensor, or tuple of the model's
    inputs); its rows are repeated to each batch size. A node other than this machine is emulated: `slowdown` gives a factor
    > 0 per node (by order or name), `link` one text for all pairs ("20mbit 10ms") or a mapping from (source, target) names;
    pairs without a link get bandwidth 0. `net` needs `num_segments`, `run_segment(i, carry)`, `exit_step(i, carry)`.

    >>> import torch
    >>> class Net:
    ...     num_segments, fingerprint = 2, "demo"
    ...     def run_segment(self, i, carry): return (carry[0] * 2,)
    ...     def exit_step(self, i, carry): return carry[0].sum()
    >>> profile(Net(), torch.ones(1, 4), batch_sizes=(1,), repeats=3).mean.shape
    (2, 1, 1)
    """
    import torch

    nodes = _names("nodes", nodes, MAX_NODES)
    batch_sizes = _batch_sizes(batch_sizes)
    factors = _factors(slowdown, nodes)
    bandwidth, delay = _links(link, nodes)
    rows = _example_rows(example)
    for name, value, low in (("repeats", repeats, 1), ("warmup", warmup, 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"profile: {name} must be an int, got {type(value).__name__}")
        if not low <= value <= 100_000:
            raise ValueError(f"profile: {name} must be in {low}..100000, got {value}")
    num_segments = net.num_segments
    was_training = getattr(net, "training", False)
    if was_training:
        net.eval()
    mean, spread = np.zeros((num_segments, len(batch_sizes))), np.zeros((num_segments, len(batch_sizes)))
    try:
        with torch.inference_mode(), _progress(progress, len(batch_sizes) * (warmup + repeats)) as advance:
            for b, size in enumerate(batch_sizes):
                carry = tuple(_repeat_rows(t, size) for t in rows)
                times: list[list[int]] = [[] for _ in range(num_segments)]
                for round_ in range(warmup + repeats):
                    elapsed = _time_segments(net, carry, num_segments)
                    if round_ >= warmup:
                        for s in range(num_segments):
                            times[s].append(elapsed[s])
                    advance()
                for s in range(num_segments):
                    mean[s, b], spread[s, b] = _centre(times[s])
            entering = _entering_carries(net, tuple(_repeat_rows(t, 1) for t in rows), num_segments)
            wire_bytes, codec_seconds = _measure_codecs(entering, repeats, warmup)
    finally:
        if was_training:
            net.train()
    scale = np.array(factors)[None, :, None]
    return Profile(nodes, batch_sizes, mean[:, None, :] * scale, spread[:, None, :] * scale, ("raw", "int8"), wire_bytes, codec_seconds,
                   bandwidth, delay, None, str(getattr(net, "fingerprint", "")))


def _factors(slowdown, nodes: tuple[str, ...]) -> list[float]:
    if slowdown is None:
        return [1.0] * len(nodes)
    if isinstance(slowdown, Mapping):
        unknown = [name for name in slowdown if name not in nodes]
        if unknown:
            raise ValueError(f"profile: slowdown names unknown nodes {unknown}, the nodes are {list(nodes)}")
        factors = [slowdown.get(name, 1.0) for name in nodes]
    elif isinstance(slowdown, str) or not isinstance(slowdown, Sequence):
        raise TypeError(f"profile: slowdown must be a sequence or mapping of factors, got {type(slowdown).__name__}")
    else:
        factors = list(slowdown)
    if len(factors) != len(nodes):
        raise ValueError(f"profile: slowdown must have one factor per node ({len(nodes)}), got {len(factors)}")
    for factor in factors:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            raise TypeError(f"profile: slowdown must hold numbers, got {type(factor).__name__}")
        if not 0 < factor < math.inf:
            raise ValueError(f"profile: slowdown must hold finite factors > 0, got {factor}")
    return [float(factor) for factor in factors]


def _links(link, nodes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    bandwidth, delay = np.zeros((len(nodes), len(nodes))), np.zeros((len(nodes), len(nodes)))
    if link is None:
        return bandwidth, delay
    pairs = link
    if not isinstance(link, Mapping):
        pairs = {(a, b): link for a in nodes for b in nodes if a != b}
    for pair, text in pairs.items():
        if not (isinstance(pair, tuple) and len(pair) == 2 and all(name in nodes for name in pair)):
            raise ValueError(f"profile: link must map pairs of the nodes {list(nodes)}, got {pair!r}")
        at = nodes.index(pair[0]), nodes.index(pair[1])
        bandwidth[at], delay[at] = parse_link(text)
    return bandwidth, delay


def _example_rows(example) -> tuple:
    rows = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    for t in rows:
        if not (hasattr(t, "shape") and hasattr(t, "element_size")):
            raise TypeError(f"profile: example must be a tensor or a tuple of tensors, got {type(t).__name__}")
        if len(t.shape) == 0 or t.shape[0] == 0:
            raise ValueError(f"profile: example must have at least one row, got shape {list(t.shape)}")
    if not rows:
        raise ValueError("profile: example must hold at least one tensor, got an empty tuple")
    return rows


def _repeat_rows(t, size: int):
    have = t.shape[0]
    return t[:size].contiguous() if have >= size else t.repeat(-(-size // have), *[1] * (t.dim() - 1))[:size].contiguous()


def _time_segments(net, carry, num_segments: int) -> list[int]:
    elapsed = []
    for s in range(num_segments):
        start = time.perf_counter_ns()
        carry = net.run_segment(s, carry)
        if s + 1 < num_segments:
            net.exit_step(s, carry)
        elapsed.append(time.perf_counter_ns() - start)
    return elapsed


def _entering_carries(net, carry, num_segments: int) -> list:
    entering = [carry]
    for s in range(num_segments - 1):
        carry = net.run_segment(s, carry)
        entering.append(carry)
    return entering


def _centre(ns: list[int]) -> tuple[float, float]:
    middle = statistics.median(ns)
    return middle * 1e-9, 1.4826e-9 * statistics.median(abs(t - middle) for t in ns)


def _measure_codecs(entering: list, repeats: int, warmup: int) -> tuple[np.ndarray, np.ndarray]:
    from fastee import ops

    wire_bytes, codec_seconds = np.zeros((len(entering), 2)), np.zeros((len(entering), 2))
    for s, carry in enumerate(entering):
        for t in carry:
            packable = t.is_floating_point() and t.dim() >= 2
            raw = t.numel() * t.element_size()
            wire_bytes[s] += raw, t.numel() + _SCALE_BYTES if packable else raw
            if packable:
                times = []
                for round_ in range(warmup + repeats):
                    start = time.perf_counter_ns()
                    ops.dequantize_rows(ops.quantize_rows(t, "int8"))
                    times += [time.perf_counter_ns() - start] * (round_ >= warmup)
                codec_seconds[s, 1] += _centre(times)[0]
    return wire_bytes, codec_seconds


class _progress:
    """A rich progress bar, or nothing."""

    def __init__(self, shown: bool, total: int):
        self._bar, self._total = None, total
        if shown:
            from rich.progress import Progress

            self._bar = Progress(transient=True)

    def __enter__(self):
        if self._bar is None:
            return lambda: None
        self._bar.start()
        task = self._bar.add_task("profile", total=self._total)
        return lambda: self._bar.advance(task)

    def __exit__(self, *exc):
        if self._bar is not None:
            self._bar.stop()

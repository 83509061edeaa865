"""Run an exported folder: segments in turn, the fused exit step between them, survivors only. Needs none of the model's own code."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import torch
from torch import Tensor

from fastee import ops
from fastee.errors import CheckpointMismatch
from fastee.exporting.manifest import Manifest, Port, read_heads, read_manifest
from fastee.nn.deadline import check_deadline, make_scheduler, run_deadline
from fastee.nn.result import End, ExitResult, Parts
from fastee.scheduling import Profile, QoS, profile

Carry = tuple[Tensor, ...]


class SegmentRunner:
    """The exits of an exported network around segments that something else runs; see `load` and the onnxruntime session.

    ``run_segment(i, carry) -> carry`` gives tensors with the batch on dimension 0. `thresholds` and `measure` start as
    exported; `set_rule` changes them. ``runner(x)`` answers an `ExitResult`, its rows in the order of the input; under
    ``deadline=`` seconds rows that would be late leave at the exit they reached, as `EarlyExit`'s do. `profile` is what that is
    held against; where it is None, the first deadline measures it with its own rows, and counts from behind that.
    """

    def __init__(self, folder: Path, manifest: Manifest, run_segment: Callable[[int, Carry], Carry]):
        self.manifest, self.run_segment = manifest, run_segment
        self.exit_names, self.num_exits = tuple(e.name for e in manifest.exits), len(manifest.exits)
        self.num_segments, self.fingerprint, self.profile = len(manifest.segments), manifest.fingerprint, None
        self._heads = []
        for e, h in zip(manifest.exits, read_heads(folder, manifest), strict=True):
            norm = ops.Norm(e.norm, h.norm_weight, h.norm_bias, e.eps) if e.norm else None
            self._heads.append((e, h, norm))
        self.set_rule(manifest.measure, [math.inf if t is None else t for t in manifest.thresholds])

    def set_rule(self, measure: str | None = None, thresholds=None) -> SegmentRunner:
        """Set the measure and one threshold per exit, as `EarlyExit.set_rule`; +inf switches an exit off, its head does not run."""
        if measure is not None and measure not in ("max_prob", "margin", "entropy", "energy"):
            raise ValueError(f"measure: expected max_prob, margin, entropy or energy, got {measure!r}")
        if thresholds is not None:
            values = [float(t) for t in thresholds]
            if len(values) != self.num_exits or any(math.isnan(t) for t in values):
                raise ValueError(f"thresholds: expected {self.num_exits} numbers, one per exit {list(self.exit_names)}, got {values}")
            self.thresholds = values
        self.measure = measure or self.measure
        self._scheduler = None
        return self

    @property
    def profile(self) -> Profile | None:
        """Measured seconds per segment and batch size; see ``EarlyExit.profile``."""
        return self._profile

    @profile.setter
    def profile(self, value: Profile | None) -> None:
        if value is not None:
            value.check(self)
        self._profile, self._scheduler = value, None

    def exit_step(self, i: int, carry: Carry, logits: bool = True):
        """Return the decision of exit `i` on a carry: see ``fastee.ops.exit_step``."""
        e, h, norm = self._heads[i]
        x, pool, mask = carry[0], e.pool, None if e.mask is None else carry[e.mask]
        if mask is not None and mask.dtype not in (torch.bool, torch.uint8, torch.int64):
            mask = mask != 0
        weight, bias = h.weight, h.bias
        if h.last_weight is not None:
            x = ops.exit_head(x, weight, bias, pool, norm, mask=mask, logits=True).logits
            x = torch.relu(x) if e.activation == "relu" else x
            weight, bias, pool, norm, mask = h.last_weight, h.last_bias, "none", None, None
        return ops.exit_step(x, weight, bias, pool, norm, self.measure, self.thresholds[i], temperature=e.temperature, mask=mask, logits=logits)

    def inputs(self, x: Any) -> Carry:
        """Return what enters segment 0, held against the manifest: a tensor, a tuple, or a dict by name."""
        ports = self.manifest.segments[0].inputs
        if isinstance(x, Mapping):
            missing, unknown = [p.name for p in ports if p.name not in x], [n for n in x if n not in {p.name for p in ports}]
            if missing or unknown:
                raise ValueError(f"x: expected the inputs {[p.name for p in ports]}, missing {missing}, unknown {unknown}")
            values = tuple(x[p.name] for p in ports)
        else:
            values = tuple(x) if isinstance(x, (tuple, list)) else (x,)
        if len(values) != len(ports):
            raise ValueError(f"x: expected {len(ports)} inputs {[p.name for p in ports]}, got {len(values)}")
        for port, value in zip(ports, values, strict=True):
            _check(port, value, values[0])
        return values

    @torch.no_grad()
    def __call__(self, *x: Any, deadline: float | None = None, **named: Any) -> ExitResult:
        """Answer a batch; inputs as the backbone took them, or one tuple or dict of them. An empty batch gives an empty result.

        `deadline`: seconds from the call; <= 0 is late already and leaves at the first exit.
        """
        entry = perf_counter_ns()
        if deadline is not None:
            check_deadline(deadline)
        carry = self.inputs(named or (x[0] if len(x) == 1 else x))
        total = carry[0].shape[0]
        if deadline is None or total == 0:
            return self._run(carry)
        if self.profile is None:
            self.profile = profile(self, carry, batch_sizes=tuple(sorted({1, total})), repeats=7, warmup=2)
            entry = perf_counter_ns()
        if self._scheduler is None or self._scheduler.max_tasks < total:
            self._scheduler = make_scheduler(self, QoS(), max(4096, total))
        try:
            return run_deadline(self, self._scheduler, carry, total, entry, deadline)
        except BaseException:
            self._scheduler = None  # its open tasks would stay for ever
            raise

    def _run(self, carry: Carry) -> ExitResult:
        total = carry[0].shape[0]
        if total == 0:
            none = torch.empty(0, dtype=torch.int64)
            return ExitResult(torch.empty(0, self.manifest.num_classes), none, torch.empty(0), none.clone())
        parts, rows = [], None
        for i, threshold in enumerate(self.thresholds):
            carry = self.run_segment(i, carry)
            if threshold == math.inf:
                continue
            step = self.exit_step(i, carry)
            stay = int(step.count)
            if stay == 0:
                return ExitResult._of(Parts(total, [*parts, (i, rows, None, step, None)]))
            if stay == len(step.exits):
                continue
            keep, leave = step.index[:stay], step.index[stay:]
            parts.append((i, leave if rows is None else rows[leave], leave, step, None))
            carry = tuple(ops.gather_rows(t, keep) for t in carry)
            rows = keep if rows is None else rows[keep]
        logits = self.run_segment(self.num_exits, carry)[0]
        return ExitResult._of(Parts(total, [*parts, (self.num_exits, rows, None, End(logits, self.measure), None)]))


def _check(port: Port, value: Any, first: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"x: input {port.name!r} must be a tensor, got {type(value).__name__}")
    dtype, shape = str(value.dtype).removeprefix("torch."), list(value.shape)
    if dtype != port.dtype:
        raise TypeError(f"x: input {port.name!r} must be {port.dtype}, got {dtype}")
    same = len(shape) == len(port.shape) + 1 and all(want in (None, got) for want, got in zip(port.shape, shape[1:], strict=True))
    if not same or shape[0] != first.shape[0]:
        rows = first.shape[0] if isinstance(first, Tensor) and first.ndim else "B"
        raise ValueError(f"x: input {port.name!r} must be [{', '.join(map(str, [rows, *port.shape]))}], got {shape}")


def load_exported(dir: str | os.PathLike, fingerprint: str | None = None) -> SegmentRunner:
    """Return a runner of a folder that ``fastee.export`` wrote with ``format="torch"`` or ``"aoti"``; the model's code is not needed.

    Both kinds are programs: load only what you trust. The digests in ``exits.json`` find mixed and damaged files, not malice.
    `fingerprint`: refuse another network's export. Raises `CheckpointMismatch` with the reason, ``FileNotFoundError`` without ``exits.json``.

    >>> import fastee, tempfile, torch
    >>> body = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> net = fastee.attach(body, exits=["1"], num_classes=3, example=torch.zeros(1, 4)).eval()
    >>> folder = fastee.export(net, tempfile.mkdtemp() + "/net")
    >>> fastee.load_exported(folder, net.fingerprint)(torch.zeros(2, 4)).exit.tolist()
    [1, 1]
    """
    folder = Path(dir)
    manifest = read_manifest(folder, fingerprint, ("torch", "aoti"))
    programs = []
    for part in manifest.segments:
        path = folder / part.file.name
        try:
            if manifest.kind == "torch":
                programs.append(torch.export.load(path).module())
            else:
                programs.append(torch._inductor.aoti_load_package(str(path)))
        except Exception as error:
            here = f"this is torch {torch.__version__} on {sys.platform}"
            raise CheckpointMismatch(f"{path}: written by torch {manifest.torch}, does not load ({here}): {error}") from error

    def run_segment(i: int, carry: Carry) -> Carry:
        # an AOTInductor package is compiled for the strides of its example, which were those of contiguous tensors
        out = programs[i](*(t.contiguous() for t in carry))
        return tuple(out) if isinstance(out, (tuple, list)) else (out,)

    return SegmentRunner(folder, manifest, run_segment)

"""An onnxruntime session that leaves early: the segments after a row's exit do not run for it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastee.errors import CheckpointMismatch
from fastee.exporting import SegmentRunner
from fastee.exporting.manifest import read_manifest
from fastee.nn import ExitResult

OUTPUTS = ("logits", "label", "confidence", "exit")


class Session:
    """Runs a folder of ``fastee.export(net, dir, format="onnx")`` on onnxruntime, batch with compaction; equal to torch within 1e-4.

    `fingerprint`: refuse another network's export (`EarlyExit.fingerprint`). `providers` and `options` go to every
    ``onnxruntime.InferenceSession``. ``session(x)`` takes and gives what the network does (tensors or arrays);
    ``session.run(names, feed)`` is onnxruntime's own call: arrays in, a list of ``logits``, ``label``, ``confidence``, ``exit`` out.
    Raises `CheckpointMismatch` for a folder of another version or model, ``ImportError`` without onnxruntime.
    """

    def __init__(
        self, dir: str | os.PathLike, fingerprint: str | None = None, *, providers: Sequence[Any] = ("CPUExecutionProvider",), options: Any = None
    ):
        try:
            import onnxruntime
        except ImportError:
            raise ImportError("fastee.integrations.onnxruntime needs onnxruntime: pip install 'fastee[onnx]'") from None
        folder = Path(dir)
        manifest = read_manifest(folder, fingerprint, ("onnx",))
        self._sessions = []
        for part in manifest.segments:
            path = folder / part.file.name
            try:
                session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
            except Exception as error:
                raise CheckpointMismatch(f"{path}: onnxruntime {onnxruntime.__version__} does not load it: {error}") from error
            self._sessions.append((session.run, [i.name for i in session.get_inputs()]))
        self.runner = SegmentRunner(folder, manifest, self._run_segment)
        self._position = [{p.name: j for j, p in enumerate(part.inputs)} for part in manifest.segments]
        for i, (_, names) in enumerate(self._sessions):
            if unknown := sorted(set(names) - self._position[i].keys()):
                raise CheckpointMismatch(f"{folder / manifest.segments[i].file.name}: takes {unknown}, which exits.json does not give")

    def _run_segment(self, i: int, carry):
        run, names = self._sessions[i]
        return tuple(map(torch.from_numpy, run(None, {n: carry[self._position[i][n]].numpy() for n in names})))

    def set_rule(self, measure: str | None = None, thresholds=None) -> Session:
        """Change measure and thresholds, as `EarlyExit.set_rule`."""
        self.runner.set_rule(measure, thresholds)
        return self

    def __call__(self, *x: Any, **named: Any) -> ExitResult:
        return self.runner(*(_tensors(v) for v in x), **_tensors(named))

    def run(self, names: Sequence[str] | None, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Answer like ``InferenceSession.run``: the named ones of ``logits``, ``label``, ``confidence`` and ``exit`` (None: all four)."""
        wanted = OUTPUTS if names is None else names
        if unknown := [n for n in wanted if n not in OUTPUTS]:
            raise ValueError(f"names: expected some of {list(OUTPUTS)}, got {unknown}")
        result = self.runner(_tensors(feed))
        return [getattr(result, n).numpy() for n in wanted]


def _tensors(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return torch.from_numpy(x if x.flags.writeable else x.copy())  # torch warns of memory that it may not write
    if isinstance(x, Mapping):
        return {k: _tensors(v) for k, v in x.items()}
    return type(x)(map(_tensors, x)) if isinstance(x, (tuple, list)) else x

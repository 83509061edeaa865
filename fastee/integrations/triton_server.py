"""The Triton Inference Server: one ONNX model per segment, and a model of the Python backend that calls them until a row has left (BLS).

`write_repository` writes the repository; the server then imports `TritonPythonModel`, so its Python needs fastee and torch. Business logic
scripting is the server's name for a model that asks other models of the same server.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastee.errors import CannotExport
from fastee.exporting import SegmentRunner
from fastee.exporting.manifest import Manifest, Port, read_manifest
from fastee.integrations.kserve import NAMES, OUTPUTS

_MODEL = "from fastee.integrations.triton_server import TritonPythonModel  # noqa: F401\n"
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def write_repository(export_dir: str | os.PathLike, repository: str | os.PathLike, name: str = "net") -> Path:
    """Write a folder of ``fastee.export(net, dir, format="onnx")`` as models of a Triton model repository, and return the repository.

    The models are ``NAME``, which takes the network's inputs and gives ``label``, ``confidence``, ``exit``, ``forced`` and
    ``logits``, and ``NAME_segment0`` and so on, which it asks in turn. The first dimension of every tensor is the batch (``max_batch_size: 0``, so the server
    merges no requests). ``NAME`` is written last. Weights are copied.

    Raises `CheckpointMismatch` for a folder of another kind or version, `CannotExport` for a tensor of bfloat16, which NumPy lacks,
    ``ValueError`` for a name that is no folder's and for models that are there already.

    >>> import fastee, tempfile, torch
    >>> from fastee.integrations.triton_server import write_repository
    >>> body = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> net = fastee.attach(body, exits=["1"], num_classes=3, example=torch.zeros(1, 4)).eval()
    >>> folder = fastee.export(net, tempfile.mkdtemp() + "/net", format="onnx")
    >>> sorted(p.name for p in write_repository(folder, tempfile.mkdtemp()).iterdir())
    ['net', 'net_segment0', 'net_segment1']
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"name: expected letters, digits, '_', '.' or '-', got {name!r}")
    folder, target = Path(export_dir), Path(repository)
    manifest = read_manifest(folder, kinds=("onnx",))
    segments = [_segment(name, i) for i in range(len(manifest.segments))]
    if there := [n for n in (name, *segments) if (target / n).exists()]:
        raise ValueError(f"repository: {target} has the models {there} already; remove them or take another name")
    configs = [
        _config(segment, "onnxruntime", _tensors(part.inputs), _outputs(manifest, i))
        for i, (segment, part) in enumerate(zip(segments, manifest.segments, strict=True))
    ]
    answers = [(n, d, [-1, manifest.num_classes] if n == "logits" else [-1]) for n, d in OUTPUTS.items()]
    whole = _config(name, "python", _tensors(manifest.segments[0].inputs), answers, "instance_group [ { kind: KIND_CPU } ]\n")
    for segment, part, config in zip(segments, manifest.segments, configs, strict=True):
        (target / segment / "1").mkdir(parents=True)
        shutil.copyfile(folder / part.file.name, target / segment / "1" / "model.onnx")
        (target / segment / "config.pbtxt").write_text(config)
    version = target / name / "1"
    version.mkdir(parents=True)
    for file in ("exits.json", manifest.heads.name):
        shutil.copyfile(folder / file, version / file)
    (version / "model.py").write_text(_MODEL)
    (target / name / "config.pbtxt").write_text(whole)
    return target


def _segment(name: str, i: int) -> str:
    return f"{name}_segment{i}"


def _output_names(manifest: Manifest, i: int) -> list[str]:
    return ["logits"] if i == len(manifest.exits) else [f"out_{j}" for j in range(len(manifest.segments[i + 1].inputs))]


def _outputs(manifest: Manifest, i: int) -> list[tuple[str, str, list[int]]]:
    names = _output_names(manifest, i)
    if i == len(manifest.exits):
        return [(names[0], "FP32", [-1, manifest.num_classes])]
    return [(n, d, s) for n, (_, d, s) in zip(names, _tensors(manifest.segments[i + 1].inputs), strict=True)]


def _tensors(ports: list[Port]) -> list[tuple[str, str, list[int]]]:
    if unknown := [p.name for p in ports if p.dtype == "bfloat16"]:
        raise CannotExport(f"tensors {unknown} are bfloat16, which the Python backend cannot hand on as NumPy arrays; export in float32")
    return [(p.name, NAMES[np.dtype(p.dtype)], [-1, *(-1 if d is None else d for d in p.shape)]) for p in ports]


def _config(name: str, backend: str, inputs: list, outputs: list, more: str = "") -> str:
    """Return a model's config.pbtxt; the protobuf text format takes strings as JSON writes them."""
    head = f"name: {json.dumps(name)}\nbackend: {json.dumps(backend)}\nmax_batch_size: 0\n"
    tensor = lambda kind, t: f"{kind} {{ name: {json.dumps(t[0])} data_type: TYPE_{t[1]} dims: {t[2]} }}\n"
    return "".join([head, *(tensor("input", t) for t in inputs), *(tensor("output", t) for t in outputs), more])


class _Failed(Exception):
    """A segment's own error, as the server gave it."""

    def __init__(self, error: Any):
        super().__init__(error.message())
        self.error = error


class TritonPythonModel:
    """What the Python backend runs as the model ``NAME`` of a repository of `write_repository`.

    A request's parameter ``deadline`` gives seconds, a number or its text, from the moment at which this model takes the request: what waited
    in the server's queue is not seen here. The first request with a deadline also measures the segments, so it is answered late.
    Errors are the request's own: ``INVALID_ARG`` for wrong inputs or deadlines, ``CANCELLED``, a segment's own error, else ``INTERNAL``.
    """

    def initialize(self, args: dict[str, str]) -> None:
        import triton_python_backend_utils as pb  # of the server's Python alone

        folder = Path(args["model_repository"], args["model_version"])
        manifest = read_manifest(folder, kinds=("onnx",), programs=False)
        segments = enumerate(manifest.segments)
        self._pb = pb
        self._ask = [(_segment(args["model_name"], i), [p.name for p in part.inputs], _output_names(manifest, i)) for i, part in segments]
        self.runner = SegmentRunner(folder, manifest, self._run_segment)

    def _run_segment(self, i: int, carry: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        pb, (model, inputs, outputs) = self._pb, self._ask[i]
        tensors = [pb.Tensor(n, t.contiguous().numpy()) for n, t in zip(inputs, carry, strict=True)]
        cpu = pb.PreferredMemory(pb.TRITONSERVER_MEMORY_CPU)  # else a segment on a GPU answers there
        answer = pb.InferenceRequest(model_name=model, inputs=tensors, requested_output_names=outputs, preferred_memory=cpu).exec()
        if answer.has_error():
            raise _Failed(answer.error())
        return tuple(_tensor(pb.get_output_tensor_by_name(answer, n)) for n in outputs)

    def execute(self, requests: list) -> list:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        pb = self._pb
        refuse = lambda text, code: pb.InferenceResponse(error=pb.TritonError(text, code))
        if request.is_cancelled():
            return refuse("the request was cancelled", pb.TritonError.CANCELLED)
        try:
            deadline = _deadline(request)
            values = self.runner.inputs({t.name(): _tensor(t) for t in request.inputs()})
        except (TypeError, ValueError) as error:
            return refuse(str(error), pb.TritonError.INVALID_ARG)
        try:
            out = self.runner(values, deadline=deadline)
        except _Failed as failed:
            return pb.InferenceResponse(error=failed.error)
        except Exception as error:
            return refuse(f"{type(error).__name__}: {error}", pb.TritonError.INTERNAL)
        asked = request.requested_output_names()
        return pb.InferenceResponse(output_tensors=[pb.Tensor(n, getattr(out, n).numpy()) for n in OUTPUTS if n in asked])


def _tensor(t: Any) -> Tensor:
    return torch.from_numpy(np.require(t.as_numpy(), requirements="W"))  # a copy only of what may not be written, of which torch warns


def _deadline(request: Any) -> float | None:
    value = json.loads(request.parameters() or "{}").get("deadline")
    if value is None:
        return None
    try:
        deadline = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        deadline = float("nan")
    if deadline != deadline:
        raise ValueError(f"parameters: deadline must be seconds, got {value!r}")
    return deadline

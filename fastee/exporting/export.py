"""export(): one artefact per segment, the heads, and ``exits.json``."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import fastee
from fastee.errors import CannotExport, did_you_mean
from fastee.exporting.manifest import (
    FORMAT,
    KINDS,
    MEASURES,
    Exit,
    File,
    Manifest,
    Part,
    Port,
    digest_of,
    write_manifest,
)
from fastee.nn import EarlyExit

BATCH = torch.export.Dim("batch", min=1, max=1 << 20)


def export(net: EarlyExit, dir: str | os.PathLike, *, format: str = "torch") -> Path:
    """Write the network as one program per segment, its heads and ``exits.json`` into a folder, and return the folder.

    ``format``: ``torch`` (``torch.export`` programs, any machine with torch), ``aoti`` (AOTInductor packages: machine code for this
    machine, for the C++ runner too), ``onnx`` (one model per segment, for onnxruntime). The batch is dynamic, every other
    size is the example's. The folder is complete or absent: it is written beside its place and moved. An older export there is replaced,
    any other folder is refused. Rules that remember earlier exits (``patience``, ``gate``) do not export. Weights stay as they are.

    Raises ``TypeError``/``ValueError`` for a wrong argument and `CannotExport`, which names the segment, the node and the module's path,
    where the backbone uses what the format does not have.

    >>> import fastee, tempfile, torch
    >>> body = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> net = fastee.attach(body, exits=["1"], num_classes=3, example=torch.zeros(1, 4)).eval()
    >>> sorted(p.name for p in fastee.export(net, tempfile.mkdtemp() + "/net").iterdir())
    ['exits.json', 'heads.safetensors', 'segment0.pt2', 'segment1.pt2']
    """
    if not isinstance(net, EarlyExit):
        raise TypeError(f"net: expected a network from fastee.attach, got {type(net).__name__}")
    if format not in KINDS:
        raise ValueError(f"format: expected one of {list(KINDS)}, got {format!r}{did_you_mean(str(format), KINDS)}")
    if net.measure not in MEASURES:
        raise ValueError(f"net: measure {net.measure!r} remembers earlier exits and does not export; set_rule with one of {list(MEASURES)}")
    target = Path(dir)
    if target.exists() and not (target / "exits.json").is_file() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"dir: {target} exists and is no earlier export; choose another folder or remove it")
    if format == "onnx":
        _need_onnx()
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=target.name + ".part", dir=target.parent))
    training = net.training
    net.eval()
    try:
        write_manifest(part, _write(net, part, format))
        part.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        os.replace(part, target)
    finally:
        net.train(training)
        shutil.rmtree(part, ignore_errors=True)
    return target


def _write(net: EarlyExit, folder: Path, kind: str) -> Manifest:
    carry, parts, names = net.inputs.batch(2), [], list(net.inputs.names)
    write = {"torch": _write_torch, "aoti": _write_aoti, "onnx": _write_onnx}[kind]
    cpu = torch.device("cpu")
    if any(t.device != cpu for t in (*net.parameters(), *net.buffers())):
        raise ValueError("net: export runs on the CPU; call net.cpu() first")
    branched = next((n for n, h in zip(net.exit_names, net.heads, strict=True) if h.branch is not None), None)
    if branched is not None:
        raise ValueError(f"net: exit {branched!r} has a branch of convolutions, which no exported engine runs; attach with another kind of head")
    with torch.no_grad():
        for i in range(net.num_segments):
            file = folder / f"segment{i}.{KINDS[kind]}"
            carry = tuple(t.contiguous() for t in carry)  # AOTInductor keeps to the strides that it sees
            outputs = net.run_segment(i, carry)
            last = i == net.num_exits
            write(net, i, carry, file, names, ["logits"] if last else [f"out_{j}" for j in range(len(outputs))])
            ports = [Port(n, str(t.dtype).removeprefix("torch."), list(t.shape[1:])) for n, t in zip(names, carry, strict=True)]
            parts.append(Part(File(file.name, digest_of(file)), ports))
            carry, names = outputs, [f"carry_{j}" for j in range(len(outputs))]
    heads = folder / "heads.safetensors"
    save_file({k: t.detach().float().contiguous().clone() for k, t in _head_tensors(net)}, heads)
    exits = []
    for name, head, place in zip(net.exit_names, net.heads, net._mask_places, strict=True):
        norm, two = head.fused()[2], head.hidden is not None
        activation = ("none" if head.kind.startswith("low_rank") else "relu") if two else None
        mask = place if head.pool == "mean_tokens" else None
        exits.append(Exit(name, head.pool, norm.kind if norm else None, norm.eps if norm else 0.0, activation, head.temperature, mask))
    thresholds = [None if t == float("inf") else t for t in net.thresholds]
    return Manifest(
        FORMAT, kind, fastee.__version__, str(torch.__version__), net.fingerprint, net.num_classes, net.measure, thresholds, net.inputs.kind, parts, exits,
        File(heads.name, digest_of(heads)),
    )  # fmt: skip


def _head_tensors(net: EarlyExit) -> Iterator[tuple[str, Tensor]]:
    for i, head in enumerate(net.heads):
        weight, bias, norm = head.fused()
        fields: dict[str, Tensor | None] = {"weight": weight, "bias": bias}
        if norm is not None:
            fields |= {"norm_weight": norm.weight, "norm_bias": norm.bias}
        if head.hidden is not None:
            fields |= {"last_weight": head.linear.weight, "last_bias": head.linear.bias}
        yield from ((f"{i}.{name}", t) for name, t in fields.items() if t is not None)


def _program(net: EarlyExit, i: int, carry: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(net.segment(i), carry, dynamic_shapes={"carry": tuple({0: BATCH} for _ in carry)}, strict=False)
    except Exception as error:
        raise CannotExport(f"segment {i} ({_span(net, i)}): torch.export refuses {_line_under(net, i, error)}: {_first_lines(error)}") from error


def _write_torch(net, i, carry, file, names, outputs) -> None:
    torch.export.save(_program(net, i, carry), file)


def _write_aoti(net, i, carry, file, names, outputs) -> None:
    try:
        torch._inductor.aoti_compile_and_package(_program(net, i, carry), package_path=str(file))
    except CannotExport:
        raise
    except Exception as error:
        raise CannotExport(f"segment {i} ({_span(net, i)}): AOTInductor refuses it: {_first_lines(error)}") from error


def _need_onnx() -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise ImportError("format='onnx' needs onnx and onnxscript: pip install 'fastee[onnx]'") from None


def _write_onnx(net, i, carry, file, names, outputs) -> None:
    program = _program(net, i, carry)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            made = torch.onnx.export(program, input_names=names, output_names=outputs, dynamo=True, verbose=False, optimize=True)
        made.save(str(file), external_data=False)
    except Exception as error:
        raise CannotExport(f"segment {i} ({_span(net, i)}): {_onnx_reason(net, i, error)}") from error


def _span(net: EarlyExit, i: int) -> str:
    first = f"after {net.exit_names[i - 1]!r}" if i else "the input"
    return f"{first} to {net.exit_names[i]!r}" if i < net.num_exits else f"{first} to the end"


def _first_lines(error: BaseException, lines: int = 3) -> str:
    text = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: " + " ".join(text[:lines])


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _line_under(net: EarlyExit, i: int, error: BaseException) -> str:
    """Return the node of the segment that was running and its module's path, "it" where no line of the segment was."""
    frames = (f for e in _chain(error) for f in traceback.extract_tb(e.__traceback__) if f.filename.startswith("<fastee segment"))
    names = [m[1] for f in frames if (m := re.match(r"\s*(\w+) =", f.line or "")) and m[1] in net._segments[i].origins]
    return f"node {names[-1]!r} of module {net._segments[i].origins[names[-1]]!r}" if names else "it"


def _onnx_reason(net: EarlyExit, i: int, error: BaseException) -> str:
    """Return what the exporter stumbled over: the node, its operator, and the path of the module that called it."""
    node = next((n for e in _chain(error) for n in _nodes_under(e)), None)
    if node is None:
        return f"torch.onnx refuses it: {_first_lines(error)}"
    return f"no ONNX operator for node {node.name!r} ({node.target}) of module {_module_path(net, i, node)!r}"


def _nodes_under(error: BaseException) -> Iterator[torch.fx.Node]:
    """The exporter names the node in its text only; the object, which knows where it came from, is a local of its frames."""
    trace = error.__traceback__
    while trace is not None:
        node: Any = trace.tb_frame.f_locals.get("node")
        if isinstance(node, torch.fx.Node) and node.op == "call_function":
            yield node
        trace = trace.tb_next


def _module_path(net: EarlyExit, i: int, node: torch.fx.Node) -> str:
    stack = [str(path).removeprefix("body.") for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    if stack and stack[-1]:
        return stack[-1]
    line = re.search(r'File "<fastee segment [^"]*", line \d+, in forward\s+(\w+) =', node.meta.get("stack_trace") or "")
    return (net._segments[i].origins.get(line[1]) if line else None) or type(net.backbone).__name__

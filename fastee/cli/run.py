"""``fastee run``: the rows of an .npz, answered by a running cluster."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import typer

import fastee


def rows(path: Path, names: list[str]) -> torch.Tensor | dict[str, torch.Tensor]:
    """Return the arrays of an .npz as the model's inputs: by name, or the only array for the only input."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    if len(names) == 1 and len(arrays) == 1:
        return next(iter(arrays.values()))
    if set(arrays) != set(names):
        raise typer.BadParameter(f"{path} holds {sorted(arrays)}, expected {sorted(names)}", param_hint="--input")
    return arrays


def run(config: Path, source: Path, deadline: float | None, keys: Path | None, out: Path | None, as_json: bool) -> int:
    """Ask, print, write; return the exit code: 1 when a row ended in an error."""
    with fastee.Cluster.connect(config, keys=keys) as cluster:
        found = cluster(rows(source, list(cluster.inputs)), deadline=deadline, on_error="return")
        names = [node.name for node in cluster.nodes]
    table = [
        {"row": i, "error": f"{type(error).__name__}: {error}"}
        if error is not None
        else {
            "row": i, "label": int(found.label[i]), "confidence": round(float(found.confidence[i]), 6), "exit": int(found.exit[i]),
            "node": names[found.node[i]], "latency": round(float(found.latency[i]), 6), "forced": bool(found.forced[i]),
        }
        for i, error in enumerate(found.errors)
    ]  # fmt: skip
    for row in table:
        typer.echo(json.dumps(row) if as_json else "  ".join(f"{k} {v}" for k, v in row.items()))
    if out is not None:
        np.savez(out, **{k: getattr(found, k).numpy() for k in ("logits", "label", "confidence", "exit", "node", "latency")})
    return int(any(error is not None for error in found.errors))

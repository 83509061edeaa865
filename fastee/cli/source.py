"""What a command line names: a network and its data, as ``package.module:name`` of the user's own code."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import typer
from torch import nn

import fastee
from fastee.errors import did_you_mean


def named(spec: str, hint: str) -> Any:
    """Return what ``package.module:name`` names, called when it is a function; the working folder is importable. Runs the user's code."""
    module, _, name = spec.partition(":")
    if not module or not name:
        raise typer.BadParameter(f"expected package.module:name, got {spec!r}", param_hint=hint)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # a module that it imports, not the one that was named
        raise typer.BadParameter(f"there is no module {error.name!r} here or among the installed ones", param_hint=hint) from None
    for part in name.split("."):
        if not hasattr(found, part):
            known = [n for n in vars(found) if not n.startswith("_")]
            raise typer.BadParameter(f"module {module!r} has no {part!r}{did_you_mean(part, known)}", param_hint=hint)
        found = getattr(found, part)
    return found() if callable(found) and not isinstance(found, nn.Module) else found


def network(spec: str, checkpoint: Path | None) -> fastee.EarlyExit:
    """Return the network that `spec` names: an EarlyExit, or with `checkpoint` the backbone that the file's exits belong to."""
    net = named(spec, "NET")
    if checkpoint is not None:
        if isinstance(net, fastee.EarlyExit):
            net = net.backbone
        if not isinstance(net, nn.Module):
            raise typer.BadParameter(f"{spec} gave a {type(net).__name__}, expected the backbone, a torch module", param_hint="NET")
        return fastee.load(checkpoint, net)
    if not isinstance(net, fastee.EarlyExit):
        raise typer.BadParameter(f"{spec} gave a {type(net).__name__}, expected an EarlyExit; or name its backbone and pass --checkpoint", param_hint="NET")
    return net.eval()

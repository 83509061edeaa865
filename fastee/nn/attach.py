"""attach(): from the user's module to a network with exits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastee.errors import CannotCut, did_you_mean
from fastee.nn.early_exit import Constants, EarlyExit
from fastee.nn.heads import POOLS, ExitHead, infer_pool
from fastee.nn.macs import choose_exits, segment_macs
from fastee.nn.segment import Splitter, split
from fastee.nn.trace import Inputs, eval_mode, logits_of, trace


def attach(
    backbone: nn.Module,
    exits: list[str] | str,
    num_classes: int | None = None,
    example: Any = None,
    *,
    pool: str | list[str] = "auto",
    norm: str | None = "batch",
    mask: str | None = None,
    head: str | nn.Module | list[str | nn.Module] = "linear",
) -> EarlyExit:
    """Return the module with untrained exit heads: what `fastee.attach`, whose arguments these are, does once it holds a module and its example.

    Raises ``ValueError`` for unknown, repeated or wrongly ordered exits and ``CannotCut`` where the backbone cannot be cut.

    >>> import torch
    >>> from fastee.nn import attach
    >>> net = attach(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)), exits=["1"], example=torch.zeros(1, 4))
    >>> net.eval()(torch.zeros(2, 4)).exit.tolist()
    [1, 1]
    """
    if not isinstance(backbone, nn.Module):
        raise TypeError(f"backbone: expected an nn.Module, got {type(backbone).__name__}")
    if any(isinstance(m, EarlyExit) for m in backbone.modules()):
        raise TypeError("backbone: it already has exits; attach to its .backbone instead")
    if example is None:
        raise TypeError("example: attach needs an example input (a tensor, or a tuple or dict of tensors)")
    inputs = Inputs(backbone, example)
    if mask is not None and mask not in inputs.names:
        raise ValueError(f"mask: expected the name of one of the inputs {list(inputs.names)}, got {mask!r}{did_you_mean(str(mask), inputs.names)}")
    with eval_mode(backbone):
        answer = logits_of(inputs.call(backbone, inputs.batch(2)))
    if answer.ndim != 2 or answer.shape[0] != 2:
        raise ValueError(f"backbone: its answer must be logits [B, C], got {list(answer.shape)} for 2 rows")
    if num_classes is None:
        num_classes = answer.shape[1]
    elif num_classes != answer.shape[1]:
        raise ValueError(f"num_classes: the backbone answers {answer.shape[1]} classes, got {num_classes}")

    keep = (mask,) if mask else ()
    names, count = _exit_names(backbone, exits)
    found = trace(backbone, inputs, names, auto=count is not None)
    splitter = Splitter(found, keep)
    if count is not None:
        names = choose_exits(backbone, splitter, count)
    for name in names:
        if found.calls.get(name, 0) > 1:
            raise CannotCut(f"cannot cut after {name!r}: the backbone calls it {found.calls[name]} times, so the place is not one place")
        if name not in found.taps:
            known = sorted(found.taps)
            raise CannotCut(f"cannot cut after {name!r}: it does not run or gives no tensor with this example. Places that do: {_some(known)}")
    cuts = [splitter.cut(name) for name in names]
    order = sorted(cuts, key=lambda c: c.index)
    for a, b in zip(order, order[1:], strict=False):
        if a.index == b.index:
            raise ValueError(f"exits: {a.place!r} and {b.place!r} end at the same place; keep one of them")
    if order != cuts:
        raise ValueError(f"exits: must be in the order in which the backbone runs them: {[c.place for c in order]}, got {list(names)}")

    segments = split(backbone, inputs, found, cuts, splitter, Constants(found.constants))
    heads = _heads(backbone, found, cuts, num_classes, pool, norm, head)
    places = tuple(next((i for i, n in enumerate(c.carry) if n.op == "placeholder" and n.target == mask), None) for c in cuts)
    options = {"pool": [h.pool for h in heads], "norm": norm, "mask": mask, "head": head}
    inputs.shrink()
    macs = segment_macs(splitter, cuts)
    return EarlyExit(backbone, segments, heads, names, inputs, found.constants, macs, places, num_classes, options)


def _exit_names(backbone: nn.Module, exits: Any) -> tuple[tuple[str, ...], int | None]:
    if isinstance(exits, str):
        kind, _, number = exits.partition(":")
        if kind == "auto" and number.isdecimal() and int(number) > 0:
            return (), int(number)
        raise ValueError(f'exits: expected a list of names or "auto:N" with N >= 1, got {exits!r}')
    names = tuple(exits) if isinstance(exits, (list, tuple)) else None
    if names is None or not all(isinstance(n, str) for n in names):
        raise TypeError(f'exits: expected a list of names or "auto:N", got {exits!r}')
    if not names:
        raise ValueError("exits: expected at least one name, got an empty list")
    known = [n for n, _ in backbone.named_modules() if n]
    for name in names:
        if name not in known:
            raise ValueError(f"exits: the backbone has no submodule {name!r}{did_you_mean(name, known)}. Names: {_some(known)}")
        if names.count(name) > 1:
            raise ValueError(f"exits: {name!r} is given {names.count(name)} times, each exit may stand once")
    return names, None


def _kind_names(head: Any) -> Any:
    return [_kind_names(h) for h in head] if isinstance(head, (list, tuple)) else head if isinstance(head, str) else type(head).__name__


def _some(names: list[str], most: int = 40) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _heads(backbone, found, cuts, num_classes, pool, norm, kind_of_head) -> list[ExitHead]:
    pools = [pool] * len(cuts) if isinstance(pool, str) else list(pool)
    if len(pools) != len(cuts):
        raise ValueError(f"pool: expected one name or {len(cuts)}, one per exit, got {len(pools)}")
    kinds = kind_of_head if isinstance(kind_of_head, (list, tuple)) else [kind_of_head] * len(cuts)
    if len(kinds) != len(cuts) or isinstance(kind_of_head, nn.Module) and len(cuts) > 1:
        raise ValueError(f"head: expected one kind, or a list of one kind or module for each of {len(cuts)} exits, got {_kind_names(kind_of_head)}")
    device = next((t.device for t in (*backbone.parameters(), *backbone.buffers())), torch.device("cpu"))
    heads = []
    for cut, kind, own in zip(cuts, pools, kinds, strict=True):
        shape = found.at2[cut.carry[0]].shape
        inferred = infer_pool(shape, cut.place)
        if kind == "auto":
            kind = inferred
        legal = {2: ("none",), 3: ("cls", "mean_tokens", "last")}.get(len(shape), ("mean",))
        if kind not in legal:
            choices = [p for p in POOLS if p in legal]
            raise ValueError(f"pool: exit {cut.place!r} gives {list(shape)}, expected one of {choices}, got {kind!r}{did_you_mean(str(kind), POOLS)}")
        features = shape[2] if len(shape) == 3 else shape[1]
        own = "linear" if kind_of_head == "shared" else own
        size = tuple(shape[2:]) if len(shape) == 4 else None
        heads.append(ExitHead(features, num_classes, kind, norm, own, size).to(device).train(backbone.training))
    if kind_of_head == "shared":
        widths = [h.features for h in heads]
        if len(set(widths)) > 1:
            raise ValueError(f"head: 'shared' needs exits of one width, got {widths} features")
        for other in heads[1:]:
            other.linear = heads[0].linear
    return heads

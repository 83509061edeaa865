"""fit(): train the exits of a network."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from typing import Any

import torch

from fastee.nn import EarlyExit
from fastee.nn.batches import loader_of
from fastee.training.features import Features
from fastee.training.gated import GatedRun
from fastee.training.loop import Run, TrainingDiverged, train
from fastee.training.methods import Distill, Frozen, Gated, Joint, method_of
from fastee.training.runs import HeadsRun, WholeRun

__all__ = ["FitReport", "TrainingDiverged", "fit"]
HELD_OUT = 0.1


@dataclasses.dataclass
class FitReport:
    """What `fit` did: ``history`` holds per epoch the loss and accuracy per exit (K heads; K+1 numbers where the end is trained too).

    Keys of an epoch: ``loss``, ``accuracy``, ``seconds`` and, with a val_loader, ``val_accuracy`` (K+1 numbers, always with the end);
    ``gated`` adds ``phase`` and ``held_out_accuracy``.
    """

    method: str
    exit_names: tuple[str, ...]
    history: list[dict[str, Any]]
    seconds: float
    samples: int
    cached: bool

    @property
    def accuracy(self) -> list[float]:
        """Accuracy per exit in the last epoch: on the validation data where given, else on the training data."""
        last = self.history[-1]
        return last.get("val_accuracy", last["accuracy"])

    def __repr__(self) -> str:
        shown = ", ".join(f"{a:.4f}" for a in self.accuracy)
        return f"FitReport({self.method}, {len(self.history)} epochs, {self.samples} samples, {self.seconds:.1f} s, accuracy per exit [{shown}])"


def fit(
    net: EarlyExit,
    loader: Any,
    method: str | Frozen | Joint | Distill | Gated = "frozen",
    epochs: int = 3,
    lr: float | None = None,
    weights: list[float] | str | None = None,
    seed: int | None = None,
    progress: bool = True,
    val_loader: Any = None,
    *,
    batch_size: int = 128,
    cache: bool | None = None,
    patience: int | None = None,
    checkpoint: str | os.PathLike | None = None,
) -> FitReport:
    """Train the exits of `net` and leave it in eval mode.

    Args:
        loader: DataLoader, Dataset or list of batches ``(x, y)``, ``(x1, x2, .., y)`` or a dict with ``labels``; y int64 [B] in [0, C).
        method: ``frozen`` trains the heads only: the backbone stays in eval mode, bit for bit as it was. ``joint`` trains all. ``distill``
            lets the exits learn from the end's, or a teacher's, logits. ``gated`` learns heads and exit decisions together (JEI-DNN)
            and sets the rule to the measure ``gate``. Settings of each: `fastee.training.Joint` and its neighbours, as objects.
        lr: default 0.01 (0.001 where the backbone is trained), AdamW (gated: SGD), falling along a cosine.
        weights: one weight per exit and, where the backbone is trained, one for its end (last); default 1; ``"pabee"`` weighs by depth.
        seed: makes the shuffling (and with ``joint`` dropout and the loader's own order) repeatable.
        cache: a fixed backbone's pooled features of one pass over the loader are kept in memory, so that an epoch takes seconds (random
            augmentation is then drawn once); None does so when they fit in 1 GiB. ``gated`` needs them.
        batch_size: rows per step on cached features, and for a plain Dataset.
        patience: stop after so many epochs without a better mean accuracy on `val_loader`, and put the best weights back.
        checkpoint: a file, written after every epoch; where it exists already, training goes on from it and ends as if never interrupted.

    Raises `TrainingDiverged` when a loss is not finite (the weights of the start of that epoch are put back), ``ValueError`` naming a
    label outside [0, C), ``CheckpointMismatch`` when `checkpoint` is of another run.
    """
    if not isinstance(net, EarlyExit):
        raise TypeError(f"net: expected an EarlyExit from fastee.attach, got {type(net).__name__}")
    method = method_of(method)
    if weights is not None:
        if isinstance(method, Gated):
            raise ValueError("weights: method='gated' weighs the exits by its gates; pass weights=None")
        method = dataclasses.replace(method, weights=weights if isinstance(weights, str) else tuple(weights))
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs: expected an integer >= 1, got {epochs!r}")
    whole = isinstance(method, Joint) or (isinstance(method, Distill) and method.backbone)
    lr = (Joint.lr if whole else method.lr) if lr is None else float(lr)
    if not (0 < lr < math.inf):
        raise ValueError(f"lr: expected a positive number, got {lr}")
    if patience is not None and (isinstance(patience, bool) or not isinstance(patience, int) or patience < 1):
        raise ValueError(f"patience: expected an integer >= 1 or None, got {patience!r}")
    if patience is not None and val_loader is None:
        raise ValueError("patience: it needs a val_loader to judge the epochs by")
    loader = loader_of(loader, batch_size=batch_size)
    val_loader = None if val_loader is None else loader_of(val_loader, "val_loader", batch_size)
    start = time.perf_counter()
    devices = sorted({t.device.index or 0 for t in net.parameters() if t.device.type == "cuda"})
    with torch.random.fork_rng(devices) if seed is not None else contextlib.nullcontext():
        if seed is not None:
            torch.manual_seed(seed)
        run = _run(net, loader, val_loader, method, batch_size, cache, whole)
        settings = dataclasses.replace(method, teacher=None) if isinstance(method, Distill) else method
        history = train(
            net, run, epochs, lr, progress, val_loader, patience, checkpoint, f"{settings!r};{seed};{batch_size}"
        )
    net.eval()
    if isinstance(method, Gated):
        net.set_rule(measure="gate", thresholds=[0.0] * net.num_exits)
    return FitReport(method.name, net.exit_names, history, time.perf_counter() - start, run.samples, run.cached)


def _run(
    net: EarlyExit, loader: Any, val_loader: Any, method: Any, batch_size: int, cache: bool | None, whole: bool
) -> Run:
    if whole:
        return WholeRun(net, loader, method)
    if not isinstance(method, Gated):
        teacher = method.teacher if isinstance(method, Distill) else None
        features = Features(net, loader, batch_size, cache, teacher)
        return HeadsRun(net, features, method.weights, method if isinstance(method, Distill) else None)
    if net.num_classes < 2:
        raise ValueError(f"num_classes: gates compare classes, expected at least 2, got {net.num_classes}")
    features = Features(net, loader, batch_size, cache)
    if not features.cached:
        raise ValueError(
            "cache: method='gated' walks the features of all rows every epoch; pass cache=True (they do not fit in 1 GiB) or fewer rows"
        )
    if val_loader is not None:
        return GatedRun(net, features, Features(net, val_loader, batch_size, True, name="val_loader"), method)
    if len(features) < 2:
        raise ValueError(
            "loader: method='gated' holds a tenth of the rows out, expected at least 2 rows or a val_loader"
        )
    return GatedRun(net, *features.split(HELD_OUT), method)

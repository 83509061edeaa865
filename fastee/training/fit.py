"""fit(): train the exit heads on a fixed backbone, or heads and backbone together."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional as F

from fastee.errors import FasteeError, did_you_mean
from fastee.nn import EarlyExit
from fastee.nn.batches import labelled, loader_of
from fastee.nn.trace import eval_mode

METHODS = ("frozen", "joint")
CACHE_BYTES = 1 << 30


class TrainingDiverged(FasteeError, ArithmeticError):
    """The loss became NaN or infinite; the weights are those of the start of that epoch."""


@dataclasses.dataclass
class FitReport:
    """What `fit` did: ``history`` holds per epoch the loss and accuracy per exit (K heads, with ``joint`` also the end).

    Keys of an epoch: ``loss``, ``accuracy``, ``seconds`` and, with a val_loader, ``val_accuracy`` (K+1 numbers, always with the end).
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
    method: str = "frozen",
    epochs: int = 3,
    lr: float | None = None,
    weights: list[float] | None = None,
    seed: int | None = None,
    progress: bool = True,
    val_loader: Any = None,
    *,
    batch_size: int = 128,
    cache: bool | None = None,
) -> FitReport:
    """Train the exits of `net` and leave it in eval mode.

    Args:
        loader: DataLoader, Dataset or list of batches ``(x, y)``, ``(x1, x2, .., y)`` or a dict with ``labels``; y int64 [B] in [0, C).
        method: ``frozen`` trains the heads only: the backbone stays in eval mode, bit for bit as it was. ``joint`` trains all.
        lr: default 0.01 (frozen) or 0.001 (joint), AdamW, falling to zero along a cosine.
        weights: one weight per exit and, with ``joint``, one for the backbone's end (last); default 1.
        seed: makes the shuffling (and with ``joint`` dropout and the loader's own order) repeatable.
        cache: ``frozen`` keeps the pooled features of one pass over the loader in memory, so that an epoch takes seconds (random
            augmentation is then drawn once); None does so when they fit in 1 GiB.
        batch_size: rows per step on cached features, and for a plain Dataset.

    Raises `TrainingDiverged` when a loss is not finite (the weights of the start of that epoch are put back), ``ValueError`` naming a
    label outside [0, C).
    """
    if not isinstance(net, EarlyExit):
        raise TypeError(f"net: expected an EarlyExit from fastee.attach, got {type(net).__name__}")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {list(METHODS)}, got {method!r}{did_you_mean(str(method), METHODS)}")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs: expected an integer >= 1, got {epochs!r}")
    lr = {"frozen": 0.01, "joint": 0.001}[method] if lr is None else float(lr)
    if not (0 < lr < math.inf):
        raise ValueError(f"lr: expected a positive number, got {lr}")
    loader = loader_of(loader, batch_size=batch_size)
    val_loader = None if val_loader is None else loader_of(val_loader, "val_loader", batch_size)
    count = net.num_exits + (method == "joint")
    weights = [1.0] * count if weights is None else [float(w) for w in weights]
    if len(weights) != count or not all(0 <= w < math.inf for w in weights) or not any(weights):
        raise ValueError(f"weights: expected {count} numbers >= 0, not all zero, for method={method!r}, got {weights}")
    start = time.perf_counter()
    devices = sorted({t.device.index or 0 for t in net.parameters() if t.device.type == "cuda"})
    with torch.random.fork_rng(devices) if seed is not None else contextlib.nullcontext():
        if seed is not None:
            torch.manual_seed(seed)
        run = _Frozen(net, loader, batch_size, cache) if method == "frozen" else _Joint(net, loader)
        history = _train(net, run, epochs, lr, torch.tensor(weights), progress, val_loader)
    net.eval()
    return FitReport(method, net.exit_names, history, time.perf_counter() - start, run.samples, run.cached)


class _Frozen:
    """Batches of pooled features and labels; logits are those of the heads."""

    def __init__(self, net: EarlyExit, loader: Any, batch_size: int, cache: bool | None):
        self.net, self.loader, self.batch_size, self.samples = net, loader, batch_size, 0
        self.modules = list(net.heads)
        self.parameters = [p for h in net.heads for p in h.parameters()]
        self.labels: Tensor | None = None
        self.features: list[Tensor] = []
        self.cached = cache is not False
        if self.cached:
            self._fill(CACHE_BYTES if cache is None else math.inf)

    def _pass(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        device = _device(self.net)
        for x, y in labelled(self.loader, self.net.num_classes, device):
            pooled, _ = self.net.taps(x)
            yield [p.float() for p in pooled], y

    def _fill(self, limit: float) -> None:
        parts, labels, used = [], [], 0
        for pooled, y in self._pass():
            used += sum(p.numel() * p.element_size() for p in pooled)
            if used > limit:
                self.cached = False
                return
            parts.append(pooled)
            labels.append(y)
        if not labels:
            raise ValueError("loader: it gave no batch")
        self.labels = torch.cat(labels)
        self.features = [torch.cat(p) for p in zip(*parts, strict=True)]

    def steps(self) -> int | None:
        if self.labels is not None:
            return math.ceil(len(self.labels) / self.batch_size)
        return len(self.loader) if hasattr(self.loader, "__len__") else None

    def batches(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        if self.labels is None:
            yield from ((p, y) for p, y in self._pass() if len(y) > 1)  # a batch norm cannot learn from one row
            return
        order = torch.randperm(len(self.labels)).to(self.labels.device)
        for rows in order.split(self.batch_size):
            if len(rows) > 1 or len(order) == 1:
                yield [f[rows] for f in self.features], self.labels[rows]

    def logits(self, batch: list[Tensor]) -> list[Tensor]:
        return [head.classify(f) for head, f in zip(self.net.heads, batch, strict=True)]

    @contextlib.contextmanager
    def mode(self) -> Iterator[None]:
        for head in self.net.heads:
            head.train()
        yield


class _Joint:
    """Batches as the loader gives them; logits of all heads and of the end."""

    cached = False

    def __init__(self, net: EarlyExit, loader: Any):
        self.net, self.loader, self.samples = net, loader, 0
        self.modules = [net]
        self.parameters = [p for p in net.parameters() if p.requires_grad]

    def steps(self) -> int | None:
        return len(self.loader) if hasattr(self.loader, "__len__") else None

    def batches(self) -> Iterator[tuple[Any, Tensor]]:
        return labelled(self.loader, self.net.num_classes, _device(self.net))

    def logits(self, batch: Any) -> list[Tensor]:
        return self.net(batch)

    @contextlib.contextmanager
    def mode(self) -> Iterator[None]:
        self.net.train()
        yield


def _device(net: EarlyExit) -> torch.device:
    return next(net.heads.parameters()).device


def _train(net, run, epochs: int, lr: float, weights: Tensor, progress: bool, val_loader) -> list[dict[str, Any]]:
    optimizer = torch.optim.AdamW(run.parameters, lr=lr, weight_decay=1e-4)
    steps = run.steps()
    total = epochs * steps if steps else None
    history: list[dict[str, Any]] = []
    columns = (TextColumn("fit {task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=not (progress and sys.stderr.isatty())) as bar:
        task = bar.add_task("", total=total)
        done = 0
        for epoch in range(epochs):
            began = time.perf_counter()
            kept = [{k: v.detach().clone() for k, v in m.state_dict().items()} for m in run.modules]
            sums, hits, rows = torch.zeros(len(weights), dtype=torch.float64), torch.zeros(len(weights), dtype=torch.float64), 0
            with run.mode(), torch.enable_grad():
                for batch, y in run.batches():
                    for group in optimizer.param_groups:
                        group["lr"] = lr * (0.5 * (1 + math.cos(math.pi * min(done, total) / total)) if total else 1.0)
                    outputs = run.logits(batch)
                    losses = torch.stack([F.cross_entropy(z.float(), y) for z in outputs])
                    values = losses.detach().double().cpu()
                    if not bool(torch.isfinite(values).all()):
                        for module, state in zip(run.modules, kept, strict=True):
                            module.load_state_dict(state)
                        net.eval()
                        k = int(torch.nonzero(~torch.isfinite(values))[0])
                        name = net.exit_names[k] if k < net.num_exits else "the backbone's end"
                        raise TrainingDiverged(
                            f"fit: the loss of {name!r} is {float(values[k])} in epoch {epoch}, step {done}; the weights of the start of this epoch"
                            f" are back. Lower lr (now {lr}) or look for NaN in the inputs."
                        )
                    optimizer.zero_grad(set_to_none=True)
                    (losses * weights.to(losses)).sum().backward()
                    optimizer.step()
                    sums += values * len(y)
                    hits += torch.stack([(z.argmax(1) == y).sum() for z in outputs]).double().cpu()
                    rows += len(y)
                    done += 1
                    bar.update(task, advance=1, description=f"epoch {epoch + 1}/{epochs}")
            if rows == 0:
                raise ValueError("loader: it gave no batch")
            run.samples = rows
            entry = {"epoch": epoch, "loss": (sums / rows).tolist(), "accuracy": (hits / rows).tolist()}
            if val_loader is not None:
                entry["val_accuracy"] = _accuracy(net, val_loader)
            entry["seconds"] = time.perf_counter() - began
            history.append(entry)
    return history


def _accuracy(net: EarlyExit, loader: Any) -> list[float]:
    hits, rows = [0] * (net.num_exits + 1), 0
    with eval_mode(net):
        for x, y in labelled(loader, net.num_classes, _device(net), "val_loader"):
            pooled, final = net.taps(x)
            outputs = [h.classify(p) for h, p in zip(net.heads, pooled, strict=True)] + [final]
            hits = [h + int((z.argmax(1) == y).sum()) for h, z in zip(hits, outputs, strict=True)]
            rows += len(y)
    if rows == 0:
        raise ValueError("val_loader: it gave no batch")
    return [h / rows for h in hits]

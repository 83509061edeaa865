"""The training loop: cosine, progress bar, divergence, early stop, a file to go on from."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastee.errors import CheckpointMismatch, FasteeError
from fastee.nn import EarlyExit
from fastee.nn.batches import labelled
from fastee.nn.early_exit import update_with_tensors
from fastee.nn.trace import eval_mode

FORMAT = 1


class TrainingDiverged(FasteeError, ArithmeticError):
    """The loss became NaN or infinite; the weights are those of the start of that epoch."""


class Run:
    """What the loop needs of a method: ``modules`` that an epoch may change, ``parameters`` to step, batches, losses."""

    floor = 0.0  # of the learning rate
    cached = False
    samples = 0
    modules: list[nn.Module]
    parameters: list[nn.Parameter]
    names: tuple[str, ...]  # of the losses

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters, lr=lr, weight_decay=1e-4)

    def epochs(self, asked: int) -> int:
        """Return how many epochs the loop walks when the user asked for `asked`."""
        return asked

    def skip(self, epoch: int) -> bool:
        """Say whether an epoch has nothing left to do."""
        return False

    def begin(self, epoch: int) -> None:
        """Called before an epoch."""

    def end(self, epoch: int, entry: dict[str, Any]) -> None:
        """Called after an epoch with its history entry, which may be extended."""

    def memory(self) -> dict[str, Tensor]:
        """Return what else must be kept to go on from a file; the tensors are filled in place when it is read."""
        return {}

    def steps(self) -> int | None:
        raise NotImplementedError

    def batches(self) -> Iterator[tuple[Any, Tensor]]:
        raise NotImplementedError

    def losses(self, batch: Any, y: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the scalar to descend, the loss of each output [n] for the history, and the logits to count hits on."""
        raise NotImplementedError

    def mode(self) -> contextlib.AbstractContextManager:
        """Put the modules into the mode they train in."""
        raise NotImplementedError


class _Saved(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    run: str
    epoch: int
    done: int
    samples: int
    history: list[dict[str, Any]]
    best: float | None
    stale: int


def train(
    net: EarlyExit,
    run: Run,
    epochs: int,
    lr: float,
    progress: bool,
    val_loader: Any,
    patience: int | None,
    checkpoint: Any,
    identity: str,
) -> list[dict[str, Any]]:
    """Walk the epochs and return the history; with `patience` the modules end with the weights of the best validation epoch."""
    optimizer, steps, epochs = run.optimizer(lr), run.steps(), run.epochs(epochs)
    total = epochs * steps if steps else None
    keeper = (
        None
        if checkpoint is None
        else _File(Path(checkpoint), run, optimizer, _identity(net, run, f"{identity};{epochs};{lr};{patience}"))
    )
    saved = _Saved(FORMAT, "", 0, 0, 0, [], None, 0)
    best_state = None
    if keeper is not None:
        saved, best_state = keeper.read(saved)
    columns = (TextColumn("fit {task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=not (progress and sys.stderr.isatty())) as bar:
        task = bar.add_task("", total=total, completed=saved.done)
        for epoch in range(saved.epoch, epochs):
            if patience is not None and saved.stale >= patience:
                break
            if run.skip(epoch):
                saved.done += steps or 0
                continue
            began, kept = time.perf_counter(), _state(run)
            run.begin(epoch)
            sums, hits, rows = 0.0, 0.0, 0
            with run.mode(), torch.enable_grad():
                for batch, y in run.batches():
                    for group in optimizer.param_groups:
                        group["lr"] = (
                            run.floor
                            + (lr - run.floor) * 0.5 * (1 + math.cos(math.pi * min(saved.done, total) / total))
                            if total
                            else lr
                        )
                    loss, each, outputs = run.losses(batch, y)
                    values = each.detach().double().cpu()
                    if not (bool(torch.isfinite(values).all()) and bool(torch.isfinite(loss))):
                        _restore(run, kept)
                        net.eval()
                        bad = torch.nonzero(~torch.isfinite(values)).flatten()
                        k = int(bad[0]) if len(bad) else 0
                        raise TrainingDiverged(
                            f"fit: the loss of {run.names[k]!r} is {float(values[k])} in epoch {epoch}, step {saved.done}; the weights of the start "
                            f"of this epoch are back. Lower lr (now {lr}) or look for NaN in the inputs."
                        )
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    sums = sums + values * len(y)
                    hits = hits + torch.stack([(z.argmax(1) == y).sum() for z in outputs]).double().cpu()
                    rows += len(y)
                    saved.done += 1
                    bar.update(task, advance=1, description=f"epoch {epoch + 1}/{epochs}")
            if rows == 0:
                raise ValueError("loader: it gave no batch")
            saved.samples = rows
            entry: dict[str, Any] = {"epoch": epoch, "loss": (sums / rows).tolist(), "accuracy": (hits / rows).tolist()}
            if val_loader is not None:
                entry["val_accuracy"] = accuracy(net, val_loader)
            run.end(epoch, entry)
            entry["seconds"] = time.perf_counter() - began
            saved.history.append(entry)
            saved.epoch = epoch + 1
            if patience is not None:
                mean = sum(entry["val_accuracy"]) / len(entry["val_accuracy"])
                if saved.best is None or mean > saved.best:
                    saved.best, saved.stale, best_state = mean, 0, _state(run)
                else:
                    saved.stale += 1
            if keeper is not None:
                keeper.write(saved, best_state)
    run.samples = saved.samples
    if best_state is not None:
        _restore(run, best_state)
    return saved.history


def accuracy(net: EarlyExit, loader: Any) -> list[float]:
    """Return the accuracy of every exit and of the end [K+1] on labelled batches."""
    hits, rows = [0] * (net.num_exits + 1), 0
    with eval_mode(net):
        for x, y in labelled(loader, net.num_classes, next(net.heads.parameters()).device, "val_loader"):
            pooled, final = net.taps(x)
            outputs = [h.classify(p) for h, p in zip(net.heads, pooled, strict=True)] + [final]
            hits = [h + int((z.argmax(1) == y).sum()) for h, z in zip(hits, outputs, strict=True)]
            rows += len(y)
    if rows == 0:
        raise ValueError("val_loader: it gave no batch")
    return [h / rows for h in hits]


def _state(run: Run) -> dict[str, Tensor]:
    return {f"{i}.{k}": v.detach().clone() for i, m in enumerate(run.modules) for k, v in m.state_dict().items()}


def _restore(run: Run, state: dict[str, Tensor]) -> None:
    for i, module in enumerate(run.modules):
        head = f"{i}."
        module.load_state_dict({k.removeprefix(head): v for k, v in state.items() if k.startswith(head)})


def _identity(net: EarlyExit, run: Run, settings: str) -> str:
    """A hash of the settings, the network's shape and of every weight that this run does not change."""
    changing = {id(p) for m in run.modules for p in (*m.parameters(), *m.buffers())}
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
    for name, t in sorted(net.state_dict(keep_vars=True).items()):
        digest.update(f"{name}:{list(t.shape)};".encode())
        if id(t) not in changing:
            update_with_tensors(digest, {name: t})
    return digest.hexdigest()


class _File:
    """The state of a run on disk: safetensors, written atomically after every epoch, nothing in it is executed."""

    def __init__(self, path: Path, run: Run, optimizer: torch.optim.Optimizer, identity: str):
        self.path, self.run, self.optimizer, self.identity = path, run, optimizer, identity

    def write(self, saved: _Saved, best: dict[str, Tensor] | None) -> None:
        saved.run = self.identity
        tensors = {f"now.{k}": v for k, v in _state(self.run).items()} | {
            f"best.{k}": v for k, v in (best or {}).items()
        }
        tensors |= {f"memory.{k}": v for k, v in self.run.memory().items()} | {"rng": torch.get_rng_state()}
        for i, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in values.items() if v is not None}
        part = self.path.with_name(self.path.name + f".{os.getpid()}.part")
        try:
            save_file(
                {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()},
                part,
                {"fastee_fit": msgspec.json.encode(saved).decode()},
            )
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)

    def read(self, fresh: _Saved) -> tuple[_Saved, dict[str, Tensor] | None]:
        if not self.path.exists():
            return fresh, None
        try:
            with safe_open(self.path, framework="pt") as file:
                saved = msgspec.json.decode((file.metadata() or {})["fastee_fit"], type=_Saved)
                tensors = {k: file.get_tensor(k) for k in file.keys()}
        except (SafetensorError, KeyError, msgspec.DecodeError, struct.error) as error:
            raise CheckpointMismatch(
                f"checkpoint: {self.path} is not a file that fit wrote ({error}); delete it or give another path"
            ) from error
        if saved.format != FORMAT or saved.run != self.identity:
            raise CheckpointMismatch(
                f"checkpoint: {self.path} is of another run (method, epochs, lr, seed, network or fixed weights differ); delete it or give another path"
            )
        try:
            _restore(self.run, _under("now.", tensors))
            for name, value in self.run.memory().items():
                value.copy_(tensors[f"memory.{name}"])
            state = self.optimizer.state_dict()
            for key, value in _under("optimizer.", tensors).items():
                i, name = key.split(".", 1)
                state["state"].setdefault(int(i), {})[name] = value
            self.optimizer.load_state_dict(state)
            torch.set_rng_state(tensors["rng"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointMismatch(f"checkpoint: {self.path} is damaged ({error}); delete it") from error
        return saved, _under("best.", tensors) or None


def _under(head: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(head): v for k, v in tensors.items() if k.startswith(head)}

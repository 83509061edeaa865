"""Frozen, joint and distilled training: what is batched, what is descended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastee.nn import EarlyExit
from fastee.nn.batches import labelled
from fastee.nn.trace import eval_mode, logits_of
from fastee.training.features import Features
from fastee.training.loop import Run
from fastee.training.methods import Distill, Joint, weights_of


def distillation(logits: Tensor, teacher: Tensor, y: Tensor, alpha: float, temperature: float) -> Tensor:
    """Return alpha T^2 KL(softmax(teacher/T), softmax(logits/T)) + (1 - alpha) CE, meaned over the batch; the teacher gets no gradient."""
    soft = F.log_softmax(teacher.detach().float() / temperature, 1)
    kl = F.kl_div(F.log_softmax(logits.float() / temperature, 1), soft, log_target=True, reduction="batchmean")
    return alpha * temperature**2 * kl + (1 - alpha) * F.cross_entropy(logits.float(), y)


class HeadsRun(Run):
    """Heads on a fixed backbone; the loss is cross-entropy, or distillation from the logits beside the features."""

    def __init__(self, net: EarlyExit, features: Features, weights: Any, distill: Distill | None = None):
        self.net, self.features, self.distill, self.cached = net, features, distill, features.cached
        self.names = net.exit_names
        self.weights = torch.tensor(weights_of(weights, net.num_exits, "frozen" if distill is None else "distill"))
        self.modules = list(net.heads)
        self.parameters = [p for n, p in net.heads.named_parameters() if ".gate." not in n]  # a shared one stands once

    def steps(self) -> int | None:
        return self.features.steps()

    def batches(self) -> Iterator[tuple[Any, Tensor]]:
        return self.features.batches()

    def losses(self, batch: list[Tensor], y: Tensor):
        *features, teacher = batch
        logits = [head.classify(f) for head, f in zip(self.net.heads, features, strict=True)]
        d = self.distill
        each = torch.stack(
            [
                F.cross_entropy(z.float(), y) if d is None else distillation(z, teacher, y, d.alpha, d.temperature)
                for z in logits
            ]
        )
        return (each * self.weights.to(each)).sum(), each, logits

    @contextlib.contextmanager
    def mode(self):
        self.net.heads.train()
        yield


class WholeRun(Run):
    """Heads and backbone together, as the loader gives the batches."""

    def __init__(self, net: EarlyExit, loader: Any, method: Joint | Distill):
        self.net, self.loader, self.samples = net, loader, 0
        self.names = (*net.exit_names, "the backbone's end")
        self.distill = method if isinstance(method, Distill) else None
        self.weights = torch.tensor(weights_of(method.weights, net.num_exits + 1, method.name))
        self.modules: list[nn.Module] = [net]
        self.parameters = [p for n, p in net.named_parameters() if p.requires_grad and ".gate." not in n]
        if self.distill is not None and self.distill.beta:
            self._transfer = _Transfer(net, self.distill, next(iter(self.batches()))[0])
            self.modules.append(self._transfer.projections)
            self.parameters += list(self._transfer.projections.parameters())

    def steps(self) -> int | None:
        return len(self.loader) if hasattr(self.loader, "__len__") else None

    def batches(self) -> Iterator[tuple[Any, Tensor]]:
        return labelled(self.loader, self.net.num_classes, next(self.net.heads.parameters()).device)

    def losses(self, batch: Any, y: Tensor):
        d = self.distill
        if d is None:
            logits = self.net(batch)
            each = torch.stack([F.cross_entropy(z.float(), y) for z in logits])
            return (each * self.weights.to(each)).sum(), each, logits
        with self._transfer.watching() if d.beta else contextlib.nullcontext() as seen:
            logits = self.net(batch)
            teacher = logits[-1].detach() if d.teacher is None else _teach(self.net, d.teacher, batch)
        exits = [distillation(z, teacher, y, d.alpha, d.temperature) for z in logits[:-1]]
        if d.beta:
            exits = [e + d.beta * t for e, t in zip(exits, self._transfer.losses(seen), strict=True)]
        each = torch.stack([*exits, F.cross_entropy(logits[-1].float(), y)])
        return (each * self.weights.to(each)).sum(), each, logits

    @contextlib.contextmanager
    def mode(self):
        self.net.train()
        yield


def _teach(net: EarlyExit, teacher: nn.Module, batch: Any) -> Tensor:
    with eval_mode(teacher):
        return logits_of(net.inputs.call(teacher, net.inputs.flat(batch))).detach()


class _Transfer:
    """|unit(P f) - unit(f_T)|^2 between what the heads' linear layers and the teacher's last linear layer read."""

    def __init__(self, net: EarlyExit, distill: Distill, batch: Any):
        self.net, self.teacher = net, distill.teacher
        heads = {id(m) for m in net.heads.modules()}
        owner = net.backbone if distill.teacher is None else distill.teacher
        self._candidates = [m for m in owner.modules() if isinstance(m, nn.Linear) and id(m) not in heads]
        self.projections = nn.ModuleList()
        with eval_mode(net), self.watching() as seen:
            net.taps(batch)
            if self.teacher is not None:
                _teach(net, self.teacher, batch)
        if seen["teacher"] is None or seen["teacher"].ndim != 2:
            raise ValueError(
                "beta: the teacher ends in no linear layer on [B, D], so there is no feature to transfer; pass beta=0"
            )
        width = seen["teacher"].shape[1]
        self.projections.extend(nn.Linear(h.linear.in_features, width, bias=False) for h in net.heads).to(seen["teacher"].device)

    @contextlib.contextmanager
    def watching(self):
        seen: dict[Any, Tensor | None] = {"teacher": None}

        def note(key):
            def hook(module, args):
                seen[key] = args[0]

            return hook

        handles = [m.register_forward_pre_hook(note("teacher")) for m in self._candidates]
        handles += [h.linear.register_forward_pre_hook(note(k)) for k, h in enumerate(self.net.heads)]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def losses(self, seen: dict[Any, Tensor | None]) -> list[Tensor]:
        goal = F.normalize(seen["teacher"].detach().float(), dim=1)
        return [
            (F.normalize(p(seen[k].float()), dim=1) - goal).square().sum(1).mean()
            for k, p in enumerate(self.projections)
        ]

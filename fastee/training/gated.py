"""Gated training (JEI-DNN, arXiv 2310.09163): gates learn where a row should leave, heads learn from the rows that would leave there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastee.nn import EarlyExit
from fastee.nn.history import gate_features
from fastee.training.features import Features
from fastee.training.loop import Run
from fastee.training.methods import Gated

STALE = 2
MOST_WEIGHT = 5.0


def exit_probabilities(g: Tensor) -> Tensor:
    """Return P [B, K] of leaving at each exit from the gates' g [B, K]: P_m = max(0, min(g_m, 1 - sum of g before m))."""
    before = F.pad(g.cumsum(1)[:, :-1], (1, 0))
    return torch.minimum(g, 1 - before).clamp_min(0)


def best_exits(ce: Tensor, cost: Tensor, trade: float) -> Tensor:
    """Return m* [B], the exit with the least CE_m + trade * cost_m, from ce [B, K+1] and cost [K+1]; ties to the earlier."""
    return (ce + trade * cost).argmin(1)


def gate_loss(logits: Tensor, best: Tensor, weight: Tensor) -> Tensor:
    """Return the mean binary cross-entropy of gate logits [B, K] against label_m = (m >= m*), positives weighted by weight [K]."""
    label = (torch.arange(logits.shape[1], device=logits.device) >= best[:, None]).to(logits.dtype)
    loss = F.binary_cross_entropy_with_logits(logits, label, reduction="none")
    return (loss * torch.where(label > 0, weight.to(loss), 1.0)).mean()


def head_loss(p: Tensor, ce: Tensor, weighting: str) -> Tensor:
    """Return mean P_m CE_m ratio_b with ratio_b = sum CE / sum P CE (1 where that is 0), from p and ce [B, M].

    ``code`` lets the gradient pass through the ratio, so the sum and its gradient are those of the plain sum of CE; ``detached`` does not.
    """
    weighted = p * ce
    total = weighted.sum(1, keepdim=True)
    ratio = torch.where(total > 0, ce.sum(1, keepdim=True) / torch.where(total > 0, total, 1.0), 1.0)
    return (weighted * (ratio if weighting == "code" else ratio.detach())).mean()


class GatedRun(Run):
    """Warm-up of the heads, then gates and heads by turns."""

    floor = 2e-4
    cached = True

    def __init__(self, net: EarlyExit, features: Features, held_out: Features, method: Gated):
        self.net, self.features, self.held_out, self.method = net, features, held_out, method
        self.names = net.exit_names
        self.modules = list(net.heads)
        self.gates = [h.add_gate() for h in net.heads]
        self.parameters = list(net.heads.parameters())
        segments, heads = np.array(net.macs["segments"]), np.array([*net.macs["heads"], 0.0])
        whole = np.cumsum(segments + heads)
        self.cost = torch.tensor(whole / whole[-1], dtype=torch.float32, device=features.labels.device)
        k = net.num_exits
        self._turns = torch.zeros((), dtype=torch.int64)
        self._weight = torch.ones(k)
        self._best, self._stale = torch.full((k,), -1.0), torch.zeros(k, dtype=torch.int64)
        self._kept = {
            f"best{i}.{n}": v.detach().clone() for i, h in enumerate(net.heads) for n, v in h.state_dict().items()
        }
        self._warming = False

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters, lr=lr, momentum=0.9, weight_decay=5e-4)

    def epochs(self, asked: int) -> int:
        return self.method.warm_up + asked

    def memory(self) -> dict[str, Tensor]:
        return {"turns": self._turns, "weight": self._weight, "best": self._best, "stale": self._stale, **self._kept}

    def skip(self, epoch: int) -> bool:
        return epoch < self.method.warm_up and bool((self._stale >= STALE).all())

    def steps(self) -> int | None:
        return self.features.steps()

    def batches(self) -> Iterator[tuple[Any, Tensor]]:
        return self.features.batches()

    def begin(self, epoch: int) -> None:
        self._warming = epoch < self.method.warm_up

    @contextlib.contextmanager
    def mode(self):
        self.net.heads.train()
        yield

    def _logits(self, batch: list[Tensor]) -> list[Tensor]:
        return [h.classify(f).float() for h, f in zip(self.net.heads, batch, strict=False)]

    def _gate(self, logits: list[Tensor]) -> Tensor:
        return torch.cat([gate(gate_features(z)).float() for gate, z in zip(self.gates, logits, strict=True)], 1)

    @staticmethod
    def _cross_entropy(logits: list[Tensor], y: Tensor) -> Tensor:
        return torch.stack([F.cross_entropy(z, y, reduction="none") for z in logits], 1)

    def losses(self, batch: list[Tensor], y: Tensor):
        if self._warming:
            logits = self._logits(batch)
            each = self._cross_entropy(logits, y).mean(0)
            k = len(each)
            weight = torch.arange(k + 1, 1, -1, device=each.device) * (self._stale < STALE).to(each.device)
            return (each * weight).sum(), each, logits
        gates_turn = int(self._turns) // self.method.phase % 2 == 0
        self._turns += 1
        self.net.heads.train(not gates_turn)
        with torch.set_grad_enabled(not gates_turn):
            logits = self._logits(batch)
        ce = self._cross_entropy([*logits, batch[-1]], y)
        if gates_turn:
            loss = gate_loss(self._gate(logits), best_exits(ce, self.cost, self.method.trade), self._weight)
        else:
            with torch.no_grad():
                p = exit_probabilities(torch.sigmoid(self._gate(logits)))
            loss = head_loss(torch.cat([p, 1 - p.sum(1, keepdim=True)], 1), ce, self.method.weighting)
        return loss, ce[:, :-1].mean(0), logits

    def end(self, epoch: int, entry: dict[str, Any]) -> None:
        self.net.heads.eval()
        with torch.no_grad():
            logits, y = self._logits(self.held_out.columns), self.held_out.labels
            right = torch.stack([(z.argmax(1) == y).float().mean() for z in logits]).cpu()
            if self._warming:
                self._end_warm_up(epoch, right)
            best = best_exits(
                self._cross_entropy([*logits, self.held_out.columns[-1]], y), self.cost, self.method.trade
            )
            count = torch.bincount(best, minlength=len(self.gates) + 1)[:-1].float().cpu()
            self._weight.copy_(torch.clamp((len(y) - count) / count.clamp_min(0.1), max=MOST_WEIGHT))
        entry["phase"] = "warm-up" if self._warming else "gated"
        entry["held_out_accuracy"] = right.tolist()

    def _end_warm_up(self, epoch: int, right: Tensor) -> None:
        for k, head in enumerate(self.net.heads):
            if self._stale[k] >= STALE:
                continue
            if right[k] > self._best[k]:
                self._best[k], self._stale[k] = right[k], 0
                for name, value in head.state_dict().items():
                    self._kept[f"best{k}.{name}"].copy_(value)
            else:
                self._stale[k] += 1
        if epoch + 1 == self.method.warm_up or bool((self._stale >= STALE).all()):
            for k, head in enumerate(self.net.heads):
                own = {n: self._kept[f"best{k}.{n}"] for n in head.state_dict() if not n.startswith("gate.")}
                head.load_state_dict(own, strict=False)

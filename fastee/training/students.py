"""Students of one teacher: who imitates which channels (NoNN, arXiv 1907.11804), and their joint training (DistrEE, arXiv 2502.15735)."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastee.nn.batches import labelled, loader_of
from fastee.nn.students import StudentTeam
from fastee.nn.trace import eval_mode, logits_of
from fastee.training.fit import FitReport
from fastee.training.loop import Run, train
from fastee.training.runs import distillation


def teacher_features(teacher: nn.Module, layer: str, x: Any) -> tuple[Tensor, Tensor]:
    """Return (max(0, spatial mean) [B, C] of the output of submodule `layer`, logits [B, V]) of the teacher in eval mode, without gradients."""
    modules = dict(teacher.named_modules())
    if layer not in modules:
        raise ValueError(f"layer: the teacher has no submodule {layer!r}")
    seen: list[Tensor] = []
    handle = modules[layer].register_forward_hook(lambda module, args, out: seen.append(out))
    try:
        with eval_mode(teacher):
            logits = logits_of(teacher(x) if isinstance(x, Tensor) else teacher(**x) if hasattr(x, "keys") else teacher(*x))
    finally:
        handle.remove()
    if not seen or not isinstance(seen[-1], Tensor) or seen[-1].ndim not in (2, 4):
        raise ValueError(f"layer: {layer!r} gave no map [B, C, H, W] and no feature [B, C]")
    f = seen[-1] if seen[-1].ndim == 2 else seen[-1].mean((2, 3))
    return f.clamp_min(0), logits


def partition(
    features: Any, parts: int, *, top: int | None = None, percentile: float = 99.0, resolution: float = 0.7, drop_largest: bool = True,
    fallback: str = "error", seed: int = 0,
) -> list[list[int]]:  # fmt: skip
    """Divide a teacher's C channels among `parts` students by how they fire together; returns sorted channel lists, largest first.

    `features` [N, C] >= 0, one row per image. Channels i < j among the `top` of a row (default 50) are tied by f_i f_j |f_i - f_j|, f over the row's
    maximum; ties under the `percentile` of the non-zero ones are cut, Louvain communities found at `resolution`, single channels put into one
    bin. The largest bin is dropped when `drop_largest` (as the official code does); further bins than parts go to the smallest part. With fewer bins
    than parts: ``ValueError``, or with ``fallback="balanced"`` the kept channels, strongest first, dealt out in turn. A seed gives one answer.

    >>> import numpy as np
    >>> f = np.kron(np.eye(3), np.array([[1.0, 0.5]])).repeat(4, 0)            # channels 0-1, 2-3 and 4-5 fire together
    >>> partition(f, 3, percentile=0, drop_largest=False)
    [[0, 1], [2, 3], [4, 5]]
    """
    import networkx  # takes 0.2 s, and only this function needs it

    f = np.asarray(features, dtype=np.float64)
    if f.ndim != 2 or 0 in f.shape or not np.isfinite(f).all() or (f < 0).any():
        raise ValueError(f"features: expected finite numbers >= 0 [N, C], at least one row and channel, got {list(f.shape)}")
    channels = f.shape[1]
    if isinstance(parts, bool) or not isinstance(parts, int) or not 1 <= parts <= channels:
        raise ValueError(f"parts: expected an integer in 1..{channels}, got {parts!r}")
    if fallback not in ("error", "balanced"):
        raise ValueError(f"fallback: expected 'error' or 'balanced', got {fallback!r}")
    if not 0 <= percentile < 100:
        raise ValueError(f"percentile: expected a number in [0, 100), got {percentile}")
    top = min(channels, 50 if top is None else top)
    weight = np.zeros((channels, channels))
    for row in f[f.max(axis=1) > 0]:
        row = row / row.max()
        best = np.argsort(-row, kind="stable")[:top]
        v = row[best]
        weight[np.ix_(best, best)] += v[:, None] * v[None, :] * np.abs(v[:, None] - v[None, :])
    bins: list[list[int]] = []
    if weight.any():
        weight /= weight.max()
        weight[weight < np.percentile(weight[weight > 0], percentile)] = 0
        graph = networkx.from_numpy_array(weight)
        groups = [sorted(g) for g in networkx.community.louvain_communities(graph, resolution=resolution, seed=seed)]
        alone = sorted(g[0] for g in groups if len(g) == 1)
        bins = sorted([g for g in groups if len(g) > 1] + ([alone] if alone else []), key=lambda g: (-len(g), g))
    kept = bins[1:] if drop_largest else bins
    if len(kept) < parts:
        if fallback == "error":
            raise ValueError(f"parts: the channels fall into {len(kept)} groups, {parts} are needed; pass fallback='balanced', fewer parts or a lower percentile")
        order = np.argsort(-f.mean(axis=0), kind="stable")
        return [sorted(map(int, order[i::parts])) for i in range(parts)]
    out = [list(b) for b in kept[:parts]]
    for extra in kept[parts:]:
        min(out, key=len).extend(extra)
    return sorted((sorted(p) for p in out), key=lambda p: (-len(p), p))


class _TeamRun(Run):
    def __init__(self, team: StudentTeam, teacher: nn.Module, layer: str, loader: Any, weights: Sequence[float], alpha: float, t: float, beta: float):
        self.team, self.teacher, self.layer, self.loader = team, teacher, layer, loader
        self.alpha, self.temperature, self.beta, self.weights = alpha, t, beta, torch.tensor(weights)
        self.names = tuple(f"exit {m}" for m in range(team.num_exits))
        self.modules = [team]
        ends = {id(p) for s in team.students for p in (*s.heads.parameters(), *s.segment(s.num_exits).parameters())}
        self.parameters = [p for p in team.parameters() if p.requires_grad and id(p) not in ends]
        self.order = torch.tensor([c for g in team.groups for c in g])

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters, lr=lr, momentum=0.9, weight_decay=5e-4)

    def steps(self) -> int | None:
        return len(self.loader) if hasattr(self.loader, "__len__") else None

    def batches(self) -> Iterator[tuple[Any, Tensor]]:
        return labelled(self.loader, self.team.num_classes, self.team.heads[0].weight.device)

    def losses(self, batch: Any, y: Tensor):
        features, z = teacher_features(self.teacher, self.layer, batch)
        if features.shape[1] <= int(self.order.max()):
            raise ValueError(f"layer: {self.layer!r} has {features.shape[1]} channels, the students' groups name channel {int(self.order.max())}")
        goal = F.normalize(features[:, self.order.to(features.device)].float(), dim=1)
        each, outputs = [], []
        for joined, logits in self.team(batch):
            apart = (F.normalize(joined.float(), dim=1) - goal).square().sum(1).mean()
            each.append(distillation(logits, z, y, self.alpha, self.temperature) + self.beta * apart)
            outputs.append(logits)
        stacked = torch.stack(each)
        return (stacked * self.weights.to(stacked)).sum(), stacked, outputs

    @contextlib.contextmanager
    def mode(self):
        self.team.train()
        yield


def train_students(
    team: StudentTeam, teacher: nn.Module, layer: str, loader: Any, epochs: int = 9, lr: float = 0.05, *, alpha: float = 0.9,
    temperature: float = 4.0, beta: float = 1.0, weights: Sequence[float] | None = None, seed: int | None = None, progress: bool = True,
    batch_size: int = 64, checkpoint: Any = None,
) -> FitReport:  # fmt: skip
    """Train students, branches and heads of `team` together and leave it in eval mode.

    Loss: sum_m w_m (alpha T^2 KL(teacher/T, z_m/T) + (1 - alpha) CE(z_m, y) + beta |unit(F_m) - unit(F_T[P])|^2), w_m = m / sum k unless `weights` [M]. All
    exits aim at the same teacher vector, which is what makes the step between exits a measure of convergence; so ``beta=0`` is legal but
    takes the meaning from Delta (warned). `layer`: the teacher's submodule whose channels the groups name. SGD with momentum 0.9, cosine. `checkpoint` as in
    `fastee.fit`. Raises ``TrainingDiverged`` when a loss is not finite.
    """
    if not isinstance(team, StudentTeam):
        raise TypeError(f"team: expected a StudentTeam, got {type(team).__name__}")
    m = team.num_exits
    values = [2.0 * (i + 1) / (m * (m + 1)) for i in range(m)] if weights is None else [float(w) for w in weights]
    if len(values) != m or not all(0 <= w < math.inf for w in values) or not any(values):
        raise ValueError(f"weights: expected {m} numbers >= 0, not all zero, got {values}")
    for name, value, low, high in (("alpha", alpha, 0, 1), ("temperature", temperature, 1e-9, math.inf), ("beta", beta, 0, math.inf), ("lr", lr, 1e-12, math.inf)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or value == math.inf:
            raise ValueError(f"{name}: expected a finite number {'in [0, 1]' if high == 1 else '>= 0' if low == 0 else '> 0'}, got {value!r}")
    if beta == 0:
        warnings.warn("train_students: with beta=0 nothing ties the exits to one vector, so a small change between them says little", stacklevel=2)
    with torch.random.fork_rng() if seed is not None else contextlib.nullcontext():
        if seed is not None:
            torch.manual_seed(seed)
        run = _TeamRun(team, teacher, layer, loader_of(loader, batch_size=batch_size), values, alpha, temperature, beta)
        history = train(team, run, epochs, lr, progress, None, None, checkpoint, f"students;{alpha};{temperature};{beta};{values};{seed};{batch_size}")
    team.eval()
    return FitReport("students", run.names, history, sum(e["seconds"] for e in history), run.samples, False)

"""Branches of frame exits: pseudo-labels from the encoder's own last layer, one linear head per layer, nothing else is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastee.nn.batches import loader_of
from fastee.nn.frames import FrameExits
from fastee.nn.trace import eval_mode
from fastee.training.fit import FitReport
from fastee.training.loop import Run, train


def codebook(features: Tensor, clusters: int, rounds: int = 20, seed: int = 0) -> Tensor:
    """Return `clusters` centres [V, D] of features [N, D] by Lloyd's rounds from k-means++ seeds; a centre that loses all its rows stays where it was."""
    if features.ndim != 2 or len(features) < clusters:
        raise ValueError(f"features: expected at least {clusters} rows [N, D], got {list(features.shape)}")
    random = torch.Generator().manual_seed(seed)
    centres = features[int(torch.randint(len(features), (1,), generator=random))][None]
    while len(centres) < clusters:
        far = torch.cdist(features, centres).amin(1).square().cpu()
        pick = torch.multinomial(far, 1, generator=random) if float(far.sum()) > 0 else torch.randint(len(features), (1,), generator=random)
        centres = torch.cat([centres, features[pick.to(features.device)]])
    for _ in range(rounds):
        code = torch.cdist(features, centres).argmin(1)
        count = torch.bincount(code, minlength=clusters).to(features)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, code, features)
        centres = torch.where(count > 0, sums / count.clamp_min(1), centres)
    return centres


class _FrameRun(Run):
    def __init__(self, net: FrameExits, loader: Any, centres: Tensor):
        self.net, self.loader, self.centres = net, loader, centres
        self.names = tuple(f"layer {m}" for m in range(1, len(net.layers) + 1))
        self.modules = list(net.branches)
        self.parameters = list(net.branches.parameters())

    def steps(self) -> int | None:
        return len(self.loader) if hasattr(self.loader, "__len__") else None

    def batches(self) -> Iterator[tuple[Any, Tensor]]:
        device = self.net.mix.device
        for batch in self.loader:
            x, mask = (batch, None) if isinstance(batch, Tensor) else batch
            x, mask = x.to(device), None if mask is None else mask.to(device).bool()
            with eval_mode(self.net):
                hidden = self.net.hidden(x, mask)
            real = torch.ones(hidden[0].shape[:2], dtype=torch.bool, device=device) if mask is None else mask
            frames = [h[real] for h in hidden]
            yield frames, torch.cdist(frames[-1], self.centres).argmin(1)

    def losses(self, batch: list[Tensor], y: Tensor):
        logits = [branch(h) for branch, h in zip(self.net.branches, batch[1:], strict=True)]
        each = torch.stack([F.cross_entropy(z.float(), y) for z in logits])
        return each.sum(), each, logits

    @contextlib.contextmanager
    def mode(self):
        self.net.branches.train()
        yield


def train_frames(
    net: FrameExits, loader: Any, epochs: int = 3, lr: float = 0.005, *, seed: int = 0, progress: bool = True, checkpoint: Any = None
) -> FitReport:
    """Train the branches of `net` on a frozen encoder and leave it in eval mode; `loader` gives batches ``x`` or ``(x, mask [B, T])``.

    The pseudo-labels are the clusters (`codebook`, as many as the branches have outputs) of the last layer's frames of the first pass, so no labels are
    needed. `checkpoint` as in `fastee.fit`. Raises ``TrainingDiverged`` when a loss is not finite.
    """
    if not isinstance(net, FrameExits):
        raise TypeError(f"net: expected FrameExits, got {type(net).__name__}")
    loader = loader_of(loader)
    run = _FrameRun(net, loader, torch.empty(0))
    frames = []
    for batch in loader:
        x, mask = (batch, None) if isinstance(batch, Tensor) else batch
        with eval_mode(net):
            last = net.hidden(x.to(net.mix.device), None if mask is None else mask.to(net.mix.device).bool())[-1]
        frames.append(last.flatten(0, 1) if mask is None else last[mask.to(last.device).bool()])
    if not frames:
        raise ValueError("loader: it gave no batch")
    run.centres = codebook(torch.cat(frames), net.branches[0][-1].out_features, seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        history = train(net, run, epochs, lr, progress, None, None, checkpoint, f"frames;{seed}")
    net.eval()
    return FitReport("frames", run.names, history, sum(e["seconds"] for e in history), run.samples, False)

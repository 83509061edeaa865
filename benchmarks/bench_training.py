"""Heads trained on features that are kept, and thresholds with a guarantee: seconds of the user's time, on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter_ns

import numpy as np
import torch
from torch import nn

import fastee
from benchmarks.bench_search import EXITS, ROWS, heads, scored
from fastee.testing.bench import Case, Context, Group

IMAGES, WIDTH, TAPS, EPOCHS = 50_000, 64, 6, 3  # CIFAR-10's training images; at most 64 channels behind a block of ResNet-56; six exits


class Rest(nn.Module):
    """Drop the first of the features [B, T, D]: a backbone that has run already."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 1:]


def fitted(features: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the ns of fitting two-layer heads to kept features, from the features' first batch on."""
    body = nn.Sequential(nn.Identity(), *(Rest() for _ in range(TAPS)), nn.Flatten(), nn.Linear(WIDTH, 10))
    net = fastee.attach(body, [str(i) for i in range(TAPS)], 10, features[:2], pool="cls", head="two_layer")
    batches = list(zip(features.split(250), labels.split(250), strict=True))
    began = perf_counter_ns()
    fastee.fit(net, batches, epochs=EPOCHS, seed=0, progress=False)
    return perf_counter_ns() - began


def cases(ctx: Context) -> Iterator[Group]:
    logits, targets, cost = heads(ctx.seed)
    score, right = scored(logits, targets)
    promised = lambda guarantee: lambda: fastee.calibration.thresholds(score, right, cost, 0.01, 0.95, guarantee=guarantee)
    yield Group("calibrate", f"{ROWS} x {EXITS}", "fp32", [
        Case("fastee", promised("ltt"), note="ltt: exact trinomial tail, 100 steps tested"), Case("hoeffding_bentkus", promised("hoeffding_bentkus")),
    ], baseline="hoeffding_bentkus", bars=("<= 100 ms",))  # fmt: skip

    rows = 2000 if ctx.quick else IMAGES
    features, labels = torch.randn(rows, TAPS + 1, WIDTH, generator=torch.Generator().manual_seed(ctx.seed)), torch.from_numpy(np.arange(rows) % 10)
    yield Group("fit_heads", f"{rows} x {TAPS} x {WIDTH}", "fp32", [
        Case("fastee", None, times=[fitted(features, labels) for _ in range(3)], note=f"two-layer heads, {EPOCHS} epochs"),
    ], baseline="fastee", bars=("<= 180000 ms",))  # fmt: skip

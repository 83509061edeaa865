"""DAISY (Interspeech 2024, arXiv 2406.05464): clean sequences leave early, noisy ones late.

Synthetic tones with noise at 20, 10, 5, 0, -5 dB, a small fixed transformer with k-means codes. Verdict rule: *reproduced* (direction) when the mean exit layer
rises at every step of falling SNR in the mean over seeds and the rank correlation is at most -0.9 in each seed; *direction only*: at most -0.9 in the mean.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from benchmarks.papers.common import Row, mean_and_error
from fastee.nn import FrameExits
from fastee.ops import mean_entropy
from fastee.training import train_frames

TITLE = "DAISY: exit depth against noise"
PUBLISHED = "direction only: early on clean, late on noisy speech"
SEEDS = 5
SNR = (20.0, 10.0, 5.0, 0.0, -5.0)
FRAMES, TONES, LAYERS, WIDTH = 40, 8, 6, 64


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, batch_first=True, norm_first=True)

    def forward(self, h):
        return self.layer(h)


def sequences(rows: int, snr: float, seed: int) -> torch.Tensor:
    """Return [rows, FRAMES, 32] windows of tones that change every 5 frames, with white noise at that signal-to-noise ratio in dB."""
    g = torch.Generator().manual_seed(seed)
    tone = torch.randint(0, TONES, (rows, FRAMES // 5), generator=g).repeat_interleave(5, 1)
    time = torch.arange(FRAMES * 32).view(1, FRAMES, 32) / 32
    wave = math.sqrt(2) * torch.sin(2 * math.pi * (tone[..., None] + 1) * time + 6.28 * torch.rand(rows, 1, 1, generator=g))
    return wave + 10 ** (-snr / 20) * torch.randn(rows, FRAMES, 32, generator=g)


def run(seed: int, quick: bool, console) -> list[Row]:
    size, epochs, rows_each = ("quick", 4, 60) if quick else ("full", 12, 300)
    torch.manual_seed(seed)
    net = FrameExits(nn.Linear(32, WIDTH), [Encoder() for _ in range(LAYERS)], WIDTH, 16).eval()
    # The encoder is given a task (which tone, from noisy frames) so that its depth means something; then it stays fixed.
    task = nn.Linear(WIDTH, TONES)
    optimizer = torch.optim.AdamW([*net.stem.parameters(), *net.layers.parameters(), *task.parameters()], lr=0.001)
    for step in range(150 if quick else 600):
        g = torch.Generator().manual_seed(1000 * seed + step)
        tone = torch.randint(0, TONES, (16, FRAMES // 5), generator=g).repeat_interleave(5, 1)
        time = torch.arange(FRAMES * 32).view(1, FRAMES, 32) / 32
        noise = 10 ** (-(25 * torch.rand(16, 1, 1, generator=g) - 5) / 20)
        x = math.sqrt(2) * torch.sin(2 * math.pi * (tone[..., None] + 1) * time) + noise * torch.randn(16, FRAMES, 32, generator=g)
        optimizer.zero_grad()
        nn.functional.cross_entropy(task(net.hidden(x)[-1]).flatten(0, 1), tone.flatten()).backward()
        optimizer.step()
    for p in net.parameters():
        p.requires_grad_(False)
    for p in net.branches.parameters():
        p.requires_grad_(True)
    train = [sequences(rows_each, s, 10_000 + 100 * seed + i) for i, s in enumerate(SNR)]
    train_frames(net, train, epochs=epochs, seed=seed, progress=False)
    with torch.no_grad():
        # The threshold is the one that lets half of the training inputs leave before the middle.
        middle = torch.cat([mean_entropy(net.branches[LAYERS // 2 - 1](net.hidden(x)[LAYERS // 2])) for x in train])
    net.set_rule(float(middle.median()), range="min-max", batch_mode="per_sample")
    net.collect = True
    for x in train:
        net(x)
    net.collect = False
    rows = []
    for i, s in enumerate(SNR):
        out = net(sequences(rows_each, s, 20_000 + 100 * seed + i))
        depth = float(out.exit.float().mean())
        rows.append(Row("daisy", size, seed, "DAISY, per sample", "official code", None, depth / LAYERS, s, {"exit_layer": depth}))
        console.print(f"daisy seed {seed} SNR {s:+.0f} dB: mean exit layer {depth:.2f} of {LAYERS}")
    return rows


def verdict(rows: list[Row]) -> tuple[str, str]:
    seeds = sorted({r.seed for r in rows})
    depth = np.array([[next(r.extra["exit_layer"] for r in rows if r.seed == s and r.point == snr) for snr in SNR] for s in seeds])
    mean = depth.mean(axis=0)
    correlation = [float(np.corrcoef(np.argsort(np.argsort(d)), np.argsort(np.argsort(SNR)))[0, 1]) for d in depth]
    said = "mean exit layer " + ", ".join(f"{m:.2f} at {s:+.0f} dB" for m, s in zip(mean, SNR, strict=True))
    said += f"; rank correlation with the SNR {mean_and_error(correlation)[0]:.2f}, worst seed {max(correlation):.2f}"
    if (np.diff(mean) > 0).all() and max(correlation) <= -0.9:
        return "reproduced", said
    return ("direction only" if mean_and_error(correlation)[0] <= -0.9 else "not reproduced"), said

"""Hierarchical training (TNNLS 2024, arXiv 2303.02384): edge and cloud train in parallel around an early exit.

Verdict rule: *reproduced* (direction) when in the mean over seeds the runtime lies below full cloud at the lowest rate, the gain falls as the rate rises, and
the cloud's accuracy is within 1 point of end-to-end training. Step times are measured on this machine, the edge declared 4x slower; the link is a virtual clock.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch.utils.data import DataLoader, TensorDataset

import fastee
from benchmarks.papers.common import Row, images, mean_and_error
from fastee.training import CutTimes, choose_cut, cut_times, train_hierarchical

TITLE = "Hierarchical training: an exit on the edge instead of gradients back"
PUBLISHED = "-29 % (VGG-16), -61 % (ResNet-18) runtime on CIFAR-10 at a low bit rate"
SEEDS = 3
RATES = (1e6, 4e6, 16e6, 64e6)
DELAY, SLOWER = 0.01, 4.0
OURS, CLOUD, SPLIT = "hierarchical, best cut (reconstructed)", "full cloud", "split learning, gradients back"


def run(seed: int, quick: bool, console) -> list[Row]:
    from fastee.data.networks import SmallResNet

    size, epochs = ("quick", 6) if quick else ("full", 25)
    (x, y), (tx, ty) = images("train"), images("test")
    loader = lambda: DataLoader(TensorDataset(x, y), 100, shuffle=True, generator=torch.Generator().manual_seed(seed))

    def fresh():
        torch.manual_seed(seed)
        return fastee.attach(SmallResNet((8, 16, 32, 32), (1, 1, 1, 1)), ["stem", "stage1", "stage2", "stage3"], 10, x[:2])

    def accuracy(net):
        net.eval()
        with torch.no_grad():
            return float(torch.cat([(net.full(a).argmax(1) == b) for a, b in zip(tx.split(500), ty.split(500), strict=True)]).float().mean())

    whole = fresh()
    fastee.fit(whole, loader(), "joint", epochs=epochs, lr=0.005, weights=[0, 0, 0, 0, 1], seed=seed, progress=False)
    reference = accuracy(whole)
    rows, found, times = [Row("hierarchical", size, seed, "end to end", "baseline", reference, 1.0)], [], []
    for cut in range(4):
        net = fresh()
        train_hierarchical(net, loader(), cut, epochs=epochs, lr=0.005, seed=seed)
        found.append(accuracy(net))
        t = cut_times(copy.deepcopy(net), x[:100], y[:100], cut, repeats=7)
        edge = {k: getattr(t, k) * SLOWER for k in ("edge_forward", "edge_exit", "edge_backward")}
        times.append(dataclasses.replace(t, **edge))
        console.print(f"hierarchical seed {seed} cut {cut}: cloud accuracy {found[-1]:.4f}, end to end {reference:.4f}")
    raw = x[:100].numel() * 4 + 100 * 8
    one = times[0]
    all_cloud = CutTimes(0, 0, 0, one.cloud_forward + one.edge_forward / SLOWER, one.cloud_backward + one.edge_backward / SLOWER, raw)
    for rate in RATES:
        reference_time = all_cloud.step(rate, DELAY)
        best = choose_cut(times, found, rate, DELAY, tol=0.01, pipelined=False)
        for method, provenance, cut, seconds in (
            (OURS, "reconstructed", best, times[best].step(rate, DELAY)),
            (SPLIT, "baseline", best, times[best].returned_gradients(rate, DELAY)),
            (CLOUD, "baseline", -1, reference_time),
        ):
            right = found[cut] if method == OURS else reference
            rows.append(Row("hierarchical", size, seed, method, provenance, right, seconds / reference_time, rate, {"seconds": seconds, "cut": cut}))
    return rows


def verdict(rows: list[Row]) -> tuple[str, str]:
    seeds = sorted({r.seed for r in rows})
    mine = {(r.seed, r.point): r for r in rows if r.method == OURS}
    reference = {r.seed: r.accuracy for r in rows if r.method == "end to end"}
    cost = [mean_and_error([mine[s, rate].cost for s in seeds])[0] for rate in RATES]
    drop = mean_and_error([reference[s] - min(mine[s, rate].accuracy for rate in RATES) for s in seeds])
    said = "runtime relative to full cloud " + ", ".join(f"{c:.2f} at {r / 1e6:g} Mbit/s" for c, r in zip(cost, RATES, strict=True))
    said += f"; accuracy {-100 * drop[0]:+.2f} ± {100 * drop[1]:.2f} points against end to end"
    falls = all(b >= a - 1e-9 for a, b in zip(cost, cost[1:], strict=False))
    if cost[0] < 1 and falls and drop[0] <= 0.01:
        return "reproduced", said
    return ("direction only" if cost[0] < 1 and falls else "not reproduced"), said

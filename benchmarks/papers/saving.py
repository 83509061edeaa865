"""Seconds and multiply-adds that calibrated exits save on real networks, a sample at a time and 32 at a time.

Thresholds are chosen on validation rows for a loss of at most 0.5 points (*guaranteed*: with confidence 0.95; *searched*: on those rows) and judged on the test rows:
``accuracy`` and, per row of the table, ``cost``: of "multiply-adds" the mean up to the exit taken, heads included; of "seconds" the time of the network with exits over
that of the backbone alone, one thread, batch by batch interleaved, both of them whole: embeddings, exits, gathering of the rows that stay. ``point`` is the batch.
*full*: MiniLM of 6 layers on SST-2, fine-tuned with its exits, timed on sentences of 9 word pieces (the median is 10), so that no row is padded; ResNet-56 on
CIFAR-10 (as JPEG), fine-tuned, then one exit at the image whose branch is the given ResNet-20, a cascade: thresholds from 10,000 images held out of the training folder, judged on the 5,000 of
the test folder. *quick*: the demo network on images.

Verdict rule: *reproduced* when the searched thresholds save at least 35 % of the seconds at batch 1 and at batch 32 (CIFAR-10: 45 % of the multiply-adds) and lose at
most 0.5 points on the test rows; *direction only* when they save any at that loss.
"""

from __future__ import annotations

import time

import numpy as np
import torch

import fastee
from benchmarks.papers import real
from benchmarks.papers.common import Row, batches, images, paired_interval

TITLE = "What exits save in seconds"
PUBLISHED = "our own claim"
NOTE = real.SST2_NOTE
SEEDS = 1
COST = "cost % of the backbone alone (seconds at batch `point`, or multiply-adds)"
MAX_DROP, CONFIDENCE = 0.005, 0.95
BATCHES = {1: 300, 32: 24}  # how many of each are timed
SEARCHED, GUARANTEED = "searched", "guaranteed"


def run(seed: int, quick: bool, console) -> list[Row]:
    if quick:
        net = fastee.attach(fastee.data.demo_network(), ["stage1", "stage2", "stage3"], 10, images("test")[0][:2])
        fastee.fit(net, batches(*images("train")), epochs=3, seed=seed, progress=False)
        val, test = (real.listen(net, batches(*images(s))) for s in ("val", "test"))
        return judged("quick", seed, net, val, test, lambda size: batches(*images("test"), size), console)
    ids, y = real.sentences("sst2-test")
    those = [i for i, tokens in enumerate(ids) if len(tokens) == real.PIECES]
    some = lambda size: real.Sentences([ids[i] for i in those], y[those], size, share=1.0)
    rows = judged("full, SST-2", seed, real.network("sst2", seed), *(real.said("sst2", seed, s) for s in ("sst2-val", "sst2-test")), some, console)
    said, pictures = real.said("cifar10-branch", seed, "cifar10"), real.cifar10()
    held, test = np.split(np.arange(len(said.y)), [real.CIFAR_VAL])
    some = lambda size: real.Images(*(pictures[k][-len(test) :] for k in "xy"), size)
    return rows + judged("full, CIFAR-10", seed, real.network("cifar10-branch", seed), said.take(held), said.take(test), some, console)


def judged(size: str, seed: int, net: fastee.EarlyExit, val: real.Said, test: real.Said, some, console) -> list[Row]:
    """Return the rows of a network: `val` chooses its thresholds, `test` judges them, ``some(batch)`` gives the batches that are timed."""
    full, rows = test.right[:, -1], [Row("saving", size, seed, "backbone alone", "baseline", float(test.right[:, -1].mean()), 1.0)]
    for method, confidence in ((SEARCHED, None), (GUARANTEED, CONFIDENCE)):
        found = fastee.calibration.thresholds(val.stats("max_prob")[:, :-1], val.right, val.cost, MAX_DROP, confidence)
        at = fastee.calibration.search.exits_of(test.stats("max_prob")[:, :-1], np.array(found.thresholds))
        right = test.right[np.arange(len(at)), at]
        low, high = paired_interval(right.astype(float) - full, seed)
        extra = {"low": low, "high": high, "rows": len(at)}
        rows.append(Row("saving", size, seed, f"{method}, multiply-adds", "ours", float(right.mean()), float(test.cost[at].mean()), None, extra))
        net.set_rule("max_prob", found.thresholds)
        for batch, count in BATCHES.items():
            ours, alone = seconds(net, some(batch), count, seed)
            rows.append(Row("saving", size, seed, f"{method}, seconds", "ours", float(right.mean()), ours / alone, batch, {**extra, "seconds": ours, "alone": alone}))
    for r in rows:
        console.print(f"saving {size} {r.method} {r.point or ''}: accuracy {r.accuracy:.4f}, cost {r.cost:.3f}")
    return rows


def seconds(net: fastee.EarlyExit, loader, count: int, seed: int) -> tuple[float, float]:
    """Return the seconds of `count` batches through the network with exits and through its backbone alone: per batch the better of two turns each, by turns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    best: list[list[float]] = []
    try:
        with torch.no_grad():
            for i, (x, _) in enumerate(loader):
                if i == count + 3:
                    break
                took = [np.inf, np.inf]
                for _ in range(2):
                    for j, call in enumerate((net, net.full)):
                        began = time.perf_counter()
                        call(x)
                        took[j] = min(took[j], time.perf_counter() - began)
                best.append(took)
    finally:
        torch.set_num_threads(threads)
    ours, alone = np.sum(best[3:], axis=0)  # the first batches warm up
    return float(ours), float(alone)


def verdict(rows: list[Row]) -> tuple[str, str]:
    seeds = sorted({r.seed for r in rows})
    mean = lambda method, point, value: float(np.mean([value(r) for r in rows if r.method == method and r.point == point and r.seed in seeds]))
    said, costs = [], {}
    for method in (SEARCHED, GUARANTEED):
        drop = np.mean([r.accuracy for r in rows if r.method == "backbone alone"]) - mean(f"{method}, multiply-adds", None, lambda r: r.accuracy)
        costs[method] = [mean(f"{method}, seconds", b, lambda r: r.cost) for b in BATCHES], drop
        saved = ", ".join(f"{100 * (1 - c):.1f} % of the seconds at batch {b}" for b, c in zip(BATCHES, costs[method][0], strict=True))
        macs = 1 - mean(f"{method}, multiply-adds", None, lambda r: r.cost)
        said.append(f"{method}: {saved}, {100 * macs:.1f} % of the multiply-adds, {100 * drop:.2f} points lost")
    spent, drop = costs[SEARCHED]
    if rows[0].size.endswith("CIFAR-10"):
        macs = mean(f"{SEARCHED}, multiply-adds", None, lambda r: r.cost)
        reached = "reproduced" if macs <= 0.55 else "direction only" if macs < 1 else "not reproduced"
    else:
        reached = "reproduced" if max(spent) <= 0.65 else "direction only" if max(spent) < 1 else "not reproduced"
    return reached if drop <= MAX_DROP else "not reproduced", "; ".join(said)

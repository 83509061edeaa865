"""MDI-Exit (arXiv 2408.05247, reconstructed): segments spread over workers that decide from queues, on the confidences of a real network.

Five segments of a residual network, on average 10 ms each in proportion to their multiply-adds, on one, two, three or five equal workers linked at 50 Mbit/s; activations
travel as the int8 code of an autoencoder with a quarter of the channels, trained per cut on the fixed network (MSE and the cross-entropy of what follows), and
the confidences are those after every cut was coded. One worker is the source. Saturated: four times what the workers can do without exits is offered, the source admits
what its queue of 100 holds, counted from a fifth of the arrivals on to the last; ``cost`` is the throughput of the same system without exits over this one's, ``accuracy`` counts what was answered. At fixed rate: 1.25
times the capacity without exits is offered and what is refused counts as wrong; ``point`` is then that factor.

Verdict rule: (R1) with one threshold chosen on validation rows such that accuracy lies within 1 point of no exits, throughput is at least 1.1 times that without exits in
every topology; (R2) at fixed rates the threshold-adapting source answers more samples rightly than the system without exits. *reproduced*: both; *direction only*: one.
"""

from __future__ import annotations

import functools
import math
import warnings

import msgspec
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import fastee
from benchmarks.papers.common import Row, batches, images, mean_and_error, trained_network
from fastee.calibration.search import exits_of
from fastee.simulation import DifficultyTrace, Spec

TITLE = "MDI-Exit: workers decide from their queues"
PUBLISHED = "more data at fixed accuracy, higher accuracy at fixed rate (no number in the abstract)"
COST = "cost % (throughput without exits over this one's)"
SEEDS = 10
TOPOLOGIES = {"local": (1, None), "2 nodes": (2, "all"), "3 mesh": (3, "all"), "3 ring": (3, "ring"), "5 mesh": (5, "all")}
LINK, SEGMENT, TOLERANCE, OFFERED, FIXED = "50mbit 1ms", 0.010, 0.01, 4.0, 1.25
TASKS = {True: 4000, False: 40_000}
NONE, SHIPPED, MDI, ADAPTED, OURS, PLACED = (
    "no exits", "whole network everywhere, input shipped", "MDI-Exit (reconstructed)", "MDI-Exit, T_e adapts (reconstructed)", "fastee: thresholds searched per exit",
    "fastee: the same under its own placement",
)  # fmt: skip


class Code(nn.Module):
    """An autoencoder of one cut: 1x1 convolutions to a quarter of the channels and back, the code in int8 with a scale per row."""

    def __init__(self, channels: int):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.down(x)
        scale = z.detach().abs().amax((1, 2, 3), keepdim=True) / 127 + 1e-12
        return self.up(z + ((z / scale).round() * scale - z).detach())  # the gradient passes through the rounding


@functools.cache
def recorded(quick: bool) -> tuple[DifficultyTrace, DifficultyTrace, list[float], list[float], list[float]]:
    """Return the traces of the validation and the test rows, the share of the multiply-adds per segment, bytes per cut, and how accurate each exit is without codes."""
    net = trained_network(0)
    train = batches(*images("train"))
    fastee.fit(net, train, epochs=6 if quick else 20, seed=0, progress=False)
    with torch.no_grad():
        carry, shapes = (images("train")[0][:1],), []
        for i in range(net.num_exits):
            carry = net.run_segment(i, carry)
            shapes.append(carry[0].shape[1:])
    torch.manual_seed(0)
    codes = nn.ModuleList(Code(s[0]) for s in shapes)
    optimizer = torch.optim.Adam(codes.parameters(), lr=0.01)
    for p in net.parameters():
        p.requires_grad_(False)
    for _ in range(2 if quick else 6):
        for x, y in train:
            carry, loss = (x,), 0.0
            for i, code in enumerate(codes):
                carry = net.run_segment(i, carry)
                coded = code(carry[0])
                loss = loss + F.mse_loss(coded, carry[0]) / carry[0].var()
                carry = (coded, *carry[1:])
                after = net.run_segment(i + 1, carry)[0]
                loss = loss + F.cross_entropy(net.heads[i + 1](after) if i + 1 < net.num_exits else after, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    plain = fastee.calibration.collect(net, batches(*images("test")))
    traces = []
    for split in ("val", "test"):
        score, right = [], []
        with torch.no_grad():
            for x, y in batches(*images(split)):
                carry, scores, rights = (x,), [], []
                for i, code in enumerate(codes):
                    carry = net.run_segment(i, carry)
                    step = net.exit_step(i, carry)
                    scores.append(step.confidence.double())
                    rights.append(step.label == y)
                    carry = (code(carry[0]), *carry[1:])
                rights.append(net.run_segment(net.num_exits, carry)[0].argmax(1) == y)
                score.append(torch.stack(scores, 1))
                right.append(torch.stack(rights, 1))
        traces.append(DifficultyTrace(torch.cat(score).numpy(), torch.cat(right).numpy()))
    macs = np.array(net.macs["segments"]) + [*net.macs["heads"], 0.0]
    sizes = [28.0 * 28.0, *(s.numel() / 4 + 4.0 for s in shapes)]
    return traces[0], traces[1], (macs / macs.sum()).tolist(), sizes, (plain[1] == plain[2][:, None]).mean(0).tolist()


def world(topology: str, shares: list[float], sizes: list[float], factor: float, tasks: int, seed: int) -> Spec:
    """Return the spec of a topology where `factor` times what its workers can do without exits is offered at the first of them."""
    n, pattern = TOPOLOGIES[topology]
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)] if pattern == "all" else [(i, (i + 1) % n) for i in range(n)] if pattern else []
    links = [{"source": f"n{i}", "target": f"n{j}", "link": LINK, "both": pattern == "all"} for i, j in pairs]
    if pattern == "ring":  # one way round; answers come back on a link too slow for anything else
        links += [{"source": f"n{j}", "target": f"n{i}", "link": "100kbit 1ms", "both": False} for i, j in pairs]
    fields = {
        "network": {"seconds": [len(shares) * SEGMENT * s for s in shares], "wire_bytes": [[b] for b in sizes]},
        "machines": [{"name": f"n{i}"} for i in range(n)], "connections": links, "tasks": tasks, "seed": seed, "timeout": 600.0,
        "arrivals": [{"sources": ["n0"], "rate": factor * n / (len(shares) * SEGMENT)}],
    }  # fmt: skip
    return msgspec.convert(fields, Spec)


def shared(trace: DifficultyTrace, cost: np.ndarray) -> float:
    """Return the cheapest single threshold whose accuracy on these rows is within the tolerance of the end's."""
    best, k = (math.inf, math.inf), trace.num_exits
    for theta in np.unique(np.quantile(trace.confidence, np.linspace(0, 1, 201))):
        at = exits_of(trace.confidence, np.full(k, theta))
        if trace.correct[:, -1].mean() - trace.correct[np.arange(len(at)), at].mean() <= TOLERANCE:
            best = min(best, (float(cost[at].mean()), float(theta)))
    return best[1]


def run(seed: int, quick: bool, console) -> list[Row]:
    size = "quick" if quick else "full"
    val, test, shares, sizes, plain = recorded(quick)
    cost = np.cumsum(shares)
    theta = shared(val, cost)
    found = fastee.calibration.thresholds(val.confidence, val.correct, cost, TOLERANCE, None).thresholds
    whole = DifficultyTrace(np.zeros((len(test.correct), 0)), test.correct[:, -1:])
    off = [math.inf] * val.num_exits
    ways = {  # provenance, trace, thresholds, policy, params
        NONE: ("baseline", test, off, "mdi_exit", {}),
        SHIPPED: ("baseline", whole, [], "mdi_exit", {}),
        MDI: ("reconstructed", test, [theta] * val.num_exits, "mdi_exit", {}),
        OURS: ("ours", test, found, "mdi_exit", {}),
        PLACED: ("ours", test, found, "deadline", {}),
        ADAPTED: ("reconstructed", test, [theta] * val.num_exits, "mdi_exit", {"adapt": "threshold"}),
    }
    rows = []
    for topology in TOPOLOGIES:
        for factor in (OFFERED, FIXED):
            base = math.nan
            for way, (provenance, trace, thresholds, policy, params) in ways.items():
                if way is SHIPPED:
                    spec = world(topology, [1.0], sizes[:1], factor, TASKS[quick], seed)
                    spec = msgspec.structs.replace(spec, network=msgspec.structs.replace(spec.network, seconds=[len(shares) * SEGMENT]),
                                                   arrivals=world(topology, shares, sizes, factor, 1, seed).arrivals)  # fmt: skip
                else:
                    spec = world(topology, shares, sizes, factor, TASKS[quick], seed)
                params = {**params, "q_max": 100} if policy == "mdi_exit" else params
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    result = fastee.simulate(spec, trace, policy, thresholds=thresholds, params=params)
                result.check()
                s = result.summary()
                done, end = result.arrival + result.latency, result.arrival[-1]
                rate = float(((done > 0.2 * end) & (done <= end)).sum() / (0.8 * end))  # neither the start nor the rest in the queues
                base = rate if way is NONE else base
                extra = {"per_second": rate, "answered": s["answered"], "useful": s["useful"], "bytes": s["mean_bytes"]}
                accuracy = s["accuracy"] if factor == OFFERED else s["useful"]
                rows.append(Row("mdi_exit", size, seed, f"{way}, {topology}", provenance, accuracy, base / rate, None if factor == OFFERED else factor, extra))
        mine = {r.method: r for r in rows if r.point is None}
        console.print(f"mdi_exit seed {seed} {topology}: " + "; ".join(f"{w} {mine[f'{w}, {topology}'].extra['per_second']:.1f}/s" for w in ways))
    rows[0].extra |= {f"without codes {k}": a for k, a in enumerate(plain)}
    return rows


def verdict(rows: list[Row]) -> tuple[str, str]:
    def mean(way: str, topology: str, point: float | None, value) -> float:
        return mean_and_error([value(r) for r in rows if r.method == f"{way}, {topology}" and r.point == point])[0]

    said, first, second = [], True, True
    for topology in TOPOLOGIES:
        at = {w: mean(w, topology, None, lambda r: r.extra["per_second"]) for w in (NONE, SHIPPED, MDI, OURS, PLACED)}
        drop = mean(NONE, topology, None, lambda r: r.accuracy) - mean(MDI, topology, None, lambda r: r.accuracy)
        first &= at[MDI] >= 1.1 * at[NONE] and drop <= TOLERANCE
        right = {w: mean(w, topology, FIXED, lambda r: r.extra["useful"]) for w in (NONE, ADAPTED)}
        second &= right[ADAPTED] > right[NONE]
        said.append(
            f"{topology}: {at[NONE]:.1f} a second without exits, {at[SHIPPED]:.1f} shipped whole, {at[MDI]:.1f} MDI-Exit ({100 * drop:+.2f} points lost), {at[OURS]:.1f} with our"
            f" thresholds, {at[PLACED]:.1f} with our placement too; at {FIXED} times the capacity {100 * right[NONE]:.1f} % right without exits, {100 * right[ADAPTED]:.1f} % adapting"
        )
    return "reproduced" if first and second else "direction only" if first or second else "not reproduced", "; ".join(said)

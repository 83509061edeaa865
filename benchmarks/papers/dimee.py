"""DIMEE (arXiv 2410.05338): three tiers, a sample starts on the one that its difficulty pool names, against rules that need no pools.

Mobile, edge and cloud run the layers up to 2, 4 and 6 of a MiniLM; a layer costs 0.2, so that all six cost what twelve do in the paper, hops 0.3 and 0.5. Pools, alpha
and every other rule's number are chosen on the validation rows for a loss of at most 0.3 points, the test rows are read once. SplitEE learns on the test
stream itself, in its order, as it would live. ``cost`` is relative to sending every sample to the cloud.

Verdict rule: *reproduced* when the pools' mean cost is at least 40 % below all-cloud, their mean drop at most 0.3 points with every seed's paired 95 % interval below
0.6, and their cost is below that of the cascade, random pools and the majority pool at equal accuracy; *direction only* when only the last clause fails ("the
cascade suffices").
"""

from __future__ import annotations

import functools
import math

import numpy as np

import fastee
from benchmarks.papers import real
from benchmarks.papers.common import (
    Row,
    batches,
    images,
    mean_and_error,
    paired_interval,
    trained_network,
)
from fastee.calibration import dimee
from fastee.calibration.search import exits_of

TITLE = "DIMEE: difficulty pools choose the tier"
PUBLISHED = "cost more than 43 % below all-cloud at a drop below 0.3 points (GLUE)"
COST = "cost % of all-cloud"
NOTE = real.SST2_NOTE
SEEDS = 3
LAYERS, LAYER_COST, HOPS = (2, 4, 6), 0.2, (0.3, 0.5, 0.5)
CLOUD = HOPS[1] + LAYER_COST * LAYERS[2]
TOLERANCE, CONFIDENCE = 0.003, 0.95
ALPHAS = np.linspace(0.5, 1.0, 101)[1:-1]
POOLS, CASCADE, RANDOM, MAJORITY = "pools by embedding distance (reconstructed)", "confidence cascade", "random pools", "majority pool"
OURS, FREE, STRICT = "fastee: guaranteed for 0.3 points", "fastee: searched for 0.3 points", "fastee: guaranteed for 0.1 points"


def populations(task: str, seed: int) -> tuple[real.Said, real.Said]:
    """Return what the exits said about the rows that choose and about those that judge."""
    if task == "SST-2":
        return real.said("sst2", seed, "sst2-val"), real.said("sst2", seed, "sst2-test")
    net = trained_network(seed, blocks=(2, 1, 1, 1), exits=["stem", "stage1.0", "stage1.1", "stage2", "stage3"])
    fastee.fit(net, batches(*images("train")), epochs=6, seed=seed, progress=False)
    val, test = (real.listen(net, batches(*images(s))) for s in ("val", "test"))
    return val, test


def layered() -> np.ndarray:
    """Return the cost [6] of a sample that climbs from the mobile and leaves after layer 1..6."""
    climbed = [0.0 if i <= LAYERS[0] else HOPS[0] if i <= LAYERS[1] else HOPS[0] + HOPS[2] for i in range(1, LAYERS[2] + 1)]
    return np.array(climbed) + LAYER_COST * np.arange(1, LAYERS[2] + 1)


def tiered(said: real.Said, pool: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Return (right [N], cost [N]) of samples that start in these pools and leave at the first tier that is sure."""
    confidence = said.stats("max_prob")[:, [i - 1 for i in LAYERS]]
    tier = dimee.last_tier(pool, confidence, alpha)
    return said.right[np.arange(len(tier)), np.array(LAYERS)[tier] - 1], dimee.path_cost(pool, tier, LAYERS, LAYER_COST, HOPS)


def shared(score: np.ndarray, right: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Return the cheapest shared threshold (as [K]) whose loss on these rows is within the tolerance."""
    k, best = score.shape[1], (math.inf, math.inf)
    for theta in np.unique(np.quantile(score, np.linspace(0, 1, 201))):
        at = exits_of(score, np.full(k, theta))
        if right[:, -1].mean() - right[np.arange(len(at)), at].mean() <= TOLERANCE:
            best = min(best, (float(cost[at].mean()), float(theta)))
    return np.full(k, best[1])


def patience(label: np.ndarray) -> np.ndarray:
    """Return how many layers in a row have agreed before each of the first K of [N, K + 1]."""
    run = np.zeros(label.shape)
    for m in range(1, label.shape[1]):
        run[:, m] = np.where(label[:, m] == label[:, m - 1], run[:, m - 1] + 1, 0)
    return run[:, :-1]


def splitee(said: real.Said, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Return (right [N], cost [N]) of the bandit (UCB1, one arm per layer) on the rows in their order; an offloaded row is run to the end by the cloud."""
    confidence, right = said.stats("max_prob"), said.right
    n, arms = confidence.shape
    offload, layer = HOPS[1], LAYER_COST * np.arange(1, arms + 1)
    plays, total = np.zeros(arms), np.zeros(arms)
    hit, cost = np.empty(n, bool), np.empty(n)
    for t in range(n):
        arm = t if t < arms else int(np.argmax(total / plays + np.sqrt(math.log(t + 1) / plays)))
        stays = confidence[t, arm] >= alpha or arm == arms - 1
        total[arm] += confidence[t, arm] - layer[arm] if stays else confidence[t, -1] - offload - layer[arm]
        plays[arm] += 1
        hit[t] = right[t, arm if stays else -1]
        cost[t] = layer[arm] if stays else offload + layer[-1]
    return hit, cost


def run(seed: int, quick: bool, console) -> list[Row]:
    rows = []
    for task in ("quick",) if quick else ("SST-2",):
        rows += judged(task if quick else f"full, {task}", seed, *populations(task, seed))
    for r in rows:
        if "curve" not in r.method:
            console.print(f"dimee seed {seed} {r.size} {r.method}: accuracy {r.accuracy:.4f}, cost {r.cost:.3f}")
    return rows


def judged(size: str, seed: int, val: real.Said, test: real.Said) -> list[Row]:
    """Return the rows of every method, its numbers chosen on `val`, on `test`."""
    classes, cuts, rng = test.logits.shape[2], [i - 1 for i in LAYERS], np.random.default_rng(seed)
    rows, everywhere, full = [], layered(), test.right[:, -1]

    def row(method: str, provenance: str, right: np.ndarray, cost: np.ndarray, point: float | None = None, **extra: float) -> None:
        if point is None:
            low, high = paired_interval(right.astype(float) - full, seed)
            extra |= {"low": low, "high": high, "rows": len(right)}
        rows.append(Row("dimee", size, seed, method, provenance, float(right.mean()), float(cost.mean() / CLOUD), point, extra))

    row("all-cloud", "baseline", full, np.full(len(full), CLOUD))
    row("mobile only", "baseline", test.right[:, cuts[0]], np.full(len(full), LAYER_COST * LAYERS[0]))
    row("edge only", "baseline", test.right[:, cuts[1]], np.full(len(full), HOPS[0] + LAYER_COST * LAYERS[1]))

    # Pools are built from one half of the validation rows and alpha is chosen on the other: on its own rows a routing looks better than it is.
    confidence = val.stats("max_prob")[:, cuts]
    half = np.arange(len(val.y)) % 2 == 0
    learn, choose = val.take(half), val.take(~half)

    sets = {"choose": choose, "test": test}

    @functools.cache
    def routes(which: str, alpha: float) -> np.ndarray:
        return dimee.pools(learn.embedding, confidence[half], alpha).route(sets[which].embedding)

    def judged_at(rule: str, which: str, alpha: float) -> tuple[np.ndarray, np.ndarray]:
        pool = np.zeros(len(sets[which].y), np.int64) if rule == CASCADE else routes(which, alpha)
        if rule == MAJORITY:
            pool = np.full_like(pool, np.bincount(pool).argmax())
        return tiered(sets[which], rng.permutation(pool) if rule == RANDOM else pool, alpha)

    alphas = ALPHAS[ALPHAS > 1 / classes]
    chosen = {}
    for rule in (POOLS, CASCADE, RANDOM, MAJORITY):
        best = (math.inf, 1.01)
        for alpha in alphas:
            right, cost = judged_at(rule, "choose", float(alpha))
            if choose.right[:, -1].mean() - right.mean() <= TOLERANCE:
                best = min(best, (float(cost.mean()), float(alpha)))
        chosen[rule] = best[1]
        row(rule, "reconstructed" if rule == POOLS else "baseline", *judged_at(rule, "test", best[1]), alpha=best[1])
        for alpha in alphas[::4]:
            row(f"{rule}, curve", "reconstructed" if rule == POOLS else "baseline", *judged_at(rule, "test", float(alpha)), round(float(alpha), 3))
    alpha = chosen[POOLS]
    c = test.stats("max_prob")[:, cuts]
    truth = np.where(c[:, 0] >= alpha, dimee.EASY, np.where(c[:, 1] >= alpha, dimee.MODERATE, dimee.HARD))
    row("oracle pools", "baseline", *tiered(test, truth, alpha), alpha=alpha)
    rows[[r.method for r in rows].index(POOLS)].extra["routed_right"] = float((routes("test", alpha) == truth).mean())
    rows[[r.method for r in rows].index(POOLS)].extra["majority"] = float(np.bincount(truth).max() / len(truth))
    row("SplitEE (bandit)", "official code", *splitee(test, chosen[CASCADE]), alpha=chosen[CASCADE])
    for method, score in (("DeeBERT (entropy)", lambda s: s.stats("entropy")[:, :-1]), ("PABEE (patience)", lambda s: patience(s.label))):
        theta = shared(score(val), val.right, everywhere)
        at = exits_of(score(test), theta)
        row(method, "official code", test.right[np.arange(len(at)), at], everywhere[at], threshold=float(min(theta[0], 1e9)))
    for method, drop, sure in ((FREE, TOLERANCE, None), (OURS, TOLERANCE, CONFIDENCE), (STRICT, 0.001, CONFIDENCE)):
        found = fastee.calibration.thresholds(val.stats("max_prob")[:, :-1], val.right, everywhere, drop, sure)
        at = exits_of(test.stats("max_prob")[:, :-1], np.array(found.thresholds))
        if found.cost > CLOUD:  # a plan that loses to sending the input is not chosen
            row(method, "ours", full, np.full(len(full), CLOUD), exits_off=1.0)
        else:
            row(method, "ours", test.right[np.arange(len(at)), at], everywhere[at])
    return rows


def verdict(rows: list[Row]) -> tuple[str, str]:
    seeds = sorted({r.seed for r in rows})
    of = lambda method: {r.seed: r for r in rows if r.method == method and r.point is None}
    full, pools = of("all-cloud"), of(POOLS)
    saving, drop = mean_and_error([1 - pools[s].cost for s in seeds]), mean_and_error([full[s].accuracy - pools[s].accuracy for s in seeds])
    worst = max(-pools[s].extra["low"] for s in seeds)
    beaten = []
    for rule in (CASCADE, RANDOM, MAJORITY):
        other = []
        for s in seeds:
            curve = [r.cost for r in rows if r.method == f"{rule}, curve" and r.seed == s and r.accuracy >= pools[s].accuracy]
            other.append(min([*curve, 1.0]))
        beaten.append(np.mean([pools[s].cost for s in seeds]) < np.mean(other))
    holds = saving[0] >= 0.40 and drop[0] <= 0.003 and worst < 0.006
    said = []
    for method in (POOLS, CASCADE, "SplitEE (bandit)", "DeeBERT (entropy)", "PABEE (patience)", FREE, OURS, STRICT):
        mine = of(method)
        said.append(
            f"{method}: cost {100 * (np.mean([mine[s].cost for s in seeds]) - 1):+.1f} %, drop {100 * np.mean([full[s].accuracy - mine[s].accuracy for s in seeds]):.2f} points"
            f" (95 % interval up to {-100 * min(mine[s].extra['low'] for s in seeds):.2f})"
        )
    routing = np.mean([pools[s].extra["routed_right"] for s in seeds]), np.mean([pools[s].extra["majority"] for s in seeds])
    said.append(f"the embedding names the pool of {100 * routing[0]:.0f} % of the samples, always guessing the largest {100 * routing[1]:.0f} %")
    return ("reproduced" if all(beaten) else "direction only") if holds else "not reproduced", "; ".join(said)

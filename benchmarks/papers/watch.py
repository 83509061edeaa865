"""The drift watch on real confidences: a network calibrated on films answers films, then other texts; does the alarm ring in time, and only then?

Calibrated for at most 2 points of disagreement with the end (95 %) on the validation rows. Each of 1,000 streams holds 5,000 rows of the calibrated kind, then 20,000
of another (*full*: SST-2's test rows, then tweets or product reviews; *quick*: images, then the same with noise), drawn with replacement, or of rows on which exit
and end disagree three times as often as the budget allows (the watch sees only whether the two agree, so their rate is all that counts); a share of the rows
(``point``) is audited. ``accuracy``: the share of the streams in which the alarm rang before the share of wrong early answers so far passed twice the budget (or in
which it never did); for streams without a change the share with no alarm at all. ``cost``: mean cost of a row before the change, audits included.

Verdict rule: *reproduced* when at some audited share of at most 20 % every changed kind that passes twice the budget is caught in time in at least 95 % of the streams
and at every share at most 1 % of the unchanged streams ring; *direction only* when only the second holds.
"""

from __future__ import annotations

import numpy as np
import torch

import fastee
from benchmarks.papers import real
from benchmarks.papers.common import Row, batches, images, trained_network
from fastee.calibration import DriftTest
from fastee.calibration.search import exits_of

TITLE = "The drift watch: an alarm in time, and no other"
PUBLISHED = "our own claim (e-processes, arXiv 2203.03532)"
NOTE = real.SST2_NOTE
SEEDS = 1
ACCURACY, COST = "right alarms (or silence)", "cost % of the network without exits, audits included"
BUDGET, CONFIDENCE, LEVEL = 0.02, 0.95, 0.01
STREAMS, BEFORE, AFTER = 1000, 5000, 20_000
RATES = (0.02, 0.05, 0.1, 0.2)


def kinds(quick: bool, seed: int) -> dict[str, real.Said]:
    """Return what the exits said: the rows that calibrate, the unchanged kind and the changed ones."""
    if not quick:
        names = {"calibrated on": "sst2-val", "films": "sst2-test", "films -> tweets": "tweets", "films -> product reviews": "amazon"}
        return {k: real.said("sst2", 0, name) for k, name in names.items()}
    net = trained_network(seed, exits=["stem", "stage1", "stage2", "stage3"])
    fastee.fit(net, batches(*images("train")), epochs=6, seed=seed, progress=False)
    (vx, vy), (tx, ty) = images("val"), images("test")
    noise = torch.randn(tx.shape, generator=torch.Generator().manual_seed(seed))
    sets = {"calibrated on": (vx, vy), "images": (tx, ty), "images -> noise 0.3": (tx + 0.3 * noise, ty), "images -> noise 0.8": (tx + 0.8 * noise, ty)}
    return {k: real.listen(net, batches(*pair)) for k, pair in sets.items()}


def run(seed: int, quick: bool, console) -> list[Row]:
    size = "quick" if quick else "full, SST-2"
    sets = kinds(quick, seed)
    chosen, usual, *changed = sets
    said = sets[chosen]
    agrees = said.label == said.label[:, -1:]
    found = fastee.calibration.thresholds(said.stats("max_prob")[:, :-1], agrees, said.cost, BUDGET, CONFIDENCE, risk="agreement")
    theta = np.array(found.thresholds)
    wrong, early, spent = {}, {}, {}
    for kind, said in sets.items():
        at = exits_of(said.stats("max_prob")[:, :-1], theta)
        wrong[kind] = said.label[np.arange(len(at)), at] != said.label[:, -1]
        early[kind], spent[kind] = at < len(theta), said.cost[at]
    disagree = {kind: float(wrong[kind].mean()) for kind in (usual, *changed)}
    disagree[f"{usual} -> {300 * BUDGET:.0f} % disagree"] = 3 * BUDGET
    rows = []
    for rate in RATES:
        audit = rate * float(np.where(early[usual], sets[usual].cost[-1] - spent[usual], 0).mean())
        for kind, share in disagree.items():
            rng = np.random.default_rng(seed)
            rang, in_time, waited, passed = 0, 0, [], 0
            for _ in range(STREAMS):
                stream = rng.random(BEFORE + AFTER) < np.repeat([disagree[usual], share], [BEFORE, AFTER])
                alarm = first_alarm(stream, np.flatnonzero(rng.random(len(stream)) < rate))
                beyond = np.flatnonzero(np.cumsum(stream)[BEFORE:] > 2 * BUDGET * np.arange(BEFORE + 1, len(stream) + 1))
                late = BEFORE + int(beyond[0]) if len(beyond) else len(stream)
                rang += alarm < len(stream)
                passed += bool(len(beyond))
                in_time += (alarm == len(stream)) if kind == usual else (alarm <= late)
                waited.append(min(alarm, len(stream)) - BEFORE)
            extra = {"disagree": share, "rang": rang / STREAMS, "passed": passed / STREAMS, "median_rows": float(np.median(waited)), "streams": STREAMS}
            rows.append(Row("watch", size, seed, kind, "ours", in_time / STREAMS, float(spent[usual].mean()) + audit, rate, extra))
            console.print(f"watch {size} audits {rate:g} {kind}: disagreement {share:.4f}, rang {extra['rang']:.3f}, in time or silent {in_time / STREAMS:.3f}")
    return rows


def first_alarm(stream: np.ndarray, audited: np.ndarray) -> int:
    """Return the number of the row at whose audit the alarm is seen, looked for after every eight audits; the length of the stream where it never rings."""
    test = DriftTest(BUDGET, LEVEL)
    for start in range(0, len(audited), 8):
        some = audited[start : start + 8]
        if test.observe(stream[some]):
            return int(some[-1])
    return len(stream)


def verdict(rows: list[Row]) -> tuple[str, str]:
    usual = rows[0].method
    changed = [m for m in dict.fromkeys(r.method for r in rows) if m != usual]
    at = lambda method, rate: [r for r in rows if r.method == method and r.point == rate]
    false = max(r.extra["rang"] for r in rows if r.method == usual)
    danger = [m for m in changed if any(r.extra["passed"] >= 0.5 for r in rows if r.method == m)]
    caught = [rate for rate in RATES if danger and all(r.accuracy >= 0.95 for m in danger for r in at(m, rate))]
    said = f"without a change at most {100 * false:.1f} % of the streams ring; " + "; ".join(
        f"{m} (disagreement {100 * at(m, RATES[0])[0].extra['disagree']:.1f} %): in time in "
        + ", ".join(f"{100 * np.mean([r.accuracy for r in at(m, rate)]):.1f} % at {rate:g}" for rate in RATES)
        + (" audited" if m in danger else " audited, but it does not pass twice the budget")
        for m in changed
    )
    return ("reproduced" if caught and false <= 0.01 else "direction only" if false <= 0.01 else "not reproduced"), said

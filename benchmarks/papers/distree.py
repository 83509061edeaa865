"""DistrEE (arXiv 2502.15735) on NoNN students (arXiv 1907.11804): stop when the joined feature no longer changes, against confidence rules.

Verdict rule: *reproduced* when the mean saving (multiply-adds of everything executed, against the same team with only its final head) of the feature difference is
at least 25 % at a mean accuracy loss of at most 1 point, thresholds chosen on validation data for a loss of at most 0.5 points; *direction only* when the saving's
interval lies above 0 at a mean loss of at most 1 point.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastee
from benchmarks.papers.common import Row, images, mean_and_error, paired_interval
from fastee.nn import StudentTeam
from fastee.training import partition, train_students
from fastee.training.students import teacher_features

TITLE = "DistrEE: students stop when their joined feature has settled"
PUBLISHED = "27.6 % less compute at close to full accuracy (CIFAR-10, WideResNet)"
SEEDS = 5
TOLERANCE = 0.005
EXITS = ["stem", "stage1", "stage2", "stage3"]
DELTA, OURS = "feature difference (reconstructed)", "fastee: thresholds searched per exit"


def noisy(split: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the embedded images pooled to 14x14, shifted by up to a pixel, with noise of a strength U(0, 0.8) of its own per image."""
    x, y = images(split)
    g = torch.Generator().manual_seed(seed)
    x = F.avg_pool2d(x, 2)
    shifts = torch.randint(-1, 2, (len(x), 2), generator=g)
    x = torch.stack([t.roll((int(a), int(b)), (1, 2)) for t, (a, b) in zip(x, shifts, strict=True)])
    return x + 0.8 * torch.rand(len(x), 1, 1, 1, generator=g) * torch.randn(x.shape, generator=g), y


def run(seed: int, quick: bool, console) -> list[Row]:
    from fastee.data.networks import SmallResNet

    size, teacher_epochs, epochs = ("quick", 5, 9) if quick else ("full", 20, 40)
    (x, y), (vx, vy), (tx, ty) = (noisy(s, 100 * seed + i) for i, s in enumerate(("train", "val", "test")))
    torch.manual_seed(seed)
    teacher = SmallResNet((16, 32, 64), (1, 1, 1))
    whole = fastee.attach(teacher, ["stage1"], 10, x[:2])
    shuffled = lambda size: DataLoader(TensorDataset(x, y), size, shuffle=True, generator=torch.Generator().manual_seed(seed))
    fastee.fit(whole, shuffled(100), "joint", epochs=teacher_epochs, lr=0.005, weights=[0, 1], seed=seed, progress=False)
    features, _ = teacher_features(teacher, "stage3", vx[:1000])
    groups = partition(features.numpy(), 2, top=32, percentile=80, resolution=1.0, drop_largest=False, fallback="balanced", seed=seed)
    students = [fastee.attach(SmallResNet((8, 16, 32), (1, 1, 1)), EXITS, 10, x[:2]) for _ in groups]
    team = StudentTeam(students, groups, 10)
    train_students(team, teacher, "stage3", shuffled(64), epochs=epochs, lr=0.05, beta=200 / sum(map(len, groups)), seed=seed, progress=False)
    val, test = (_outputs(team, *pair) for pair in ((vx, vy), (tx, ty)))
    exits = team.num_exits
    base = sum(sum(s.macs["segments"][:exits]) + b[-1] for s, b in zip(students, team._branch_macs, strict=True)) + team.heads[-1].in_features * 10
    cost = np.array(team.macs) / base
    full_right = test["label"][:, -1] == test["y"]
    rows = [Row("distree", size, seed, "no exits", "baseline", float(full_right.mean()), 1.0)]
    with torch.no_grad():
        right = float(torch.cat([teacher(c).argmax(1) for c in tx.split(500)]).eq(ty).float().mean())
    whole_macs = sum(whole.macs["segments"])
    rows.append(Row("distree", size, seed, "teacher on one node", "baseline", right, whole_macs / base))
    for m in range(exits):
        rows.append(Row("distree", size, seed, f"fixed exit {m + 1}", "baseline", float((test["label"][:, m] == test["y"]).mean()), float(cost[m])))
    for method, name in ((DELTA, "delta"), ("entropy", "entropy"), ("max_prob", "max_prob"), ("patience", "patience")):
        theta = _shared(val, name, cost)
        taken = _taken(test[name], theta)
        rows.append(_row(size, seed, method, "reconstructed" if name == "delta" else "baseline", test, taken, cost, theta))
    found = fastee.calibration.thresholds(val["max_prob"], val["label"] == val["y"][:, None], cost, TOLERANCE, confidence=None)
    rows.append(_row(size, seed, OURS, "ours", test, _taken(test["max_prob"], found.thresholds), cost, math.nan))
    for r in rows:
        console.print(f"distree seed {seed} {r.method}: accuracy {r.accuracy:.4f}, cost {r.cost:.3f}")
    return rows


def _outputs(team: StudentTeam, x: torch.Tensor, y: torch.Tensor) -> dict[str, np.ndarray]:
    """Return per exit label [N, M] and scores [N, M-1] (larger = more confident) of all rows."""
    out: dict[str, list] = {k: [] for k in ("label", "max_prob", "entropy", "delta")}
    with torch.no_grad():
        for part in x.split(250):
            carries, before, columns = [(part,)] * len(team.students), None, {k: [] for k in out}
            for m, head in enumerate(team.heads):
                shown = [team.run_student(i, m, c) for i, c in enumerate(carries)]
                carries, joined = [c for c, _ in shown], team.join([f for _, f in shown])
                s = fastee.ops.row_stats(head(joined))
                delta = torch.full((len(part),), math.inf) if before is None else team.change(joined, before, range(len(team.students)))
                for k, v in (("label", s.label), ("max_prob", s.max_prob), ("entropy", -s.entropy), ("delta", -delta)):
                    columns[k].append(v)
                before = joined
            for k, v in columns.items():
                out[k].append(torch.stack(v, 1))
    found = {k: torch.cat(v).numpy() for k, v in out.items()}
    label = found["label"]
    run = np.zeros(label.shape)
    for m in range(1, label.shape[1]):
        run[:, m] = np.where(label[:, m] == label[:, m - 1], run[:, m - 1] + 1, 0)
    return {**{k: v if k == "label" else v[:, :-1] for k, v in found.items()}, "patience": run[:, :-1], "y": y.numpy()}


def _taken(score: np.ndarray, theta) -> np.ndarray:
    from fastee.calibration.search import exits_of

    k = score.shape[1]
    return exits_of(score.astype(np.float64), np.full(k, theta, dtype=np.float64) if np.ndim(theta) == 0 else np.asarray(theta))


def _shared(val: dict[str, np.ndarray], name: str, cost: np.ndarray) -> float:
    """Return the shared threshold of least cost whose validation accuracy is within the tolerance of full execution."""
    full = (val["label"][:, -1] == val["y"]).mean()
    best, rows = (1.0 * cost[-1], math.inf), np.arange(len(val["y"]))
    for theta in np.unique(np.quantile(val[name][np.isfinite(val[name])], np.linspace(0, 1, 201))):
        taken = _taken(val[name], theta)
        if (val["label"][rows, taken] == val["y"]).mean() >= full - TOLERANCE and cost[taken].mean() < best[0]:
            best = (float(cost[taken].mean()), float(theta))
    return best[1]


def _row(size, seed, method, provenance, test, taken, cost, theta) -> Row:
    rows = np.arange(len(taken))
    right = test["label"][rows, taken] == test["y"]
    low, high = paired_interval(right.astype(float) - (test["label"][:, -1] == test["y"]), seed)
    extra = {"low": low, "high": high, **({"threshold": float(theta)} if math.isfinite(theta) else {})}
    return Row("distree", size, seed, method, provenance, float(right.mean()), float(cost[taken].mean()), None, extra)


def verdict(rows: list[Row]) -> tuple[str, str]:
    seeds = sorted({r.seed for r in rows})
    full = {r.seed: r.accuracy for r in rows if r.method == "no exits"}
    said, result = [], "not reproduced"
    for method in (DELTA, "entropy", "max_prob", "patience", OURS):
        mine = {r.seed: r for r in rows if r.method == method}
        saving, loss = mean_and_error([1 - mine[s].cost for s in seeds]), mean_and_error([full[s] - mine[s].accuracy for s in seeds])
        said.append(f"{method}: saving {100 * saving[0]:.1f} ± {100 * saving[1]:.1f} %, loss {100 * loss[0]:.2f} ± {100 * loss[1]:.2f} points")
        if method == DELTA and loss[0] <= 0.01:
            result = "reproduced" if saving[0] >= 0.25 else "direction only" if saving[0] - 1.96 * saving[1] > 0 else result
    return result, "; ".join(said)

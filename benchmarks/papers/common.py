"""Rows, seeds and statistics that every paper's test shares. Verdict rules stand in the systems' modules, fixed before the run."""

from __future__ import annotations

import datetime
import math
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch

import fastee


class Row(msgspec.Struct, omit_defaults=True):
    """One method at one point of one seed; ``cost`` is relative to the network without exits, ``extra`` holds what else was measured."""

    system: str
    size: str  # quick or full
    seed: int
    method: str
    provenance: str  # published, official code, reconstructed, ours, baseline
    accuracy: float | None
    cost: float
    point: float | None = None
    extra: dict[str, float] = {}
    commit: str = ""
    date: str = ""
    torch: str = ""


def stamped(rows: Iterable[Row]) -> list[Row]:
    """Return the rows with commit, date and versions."""
    try:
        where = Path(__file__).parent
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=where, capture_output=True, text=True, timeout=10).stdout.strip()
    except OSError:
        commit = ""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return [msgspec.structs.replace(r, commit=commit, date=now, torch=str(torch.__version__)) for r in rows]


def append(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to a JSON-lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        for row in stamped(rows):
            file.write(msgspec.json.encode(row) + b"\n")


def read(path: Path) -> list[Row]:
    """Return the rows of a file; of the same (system, size, seed, method, point) the last one counts."""
    found: dict[tuple, Row] = {}
    if path.exists():
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                row = msgspec.json.decode(line, type=Row)
            except msgspec.DecodeError as error:
                raise ValueError(f"{path}, line {number}: not a row: {error}") from None
            found[row.system, row.size, row.seed, row.method, row.point] = row
    return list(found.values())


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error over seeds (NaN for one value)."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def paired_interval(difference: np.ndarray, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """Return the bootstrap 95 % interval of the mean of paired differences [N]."""
    values, counts = np.unique(difference, return_counts=True)  # few of them: how often each is drawn says as much as which rows were
    means = np.random.default_rng(seed).multinomial(len(difference), counts / len(difference), draws) @ values / len(difference)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def images(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the embedded Fashion-MNIST sample: train 5,000, val 3,000, test 2,000."""
    return fastee.data.load("fashion_mnist_sample", split).tensors


def batches(x: torch.Tensor, y: torch.Tensor, size: int = 250) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def trained_network(seed: int, widths=(8, 16, 32, 32), blocks=(1, 1, 1, 1), epochs: int = 6, exits: Sequence[str] | None = None):
    """Return a residual network trained on the embedded images without any exit's influence, and attached exits with untrained heads."""
    from torch.utils.data import DataLoader, TensorDataset

    from fastee.data.networks import SmallResNet

    torch.manual_seed(seed)
    body = SmallResNet(widths, blocks)
    x, y = images("train")
    optimizer = torch.optim.AdamW(body.parameters(), lr=0.005, weight_decay=1e-3)
    loader = DataLoader(TensorDataset(x, y), 100, shuffle=True, generator=torch.Generator().manual_seed(seed))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    body.train()
    for _ in range(epochs):
        for a, b in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(body(a), b).backward()
            optimizer.step()
            schedule.step()
    return fastee.attach(body.eval(), list(exits or ["stem", "stage1", "stage2", "stage3"]), 10, x[:2])


def relative_cost(net) -> np.ndarray:
    """Return the cumulative cost [K+1] of leaving at each exit, heads included, relative to the backbone alone."""
    segments, heads = np.array(net.macs["segments"]), np.array([*net.macs["heads"], 0.0])
    return np.cumsum(segments + heads) / segments.sum()


def budget_rule(score: np.ndarray, q: float) -> np.ndarray:
    """Return thresholds [K] by the budget rule of MSDNet (arXiv 1703.09844): exit m takes the share q^m / sum_k q^k of the validation rows, the
    most confident of those left first; a share of nothing switches the exit off."""
    n, k = score.shape
    p = q ** np.arange(1, k + 2)
    p /= p.sum()
    left, thresholds = np.ones(n, bool), np.full(k, np.inf)
    for m in range(k):
        take = int(n * p[m])
        order = np.argsort(-score[:, m], kind="stable")
        order = order[left[order]]
        if 0 < take <= len(order):
            thresholds[m] = score[order[take - 1], m]
            left &= ~(score[:, m] >= thresholds[m])
    return thresholds


def at_thresholds(score: np.ndarray, label: np.ndarray, y: np.ndarray, cost: np.ndarray, thresholds) -> tuple[float, float]:
    """Return (accuracy, mean cost) of thresholds on collected rows."""
    from fastee.calibration.search import exits_of

    taken = exits_of(score.astype(np.float64), np.asarray(thresholds))
    return float((label[np.arange(len(y)), taken] == y).mean()), float(cost[taken].mean())

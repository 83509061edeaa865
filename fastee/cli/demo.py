"""The demo: one trained network, three emulated machines, the same test images through every way of running them."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations_with_replacement

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch.utils.data import DataLoader

import fastee
from fastee import data
from fastee.cluster import ClusterResult
from fastee.report import Result, Row, closing, row

EXITS = ["stage1", "stage2", "stage3"]
MAX_DROP, CONFIDENCE, MEASURE = 0.005, 0.95, "max_prob"
DEADLINE = 0.1
PATIENCE = 60.0  # seconds; a way without a deadline ends with a typed error at the cluster's own timeout of 30 s
NODES, LINK = ("mobile", "edge", "cloud"), "20mbit 10ms"
# One Cortex-A72 core (a 2019 single-board computer) has about 1/12 of the fp32 convolution rate of one server core.
SLOWDOWN = (12.0, 3.0, 1.0)
CHUNK = 32
# Wall-clock budgets in seconds: everything up to the report, on 2 cores.
BUDGET, QUICK_BUDGET = 160.0, 33.0


@dataclass
class Way:
    """One way of running the samples: `call` takes `batch` images at once and answers an ExitResult (exit -1: no answer)."""

    key: str
    name: str
    how: str
    batch: int
    call: Callable[[torch.Tensor], object]
    exits_on: bool
    label: list[int] = field(default_factory=list)
    exit: list[int] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    wire: list[float] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    nodes: Counter = field(default_factory=Counter)
    errors: Counter = field(default_factory=Counter)

    def run(self, images: torch.Tensor) -> None:
        """Run `images` in groups of `batch` and keep what came back."""
        for x in images.split(self.batch):
            start = time.perf_counter()
            out = self.call(x)
            label, taken = out.label.tolist(), out.exit.tolist()  # an ExitResult decides when it is read: part of the answer
            spent = time.perf_counter() - start
            self.label += label
            self.exit += taken
            self.latency += [float(t) for t in getattr(out, "latency", [spent] * len(x))]
            self.wire += [float(b) for b in getattr(out, "wire_bytes", [0.0] * len(x))]
            self.forced += [bool(f) for f in out.forced]
            self.nodes.update(NODES[n] for n in getattr(out, "node", torch.empty(0)).tolist() if n >= 0)
            self.errors.update(type(e).__name__ for e in getattr(out, "errors", ()) if e is not None)

    def row(self, truth: torch.Tensor, macs: dict) -> Row:
        """Return the report's row of everything that ran."""
        segments, heads = macs["segments"], macs["heads"]
        spent, cost = [], 0.0
        for i, segment in enumerate(segments):
            cost += segment + (heads[i] if self.exits_on and i < len(heads) else 0.0)
            spent.append(cost)
        return row(
            self.key, self.name, self.how, label=self.label, truth=truth[: len(self.label)].tolist(), exit=self.exit, latency=self.latency,
            wire_bytes=self.wire, forced=self.forced, exit_macs=spent, full_macs=sum(segments), deadline=DEADLINE,
            nodes={name: self.nodes[name] for name in NODES if self.nodes}, errors=dict(self.errors),
        )  # fmt: skip


class _Steps:
    """Prints one line per step with its duration."""

    def __init__(self, console: Console, count: int):
        self.console, self.count, self.done, self.start = console, count, 0, time.perf_counter()

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    @contextmanager
    def step(self, text: str) -> Iterator[list[str]]:
        self.done += 1
        found: list[str] = []
        start = time.perf_counter()
        with self.console.status(f"[{self.done}/{self.count}] {text}"):
            yield found
        tail = ": " + "; ".join(found) if found else ""
        self.console.print(f"\\[{self.done}/{self.count}] {text}{tail} ({time.perf_counter() - start:.1f} s)", soft_wrap=True)


def run(console: Console, *, quick: bool = False, seed: int = 0) -> Result:
    """Run the whole demo and return what was measured; progress goes to `console`."""
    steps = _Steps(console, 7)
    torch.manual_seed(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(console, steps, quick, seed, threads)
    finally:
        torch.set_num_threads(threads)


def _run(console: Console, steps: _Steps, quick: bool, seed: int, threads: int) -> Result:
    budget = QUICK_BUDGET if quick else BUDGET
    with steps.step("load Fashion-MNIST sample and network") as said:
        train, val, test = (data.load("fashion_mnist_sample", split, pixels=True) for split in ("train", "val", "test"))
        backbone, trained = data.demo_network(pixels=True), data.demo_metadata()
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
        images, truth = test.tensors[0][order], test.tensors[1][order]
        said.append(f"{len(train)} train, {len(val)} val, {len(test)} test images, {sum(p.numel() for p in backbone.parameters()):,} parameters")
    with steps.step(f"attach exits after {', '.join(EXITS)}") as said:
        net = fastee.attach(backbone, exits=EXITS, num_classes=10, example=images[:1]).eval()
        total = sum(net.macs["segments"])
        share = [sum(net.macs["segments"][: i + 1]) / total for i in range(net.num_segments)]
        said.append(f"{total / 1e6:.1f} M multiply-adds per image, reached by the exits: {', '.join(f'{100 * s:.0f} %' for s in share[:-1])}")
    with steps.step("fit the heads (backbone frozen)") as said:
        epochs = 20
        fitted = fastee.fit(net, DataLoader(train, 250), method="frozen", epochs=epochs, seed=seed, progress=False)
        said.append(f"{epochs} epochs on the {len(train)} training images, accuracy per exit on them {', '.join(f'{100 * a:.1f} %' for a in fitted.accuracy)}")
    with steps.step(f"calibrate to a drop of at most {100 * MAX_DROP:g} points") as said:
        report = fastee.calibrate(net, DataLoader(val, 250), max_drop=MAX_DROP, confidence=CONFIDENCE, measure=MEASURE)
        thresholds = [float(t) for t in net.thresholds]
        calibration = {
            "measure": MEASURE, "max_drop": MAX_DROP, "confidence": CONFIDENCE, "samples": len(val), "thresholds": thresholds,
            "cost": float(report.cost), "drop": float(report.drop), "bound": None if report.bound is None else float(report.bound),
        }  # fmt: skip
        said.append(f"thresholds {', '.join(f'{t:.4f}' for t in thresholds)}")
    with steps.step("run on this machine without emulation") as said:
        local = _local(net, images, truth, 96 if quick else 480)
        calibration |= _test_drop(net, test)
        said.append(f"full {1e3 * local[0].mean:.2f} ms, with exits {1e3 * local[1].mean:.2f} ms per image")
        said.append(f"drop over all {len(test)} test images {100 * calibration['test_drop']:+.2f} points")
    with steps.step(f"start the emulated machines {', '.join(NODES)}") as said:
        cluster = fastee.local_cluster(net, nodes=len(NODES), link=LINK, slowdown=list(SLOWDOWN), names=NODES)
        said.append("pids " + ", ".join(str(node.pid) for node in cluster.nodes))
    try:
        ways, tried = _ways(cluster, net, images, 2 if quick else 4)
        samples = _measure(console, steps, ways, images, budget)
    finally:
        cluster.close()
    rows = [way.row(truth, net.macs) for way in ways]
    by_key = {r.key: r for r in rows}
    times = ", ".join(f"{name} {factor:g}x" for name, factor in zip(NODES, SLOWDOWN, strict=True))
    notes = [
        f"Emulated: {len(NODES)} processes on one machine of {os.cpu_count()} cores, slowed down by declared factors ({times}), every "
        f"directed link shaped to {LINK} in user space. The rows called here ran on the same slowed-down {NODES[0]} through the same cluster.",
        "Latency is from handing in a sample (or the batch it is part of) to its answer, seen by the requester; one call at a time.",
        f"The images travel as the {images[0].numel()} uint8 pixels they are; bytes count everything that a sample put on the links, both ways "
        "as the cluster reports it.",
        tried,
        f"All ways ran the same {samples} test images, interleaved in rounds of {CHUNK}; a sample that was rejected or timed out counts as "
        "wrong and late.",
        f"Backbone: {trained['accuracy_official_test']:.4f} on the official test file, trained with deep supervision "
        f"({trained['made_by']}); the exits' heads were attached and fitted in this run.",
    ]
    for r in rows:
        if r.key.startswith("split-exits"):
            placed = ", ".join(f"{name} {100 * count / r.samples:.0f} %" for name, count in r.nodes.items())
            refused = "".join(f", {kind} {100 * count / r.samples:.0f} %" for kind, count in r.errors.items())
            notes.append(f"{r.name}: the scheduler had samples answered on {placed}{refused}; {r.forced} answers were forced by the deadline.")
    return Result(
        title="fastee demo: early exits and splitting on three emulated machines",
        deadline=DEADLINE,
        exit_names=EXITS,
        rows=rows,
        local=local,
        calibration=calibration,
        setting={
            "nodes": ", ".join(NODES), "slowdown": list(SLOWDOWN), "link": LINK, "deadline_seconds": DEADLINE, "samples": samples,
            "quick": quick, "seed": seed, "seconds": round(steps.elapsed, 1), "torch_threads": 1,
        },
        machine=_machine(),
        notes=notes,
        summary=closing(by_key["split-exits-1"], by_key["full-1"], by_key["cloud-1"], calibration),
    )  # fmt: skip


def _local(net, images: torch.Tensor, truth: torch.Tensor, samples: int) -> list[Row]:
    """Return the rows of the bare backbone and of the network with exits on this machine, batch 1 and 32, interleaved."""
    off = _without_exits(net)
    ways = [
        Way("local-full-1", "full model, batch 1", "the bare backbone", 1, off, False),
        Way("local-exits-1", "exits, batch 1", "calibrated exits", 1, net, True),
        Way("local-full-32", "full model, batch 32", "the bare backbone", 32, off, False),
        Way("local-exits-32", "exits, batch 32", "calibrated exits, survivors compacted after each exit", 32, net, True),
    ]
    with torch.inference_mode():
        for way in ways:
            Way("", "", "", way.batch, way.call, False).run(images[: 3 * way.batch])
        for chunk in images[:samples].split(CHUNK):
            for way in ways:
                way.run(chunk)
    return [way.row(truth, net.macs) for way in ways]


@torch.inference_mode()
def _test_drop(net, test) -> dict:
    """Return the accuracy that the calibrated exits cost over the whole test split."""
    exits = full = 0
    for x, y in DataLoader(test, 250):
        exits += int((net(x).label == y).sum())
        full += int((net.full(x).argmax(1) == y).sum())
    return {"test_drop": (full - exits) / len(test), "test_samples": len(test)}


def _without_exits(net) -> Callable[[torch.Tensor], fastee.ExitResult]:
    """Return the bare backbone as a function that answers an ExitResult."""

    def call(x: torch.Tensor) -> fastee.ExitResult:
        logits = net.full(x)
        probability, label = logits.softmax(1).max(1)
        return fastee.ExitResult(logits, label, probability, torch.full((len(x),), net.num_exits))

    return call


def _ways(cluster, net, images: torch.Tensor, pilots: int) -> tuple[list[Way], str]:
    """Return the ways to run on the cluster; the split without exits is the fastest fixed one of a pilot of `pilots` images."""
    here, there = [0] * net.num_segments, [len(NODES) - 1] * net.num_segments

    def with_(**options) -> Callable:
        # submit, not cluster(x): the clock of every image starts when it is handed in, also while it waits for its turn.
        def call(x: torch.Tensor) -> ClusterResult:
            futures = [cluster.submit(image, **options) for image in x.split(1)]
            return ClusterResult([f.exception(PATIENCE) or f.result() for f in futures], net.num_classes)

        return call

    for way in (with_(plan=here, exits=False), with_(plan=there, exits=False), with_()):
        way(images[:1])
    medians = {}
    plans = [p for p in combinations_with_replacement(range(len(NODES)), net.num_segments) if len(set(p)) > 1]
    for plan in plans:
        seconds = [float(with_(plan=list(plan), exits=False)(x).latency[0]) for x in images[-pilots:].split(1)]
        medians[plan] = sorted(seconds)[len(seconds) // 2]
    split = list(min(medians, key=medians.get))
    shown = " ".join(NODES[n] for n in split)
    tried = f"Split without exits: the fastest of all {len(plans)} fixed splits along {' -> '.join(NODES)} in a pilot, segments on {shown}."
    ways = [
        Way("full-1", "full model here, batch 1", "all on the mobile node, exits off", 1, with_(plan=here, exits=False), False),
        Way("full-32", "full model here, batch 32", "the same, 32 images handed in at once; a node serves them one by one", 32, with_(plan=here, exits=False), False),
        Way("exits-1", "exits here, batch 1", "all on the mobile node, calibrated exits", 1, with_(plan=here), True),
        Way("exits-32", "exits here, batch 32", "the same, 32 images handed in at once", 32, with_(plan=here), True),
        Way("cloud-1", "all sent to the cloud, batch 1", "raw pixels sent, exits off", 1, with_(plan=there, exits=False), False),
        Way("cloud-32", "all sent to the cloud, batch 32", "the same, 32 images handed in at once", 32, with_(plan=there, exits=False), False),
        Way("split-1", "split without exits, batch 1", f"fixed plan: {shown}", 1, with_(plan=split, exits=False), False),
        Way("split-exits-1", f"exits + split, {1e3 * DEADLINE:g} ms, batch 1", "the scheduler decides every hop under the deadline", 1, with_(deadline=DEADLINE), True),
        Way(
            "split-exits-32", f"exits + split, {1e3 * DEADLINE:g} ms, batch 32", "the same, 32 images handed in at once", 32,
            with_(deadline=DEADLINE), True,
        ),
    ]  # fmt: skip
    return ways, tried


def _measure(console: Console, steps: _Steps, ways: list[Way], images: torch.Tensor, budget: float) -> int:
    """Run rounds of `CHUNK` images through every way until the time or the images are used up; return the number of images."""
    chunks = images.split(CHUNK)
    done, slowest = 0, 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    steps.done += 1
    start = told = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(f"[{steps.done}/{steps.count}] images through each of {len(ways)} ways", total=len(images))
        for number, chunk in enumerate(chunks):
            if number and steps.elapsed + slowest > budget:
                break
            began = time.perf_counter()
            # Rotated, so that no way always runs just after the same other one.
            for offset in range(len(ways)):
                ways[(number + offset) % len(ways)].run(chunk)
            slowest = max(slowest, time.perf_counter() - began)
            done += len(chunk)
            if not console.is_terminal and time.perf_counter() - told > 15:
                told = time.perf_counter()
                console.print(f"      {done} images through each of {len(ways)} ways so far")
            progress.update(bar, completed=done, total=min(len(images), done + CHUNK * int(max(0, budget - steps.elapsed) / slowest)))
    console.print(
        f"\\[{steps.done}/{steps.count}] run {done} images through each of {len(ways)} ways ({time.perf_counter() - start:.1f} s)", soft_wrap=True
    )
    return done


def _machine() -> dict:
    found = fastee.doctor()
    return {
        "fastee": found["fastee"], "python": found["python"], "torch": str(torch.__version__), "system": platform.platform(),
        "cpu": found["machine"].get("cpu"), "cores": os.cpu_count(), "isa": found["native"].get("isa") or "no native kernels",
    }  # fmt: skip

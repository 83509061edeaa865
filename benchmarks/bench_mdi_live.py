"""MDI-Exit on 1, 2, 3 and 5 real processes beside the simulator's prediction: throughput at fixed thresholds, accuracy at a fixed rate.

Tasks enter at node 0. Throughput is that of an open loop at `OVERLOAD` times what the nodes can do, accuracy that of one at `FIXED_RATE`; both count from a
quarter of the time on. Every node is slowed down by one declared factor, so that the whole network takes `FULL_SECONDS` there and two cores carry five nodes.
The simulator gets the same arrivals, links, credit and policy, the network's own scores, and per node and segment the seconds that the node tells in its
heartbeats after `WARM_ROWS` rows before the stream: a node that sleeps 95 % of the time computes with cold caches, twice as long as the profile's hot loop
says, its first segment more so (the note has the factor). ``ratio`` is the larger of live / simulated and simulated / live.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader

import fastee
from fastee import data
from fastee.simulation.spec import Arrivals, Connection, Machine, Network, Spec
from fastee.testing.bench import Case, Context, Group

COUNTS = (1, 2, 3, 5)
EXITS, LINK = ("stage1", "stage2"), "100mbit 2ms"
FULL_SECONDS, CREDIT, THRESHOLD, WARM_ROWS = 0.060, 512, 0.9, 40
OVERLOAD, FIXED_RATE = 1.4, 45.0
THRESHOLD_PARAMS = {"adapt": "threshold", "t_min": 0.3, "t_max": 0.99}


@dataclass
class Outcome:
    """Answers a second, their share that is right, their seconds."""

    throughput: float
    accuracy: float
    latency: list[float]


def trained() -> tuple[fastee.EarlyExit, torch.Tensor, torch.Tensor]:
    """The demo's network with fitted heads, test images and their labels."""
    train, test = (data.load("fashion_mnist_sample", split, pixels=True) for split in ("train", "test"))
    net = fastee.attach(data.demo_network(pixels=True), exits=list(EXITS), num_classes=10, example=test.tensors[0][:1]).eval()
    fastee.fit(net, DataLoader(train, 250), method="frozen", epochs=3, seed=0, progress=False)
    return net.set_rule(measure="max_prob", thresholds=[THRESHOLD] * 2), *test.tensors


@torch.inference_mode()
def scores(net: fastee.EarlyExit, images: torch.Tensor, truth: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Confidence [rows, K] and correctness [rows, K + 1] at every exit."""
    carry, confidence, right = (images,), [], []
    for segment in range(net.num_segments - 1):
        carry = net.run_segment(segment, carry)
        out = net.exit_step(segment, carry)
        confidence.append(out.confidence)
        right.append(out.label == truth)
    right.append(net.run_segment(net.num_segments - 1, carry)[0].argmax(1) == truth)
    return torch.stack(confidence, 1).double().numpy(), torch.stack(right, 1).numpy()


def live(cluster, images: torch.Tensor, truth: torch.Tensor, times: list[float], begin: float, end: float) -> Outcome:
    """Submit images at `times` and count what is answered from `begin` to `end` seconds."""
    settled: list[tuple[float, int, fastee.cluster.TaskAnswer]] = []
    began, futures = time.monotonic(), []
    for number, at in enumerate(times):
        time.sleep(max(0.0, began + at - time.monotonic()))
        row = number % len(images)
        futures.append(cluster.submit(images[row : row + 1]))
        futures[-1].add_done_callback(lambda f, row=row: settled.append((time.monotonic() - began, row, f.result())))
    for future in futures:
        future.result(60)
    window = [(row, answer) for at, row, answer in settled if begin <= at < end]
    right = [answer.label == int(truth[row]) for row, answer in window]
    return Outcome(len(window) / (end - begin), float(np.mean(right)), [answer.latency for _, answer in window])


def measured(cluster, images: torch.Tensor, count: int) -> np.ndarray:
    """Seconds [node, segment] that each node says a row takes there, after `WARM_ROWS` rows for each at once."""
    segments = cluster._net.num_segments
    for future in [cluster.submit(images[i : i + 1], plan=[node] * segments) for i in range(WARM_ROWS) for node in range(count)]:
        future.result(120)
    time.sleep(0.3)  # the next heartbeat
    return np.array([beat["segments"] for beat in cluster.beats().values()])


def simulated(profile: fastee.Profile, trace, took: np.ndarray, times: list[float], begin: float, end: float, params: dict) -> Outcome:
    """What the simulator says of the same on nodes whose segments take `took` [node, segment] seconds."""
    raw, count = [profile.codecs.index("raw")], len(took)
    fastest = took[took.sum(1).argmin()]
    machines = [Machine(name=f"node{i}", slowdown=float(row.sum() / fastest.sum())) for i, row in enumerate(took)]
    links = [Connection(source=f"node{a}", target=f"node{b}", link=LINK) for a in range(count) for b in range(a + 1, count)]
    spec = Spec(
        network=Network(seconds=fastest.tolist(), wire_bytes=profile.wire_bytes[:, raw].tolist()), machines=machines, connections=links, policy="mdi_exit",
        params=params, arrivals=[Arrivals(kind="times", sources=["node0"], times=times)], tasks=len(times), thresholds=[THRESHOLD] * 2, credit=CREDIT, max_tasks=4096,
    )  # fmt: skip
    out = fastee.simulate(spec, trace)
    at = out.arrival + out.latency
    inside = (at >= begin) & (at < end)
    return Outcome(inside.sum() / (end - begin), float(out.correct[inside].mean()), out.latency[inside].tolist())


def cases(ctx: Context) -> Iterator[Group]:
    seconds = 4.0 if ctx.quick else 8.0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    net, images, truth = trained()
    images, truth = images[:1000], truth[:1000]
    trace = scores(net, images, truth)
    cost = float(fastee.profile(net, images[:1], nodes=("node0",), batch_sizes=(1,)).mean.sum())
    factor = max(1.0, FULL_SECONDS / cost)
    at_rate = lambda rate: [n / rate for n in range(round(rate * seconds))]
    passed = trace[0] > THRESHOLD
    stage = np.where(passed[:, 0], 0, np.where(passed[:, 1], 1, 2))
    try:
        for count in COUNTS:
            for part, params in (("throughput", {}), ("accuracy", THRESHOLD_PARAMS)):
                names = [f"node{i}" for i in range(count)]
                with fastee.local_cluster(
                    net, nodes=count, names=names, link=LINK, slowdown=factor, example=images[:1], codec="raw", credit=CREDIT, policy="mdi_exit", params=params
                ) as cluster:
                    took, profile = measured(cluster, images, count), cluster.profile
                    rate = float((1 / np.cumsum(took, 1)[:, stage].mean(1)).sum())
                    times = at_rate(OVERLOAD * rate if part == "throughput" else FIXED_RATE)
                    real = live(cluster, images, truth, times, seconds / 4, seconds)
                sim = simulated(profile, trace, took, times, seconds / 4, seconds, params)
                a, b = getattr(real, part), getattr(sim, part)
                cold = took.sum(1).mean() / profile.mean[:, 0, 0].sum()
                unit = "/s" if part == "throughput" else ""
                note = (
                    f"{len(times)} tasks; live {a:.3g}{unit}, simulated {b:.3g}{unit}; live accuracy {real.accuracy:.3f} at {real.throughput:.1f}/s, simulated "
                    f"{sim.accuracy:.3f} at {sim.throughput:.1f}/s; slow-down {factor:.0f}, a row {1e3 * took.sum(1).mean():.0f} ms, {cold:.2f} times its profile, links {LINK}"
                )
                case = Case("fastee", None, note=note, times=[t * 1e9 for t in real.latency], ratio=max(a / b, b / a))
                yield Group("mdi_live", f"{part}, {count} processes", "fp32", [case], baseline="fastee", per_call=True, bars=("ratio <= 1.15",))
    finally:
        torch.set_num_threads(threads)

"""MDI-Exit on 1, 2, 3 and 5 real processes beside the simulator's prediction: throughput at fixed thresholds, accuracy at a fixed rate.

Tasks enter at node 0, an open loop for some seconds; what is counted starts after the first quarter. Every node is slowed down by one declared factor, so
that the whole network takes `FULL_SECONDS` there and two cores carry five nodes. The simulator gets the measured profile, the same arrivals, links,
credit and policy, and the network's own scores. ``ratio`` is the larger of live / simulated and simulated / live.
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
FULL_SECONDS, CREDIT, THRESHOLD = 0.060, 256, 0.9
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


def live(cluster, images: torch.Tensor, truth: torch.Tensor, rate: float, seconds: float) -> Outcome:
    """Offer images at `rate` for `seconds` and count what is answered from a quarter of that time to its end."""
    settled: list[tuple[float, int, fastee.cluster.TaskAnswer | None]] = []

    def settle(number, future):
        settled.append((time.monotonic(), number, None if future.exception() else future.result()))

    began = time.monotonic()
    for number in range(round(rate * seconds)):
        time.sleep(max(0.0, began + number / rate - time.monotonic()))
        row = number % len(images)
        cluster.submit(images[row : row + 1]).add_done_callback(lambda f, number=number: settle(number, f))
    time.sleep(max(0.0, began + seconds - time.monotonic()))
    window = [(n, a) for at, n, a in list(settled) if began + seconds / 4 <= at < began + seconds and a is not None]
    right = [a.label == int(truth[n % len(images)]) for n, a in window]
    return Outcome(len(window) / (0.75 * seconds), float(np.mean(right)), [a.latency for _, a in window])


def simulated(profile: fastee.Profile, trace, count: int, factor: float, rate: float, seconds: float, params: dict) -> Outcome:
    """What the simulator says of the same."""
    raw = [profile.codecs.index("raw")]
    network = Network(seconds=(profile.mean[:, 0, 0] / factor).tolist(), wire_bytes=profile.wire_bytes[:, raw].tolist())
    links = [Connection(source="node", target="node", link=LINK)] if count > 1 else []
    tasks = round(rate * seconds)
    spec = Spec(
        network=network, machines=[Machine(name="node", slowdown=factor, count=count)], connections=links, policy="mdi_exit", params=params,
        arrivals=[Arrivals(kind="times", sources=["node0" if count > 1 else "node"], times=[n / rate for n in range(tasks)])], tasks=tasks,
        thresholds=[THRESHOLD] * 2, credit=CREDIT, max_tasks=4096,
    )  # fmt: skip
    out = fastee.simulate(spec, trace)
    at = out.arrival + out.latency
    inside = (at >= seconds / 4) & (at < seconds)
    return Outcome(inside.sum() / (0.75 * seconds), float(out.correct[inside].mean()), out.latency[inside].tolist())


def cases(ctx: Context) -> Iterator[Group]:
    seconds = 4.0 if ctx.quick else 8.0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    net, images, truth = trained()
    images, truth = images[:1000], truth[:1000]
    trace = scores(net, images, truth)
    cost = float(fastee.profile(net, images[:1], nodes=("node0",), batch_sizes=(1,)).mean.sum())
    factor = max(1.0, FULL_SECONDS / cost)
    depth = 1.0  # mean share of the network that a task runs at the fixed thresholds
    passed = trace[0] > THRESHOLD
    macs = np.cumsum(net.macs["segments"]) / sum(net.macs["segments"])
    depth = float(np.where(passed[:, 0], macs[0], np.where(passed[:, 1], macs[1], 1.0)).mean())
    try:
        for count in COUNTS:
            for part, rate, params in (("throughput", OVERLOAD * count / (depth * FULL_SECONDS), {}), ("accuracy", FIXED_RATE, THRESHOLD_PARAMS)):
                names = [f"node{i}" for i in range(count)]
                with fastee.local_cluster(
                    net, nodes=count, names=names, link=LINK, slowdown=factor, example=images[:1], codec="raw", credit=CREDIT, policy="mdi_exit", params=params
                ) as cluster:
                    cluster(images[:4])
                    real = live(cluster, images, truth, rate, seconds)
                    profile = cluster.profile
                sim = simulated(profile, trace, count, factor, rate, seconds, params)
                a, b = getattr(real, part), getattr(sim, part)
                unit = "/s" if part == "throughput" else ""
                note = (
                    f"{rate:.0f} tasks/s offered; live {a:.3g}{unit}, simulated {b:.3g}{unit}; live accuracy {real.accuracy:.3f} at {real.throughput:.1f}/s, simulated "
                    f"{sim.accuracy:.3f} at {sim.throughput:.1f}/s; slow-down {factor:.0f}, links {LINK}"
                )
                case = Case("fastee", None, note=note, times=[t * 1e9 for t in real.latency], ratio=max(a / b, b / a))
                yield Group("mdi_live", f"{part}, {count} processes", "fp32", [case], baseline="fastee", per_call=True, bars=("ratio <= 1.15",))
    finally:
        torch.set_num_threads(threads)

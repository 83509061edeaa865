"""VGG-16 over four processes, slow-down factors, 100 Mbit/s links: our plan, the best node, equal fused tiles, each beside its prediction.

The times of a row are those of whole inferences; ``ratio`` of our plan is the larger of measured / predicted and predicted / measured.
`FASTEE_BENCH_SPATIAL_INPUT` sets the input's height and width (224). Factors are of processor time, so two cores carry four nodes.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator

import torch
from torch import nn

from fastee import spatial_cluster
from fastee.testing.bench import Case, Context, Group

FACTORS, LINK = (8.0, 8.0, 16.0, 16.0), "100mbit 0ms"
PLANS = {"fastee": "search", "single_node": "offload", "equal_tiles": "deepthings", "aofl": "aofl"}


def vgg16(size: int) -> nn.Module:
    """VGG-16's layers with random weights for inputs of `size`."""
    layers: list[nn.Module] = []
    channels = 3
    for count, out in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(count):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()]
            channels = out
        layers.append(nn.MaxPool2d(2))
    flat = 512 * (size // 32) ** 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000)).eval()


def cases(ctx: Context) -> Iterator[Group]:
    size, rounds = int(os.environ.get("FASTEE_BENCH_SPATIAL_INPUT", "224")), 3 if ctx.quick else 5
    torch.manual_seed(0)
    net, x = vgg16(size), torch.randn(1, 3, size, size)
    with spatial_cluster(net, nodes=4, link=LINK, slowdown=FACTORS, example=x, start_timeout=140) as cluster, torch.no_grad():
        ours, want = cluster.plan, net(x)
        plans = {provider: ours if provider == "fastee" else ours.planner.baseline(method) for provider, method in PLANS.items()}
        times: dict[str, list[float]] = {provider: [] for provider in plans}
        for turn in range(rounds + 1):
            for provider, plan in plans.items():
                cluster.plan = plan
                answer = cluster(x)
                off = float((answer.output - want).abs().max())
                if off > 1e-5 * max(1.0, float(want.abs().max())):
                    raise RuntimeError(f"{provider}: the answer is {off:g} off the unsplit network's")
                if turn:
                    times[provider].append(answer.latency)
        made = []
        for provider, plan in plans.items():
            measured = statistics.median(times[provider])
            ratio = max(measured / plan.latency, plan.latency / measured)
            note = f"slow-down {FACTORS}, links {LINK}; measured {measured * 1e3:.0f} ms, predicted {plan.latency * 1e3:.0f} ms ({measured / plan.latency:.2f})"
            made.append(Case(provider, None, note=note, times=[t * 1e9 for t in times[provider]], ratio=ratio))
    yield Group("spatial_live", f"vgg16 at {size}, 4 nodes", "fp32", made, baseline="single_node", per_call=True,
                bars=(">= 1x single_node", ">= 1x equal_tiles", "ratio <= 1.2"))  # fmt: skip

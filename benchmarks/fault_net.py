"""What the live benchmarks of clusters run: three like segments with two exits, 16 KB in and 16 KB over each cut, about 0.3 ms a segment."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import fastee

SHAPE = (4, 32, 32)
DEADLINE = 0.4
PORT = 25600
LINKS = {("mobile", "edge"): "50mbit 2ms", ("mobile", "cloud"): "50mbit 20ms", ("edge", "cloud"): "100mbit 20ms"}
SLOWDOWN = {"mobile": 20, "edge": 6, "cloud": 3}


def backbone() -> nn.Module:
    """The body, its weights the same in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Conv2d(4, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 4, 3, padding=1), nn.ReLU()) for _ in range(3)]
        return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4096, 10)).eval()


def inputs(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def network() -> fastee.EarlyExit:
    """The body with exits; about a third of the inputs leaves at each."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = fastee.attach(backbone(), exits=["0", "1"], num_classes=10, example=torch.zeros(1, *SHAPE)).eval()
        x = inputs(128, seed=99)
    with torch.no_grad():
        h = net.run_segment(0, (x,))
        first = net.exit_step(0, h).confidence
        second = net.exit_step(1, net.run_segment(1, h)).confidence
    return net.set_rule(thresholds=[float(first.quantile(0.67)), float(second[first < first.quantile(0.67)].quantile(0.5))])


def write_cluster(folder: Path, net: fastee.EarlyExit | None = None) -> Path:
    """Write the checkpoint and a cluster.toml of mobile, edge and cloud into `folder` and return the toml's path."""
    net = network() if net is None else net
    net.save(folder / "model.safetensors", weights="all")
    text = f'[model]\nbackbone = "benchmarks.fault_net:backbone"\ncheckpoint = "model.safetensors"\nfingerprint = "{net.fingerprint}"\n'
    text += "".join(f'[[node]]\nname = "{name}"\nport = {PORT + 2 * i}\nslowdown = {factor}\n' for i, (name, factor) in enumerate(SLOWDOWN.items()))
    text += "".join(f'[[link]]\nbetween = ["{a}", "{b}"]\nspeed = "{speed}"\n' for (a, b), speed in LINKS.items())
    path = folder / "cluster.toml"
    path.write_text(text + f"[qos]\ndeadline = {DEADLINE}\n[timeouts]\ngrace = 0.5\ntask = 15\n")
    return path

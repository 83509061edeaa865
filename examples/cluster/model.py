"""Writes model.safetensors beside this file: `python examples/cluster/model.py`. Untrained, to show how the machines are started."""

from pathlib import Path

import torch


def backbone() -> torch.nn.Module:
    """Return the backbone that every machine builds before it loads the weights."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, padding=1, stride=2), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(32 * 16 * 16, 10),
    )  # fmt: skip


if __name__ == "__main__":
    import fastee

    torch.manual_seed(0)
    net = fastee.attach(backbone(), exits=["1"], num_classes=10, example=torch.zeros(1, 3, 32, 32)).set_rule(thresholds=[0.2])
    net.save(Path(__file__).with_name("model.safetensors"), weights="all")
    print(f'fingerprint = "{net.fingerprint}"')

"""The trained network of the demo."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fastee.data.networks import SmallResNet
from fastee.errors import CheckpointMismatch

_FILE = Path(__file__).parent / "demo_network.safetensors"
_REPAIR = "pip install --force-reinstall --no-deps fastee"


def _read() -> tuple[dict, dict[str, torch.Tensor]]:
    try:
        with safe_open(_FILE, "pt") as file:
            return json.loads((file.metadata() or {})["fastee"]), {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointMismatch(f"{_FILE.name} cannot be read ({error}); repair: {_REPAIR}") from error


def demo_metadata() -> dict:
    """Return what the training script recorded: architecture, accuracies, epochs, seed, the rows it left out."""
    return _read()[0]


def demo_network(*, pixels: bool = False) -> SmallResNet:
    """Return the shipped residual network for Fashion-MNIST in eval mode: images [B,1,28,28] -> logits [B,10] fp32.

    Four stages of 16, 32, 64 and 64 channels. It reads what ``load`` gives: normalised fp32, or with `pixels` the uint8
    pixels. Trained by ``tools/train_demo_network.py`` on the official training file without the images of the embedded val
    split; ``demo_metadata()`` has the measured accuracies. Raises ``CheckpointMismatch`` for a damaged file.

    >>> demo_network()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    about, state = _read()
    net = SmallResNet(tuple(about["widths"]), tuple(about["blocks"]), pixels=(about["mean"], about["std"]) if pixels else None)
    try:
        net.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in state.items()})
    except RuntimeError as error:
        raise CheckpointMismatch(f"{_FILE.name} does not fit SmallResNet ({error}); repair: {_REPAIR}") from error
    return net.eval()

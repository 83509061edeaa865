"""timm's models by name, for ``fastee.attach("timm/resnet18", ...)``; its models themselves are plain modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

try:
    import timm
except ImportError as e:
    raise ImportError(f"fastee.integrations.timm needs timm: pip install 'fastee[timm]' ({e})") from e
except RuntimeError as e:  # timm imports torchvision, and that one stops where its library is of another build
    raise ImportError(f"timm could not be imported: {e}; torch and torchvision must be of one build, from one index") from e

from fastee.errors import did_you_mean


def make(name: str, num_classes: int | None = None, **shape: Any) -> nn.Module:
    """Return timm's model `name` in eval mode; `shape` goes to ``timm.create_model``, of which `checkpoint_path` reads weights, else random.

    Raises ``ValueError`` for an unknown name and for ``pretrained=True``, which would download.

    >>> from fastee.integrations.timm import make  # doctest: +SKIP
    >>> make("resnet18", num_classes=7).num_classes  # doctest: +SKIP
    7
    """
    if shape.get("pretrained"):
        itself = f"timm.create_model({name!r}, pretrained=True)"
        raise ValueError(f"pretrained: attach downloads nothing; pass checkpoint_path=, or {itself} as the backbone")
    if not timm.is_model(name):
        raise ValueError(f"backbone: timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
    if num_classes is not None:
        shape["num_classes"] = num_classes
    return timm.create_model(name, **shape).eval()


def example_for(model: nn.Module, shape: dict[str, Any]) -> Tensor:
    """Return a random image fp32 [1, C, H, W] of the size in timm's configuration of `model`, or in `shape` (``in_chans``, ``img_size``)."""
    channels, *size = model.pretrained_cfg.get("input_size") or (3, 224, 224)
    size = shape.get("img_size", size)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn(1, shape.get("in_chans", channels), height, width, generator=torch.Generator().manual_seed(0))

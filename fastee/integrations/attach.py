"""fastee.attach: exits in a module, in a model of Hugging Face, or in a model that is named."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import nn

from fastee import nn as networks

if TYPE_CHECKING:
    from fastee.integrations.transformers import ExitModel


def attach(
    backbone: nn.Module | str,
    exits: list[str] | list[int] | str,
    num_classes: int | None = None,
    example: Any = None,
    *,
    pool: str | list[str] = "auto",
    norm: str | None = "batch",
    mask: str | None = None,
    head: str | nn.Module | list[str | nn.Module] = "linear",
    **shape: Any,
) -> networks.EarlyExit | ExitModel:
    """Return the backbone with untrained exit heads behind the named submodules; all exits are off until a rule is set.

    Args:
        backbone: any module that answers logits [B, C] (or an object with ``.logits``), or a name: ``"timm/resnet18"`` for timm's models,
            a family (``"bert"``, ``"vit"``) of Hugging Face, or the folder of one of its checkpoints.
            A module's weights are shared; its weights, mode, hooks and answer stay as they are. A name downloads nothing: a family and
            a model of timm begin with random weights (timm's own ``checkpoint_path=`` reads a file).
        exits: names of submodules (as in ``named_modules()``) in the order in which the backbone runs them, or ``"auto:N"`` for N
            places at even cost with narrow carries; in Hugging Face's models also layers counted from 0, and ``"auto:N"`` means layers.
        num_classes: C; None takes it from the backbone's answer.
        example: a tensor, or a tuple or dict of the model's inputs, batch on dimension 0; at least one row. Models of Hugging Face and
            of timm make one up, but for audio, whose length is free.
        pool: per exit or for all: ``auto`` ([B,D] none, [B,T,D] cls, [B,D,*spatial] mean), or one of mean, mean_tokens, cls, last, none.
        norm: ``batch``, ``layer``, ``rms`` or None, between pool and linear.
        mask: name of the input [B, T] that is non-zero at real tokens, for ``pool="mean_tokens"``; it travels with every carry.
        head: kind of every head, see `fastee.ExitHead`; ``"shared"``: linear heads with common weight and bias (all exits equally wide),
            norms apart; or a list of one per exit. Where early maps say little in their mean: ``"conv:N"`` or a branch of your own, a module.
        shape: with a name, what its maker takes: fields of the family's configuration, or arguments of ``timm.create_model``.

    A model of Hugging Face comes back as `fastee.integrations.transformers.ExitModel`, for texts of any length; its ``.net`` is the
    `EarlyExit`. Raises ``ValueError`` for unknown names, for unknown, repeated or wrongly ordered exits, and ``CannotCut`` where the
    backbone cannot be cut.

    >>> import fastee, torch
    >>> conv, pool = torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1)
    >>> body = torch.nn.Sequential(conv, torch.nn.ReLU(), pool, torch.nn.Flatten(), torch.nn.Linear(8, 10))
    >>> net = fastee.attach(body, exits=["1"], num_classes=10, example=torch.zeros(1, 3, 8, 8))
    >>> net.eval()(torch.zeros(4, 3, 8, 8)).exit.tolist()
    [1, 1, 1, 1]
    """
    options: dict[str, Any] = {"pool": pool, "norm": norm, "mask": mask, "head": head}
    if isinstance(backbone, str) and backbone.startswith("timm/"):
        from fastee.integrations import timm

        backbone = timm.make(backbone.removeprefix("timm/"), num_classes, **shape)
        example = timm.example_for(backbone, shape) if example is None else example
    elif isinstance(backbone, str):
        from fastee.integrations import transformers

        backbone = transformers.make(backbone, num_classes, **shape)
    elif shape:
        raise TypeError(f"{next(iter(shape))}: not an argument of attach but of a named model, got a {type(backbone).__name__}")
    if _is_pretrained(backbone):
        from fastee.integrations import transformers

        return transformers.attach(backbone, exits, num_classes, example, **options)
    return networks.attach(backbone, exits, num_classes, example, **options)


def _is_pretrained(backbone: Any) -> bool:
    """Whether it is one of Hugging Face's, asked without importing transformers: whoever holds such a model has done so."""
    made_by = sys.modules.get("transformers.modeling_utils")
    return made_by is not None and isinstance(backbone, made_by.PreTrainedModel)

"""Exits in Hugging Face's encoders: BERT, DistilBERT, RoBERTa, ViT, DeiT, Wav2Vec2, HuBERT and their like, with `pipeline` and `Trainer`."""

from __future__ import annotations

import dataclasses
import inspect
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

try:
    from transformers import (
        CONFIG_MAPPING,
        MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING,
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        AutoConfig,
        PreTrainedModel,
        TrainerCallback,
    )
    from transformers.utils import ModelOutput
except ImportError as e:
    raise ImportError(f"fastee.integrations.transformers needs transformers: pip install 'fastee[huggingface]' ({e})") from e

from fastee import nn as networks
from fastee.errors import did_you_mean
from fastee.nn import EarlyExit

CLASSIFIERS = (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING)
SHORTEST = 8  # tokens: shorter texts are padded to this


@dataclasses.dataclass
class ExitOutput(ModelOutput):
    """What a model with exits answers: ``logits`` [B, C] of the exit taken, ``exit`` int64 [B], ``confidence`` fp32 [B]; ``loss`` with labels."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit: Tensor | None = None
    confidence: Tensor | None = None


class ExitModel(nn.Module):
    """A Hugging Face classifier with exits; made by `attach`. Called like the model itself, so that ``pipeline(...)`` and ``Trainer`` take it.

    Segments are traced for one number of tokens. A text is padded, with its mask, to the next power of two (at most the longest
    position that the model knows); each such length is traced at its first use, and all share the heads. ``.net`` is the network of the
    example's length: give it to ``fastee.fit``, ``fastee.calibrate`` and ``set_rule``; its rule holds for every length.
    With ``labels`` the answer has a loss: the mean cross entropy of all heads and of the model's own end.
    """

    def __init__(self, model: PreTrainedModel, names: list[str], example: dict[str, Tensor], options: dict[str, Any]):
        super().__init__()
        self.backbone, self.names, self.options = model, names, options
        self._accepts = set(inspect.signature(model.forward).parameters)  # Trainer hands in more than the model takes
        self._nets: dict[tuple, EarlyExit] = {}
        object.__setattr__(self, "net", None)  # not a submodule: the backbone would stand twice in the state
        object.__setattr__(self, "net", self._net_for(example))
        self.heads = self.net.heads
        self.train(model.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("backbone"), name)  # config, device, generation_config, ...: what pipelines ask for

    def _net_for(self, inputs: dict[str, Tensor]) -> EarlyExit:
        key = tuple((n, tuple(v.shape[1:])) for n, v in inputs.items())
        if key not in self._nets:
            example = {n: v[:1].repeat_interleave(2, 0) for n, v in inputs.items()}
            options = dict(self.options)
            if options["mask"] is None and "attention_mask" in inputs and "mean_tokens" in options["pool"]:
                options["mask"] = "attention_mask"
            net = networks.attach(self.backbone, self.names, example=example, **options)
            if self.net is not None:
                net.heads = self.net.heads
            self._nets[key] = net
        return self._nets[key]

    def _padded(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        ids = inputs.get("input_ids")
        if ids is None:
            return inputs
        tokens, longest = ids.shape[1], self.backbone.config.max_position_embeddings
        if self.backbone.config.model_type in ("roberta", "xlm-roberta", "camembert"):
            longest -= self.backbone.config.pad_token_id + 1  # their positions begin behind the padding's
        if tokens > longest:
            raise ValueError(f"input_ids: at most {longest} tokens, got {tokens}; tokenize with truncation=True")
        more = min(max(SHORTEST, 1 << (tokens - 1).bit_length()), longest) - tokens
        inputs = {**inputs, "attention_mask": inputs.get("attention_mask", torch.ones_like(ids))}
        fill = {"input_ids": self.backbone.config.pad_token_id or 0}
        return {n: F.pad(v, (0, more), value=fill.get(n, 0)) if v.shape[1:2] == (tokens,) else v for n, v in inputs.items()}

    def forward(self, *args: Tensor, labels: Tensor | None = None, return_dict: bool = True, deadline: float | None = None, **inputs: Any) -> Any:
        """Answer like the model, with exits; `deadline` in seconds as in `EarlyExit`. Inputs by name, the main one also by position."""
        if args:
            inputs = {self.backbone.main_input_name: args[0], **inputs}
        given = {n: v for n, v in inputs.items() if isinstance(v, Tensor) and n in self._accepts}
        if self.backbone.main_input_name not in given:
            raise ValueError(f"inputs: expected {self.backbone.main_input_name!r}, got {sorted(inputs)}")
        given = self._padded(given)
        net = self._net_for(given)
        loss = None
        if self.training or labels is not None:
            logits = self._all_logits(net, given)
            if labels is not None:
                loss = torch.stack([F.cross_entropy(z.float(), labels) for z in logits]).mean()
            if self.training:
                return ExitOutput(loss=loss, logits=logits[-1]) if return_dict else (loss, logits[-1])
        net.eval()
        if net is not self.net and (net.measure, net.thresholds) != (self.net.measure, self.net.thresholds):
            net.set_rule(self.net.measure, self.net.thresholds)
        out = net(given, deadline=deadline)
        return ExitOutput(loss, out.logits, out.exit, out.confidence) if return_dict else tuple(v for v in (loss, out.logits) if v is not None)

    @staticmethod
    def _all_logits(net: EarlyExit, inputs: dict[str, Tensor]) -> list[Tensor]:
        return net._all_logits(net._gather_inputs((inputs,), {}))


def attach(
    model: PreTrainedModel,
    exits: str | list[int] | list[str] = "auto:2",
    num_classes: int | None = None,
    example: Tensor | dict[str, Tensor] | None = None,
    *,
    pool: str | list[str] = "auto",
    norm: str | None = "batch",
    mask: str | None = None,
    head: str = "linear",
) -> ExitModel:
    """Return the model with untrained exit heads behind some of its layers; all exits are off until a rule is set.

    ``fastee.attach`` calls this for every model of Hugging Face, and for its families and folders by name.

    Args:
        model: a sequence, image or audio classifier of Hugging Face. Its weights are shared and stay as they are.
        exits: layers counted from 0, names of submodules, or ``"auto:N"``: N layers at even distances.
        num_classes: C; None takes it from the model's answer.
        example: the model's inputs by name, or its main one; needed for audio, whose length is free (later calls keep to it), else made up.
        pool: as in ``fastee.attach``; ``mean_tokens`` heeds the attention mask. Auto: the first token, for audio the mean of all.
        norm, mask, head: as in ``fastee.attach``.

    Raises ``TypeError``/``ValueError`` for wrong arguments and `fastee.errors.CannotCut` where the model cannot be cut.

    >>> import torch, transformers
    >>> from fastee.integrations.transformers import attach
    >>> shape = dict(vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=3)
    >>> model = attach(transformers.BertForSequenceClassification(transformers.BertConfig(**shape)).eval(), exits=[0])
    >>> model(torch.ones(2, 5, dtype=torch.long)).exit.tolist()
    [1, 1]
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers.PreTrainedModel, got {type(model).__name__}")
    if model.main_input_name == "input_values" and pool == "auto":
        pool = "mean_tokens"
    example = _example(model) if example is None else {model.main_input_name: example} if isinstance(example, Tensor) else dict(example)
    options = {"num_classes": num_classes, "pool": pool, "norm": norm, "mask": mask, "head": head}
    return ExitModel(model, layer_names(model, exits), example, options)


def make(name: str, num_classes: int | None = None, **shape: Any) -> PreTrainedModel:
    """Return the classifier that `name` says, in eval mode: a folder's or the local cache's checkpoint, or a family with random weights.

    Args:
        name: a folder with ``config.json`` and weights, a family (``"bert"``, ``"wav2vec2"``), or a checkpoint in Hugging Face's local cache.
        num_classes: ``num_labels`` of the configuration; None leaves it. A checkpoint without a classifier gets a random one.
        shape: fields of the configuration, instead of the family's or the checkpoint's.

    Nothing is downloaded. Raises ``ValueError`` for a name that would need it, a family without classifiers and unknown fields.

    >>> from fastee.integrations.transformers import make
    >>> make("distilbert", num_classes=3, vocab_size=99, dim=16, n_layers=2, n_heads=2, hidden_dim=16).num_labels
    3
    """
    if num_classes is not None:
        shape["num_labels"] = num_classes
    family = name in CONFIG_MAPPING and not (Path(name) / "config.json").is_file()
    try:
        config = CONFIG_MAPPING[name]() if family else AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as e:
        near = did_you_mean(name, CONFIG_MAPPING) if name.isidentifier() else ""  # what has a dash or a slash is a checkpoint's name
        raise ValueError(
            f"backbone: expected a module, a folder with config.json and weights, or a family of Hugging Face, got {name!r}{near}; "
            f"nothing is downloaded: pass the model itself, such as AutoModelForSequenceClassification.from_pretrained({name!r})"
        ) from e
    for field in shape:
        if not hasattr(config, field):
            raise ValueError(f"{field}: not a field of {type(config).__name__}{did_you_mean(field, config.to_dict())}")
    found = next((known[type(config)] for known in CLASSIFIERS if type(config) in known), None)
    if found is None:
        raise ValueError(f"backbone: transformers has no classifier of the family {config.model_type!r}, got {name!r}")
    kinds = found if isinstance(found, tuple) else (found,)  # DeiT has two: with and without its teacher's token
    kind = next((k for k in kinds if k.__name__ in (config.architectures or ())), kinds[0])
    return (kind(type(config)(**shape)) if family else kind.from_pretrained(name, local_files_only=True, **shape)).eval()


def layer_names(model: nn.Module, exits: str | list[int] | list[str]) -> list[str]:
    """Return the names of the layers that `exits` means: the longest ``ModuleList`` of one class is the stack; names stay as they are."""
    if isinstance(exits, (list, tuple)) and exits and all(isinstance(e, str) for e in exits):
        return list(exits)
    stacks = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1 and "conv" not in n]
    if not stacks:
        raise ValueError(f"model: {type(model).__name__} has no stack of layers")
    name, stack = max(stacks, key=lambda s: (len(s[1]), sum(p.numel() for p in s[1].parameters())))
    last = len(stack) - 1
    if isinstance(exits, str):
        kind, _, number = exits.partition(":")
        if kind != "auto" or not number.isdecimal() or not 1 <= int(number) <= last:
            raise ValueError(f'exits: expected "auto:N" with N from 1 to {last}, or layers, got {exits!r}')
        exits = sorted({math.ceil((i + 1) * len(stack) / (int(number) + 1)) - 1 for i in range(int(number))})
    wrong = [i for i in exits if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < last]
    if wrong or not exits:
        raise ValueError(f"exits: expected layers from 0 to {last - 1} (the last one is the model's own end), got {exits!r}")
    return [f"{name}.{i}" for i in exits]


def _example(model: PreTrainedModel) -> dict[str, Tensor]:
    c = model.config
    if model.main_input_name == "pixel_values" and hasattr(c, "image_size"):
        size = c.image_size if isinstance(c.image_size, (tuple, list)) else (c.image_size, c.image_size)
        return {"pixel_values": torch.randn(1, c.num_channels, *size, generator=torch.Generator().manual_seed(0))}
    if model.main_input_name == "input_ids":
        ids = (torch.arange(2 * SHORTEST)[None] * 7 + 5) % (c.vocab_size - 1) + 1
        return {"input_ids": ids[:, :SHORTEST], "attention_mask": torch.ones(1, SHORTEST, dtype=torch.long)}
    raise ValueError(f"example: needed for a model that takes {model.main_input_name!r}: its inputs by name")


class HeadsCallback(TrainerCallback):
    """For ``transformers.Trainer``: train the heads alone, with the backbone frozen and in eval mode; afterwards it is as it was."""

    def __init__(self, model: ExitModel):
        if not isinstance(model, ExitModel):
            raise TypeError(f"model: expected what fastee.integrations.transformers.attach returns, got {type(model).__name__}")
        self.model, self._before = model, []

    def on_init_end(self, args, state, control, **kwargs):
        args.remove_unused_columns = False  # Trainer keeps what forward() names, and ours takes what the model takes

    def on_train_begin(self, args, state, control, **kwargs):
        self._before = [(p, p.requires_grad) for p in self.model.backbone.parameters()]
        for p, _ in self._before:
            p.requires_grad_(False)

    def on_step_begin(self, args, state, control, **kwargs):
        self.model.backbone.eval()  # Trainer puts the whole model into train mode before every epoch

    def on_train_end(self, args, state, control, **kwargs):
        for p, wanted in self._before:
            p.requires_grad_(wanted)
        self.model.eval()

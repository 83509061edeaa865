"""Exits in Hugging Face's encoders: BERT, DistilBERT, RoBERTa, ViT, DeiT, Wav2Vec2, HuBERT and their like, with `pipeline` and `Trainer`."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

try:
    from transformers import PreTrainedModel, TrainerCallback
    from transformers.utils import ModelOutput
except ImportError:
    raise ImportError("fastee.integrations.transformers needs transformers: pip install 'fastee[huggingface]'") from None

import fastee
from fastee.nn import EarlyExit

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
            mask = "attention_mask" if "attention_mask" in inputs and self.options["pool"] == "mean_tokens" else None
            net = fastee.attach(self.backbone, self.names, example=example, mask=mask, **self.options)
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
    model: PreTrainedModel, exits: str | list[int] = "auto:2", example: dict[str, Tensor] | None = None, *, pool: str = "auto", head: str = "linear"
) -> ExitModel:  # fmt: skip
    """Return the model with untrained exit heads behind some of its layers; all exits are off until a rule is set.

    Args:
        model: a sequence, image or audio classifier of Hugging Face. Its weights are shared and stay as they are.
        exits: layers counted from 0, or ``"auto:N"``: N layers at even distances.
        example: the model's inputs by name; needed for audio, whose length is free (later calls keep to it), else made up.
        pool: as in ``fastee.attach``; ``mean_tokens`` heeds the attention mask. Auto: the first token, for audio the mean of all.
        head: as in ``fastee.attach``.

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
    return ExitModel(model, layer_names(model, exits), _example(model) if example is None else dict(example), {"pool": pool, "head": head})


def layer_names(model: nn.Module, exits: str | list[int]) -> list[str]:
    """Return the names of the layers that `exits` means: the longest ``ModuleList`` of one class is the stack."""
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
    if model.main_input_name == "pixel_values":
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

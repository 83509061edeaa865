"""Exits per token in Hugging Face's language models: in ``generate()``, with the skipped layers' keys and values kept up; and lossless drafts.

For models of Llama's shape (Llama, Mistral, Qwen2, Qwen3, Gemma and their like): layers with ``input_layernorm``, ``self_attn`` with
``k_proj`` and ``v_proj``, rotary positions. The check after a layer is one fused call: final norm, head, statistics, rule; the
logits of a token that stays are never written.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

try:
    from transformers import DynamicCache, PreTrainedModel
except ImportError:
    raise ImportError("fastee.integrations.causal_lm needs transformers: pip install 'fastee[huggingface]'") from None

from fastee import ops
from fastee.calibration import thresholds as find_thresholds

MEASURES = ("max_prob", "margin", "entropy", "energy")


class _Stack:
    """What fastee needs to know of a model: its layers, final norm and head, and how one layer keeps keys and values."""

    def __init__(self, model: PreTrainedModel):
        if not isinstance(model, PreTrainedModel) or not isinstance(getattr(model, "lm_head", None), nn.Linear):
            raise TypeError(f"model: expected a causal language model with an lm_head, got {type(model).__name__}")
        body = getattr(model, "model", None)
        if not isinstance(getattr(body, "layers", None), nn.ModuleList) or not hasattr(body, "norm") or not hasattr(body, "rotary_emb"):
            raise TypeError(f"model: {type(model).__name__} has no model.layers, model.norm and model.rotary_emb; models of Llama's shape are expected")
        self.model, self.layers, self.norm, self.head = model, body.layers, body.norm, model.lm_head
        for i, layer in enumerate(self.layers):
            for path in ("input_layernorm", "self_attn.k_proj", "self_attn.v_proj"):
                at: Any = layer
                for atom in path.split("."):
                    at = getattr(at, atom, None)
                if at is None:
                    raise TypeError(f"model: layer {i} of {type(model).__name__} has no {path}; models of Llama's shape are expected")
        self.rotate: Callable = sys.modules[type(self.layers[0]).__module__].apply_rotary_pos_emb
        eps = getattr(self.norm, "variance_epsilon", getattr(self.norm, "eps", 1e-6))
        self.gain = 1.0 + self.norm.weight.detach() if "Gemma" in type(self.norm).__name__ else self.norm.weight.detach()
        self.final = ops.Norm("rms", self.gain, None, eps)

    def check(self, h: Tensor, measure: str, threshold: float, logits: bool):
        """Decide on hidden states [B, D] by the model's own norm and head."""
        return ops.exit_step(h, self.head.weight, self.head.bias, "none", self.final, measure, threshold, logits=logits)

    def keep_up(self, layer: nn.Module, h: Tensor, position_embeddings, cache, i: int) -> tuple[Tensor, Tensor]:
        """Write a skipped layer's keys and values, computed from the state [B, T, D] at which the token left (CALM, section 3.3)."""
        a = layer.self_attn
        x = layer.input_layernorm(h)
        shape = (*x.shape[:-1], -1, a.head_dim)
        key, value = a.k_proj(x).view(shape), a.v_proj(x).view(shape)
        key = (a.k_norm(key) if hasattr(a, "k_norm") else key).transpose(1, 2)
        cos, sin = position_embeddings
        key = self.rotate(key, key, cos, sin)[1]
        return cache.update(key, value.transpose(1, 2), i)


class _Subset:
    """A cache as some rows of a batch see it: keys and values come in for those rows, and the whole batch's are written."""

    def __init__(self, cache, keep: Tensor, others: tuple[Tensor, Tensor], rows: Tensor):
        self.cache, self.keep, self.others, self.rows = cache, keep, others, rows

    def update(self, key: Tensor, value: Tensor, i: int, *args, **kwargs):
        whole = []
        for mine, theirs in ((key, self.others[0]), (value, self.others[1])):
            both = mine.new_empty((self.rows.shape[0], *mine.shape[1:]))
            both[self.keep], both[~self.rows] = mine, theirs
            whole.append(both)
        keys, values = self.cache.update(*whole, i)
        return keys[self.keep], values[self.keep]


class TokenExits:
    """Exits per token in a causal language model; made by `attach_tokens`. ``model.generate()`` then leaves layers out by itself.

    A token leaves after the first exit layer whose score reaches its threshold, in a batch each row by itself; later layers only keep up
    their keys and values for it. The prompt always runs through all layers. With every threshold at +inf (the state after `attach_tokens`)
    the model's own code runs and nothing is between. ``depth``: how many decoded tokens left at each exit, the last entry the end.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int]):
        self.stack = _Stack(model)
        last = len(self.stack.layers) - 1
        layers = list(layers)
        if not layers or any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < last for i in layers) or layers != sorted(set(layers)):
            raise ValueError(f"layers: expected rising numbers from 0 to {last - 1}, got {layers}")
        self.model, self.layers = model, layers
        self.thresholds, self.measure = [math.inf] * len(layers), "max_prob"
        self.depth = [0] * (len(layers) + 1)
        self._stay: Tensor | None = None  # bool [B]: rows that have not left; None before anyone left
        self._left = False  # every row has
        self._decoding = False

    def set_rule(self, measure: str | None = None, thresholds: Sequence[float] | None = None) -> TokenExits:
        """Set the measure and one threshold per exit layer, as `EarlyExit.set_rule`; all at +inf takes everything out of the model again."""
        if measure is not None and measure not in MEASURES:
            raise ValueError(f"measure: expected one of {list(MEASURES)}, got {measure!r}")
        values = self.thresholds if thresholds is None else [float(t) for t in thresholds]
        if len(values) != len(self.layers) or any(math.isnan(t) for t in values):
            raise ValueError(f"thresholds: expected {len(self.layers)} numbers, one per layer {self.layers}, got {values}")
        self.measure, self.thresholds = measure or self.measure, values
        for module in (*self.stack.layers, self.stack.head):
            module.__dict__.pop("forward", None)
        if any(t != math.inf for t in values):
            rules = dict(zip(self.layers, values, strict=True))
            for i, layer in enumerate(self.stack.layers):
                layer.forward = self._layer(i, layer, rules.get(i, math.inf))
            self.stack.head.forward = self._head(self.stack.head)
        return self

    def remove(self) -> None:
        """Take everything out of the model again."""
        self.set_rule(thresholds=[math.inf] * len(self.layers))

    def _layer(self, i: int, layer: nn.Module, threshold: float) -> Callable:
        own, stack, exits = type(layer).forward.__get__(layer), self.stack, self.layers

        def forward(hidden_states: Tensor, *args: Any, **named: Any) -> Tensor:
            cache = named.get("past_key_values")
            if hidden_states.shape[1] != 1 or cache is None or not cache.get_seq_length() or torch.is_grad_enabled():
                self._stay, self._decoding = None, False  # the prompt, or training: the model's own way
                return own(hidden_states, *args, **named)
            if i == 0:
                self._stay, self._left, self._decoding = None, False, True
            stay = self._stay
            if stay is None:
                h = own(hidden_states, *args, **named)
            elif self._left:
                stack.keep_up(layer, hidden_states, named["position_embeddings"], cache, i)
                return hidden_states
            else:
                h = self._some(layer, own, i, hidden_states, stay, args, named)
            if threshold != math.inf:
                self._check(h, stay, threshold, exits.index(i))
            return h

        return forward

    def _some(self, layer, own, i, h, stay, args, named) -> Tensor:
        """Run a layer for the rows that stay; the others' keys and values are kept up."""
        keep, cache = stay.nonzero().squeeze(1), named["past_key_values"]
        cos, sin = named["position_embeddings"]
        pick = lambda t, rows: t if t is None or t.shape[0] == 1 else t[rows]
        left: list[tuple[Tensor, Tensor]] = []
        self.stack.keep_up(layer, h[~stay], (pick(cos, ~stay), pick(sin, ~stay)), _Catch(left), i)
        named = {
            **named, "past_key_values": _Subset(cache, keep, left[0], stay), "position_embeddings": (pick(cos, keep), pick(sin, keep)),
            "attention_mask": pick(named.get("attention_mask"), keep), "position_ids": pick(named.get("position_ids"), keep),
        }  # fmt: skip
        out = h.clone()
        out[keep] = own(h[keep], *args, **named)
        return out

    def _check(self, h: Tensor, stay: Tensor | None, threshold: float, exit_: int) -> None:
        rows = h[:, 0] if stay is None else h[stay, 0]
        step = self.stack.check(rows, self.measure, threshold, False)
        if step.count == rows.shape[0]:
            return
        before = torch.ones(h.shape[0], dtype=torch.bool) if stay is None else stay
        self._stay, self._left = before.clone(), step.count == 0
        self._stay[before] = ~step.exits
        self.depth[exit_] += rows.shape[0] - step.count

    def _head(self, head: nn.Linear) -> Callable:
        own = type(head).forward.__get__(head)

        def forward(h: Tensor) -> Tensor:
            if self._decoding:
                self.depth[-1] += h.shape[0] if self._stay is None else int(self._stay.sum())
            self._stay = None
            return own(h)

        return forward

    @torch.no_grad()
    def calibrate(
        self, prompts: Sequence[Tensor], max_drop: float = 0.05, confidence: float = 0.95, *, measure: str = "margin", tokens: int = 16,
        tokens_per_prompt: int | None = 1, seed: int = 0,
    ):  # fmt: skip
        """Set the thresholds so that at most `max_drop` of the tokens differ from the full model's, with `confidence` (Learn then Test, CALM).

        Every prompt (int64 [1, T]) is continued by `tokens` greedy tokens of the full model; at each exit layer the score and whether the token
        agrees are noted. `tokens_per_prompt` of them, drawn with `seed`, count: with 1 (default) the draws are independent and the bound holds
        for a random token of a random prompt; None takes all, which gives more rows that depend on each other, and the bound is then a guide.
        Contexts are the full model's: under exits later tokens see what earlier exits wrote. Returns the report of
        ``fastee.calibration.thresholds``.
        """
        self.remove()
        draw = torch.Generator().manual_seed(seed)
        scores, agree = [], []
        for prompt in prompts:
            whole = self.model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
            states = self.model.model(whole[:, :-1], output_hidden_states=True, use_cache=False).hidden_states
            at = torch.arange(prompt.shape[1] - 1, whole.shape[1] - 1)
            if tokens_per_prompt is not None:
                at = at[torch.randperm(len(at), generator=draw)[:tokens_per_prompt]]
            steps = [self.stack.check(states[i + 1][0, at], measure, math.inf, False) for i in self.layers]
            scores.append(torch.stack([s.confidence for s in steps], 1))
            agree.append(torch.stack([s.label == whole[0, at + 1] for s in steps], 1))
        score, same = torch.cat(scores), torch.cat(agree)
        cost = [i + 1 for i in self.layers] + [len(self.stack.layers)]
        report = find_thresholds(score.numpy(), torch.cat([same, torch.ones(len(same), 1, dtype=torch.bool)], 1).numpy(), cost, max_drop=max_drop, confidence=confidence)
        self.set_rule(measure, list(report.thresholds))
        return report


class _Catch:
    """Takes what a layer would write into its cache."""

    def __init__(self, into: list):
        self.into = into

    def update(self, key: Tensor, value: Tensor, i: int, *args, **kwargs):
        self.into.append((key, value))
        return key, value


def attach_tokens(model: PreTrainedModel, layers: Sequence[int]) -> TokenExits:
    """Give a causal language model exits behind the given layers (counted from 0), all off until a rule is set; see `TokenExits`.

    Raises ``TypeError`` for a model of another shape than Llama's, naming the part, and ``ValueError`` for layers that are not there.

    >>> import torch, transformers
    >>> from fastee.integrations.causal_lm import attach_tokens
    >>> shape = dict(vocab_size=50, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, eos_token_id=None)
    >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
    >>> exits = attach_tokens(model, [1]).set_rule("max_prob", [0.0])
    >>> model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=4, do_sample=False).shape[1], exits.depth
    (7, [3, 0])
    """
    return TokenExits(model, layers)


class Speculation(NamedTuple):
    tokens: Tensor  # int64 [1, T + new]
    drafted: int
    accepted: int


@torch.no_grad()
def speculate(
    model: PreTrainedModel, input_ids: Tensor, max_new_tokens: int, *, layer: int, draft: int = 4, measure: str = "margin", threshold: float = 0.0
) -> Speculation:  # fmt: skip
    """Continue a prompt int64 [1, T] greedily, drafting with the layers up to `layer` and verifying with the others: the same tokens, no loss.

    Up to `draft` tokens are drafted in a row, fewer once a draft's score falls below `threshold`; the remaining layers then judge all of
    them in one pass that reuses the draft's states, keys and values, and the longest agreeing beginning is kept with the model's own
    next token. Equal to plain greedy decoding but where two tokens tie within rounding (a product over several tokens adds in another
    order). Stops after an end-of-sequence token of the model's generation config. Raises ``ValueError`` for wrong arguments.

    >>> import torch, transformers
    >>> from fastee.integrations.causal_lm import speculate
    >>> shape = dict(vocab_size=50, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, eos_token_id=None)
    >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
    >>> speculate(model, torch.ones(1, 3, dtype=torch.long), 5, layer=1).tokens.shape
    torch.Size([1, 8])
    """
    stack = _Stack(model)
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids: expected one prompt [1, T], got {list(input_ids.shape)}")
    if not 0 <= layer < len(stack.layers) - 1 or draft < 1 or max_new_tokens < 1:
        raise ValueError(f"layer, draft, max_new_tokens: expected 0..{len(stack.layers) - 2}, >= 1, >= 1, got {layer}, {draft}, {max_new_tokens}")
    ends = model.generation_config.eos_token_id
    ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    cache = DynamicCache(config=model.config)
    h = model.model(input_ids, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
    pending = int(stack.head(h).argmax())
    tokens, drafted, accepted = [*input_ids[0].tolist(), pending], 0, 0
    goal = input_ids.shape[1] + max_new_tokens
    body = model.model

    def run(layers: range, x: Tensor, start: int) -> Tensor:
        count = x.shape[1]
        at = torch.arange(start, start + count)[None]
        rotary, mask = body.rotary_emb(x, position_ids=at), None
        if count > 1:
            mask = torch.full((count, start + count), torch.finfo(x.dtype).min, dtype=x.dtype).triu(start + 1)[None, None]
        for i in layers:
            x = stack.layers[i](x, attention_mask=mask, position_embeddings=rotary, position_ids=at, past_key_values=cache, use_cache=True)
        return x

    while len(tokens) < goal and pending not in ends:
        start, states, guesses = len(tokens) - 1, [], [pending]
        for _ in range(min(draft, goal - len(tokens))):
            x = body.embed_tokens(torch.tensor([[guesses[-1]]]))
            states.append(run(range(layer + 1), x, start + len(states)))
            step = stack.check(states[-1][:, 0], measure, threshold, False)
            guesses.append(int(step.label))
            if not bool(step.exits) or guesses[-1] in ends:
                break
        full = stack.head(body.norm(run(range(layer + 1, len(stack.layers)), torch.cat(states, 1), start)))[0].argmax(-1).tolist()
        same = next((j for j, (a, b) in enumerate(zip(guesses[1:], full, strict=True)) if a != b), len(full))
        drafted, accepted = drafted + len(full), accepted + same
        # full[same] is the model's own token where the draft first erred; when all agreed, the last guess is it
        new = full[: same + 1]
        new = new[: next((j + 1 for j, t in enumerate(new) if t in ends), len(new))]
        tokens += new
        pending = tokens[-1]
        for i in range(len(stack.layers)):  # forget what was written for guesses that were wrong
            part = cache.layers[i]
            part.keys, part.values = part.keys[:, :, : len(tokens) - 1], part.values[:, :, : len(tokens) - 1]
    return Speculation(torch.tensor([tokens[:goal]]), drafted, accepted)

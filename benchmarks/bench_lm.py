"""Language models on the CPU: ``generate()`` with exits off, with exits at several rates, and lossless drafts, beside transformers' own.

The models are random. Their layers are scaled so that the words depend on all of them, else every exit would agree; for the drafts the layers
behind the exit are damped instead, as training with exits (LayerSkip) would make them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from fastee.testing.bench import Case, Context, Group

LAYERS, WIDTH, VOCABULARY, TOKENS, PROMPT = 12, 128, 1000, 24, 8


def llama(seed: int, damped_after: int | None = None):
    """Return a random 12-layer Llama, 128 wide, 1,000 words; `damped_after`: the layers behind that one change little."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = dict(hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=4)
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=256, bos_token_id=None, eos_token_id=None, **shape)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            gain = 6.0 if damped_after is None or i <= damped_after else 0.5
            layer.mlp.down_proj.weight.mul_(gain)
            layer.self_attn.o_proj.weight.mul_(gain)
        model.lm_head.weight.mul_(30)
    return model


def prompt(seed: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(seed))


def generate(model, ids: torch.Tensor, **named) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0, **named)[0, -TOKENS:]


def threshold_for(model, ids: torch.Tensor, rate: float) -> tuple[float, float]:
    """Return the one margin, of all exits, at which about `rate` of the tokens leave before the end, and the rate that it gives."""
    from fastee.integrations.causal_lm import attach_tokens

    exits = attach_tokens(model, list(range(LAYERS - 1)))

    def left(threshold: float) -> float:
        exits.set_rule("margin", [threshold] * (LAYERS - 1))
        exits.depth = [0] * LAYERS
        generate(model, ids)
        return 1 - exits.depth[-1] / sum(exits.depth)

    try:
        low, high = 0.0, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (middle, high) if left(middle) > rate else (low, middle)
        return min(((t, left(t)) for t in (low, high)), key=lambda found: abs(found[1] - rate))
    finally:
        exits.remove()


def cases(ctx: Context) -> Iterator[Group]:
    import transformers

    from fastee.integrations.causal_lm import attach_tokens, speculate

    transformers.logging.set_verbosity_error()
    bare, model, ids = llama(ctx.seed), llama(ctx.seed), prompt(ctx.seed)
    exits = attach_tokens(model, list(range(LAYERS - 1)))
    plain = Case("bare", lambda: generate(bare, ids), note="Hugging Face's generate")
    if not torch.equal(generate(bare, ids), generate(model, ids)):
        raise RuntimeError("exits that are off changed the words")
    shape = f"{LAYERS} layers x {WIDTH}, {TOKENS} tokens"
    yield Group("generate", f"{shape}, exits off", "fp32", [Case("fastee", lambda: generate(model, ids), note="every threshold +inf"), plain],
                baseline="bare", bars=(">= 0.99x bare",))  # fmt: skip
    middle = LAYERS // 2 - 1
    for rate in (0.0, 0.5, 1.0):
        # one exit, half way: what leaves skips the other half
        exits.set_rule("margin", [math.inf] * middle + [{0.0: 2.0, 1.0: 0.0}.get(rate, half(bare, ids, middle))] + [math.inf] * (LAYERS - 2 - middle))
        exits.depth = [0] * LAYERS
        generate(model, ids)
        left = exits.depth[middle]
        yield Group("generate", f"{shape}, {left} of {TOKENS - 1} leave half way", "fp32",
                    [Case("fastee", lambda: generate(model, ids), note="one check a token"), plain], baseline="bare",
                    bars=(">= 1x bare",) if left else ())  # fmt: skip
    exits.remove()
    draft, layer, count = llama(ctx.seed, damped_after=2), 2, 4
    own = speculate(draft, ids, TOKENS, layer=layer, draft=count)
    if not torch.equal(own.tokens[0, -TOKENS:], generate(draft, ids)):
        raise RuntimeError("the drafts changed the words")
    yield Group(
        "generate", f"{shape}, drafts by {layer + 1} layers", "fp32",
        [
            Case("fastee", lambda: speculate(draft, ids, TOKENS, layer=layer, draft=count), note=f"speculate: {own.accepted} of {own.drafted} drafts accepted"),
            Case("transformers", lambda: generate(draft, ids, assistant_early_exit=layer + 1, num_assistant_tokens=count), note="generate(assistant_early_exit=3)"),
            Case("bare", lambda: generate(draft, ids), note="generate"),
        ],
        baseline="transformers", bars=(">= 1x transformers",),
    )  # fmt: skip


def half(model, ids: torch.Tensor, layer: int) -> float:
    """Return the median margin behind a layer over the words of the whole model."""
    from fastee.integrations.causal_lm import attach_tokens

    exits = attach_tokens(model, [layer])
    with torch.no_grad():
        whole = torch.cat([ids, generate(model, ids)[None]], 1)
        states = model.model(whole[:, :-1], output_hidden_states=True, use_cache=False).hidden_states[layer + 1]
        return float(exits.stack.check(states[0, -TOKENS:], "margin", math.inf, False).confidence.median())

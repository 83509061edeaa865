"""economize: CALM for Hugging Face language models. Its check after a layer and whole tokens."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch

import fastee
from fastee.testing.bench import Case, Context, Group

from . import Peer

PEER = Peer("0.3.2", "Apache-2.0", (("transformers==5.23.0",), ("--no-deps", "economize==0.3.2")), {"HF_HUB_OFFLINE": "1"})
LAYERS, WIDTH, VOCABULARY, TOKENS = 12, 128, 1000, 16


def llama(seed: int):
    """Return a random 12-layer Llama, 128 wide, 1,000 words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = dict(hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=4)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=256, bos_token_id=None, eos_token_id=None, **shape)
    ).eval()


def head_of(model):
    """Return fastee's check of a hidden state [B, D]: the model's own norm and head, margin of the two best words; nothing leaves at 2."""
    final = model.model.norm
    norm = fastee.ops.Norm("rms", final.weight.detach(), None, final.variance_epsilon)
    weight = model.lm_head.weight.detach()
    return lambda h: fastee.ops.exit_head(h, weight, None, "none", norm, "margin", 2.0)


def generate(model, ids: torch.Tensor):
    return model.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0)[0, -TOKENS:]


def cases(ctx: Context) -> Iterator[Group]:
    from economize import apply
    from economize.techniques.dynamic_depth.calm import CalmConfig

    bare, hooked = llama(ctx.seed), llama(ctx.seed)
    model = apply(llama(ctx.seed), CalmConfig(confidence="softmax", threshold=1.0, min_layer=1))
    policy, ours = model.techniques["calm"].make_policy(), head_of(bare)
    policy.exited, policy._threshold = torch.zeros(1, 1, dtype=torch.bool), torch.ones(1, 1)
    states = ctx.rotate(lambda i: (torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(i)),), 4 * WIDTH)
    pass_ = SimpleNamespace(valid=None)
    with torch.no_grad():
        theirs = model.techniques["calm"].measure(1, states[0][0][None], states[0][0][None])
    if abs(float(theirs) - float(ours(*states[0]).confidence)) > 1e-4:
        raise RuntimeError(f"margins disagree: {float(theirs)} and {float(ours(*states[0]).confidence)}")
    yield Group(
        "exit_head",
        f"1x{WIDTH}->{VOCABULARY}, rms norm, margin",
        "fp32",
        [
            Case("fastee", ours, states),
            Case(
                "economize",
                lambda h: policy.transform(1, h[None], h[None], None, pass_),
                states,
                note="CALM's check after a layer; none fires",
            ),
        ],
        baseline="economize",
        bytes=4 * WIDTH * VOCABULARY,
        flops=2 * WIDTH * VOCABULARY,
        working_set=4 * WIDTH * VOCABULARY,
        bars=(">= 1x economize",),
    )

    check = head_of(hooked)
    for layer in hooked.model.layers[1:]:
        layer.register_forward_hook(lambda _, __, out: check(out[:, -1]) and None)
    ids = torch.randint(VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(ctx.seed))
    if not torch.equal(generate(bare, ids), generate(hooked, ids)):
        raise RuntimeError("the checks changed the words")
    yield Group(
        "generate",
        f"{LAYERS} layers x {WIDTH}, {TOKENS} tokens, {LAYERS - 1} checks each, none fires",
        "fp32",
        [
            Case("fastee", lambda: generate(hooked, ids), note="Hugging Face's generate, our check in hooks"),
            Case("economize", lambda: model.decode(ids[0], TOKENS), note="its own loop"),
            Case("bare", lambda: generate(bare, ids), note="Hugging Face's generate, no checks"),
        ],
        baseline="economize",
        bars=(">= 1x economize",),
    )


CASES = {"exit_step": cases}

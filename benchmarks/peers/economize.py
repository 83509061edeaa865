"""economize: CALM for Hugging Face language models. Its check after a layer, and whole tokens at the same thresholds."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch

from fastee.testing.bench import Case, Context, Group

from ..bench_lm import LAYERS, TOKENS, VOCABULARY, WIDTH, generate, llama, prompt, threshold_for
from . import Peer

PEER = Peer("0.3.2", "Apache-2.0", (("transformers==5.23.0",), ("--no-deps", "economize==0.3.2")), {"HF_HUB_OFFLINE": "1"})


def attached(seed: int):
    """Return a model of its own with fastee's exits behind every layer but the last, and them."""
    from fastee.integrations.causal_lm import attach_tokens

    model = llama(seed)
    return model, attach_tokens(model, list(range(LAYERS - 1)))


def cases(ctx: Context) -> Iterator[Group]:
    import transformers
    from economize import apply
    from economize.techniques.dynamic_depth.calm import CalmConfig

    transformers.logging.set_verbosity_error()
    configured = lambda threshold: apply(llama(ctx.seed), CalmConfig(confidence="softmax", threshold=threshold, min_layer=1))
    bare, (ours, exits), theirs, ids = llama(ctx.seed), attached(ctx.seed), configured(1.0), prompt(ctx.seed)
    policy = theirs.techniques["calm"].make_policy()
    policy.exited, policy._threshold = torch.zeros(1, 1, dtype=torch.bool), torch.ones(1, 1)
    states = ctx.rotate(lambda i: (torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(i)),), 4 * WIDTH)
    check, nobody = exits.stack.check, SimpleNamespace(valid=None)
    with torch.no_grad():
        margin = float(theirs.techniques["calm"].measure(1, states[0][0][None], states[0][0][None]))
        if abs(margin - float(check(*states[0], "margin", 2.0, False).confidence)) > 1e-4:
            raise RuntimeError(f"margins disagree: {margin} and {float(check(*states[0], 'margin', 2.0, False).confidence)}")
    yield Group(
        "exit_head", f"1x{WIDTH}->{VOCABULARY}, rms norm, margin", "fp32",
        [
            Case("fastee", lambda h: check(h, "margin", 2.0, False), states),
            Case("economize", lambda h: policy.transform(1, h[None], h[None], None, nobody), states, note="CALM's check after a layer; none fires"),
        ],
        baseline="economize", bytes=4 * WIDTH * VOCABULARY, flops=2 * WIDTH * VOCABULARY, working_set=4 * WIDTH * VOCABULARY,
        bars=("<= 20 us",),  # a twentieth of the 0.40 ms that were measured for economize's on another machine
    )  # fmt: skip
    checks = (LAYERS - 1) * (TOKENS - 1)
    for rate in (0.0, 0.25, 0.5, 0.75, 1.0):
        threshold, left = {0.0: (1.0, 0.0), 1.0: (0.0, 1.0)}.get(rate) or threshold_for(bare, ids, rate)
        calm = configured(threshold)
        # economize's rule is u > threshold, ours u >= threshold: no margin of these words lies on one
        exits.set_rule("margin", [threshold] * (LAYERS - 1) if rate else [2.0] * (LAYERS - 1))
        exits.depth = [0] * LAYERS
        words = generate(ours, ids)
        if not torch.equal(words, calm.decode(ids[0], TOKENS).tokens[-TOKENS:]):
            raise RuntimeError(f"threshold {threshold}: the words differ")
        if 1 - exits.depth[-1] / sum(exits.depth) != left:
            raise RuntimeError(f"threshold {threshold}: {exits.depth} left, expected {left:.0%}")
        depth = sum(layer * n for layer, n in enumerate(exits.depth, 1)) / sum(exits.depth)
        found = [
            Case("fastee", lambda: generate(ours, ids), note="Hugging Face's generate, attach_tokens"),
            Case("economize", lambda calm=calm: calm.decode(ids[0], TOKENS), note="its own loop"),
            Case("bare", lambda: generate(bare, ids), note="Hugging Face's generate, no checks"),
        ]
        bars = (">= 1x economize", *(() if rate else (f"<= {20 * checks} us over bare",)))  # 20 us a check, in the loop
        shape = f"{LAYERS} layers x {WIDTH}, {TOKENS} tokens, {left:.0%} leave, {depth:.1f} layers each"
        yield Group("generate", shape, "fp32", found, baseline="economize", bars=bars)


CASES = {"exit_step": cases}

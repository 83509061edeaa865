"""tide-inference: learned routers for Hugging Face language models, its CPU path. Its check and whole tokens."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

import fastee
from fastee.testing.bench import Case, Context, Group

from ..bench_lm import LAYERS, TOKENS, WIDTH, generate, llama
from . import Peer

PEER = Peer(
    "0.2.1",
    "Apache-2.0",
    (("transformers==5.23.0", "pyyaml==6.0.3"), ("--no-build-isolation", "--no-deps", "tide-inference==0.2.1")),
    {"TIDE_NO_CUDA": "1", "HF_HUB_OFFLINE": "1"},
)
EVERY, NARROW = 4, 64


def head_of(model):
    """Return fastee's check of a hidden state [B, D]: the model's own norm and head, margin of the two best words; nothing leaves at 2."""
    final = model.model.norm
    norm = fastee.ops.Norm("rms", final.weight.detach(), None, final.variance_epsilon)
    weight = model.lm_head.weight.detach()
    return lambda h: fastee.ops.exit_head(h, weight, None, "none", norm, "margin", 2.0)


def runtime(model, threshold: float):
    """Return TIDE around a model, with a router after layers 3, 7 and 11 that scores every token 0.5."""
    from TIDE import TIDE, TIDEConfig
    from TIDE.router import RouterCheckpoint, TokenRouter

    routers = {k: TokenRouter(WIDTH, NARROW) for k in range(EVERY - 1, LAYERS, EVERY)}
    for router in routers.values():
        router.up.weight.data.zero_()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "routers.pt"
        RouterCheckpoint(routers, WIDTH, NARROW).save(path)
        return TIDE(model, path, config=TIDEConfig(exit_threshold=threshold, min_layers=2))


def cases(ctx: Context) -> Iterator[Group]:
    logging.disable(logging.INFO)  # it logs statistics of every text it makes
    bare, hooked = llama(ctx.seed), llama(ctx.seed)
    never, always = runtime(llama(ctx.seed), 0.6), runtime(llama(ctx.seed), 0.4)
    router, final = never.routers[EVERY - 1], never._final_norm
    two, bias = torch.randn(2, WIDTH), torch.zeros(2)
    norm = fastee.ops.Norm("rms", final.weight.detach(), None, final.variance_epsilon)
    states = ctx.rotate(lambda i: (torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(i)),), 4 * WIDTH)
    yield Group(
        "exit_head",
        f"1x{WIDTH}, rms norm, gate",
        "fp32",
        [
            Case(
                "fastee",
                lambda h: fastee.ops.exit_head(h, two, bias, "none", norm),
                states,
                note="norm, a linear head of two classes, rule",
            ),
            Case("fastee_words", head_of(bare), states, note="norm, the language-model head over 1,000 words, rule"),
            Case(
                "tide-inference",
                lambda h: bool((never._score_router(h, EVERY - 1) > 0.6).all()),
                states,
                note=f"norm, router {WIDTH}->{router.down.out_features}->1, rule",
            ),
        ],
        baseline="tide-inference",
        bars=(">= 1x tide-inference",),
    )

    check = head_of(hooked)
    for layer in list(hooked.model.layers)[EVERY - 1 :: EVERY]:
        layer.register_forward_hook(lambda _, __, out: check(out[:, -1]) and None)
    ids = torch.randint(3, 1000, (1, 8), generator=torch.Generator().manual_seed(ctx.seed))
    run = lambda tide: tide.generate(ids, max_new_tokens=TOKENS, temperature=0)
    yield Group(
        "generate",
        f"{LAYERS} layers x {WIDTH}, {TOKENS} tokens, {LAYERS // EVERY} checks each",
        "fp32",
        [
            Case("fastee", lambda: generate(hooked, ids), note="Hugging Face's generate, our check in hooks, none fires"),
            Case("tide-inference", lambda: run(never), note="none fires"),
            Case(
                "tide_all_leave",
                lambda: run(always),
                note=f"every token leaves after layer {EVERY} of {LAYERS}: all layers run all the same",
            ),
            Case("bare", lambda: generate(bare, ids), note="Hugging Face's generate, no checks"),
        ],
        baseline="tide-inference",
        bars=(">= 1x tide-inference",),
    )


CASES = {"exit_step": cases}

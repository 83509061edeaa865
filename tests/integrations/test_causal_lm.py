"""Exits per token in generate(): the definition (every layer, tokens replaced) against the runner; caches, batches, calibration, drafts."""

import math

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'fastee[huggingface]'")

from fastee.integrations.causal_lm import attach_tokens, speculate  # noqa: E402

SHAPE = dict(vocab_size=60, hidden_size=32, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, eos_token_id=None, bos_token_id=None)
INF = math.inf


def make(name="Llama", seed=0):
    torch.manual_seed(seed)
    model = getattr(transformers, name + "ForCausalLM")(getattr(transformers, name + "Config")(**SHAPE)).eval()
    with torch.no_grad():  # random layers change a state little, so that every exit would agree: make them matter
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(6)
            layer.self_attn.o_proj.weight.mul_(6)
        model.lm_head.weight.mul_(40)
    return model


def greedy(model, ids, tokens=12, **named):
    return model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0, **named)


@torch.no_grad()
def definition(model, ids, tokens, layers, thresholds):
    """One row: at every step run layer by layer, leave at the margin, and fill the keys and values of later layers from that state."""
    cache = transformers.DynamicCache(config=model.config)
    h = model.model(ids, past_key_values=cache).last_hidden_state
    out, exits, margins = [int(model.lm_head(h[:, -1]).argmax())], [], []
    while len(out) < tokens:
        at = torch.tensor([[ids.shape[1] + len(out) - 1]])
        x = model.model.embed_tokens(torch.tensor([[out[-1]]]))
        rotary, left = model.model.rotary_emb(x, position_ids=at), None
        for i, layer in enumerate(model.model.layers):
            y = layer(x, attention_mask=None, position_embeddings=rotary, position_ids=at, past_key_values=cache)
            if left is not None:
                continue  # x stays: the layer ran on the state at which the token left, and wrote its keys and values from it
            x = y
            if i in layers:
                p = model.lm_head(model.model.norm(x))[0, 0].softmax(-1).topk(2).values
                margins.append(float(p[0] - p[1]))
                if margins[-1] >= thresholds[layers.index(i)]:
                    left = layers.index(i)
        exits.append(len(layers) if left is None else left)
        out.append(int(model.lm_head(model.model.norm(x))[0, 0].argmax()))
    return out, exits, margins


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_generate_follows_the_definition(name):
    model, ids = make(name), torch.randint(1, 60, (1, 7))
    margins = sorted(definition(model, ids, 12, [1, 3], [INF, INF])[2])
    rule = [margins[-4] - 1e-4, margins[len(margins) // 2] - 1e-4]
    want, exits, _ = definition(model, ids, 12, [1, 3], rule)
    assert len(set(exits)) > 1, "the case must hold tokens that leave and tokens that stay"
    tokens = attach_tokens(model, [1, 3]).set_rule("margin", rule)
    assert greedy(model, ids)[0, 7:].tolist() == want
    assert tokens.depth == [exits.count(i) for i in range(3)]


def test_rows_of_a_batch_leave_by_themselves():
    model, ids = make(), torch.randint(1, 60, (5, 7))
    tokens = attach_tokens(model, [1, 3]).set_rule("margin", [0.9, 0.8])
    alone = [greedy(model, ids[i : i + 1])[0].tolist() for i in range(5)]
    depth, tokens.depth = tokens.depth, [0, 0, 0]
    assert greedy(model, ids).tolist() == alone
    assert tokens.depth == depth and all(depth)


def test_padded_prompts_and_static_caches_give_the_same_tokens():
    model, ids = make(), torch.randint(1, 60, (3, 7))
    attach_tokens(model, [1, 3]).set_rule("margin", [0.9, 0.8])
    want = greedy(model, ids)
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), ids], 1)
    mask = (torch.arange(9) >= 2).long().expand(3, 9)
    assert greedy(model, padded, attention_mask=mask)[:, 2:].tolist() == want.tolist()
    assert greedy(model, ids, cache_implementation="static", disable_compile=True).tolist() == want.tolist()


def test_skipped_layers_run_neither_attention_nor_mlp():
    model, ids, ran = make(), torch.randint(1, 60, (2, 7)), []
    attach_tokens(model, [1]).set_rule("max_prob", [0.0])
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
        layer.self_attn.q_proj.register_forward_hook(lambda *_, i=i: ran.append(i))
    greedy(model, ids, 3)
    assert sorted(set(ran[10:])) == [0, 1], "after the prompt only the layers up to the exit"


def test_off_is_the_model_itself():
    model, ids = make(), torch.randint(1, 60, (2, 7))
    want = greedy(model, ids).tolist()
    tokens = attach_tokens(model, [1])
    assert greedy(model, ids).tolist() == want and not any("forward" in m.__dict__ for m in model.modules())
    tokens.set_rule("max_prob", [0.0])
    assert greedy(model, ids).tolist() != want
    tokens.remove()
    assert greedy(model, ids).tolist() == want and not any("forward" in m.__dict__ for m in model.modules())


def test_calibration_keeps_its_bound_on_fresh_prompts():
    model = make()
    with torch.no_grad():
        for layer in list(model.model.layers)[2:]:
            layer.mlp.down_proj.weight.mul_(0.15)
            layer.self_attn.o_proj.weight.mul_(0.15)
    tokens = attach_tokens(model, [1, 3])
    prompts = [torch.randint(1, 60, (1, 5)) for _ in range(120)]
    report = tokens.calibrate(prompts, max_drop=0.1, confidence=0.9, tokens=4)
    assert min(tokens.thresholds) < INF and report.bound <= 0.1
    tokens.remove()
    differ = total = 0
    for _ in range(60):
        ids = torch.randint(1, 60, (1, 5))
        want = greedy(model, ids, 2)
        tokens.set_rule(thresholds=list(report.thresholds))
        got = greedy(model, ids, 2)
        tokens.remove()
        differ, total = differ + int(got[0, -1] != want[0, -1]), total + 1
    assert differ / total <= 0.2, "60 tokens: 0.1 and twice its deviation"


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
@pytest.mark.parametrize("draft, threshold", [(1, 0.0), (4, 0.0), (4, 0.3), (9, 0.0)])
def test_drafts_are_lossless(name, draft, threshold):
    model = make(name)
    for seed in range(3):
        ids = torch.randint(1, 60, (1, 6), generator=torch.Generator().manual_seed(seed))
        want = greedy(model, ids, 17)
        got = speculate(model, ids, 17, layer=2, draft=draft, threshold=threshold)
        assert got.tokens.tolist() == want.tolist() and 0 <= got.accepted <= got.drafted


def test_drafts_stop_at_the_end_of_sequence():
    model, ids = make(), torch.randint(1, 60, (1, 6))
    free = greedy(model, ids, 12)[0]
    model.generation_config.eos_token_id = int(free[9])
    assert speculate(model, ids, 12, layer=2).tokens.tolist() == greedy(model, ids, 12).tolist()


def test_wrong_arguments_name_themselves():
    model = make()
    with pytest.raises(ValueError, match=r"layers: expected rising numbers from 0 to 3, got \[4\]"):
        attach_tokens(model, [4])
    with pytest.raises(ValueError, match="thresholds: expected 1 numbers"):
        attach_tokens(model, [1]).set_rule(thresholds=[1, 2])
    with pytest.raises(TypeError, match="expected a causal language model"):
        attach_tokens(torch.nn.Linear(2, 2), [0])
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2))
    with pytest.raises(TypeError, match="GPT2LMHeadModel"):
        attach_tokens(gpt2, [0])
    with pytest.raises(ValueError, match=r"input_ids: expected one prompt \[1, T\], got \[2, 3\]"):
        speculate(model, torch.ones(2, 3, dtype=torch.long), 4, layer=1)

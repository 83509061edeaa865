"""Exits in Hugging Face's encoders: tiny random models of each family, masks and lengths, pipeline() and Trainer."""

import pytest
import torch

import fastee

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'fastee[huggingface]'")

from fastee.integrations.transformers import ExitModel, HeadsCallback, attach, layer_names  # noqa: E402

TINY = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, num_labels=3)
TEXT = dict(vocab_size=100, max_position_embeddings=36, pad_token_id=1)
DISTIL = dict(vocab_size=100, max_position_embeddings=36, num_labels=3, dim=32, n_layers=3, n_heads=2, hidden_dim=48)
IMAGE = dict(image_size=16, patch_size=4)
AUDIO = dict(vocab_size=20, conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 4), num_feat_extract_layers=2, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, classifier_proj_size=16)
FAMILIES = {
    "bert": ("Bert", "ForSequenceClassification", {**TINY, **TEXT}),
    "roberta": ("Roberta", "ForSequenceClassification", {**TINY, **TEXT}),
    "distilbert": ("DistilBert", "ForSequenceClassification", DISTIL),
    "vit": ("ViT", "ForImageClassification", {**TINY, **IMAGE}),
    "deit": ("DeiT", "ForImageClassification", {**TINY, **IMAGE}),
    "wav2vec2": ("Wav2Vec2", "ForSequenceClassification", {**TINY, **AUDIO}),
    "hubert": ("Hubert", "ForSequenceClassification", {**TINY, **AUDIO}),
}


def make(family):
    torch.manual_seed(0)
    name, task, shape = FAMILIES[family]
    return getattr(transformers, name + task)(getattr(transformers, name + "Config")(**shape)).eval()


def inputs(family, rows=6):
    if family in ("vit", "deit"):
        return {"pixel_values": torch.randn(rows, 3, 16, 16)}
    if family in ("wav2vec2", "hubert"):
        return {"input_values": torch.randn(rows, 800)}
    mask = (torch.arange(8) < torch.arange(rows)[:, None] % 6 + 3).long()
    return {"input_ids": torch.where(mask == 1, torch.randint(5, 99, (rows, 8)), 1), "attention_mask": mask}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    model = make(request.param)
    torch.manual_seed(1)
    x = inputs(request.param)
    return request.param, model, fastee.attach(model, exits=[0], example=x), x


def test_exits_off_is_the_model_and_rows_leave_alone(family):
    _, model, wrapped, x = family
    with torch.no_grad():
        want = model(**x).logits
        assert torch.equal(wrapped(**x).logits, want)
        net = wrapped.net
        score = net.exit_step(0, net.run_segment(0, net.inputs.flat(x))).confidence
    middle = float(score.sort().values[2:4].mean())
    try:
        net.set_rule(thresholds=[middle])
        out = wrapped(**x)
        assert out.exit.tolist() == (score < middle).long().tolist() and 0 < out.exit.sum() < 6
        assert torch.allclose(out.logits[out.exit == 1], want[out.exit == 1], atol=1e-5)
        alone = torch.cat([wrapped(**{n: v[i : i + 1] for n, v in x.items()}).logits for i in range(6)])
        assert torch.allclose(alone, out.logits, atol=1e-5)
    finally:
        net.set_rule(thresholds=[float("inf")])


def test_a_familys_name_makes_its_classifier(family):
    name, model, _, x = family
    torch.manual_seed(0)
    shape = {k: v for k, v in FAMILIES[name][2].items() if k != "num_labels"}
    named = fastee.attach(name, exits=[0], num_classes=3, example=x, **shape)
    assert isinstance(named, ExitModel) and type(named.backbone) is type(model)
    with torch.no_grad():
        assert torch.equal(named(**x).logits, model(**x).logits)  # the same seed drew the same weights


def test_a_folder_gives_its_checkpoint_and_its_class(tmp_path):
    model = make("bert")
    model.save_pretrained(tmp_path / "bert")
    x = inputs("bert")
    with torch.no_grad():
        assert torch.equal(fastee.attach(str(tmp_path / "bert"), exits=[0])(**x).logits, model(**x).logits)
        half = fastee.attach(str(tmp_path / "bert"), "auto:1", num_hidden_layers=2)
    assert half.names == ["bert.encoder.layer.0"] and torch.equal(half.backbone.classifier.weight, model.classifier.weight)
    shape = transformers.DeiTConfig(**FAMILIES["deit"][2])
    transformers.DeiTForImageClassificationWithTeacher(shape).save_pretrained(tmp_path / "deit")
    assert type(fastee.attach(str(tmp_path / "deit"), exits=[0]).backbone) is transformers.DeiTForImageClassificationWithTeacher


def test_plain_attach_takes_names_of_submodules_and_texts_of_any_length():
    model = make("bert")
    net = fastee.attach(model, ["bert.encoder.layer.0"], 3, norm=None, pool="mean_tokens")
    assert net.heads[0].norm is None and net.heads[0].pool == "mean_tokens"
    net.net.set_rule(thresholds=[0.0])
    with torch.no_grad():
        for tokens in (3, 12):
            ids = torch.randint(5, 99, (4, tokens))
            hidden = model.bert(input_ids=ids, output_hidden_states=True).hidden_states[1]
            assert torch.allclose(net(input_ids=ids).logits, net.heads[0](hidden), atol=1e-5), "the padding is masked out of the mean"


def test_audio_takes_its_example_as_a_tensor():
    assert fastee.attach(make("hubert"), [0], example=torch.randn(1, 800)).net.inputs.names == ("input_values",)


def test_wrong_names_say_what_to_pass_and_ask_no_network(monkeypatch):
    asked = []
    monkeypatch.setattr("socket.socket.connect", lambda self, address: asked.append(address))
    with pytest.raises(ValueError, match=r"got 'google/nothing-here'; nothing is downloaded: pass the model itself, such as .*from_pretrained\('google/nothing-here'\)"):
        fastee.attach("google/nothing-here", [0])
    with pytest.raises(ValueError, match="a family of Hugging Face, got 'rorberta', did you mean 'roberta'"):
        fastee.attach("rorberta", [0])
    assert asked == []
    with pytest.raises(ValueError, match="hiden_size: not a field of BertConfig, did you mean 'hidden_size'"):
        fastee.attach("bert", [0], hiden_size=32)
    with pytest.raises(ValueError, match="no classifier of the family 'encodec'"):
        fastee.attach("encodec", [0])
    with pytest.raises(ValueError, match="num_classes: the backbone answers 3 classes, got 4"):
        fastee.attach(make("bert"), [0], num_classes=4)
    with pytest.raises(TypeError, match="hidden_size: not an argument of attach but of a named model, got a BertFor"):
        fastee.attach(make("bert"), [0], hidden_size=32)


@pytest.fixture(scope="module")
def bert():
    return attach(make("bert"), exits=[0, 1])


def test_every_length_gives_the_models_answer_with_one_set_of_heads(bert):
    bert.net.set_rule(thresholds=[float("inf"), 0.0])
    with torch.no_grad():
        for tokens in (3, 12):
            ids = torch.randint(5, 99, (4, tokens))
            short = bert(input_ids=ids)
            assert short.exit.tolist() == [1] * 4
            hidden = bert.backbone.bert(input_ids=ids, output_hidden_states=True).hidden_states[2]
            assert torch.allclose(short.logits, bert.heads[1](hidden), atol=1e-5), "padding must not reach the answer"
    assert len(bert._nets) == 2 and len({id(n.heads) for n in bert._nets.values()}) == 1
    with pytest.raises(ValueError, match="input_ids: at most 36 tokens, got 40"):
        bert(input_ids=torch.ones(1, 40, dtype=torch.long))
    bert.net.set_rule(thresholds=[float("inf")] * 2)


def test_pipelines_take_the_wrapped_model(bert):
    vocabulary = {w: i for i, w in enumerate(["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film"])}
    tokenizers = pytest.importorskip("tokenizers")
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]")
    pipe = transformers.pipeline("text-classification", model=bert, tokenizer=tokenizer, device="cpu")
    answers = pipe(["a good film", "bad"])
    with torch.no_grad():
        ids = tokenizer(["bad"], return_tensors="pt")["input_ids"]
        want = bert.backbone(input_ids=ids).logits.softmax(-1)[0]
    assert answers[1]["label"] == f"LABEL_{int(want.argmax())}" and answers[1]["score"] == pytest.approx(float(want.max()), abs=1e-5)


def test_trainer_trains_the_heads_alone(tmp_path):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    wrapped = attach(make("bert"), exits=[0])
    x, y = inputs("bert", 16), torch.arange(16) % 3
    rows = [{"input_ids": x["input_ids"][i], "attention_mask": x["attention_mask"][i], "labels": y[i]} for i in range(16)]
    before = {n: p.clone() for n, p in wrapped.backbone.named_parameters()}
    heads = [p.clone() for p in wrapped.heads.parameters()]
    arguments = transformers.TrainingArguments(str(tmp_path), max_steps=3, per_device_train_batch_size=8, report_to=[], save_strategy="no", use_cpu=True, learning_rate=0.1)
    transformers.Trainer(wrapped, arguments, train_dataset=rows, callbacks=[HeadsCallback(wrapped)]).train()
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in wrapped.backbone.named_parameters())
    assert any(not torch.equal(a, b) for a, b in zip(heads, wrapped.heads.parameters(), strict=True))


def test_labels_give_the_mean_loss_of_all_heads(bert):
    x, y = inputs("bert"), torch.arange(6) % 3
    bert.train()
    try:
        loss = bert(**x, labels=y).loss
        loss.backward()
    finally:
        bert.eval()
    assert loss.ndim == 0 and all(p.grad is not None for p in bert.heads[0].linear.parameters())


def test_layers_are_found_and_wrong_ones_named():
    model = make("vit")
    assert [n.rsplit(".", 1)[1] for n in layer_names(model, "auto:2")] == ["0", "1"]
    with pytest.raises(ValueError, match=r"exits: expected layers from 0 to 1 .*, got \[2\]"):
        attach(model, exits=[2])
    with pytest.raises(ValueError, match='"auto:N" with N from 1 to 2'):
        attach(model, exits="auto:9")
    with pytest.raises(TypeError, match="model: expected a transformers.PreTrainedModel, got Linear"):
        attach(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="example: needed for a model that takes 'input_values'"):
        attach(make("hubert"))
    with pytest.raises(TypeError, match="what fastee.integrations.transformers.attach returns"):
        HeadsCallback(fastee)

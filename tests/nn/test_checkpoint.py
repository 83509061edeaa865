import json
import math
import re
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_nets import FAMILIES, ResNet, images, tokens

import fastee
from fastee.errors import CheckpointMismatch


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = fastee.attach(ResNet().eval(), ["layer1", "layer2"], 10, images(2))
    for p in net.heads.parameters():
        p.data.normal_()
    return net.set_rule(measure="margin", thresholds=[0.25, math.inf])


@pytest.mark.parametrize("weights", ["heads", "all"])
def test_round_trip(net, tmp_path, weights):
    path, x = tmp_path / "net.safetensors", images(8)
    net.save(path, weights=weights)
    backbone = ResNet().eval()
    if weights == "heads":
        backbone.load_state_dict(net.backbone.state_dict())
    back = fastee.load(path, backbone)
    assert back.measure == "margin" and back.thresholds == [0.25, math.inf] and back.exit_names == ("layer1", "layer2")
    assert back.fingerprint == net.fingerprint and not back.training
    a, b = net(x), back(x)
    assert torch.equal(a.logits, b.logits) and torch.equal(a.exit, b.exit)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("family", ["encoder_mask", "two_inputs", "constant"])
def test_round_trip_of_other_inputs(family, tmp_path):
    torch.manual_seed(0)
    make, exits, inputs = FAMILIES[family]
    backbone = make().eval()
    options = {"pool": "mean_tokens", "mask": "attention_mask"} if family == "encoder_mask" else {}
    net = fastee.attach(backbone, exits, 10, inputs(2), norm="layer", **options).set_rule(thresholds=[0.2] * len(exits))
    net.save(tmp_path / "n")
    back, x = fastee.load(tmp_path / "n", backbone), inputs(5)
    assert torch.equal(net(x).logits, back(x).logits) and back.options == net.options


def test_the_users_rows_are_not_written(tmp_path):
    torch.manual_seed(0)
    x = tokens(2)
    net = fastee.attach(FAMILIES["encoder_mask"][0]().eval(), ["layers.0"], 10, x)
    net.save(tmp_path / "n")
    with safe_open(tmp_path / "n", "pt") as file:
        assert all(k.startswith("heads.") for k in file.keys())
        assert set(json.loads(file.metadata()["fastee"])["inputs"][0]) == {"name", "dtype", "shape"}


def rewrite(path, change=None, tensors=None, raw=None):
    with safe_open(path, "pt") as file:
        header, state = json.loads(file.metadata()["fastee"]), {k: file.get_tensor(k) for k in file.keys()}
    if change:
        header.update(change)
    if tensors:
        tensors(state)
    save_file(state, path, metadata={"fastee": json.dumps(header) if raw is None else raw})


HOSTILE = [
    (lambda p: p.write_bytes(b"abc"), "3 bytes are no safetensors file"),
    (lambda p: p.write_bytes(struct.pack("<Q", 1 << 60) + b"{}"), "its header claims 1152921504606846976 bytes, at most 2 are possible here"),
    (lambda p: p.write_bytes(struct.pack("<Q", 2) + b"[]" + bytes(64)), "not a readable safetensors file"),
    (lambda p: p.write_bytes(p.read_bytes()[:-100]), "not a readable safetensors file"),
    (lambda p: save_file({"a": torch.zeros(2)}, p), "not written by fastee"),
    (lambda p: rewrite(p, raw="{"), "its 'fastee' metadata is malformed"),
    (lambda p: rewrite(p, {"evil": 1}), "its 'fastee' metadata is malformed: Object contains unknown field `evil`"),
    (lambda p: rewrite(p, {"thresholds": "many"}), "its 'fastee' metadata is malformed: Expected `array`, got `str`"),
    (lambda p: rewrite(p, {"format": 99}), "format 99, this fastee reads format 1"),
    (lambda p: rewrite(p, {"weights": "some"}), "weights must be 'heads' or 'all', got 'some'"),
    (lambda p: rewrite(p, {"thresholds": [0.1]}), "does not fit this backbone: thresholds: expected 2 numbers"),
    (lambda p: rewrite(p, {"measure": "magic"}), "does not fit this backbone: measure: expected one of"),
    (lambda p: rewrite(p, {"exits": ["layer1", "os.system"]}), "does not fit this backbone: exits: the backbone has no submodule 'os.system'"),
    (lambda p: rewrite(p, {"inputs": [{"name": "x", "dtype": "float32", "shape": [1 << 40, 1 << 40]}]}), "input 'x' has an impossible description"),
    (lambda p: rewrite(p, {"inputs": []}), "it describes no usable model inputs"),
    (lambda p: rewrite(p, {"backbone": "0" * 32}), "written for another backbone"),
    (lambda p: rewrite(p, {"backbone_weights": "0" * 32}), "its heads were trained on other weights of this backbone"),
    (lambda p: rewrite(p, tensors=lambda s: s.pop("heads.0.linear.bias")), "tensors missing ['heads.0.linear.bias'], unknown []"),
    (lambda p: rewrite(p, tensors=lambda s: s.update(extra=torch.zeros(1))), "tensors missing [], unknown ['extra']"),
    (lambda p: rewrite(p, tensors=lambda s: s.update({"heads.0.linear.bias": torch.zeros(11)})), "tensor 'heads.0.linear.bias' is torch.float32 [11], expected"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), HOSTILE, ids=[m[:40] for _, m in HOSTILE])
def test_hostile_files_are_refused_with_the_reason(net, tmp_path, damage, message):
    path = tmp_path / "net.safetensors"
    net.save(path)
    before = {k: v.clone() for k, v in net.backbone.state_dict().items()}
    damage(path)
    with pytest.raises(CheckpointMismatch, match=re.escape(message)):
        fastee.load(path, net.backbone)
    assert all(torch.equal(v, before[k]) for k, v in net.backbone.state_dict().items())


def test_heads_on_other_weights_only_when_asked(net, tmp_path):
    net.save(tmp_path / "n")
    other = ResNet().eval()
    with pytest.raises(CheckpointMismatch, match="other weights"):
        fastee.load(tmp_path / "n", other)
    back = fastee.load(tmp_path / "n", other, strict=False)
    assert torch.equal(back.heads[0].linear.weight, net.heads[0].linear.weight)


def test_missing_files_and_bad_arguments(net, tmp_path):
    with pytest.raises(FileNotFoundError):
        fastee.load(tmp_path / "none", net.backbone)
    with pytest.raises(ValueError, match=re.escape("weights: expected 'heads' or 'all', got 'most'")):
        net.save(tmp_path / "n", weights="most")
    assert not list(tmp_path.iterdir())

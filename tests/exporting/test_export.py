"""export() and load_exported(): the same answers from files alone, and folders that are not what they say refused."""

import json
import math
import shutil

import pytest
import small_nets
import torch
from torch import nn

import fastee
from fastee.errors import CannotExport, CheckpointMismatch


def small_net(pool="auto", head="linear", norm="batch"):
    body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 5))
    net = fastee.attach(body, exits=["1", "3"], example=torch.randn(2, 6), head=head, norm=norm).eval()
    net.heads[0].temperature = 1.7
    return net


def half_way(net, x):
    """Set the first threshold between the rows, so that some leave and some stay."""
    with torch.no_grad():
        u = net.exit_step(0, net.run_segment(0, net.inputs.flat(x))).confidence.sort().values
    return net.set_rule(thresholds=[float(u[len(u) // 2 - 1 : len(u) // 2 + 1].mean()), math.inf])


def same(a, b, tolerance=1e-5):
    assert a.exit.tolist() == b.exit.tolist() and a.label.tolist() == b.label.tolist()
    assert torch.allclose(a.logits, b.logits, atol=tolerance) and torch.allclose(a.confidence, b.confidence, atol=tolerance)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    net = small_net()
    half_way(net, torch.randn(16, 6))
    return net, fastee.export(net, tmp_path_factory.mktemp("export") / "net")


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported[1], tmp_path / "net")


def edit(folder, **changes):
    at = folder / "exits.json"
    at.write_text(json.dumps({**json.loads(at.read_text()), **changes}))


def test_a_folder_answers_like_its_network(exported):
    net, folder = exported
    runner, x = fastee.load_exported(folder, net.fingerprint), torch.randn(37, 6)
    want = net(x)
    assert 0 < int((want.exit == 0).sum()) < 37
    same(want, runner(x))
    for thresholds in ([math.inf, math.inf], [0.0, 0.0], [math.inf, 0.4]):
        net_rule = net.thresholds
        try:
            same(net.set_rule(thresholds=thresholds)(x), runner.set_rule(thresholds=thresholds)(x))
        finally:
            net.set_rule(thresholds=net_rule)
    assert runner(torch.empty(0, 6)).logits.shape == (0, 5)


def test_segments_after_the_last_exit_do_not_run(exported):
    runner, ran = fastee.load_exported(exported[1]), []
    run = runner.run_segment
    runner.run_segment = lambda i, carry: ran.append((i, carry[0].shape[0])) or run(i, carry)
    runner.set_rule(thresholds=[0.0, math.inf])(torch.randn(3, 6))
    assert ran == [(0, 3)]


@pytest.mark.parametrize("head, norm", [("two_layer:7", "layer"), ("low_rank:3", "rms"), ("linear", None)])
def test_every_kind_of_head_survives(head, norm, tmp_path):
    net, x = small_net(head=head, norm=norm), torch.randn(9, 6)
    half_way(net, x)
    same(net(x), fastee.load_exported(fastee.export(net, tmp_path / "net"))(x))


def test_masks_and_several_inputs_cross_every_cut(tmp_path):
    x = {"input_ids": torch.randint(0, 50, (8, 9)), "attention_mask": (torch.arange(9) < torch.randint(3, 10, (8, 1))).long()}
    net = fastee.attach(small_nets.Encoder(), exits=["layers.0"], example=x, pool="mean_tokens", mask="attention_mask").eval()
    with torch.no_grad():
        net.set_rule(thresholds=[float(net.exit_step(0, net.run_segment(0, net.inputs.flat(x))).confidence.median())])
    runner = fastee.load_exported(fastee.export(net, tmp_path / "net"))
    same(net(x), runner(**x))
    with pytest.raises(ValueError, match=r"missing \['attention_mask'\]"):
        runner(input_ids=x["input_ids"])
    with pytest.raises(TypeError, match="'attention_mask' must be int64, got float32"):
        runner(x["input_ids"], x["attention_mask"].float())
    with pytest.raises(ValueError, match=r"'attention_mask' must be \[8, 9\], got \[7, 9\]"):
        runner(x["input_ids"], x["attention_mask"][:7])


def test_another_network_is_refused(exported):
    with pytest.raises(CheckpointMismatch, match="exported from the network .* expected 0000: other weights"):
        fastee.load_exported(exported[1], "0000")


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"format": 2}, "format 2, this fastee reads format 1"),
        ({"kind": "onnx"}, "kind 'onnx' does not run here, expected 'torch' or 'aoti'"),
        ({"kind": "tourch"}, "kind must be one of .* did you mean 'torch'"),
        ({"measure": "gate"}, "measure must be one of"),
        ({"thresholds": [0.5]}, "expected 2 thresholds"),
        ({"exits": []}, "one segment more than exits"),
        ({"num_classes": 6}, "do not make a head of 6 classes"),
        ({"extra": 1}, "malformed: .*extra"),
        ({"num_classes": "6"}, "malformed"),
    ],
)
def test_a_manifest_that_lies_is_refused(copy, changes, says):
    edit(copy, **changes)
    with pytest.raises(CheckpointMismatch, match=says):
        fastee.load_exported(copy)


def test_a_manifest_cannot_name_files_elsewhere(copy):
    manifest = json.loads((copy / "exits.json").read_text())
    for name in ("../segment0.pt2", "/etc/passwd", "segment0.pt2\n", ""):
        manifest["segments"][0]["file"]["name"] = name
        edit(copy, segments=manifest["segments"])
        with pytest.raises(CheckpointMismatch, match="no name of an exported file"):
            fastee.load_exported(copy)


def test_damaged_mixed_and_missing_files_are_refused(copy):
    file = copy / "segment1.pt2"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointMismatch, match="segment1.pt2: not the file of this export"):
        fastee.load_exported(copy)
    file.unlink()
    with pytest.raises(CheckpointMismatch, match="segment1.pt2: missing"):
        fastee.load_exported(copy)
    (copy / "exits.json").write_text("{" * 3)
    with pytest.raises(CheckpointMismatch, match="malformed"):
        fastee.load_exported(copy)
    (copy / "exits.json").write_bytes(b" " * (4 << 20) + b"{}")
    with pytest.raises(CheckpointMismatch, match="at most"):
        fastee.load_exported(copy)
    with pytest.raises(FileNotFoundError):
        fastee.load_exported(copy / "nowhere")


def test_what_does_not_export_says_so(tmp_path):
    net = small_net()
    with pytest.raises(TypeError, match="net: expected a network from fastee.attach, got Linear"):
        fastee.export(nn.Linear(2, 2), tmp_path / "a")
    with pytest.raises(ValueError, match="format: expected one of .* did you mean 'onnx'"):
        fastee.export(net, tmp_path / "a", format="onxx")
    with pytest.raises(ValueError, match="measure 'patience' remembers"):
        fastee.export(net.set_rule(measure="patience"), tmp_path / "a")
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ValueError, match="is no earlier export"):
        fastee.export(small_net(), tmp_path)
    assert (tmp_path / "mine").read_text() == "precious"


class Branches(nn.Module):
    def forward(self, x):
        return x * 2 if x.shape[0] > 4 else x


def test_a_segment_that_torch_cannot_export_is_named(tmp_path, monkeypatch):
    net = small_net()
    monkeypatch.setattr(net._segments[1], "function", lambda body, x: (Branches()(x),))
    with pytest.raises(CannotExport, match=r"segment 1 \(after '1' to '3'\): torch.export refuses it"):
        fastee.export(net, tmp_path / "net")
    assert not list(tmp_path.iterdir()), "a failed export leaves nothing behind"


class SplitsByValue(nn.Module):
    def forward(self, x):
        return torch.split(x, torch.nonzero(x.sum(1) > -99).shape[0])[0]


def test_a_shape_that_depends_on_values_is_named_with_its_module(tmp_path):
    body = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Tanh(), SplitsByValue()), nn.Linear(8, 3))
    net = fastee.attach(body, exits=["0"], example=torch.randn(2, 6)).eval()
    with pytest.raises(CannotExport, match=r"segment 1 \(after '0' to the end\): torch.export refuses node 'split' of module '1\.1': GuardOnDataDependent"):
        fastee.export(net, tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_a_second_export_replaces_the_first(exported, tmp_path):
    net = small_net()
    fastee.export(net, tmp_path / "net")
    net.set_rule(thresholds=[0.25, math.inf])
    assert fastee.load_exported(fastee.export(net, tmp_path / "net")).thresholds == [0.25, math.inf]
    assert [p.name for p in tmp_path.iterdir()] == ["net"]

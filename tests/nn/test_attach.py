import copy
import functools
import math
import re

import pytest
import torch
from small_nets import FAMILIES, Encoder, ResNet, ViT, images, layer, logits, rows_of, tokens
from torch import nn

import fastee
from fastee.errors import CannotCut


@functools.cache
def made(name):
    torch.manual_seed(0)
    make, exits, inputs = FAMILIES[name]
    backbone = make().eval()
    return backbone, fastee.attach(backbone, exits, 10, inputs(2)), inputs


def chain(net, x):
    carry = net.inputs.flat(x)
    for i in range(net.num_segments):
        carry = net.run_segment(i, carry)
    assert len(carry) == 1
    return carry[0]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rows", [1, 2, 5])
@torch.no_grad()
def test_segments_answer_like_the_backbone_at_any_batch_size(name, rows):
    backbone, net, inputs = made(name)
    x = inputs(rows)
    torch.testing.assert_close(chain(net, x), logits(net.full(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_row_does_not_change_when_the_others_leave(name):
    _, net, inputs = made(name)
    x = inputs(5)
    keep = torch.tensor([3, 1])
    carry = net.inputs.flat(x)
    for i in range(net.num_segments):
        carry = net.run_segment(i, carry)
        if i == 0:
            carry = tuple(t[keep] for t in carry)
    torch.testing.assert_close(carry[0], logits(net.full(rows_of(x, keep))), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_segments_leave_their_carry_unwritten(name):
    _, net, inputs = made(name)
    carry = net.inputs.flat(inputs(3))
    for i in range(net.num_segments):
        before = [t.clone() for t in carry]
        out = net.run_segment(i, carry)
        assert all(torch.equal(a, b) for a, b in zip(carry, before, strict=True)), f"segment {i} wrote its input"
        carry = out


@pytest.mark.parametrize("name", FAMILIES)
def test_attach_changes_nothing_of_the_backbone(name):
    make, exits, inputs = FAMILIES[name]
    backbone = make()
    next(backbone.modules()).train()
    list(backbone.children())[0].eval()
    modes = [m.training for m in backbone.modules()]
    state = copy.deepcopy(backbone.state_dict())
    attributes, hooks = set(backbone.__dict__), [len(m._forward_hooks) for m in backbone.modules()]
    net = fastee.attach(backbone, exits, 10, inputs(2))
    assert [m.training for m in backbone.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in backbone.state_dict().items())
    assert set(backbone.__dict__) == attributes
    assert [len(m._forward_hooks) for m in backbone.modules()] == hooks
    assert {id(p) for p in backbone.parameters()} <= {id(p) for p in net.parameters()}
    assert net.training == backbone.training


def test_what_crosses_a_cut_is_minimal():
    _, net, inputs = made("resnet")
    x = inputs(2)
    assert len(net.run_segment(0, (x,))) == 1
    backbone = ResNet().eval()
    inner = fastee.attach(backbone, ["layer1.0.bn1"], 10, x)
    carry = inner.run_segment(0, (x,))
    assert [list(t.shape) for t in carry] == [[2, 8, 16, 16], [2, 8, 16, 16]]  # the tap and the shortcut


def test_a_mask_travels_with_every_carry():
    torch.manual_seed(0)
    backbone = Encoder().eval()
    net = fastee.attach(backbone, ["layers.0", "layers.1"], 10, tokens(2), pool="mean_tokens", mask="attention_mask")
    x = tokens(4)
    carry = net.run_segment(0, net.inputs.flat(x))
    assert any(t.dtype == torch.int64 and torch.equal(t, x["attention_mask"]) for t in carry)
    with torch.no_grad():
        pooled, _ = net.taps(x)
    hidden = carry[0]
    want = torch.stack([hidden[i, : int(x["attention_mask"][i].sum())].mean(0) for i in range(4)])
    torch.testing.assert_close(pooled[0], want, rtol=1e-4, atol=1e-5)
    net.set_rule(thresholds=[0.0, 0.0])
    assert net(x).exit.tolist() == [0] * 4
    torch.testing.assert_close(net(x).logits, net.heads[0].classify(want), rtol=1e-4, atol=1e-5)


def test_the_export_route_is_taken_where_values_steer():
    _, net, _ = made("encoder_branch")
    assert "torch.ops.aten" in net._segments[1].source
    _, net, _ = made("encoder_mask")
    assert "torch.ops.aten" not in net._segments[1].source


def test_auto_places_exits_at_even_cost():
    torch.manual_seed(0)
    for backbone, x in ((ResNet().eval(), images(1)), (ViT().eval(), images(1)), (ViT(container=True).eval(), images(1)), (Encoder().eval(), tokens(1))):
        net = fastee.attach(backbone, "auto:2", 10, x)
        share = torch.tensor(net.macs["segments"]).cumsum(0)
        share = share / share[-1]
        assert net.num_exits == 2 and (share[:2] - torch.tensor([1 / 3, 2 / 3])).abs().max() < 0.2, (net.exit_names, share)
    assert fastee.attach(ResNet().eval(), "auto:1", 10, images(1)).exit_names[0].startswith("layer2")


def test_macs_are_exact_on_a_hand_counted_net():
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    net = fastee.attach(body, ["1"], 10, torch.zeros(2, 3, 6, 6))
    assert net.macs == {"segments": [3 * 9 * 8 * 16, 8 * 4 * 16 + 40], "heads": [80.0]}


def test_pools_follow_the_shape_of_the_tap():
    _, net, _ = made("resnet")
    assert [h.pool for h in net.heads] == ["mean", "mean"]
    _, net, _ = made("vit")
    assert [h.pool for h in net.heads] == ["cls", "cls"]
    _, net, _ = made("two_inputs")
    assert [h.pool for h in net.heads] == ["none"]


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.a(self.a(x)))


class Sizes(nn.Module):
    """The input's width crosses the cut as a plain int, and nothing that crosses tells it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, x):
        n = x.size(1)
        return self.b(self.a(x)) / n


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.rnn, self.b = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.rnn(self.a(x).transpose(0, 1)).mean(0))


class Data(nn.Module):
    """Neither tracer can follow this one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.a(x)
        if float(h.sum()) > 0:
            h = -h
        return self.b(h)


@pytest.mark.parametrize(
    ("backbone", "exits", "message"),
    [
        (Shared, ["a"], "cannot cut after 'a': the backbone calls it 2 times, so the place is not one place"),
        (Sizes, ["a"], "the value 'size' (8) crosses the cut"),
        (TimeFirst, ["rnn"], "cannot cut after 'rnn': its output 'rnn' (float32 [8, 2, 8]) has no batch on dimension 0"),
        (Data, ["a"], "Data cannot be turned into a graph. symbolic: TypeError: float()"),
        (Shared, ["b"], "cannot cut after 'b': its output is the backbone's own answer, nothing follows"),
    ],
)  # fmt: skip
def test_places_that_cannot_be_cut_say_so(backbone, exits, message):
    x = torch.randn(2, 8, 8) if backbone is TimeFirst else torch.randn(2, 8)
    with pytest.raises(CannotCut, match=re.escape(message)):
        fastee.attach(backbone().eval(), exits, 3, x)


BAD = [
    (dict(exits=["layer9"]), ValueError, "exits: the backbone has no submodule 'layer9', did you mean 'layer"),
    (dict(exits=["layer1", "layer1"]), ValueError, "exits: 'layer1' is given 2 times, each exit may stand once"),
    (dict(exits=["layer2", "layer1"]), ValueError, "exits: must be in the order in which the backbone runs them: ['layer1', 'layer2'], got ['layer2', 'layer1']"),
    (dict(exits=["layer1", "layer1.1"]), ValueError, "exits: 'layer1' and 'layer1.1' end at the same place; keep one of them"),
    (dict(exits=[]), ValueError, "exits: expected at least one name, got an empty list"),
    (dict(exits="auto"), ValueError, "exits: expected a list of names or \"auto:N\" with N >= 1, got 'auto'"),
    (dict(exits="auto:0"), ValueError, "exits: expected a list of names"),
    (dict(exits=[3]), TypeError, "exits: expected a list of names or \"auto:N\", got [3]"),
    (dict(num_classes=7), ValueError, "num_classes: the backbone answers 10 classes, got 7"),
    (dict(example=None), TypeError, "example: attach needs an example input"),
    (dict(example=3), TypeError, "example: expected a tensor, a tuple or a dict of tensors, got int"),
    (dict(example=torch.zeros(0, 3, 16, 16)), ValueError, "example: input 'x' needs at least one row on dimension 0, got [0, 3, 16, 16]"),
    (dict(backbone=3), TypeError, "backbone: expected an nn.Module, got int"),
    (dict(pool="clss"), ValueError, "pool: exit 'layer1' gives [2, 8, 16, 16], expected one of ['mean'], got 'clss', did you mean 'cls'?"),
    (dict(pool=["mean"]), ValueError, "pool: expected one name or 2, one per exit, got 1"),
    (dict(norm="batchnorm"), ValueError, "norm: expected None or one of ['batch', 'layer', 'rms'], got 'batchnorm', did you mean 'batch'?"),
    (dict(mask="padding"), ValueError, "mask: expected the name of one of the inputs ['x'], got 'padding'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m[:40] for *_, m in BAD])
def test_bad_arguments_are_named(change, error, message):
    args = {"backbone": ResNet().eval(), "exits": ["layer1", "layer2"], "num_classes": 10, "example": images(1), **change}
    with pytest.raises(error, match=re.escape(message)):
        fastee.attach(**args)


def test_attaching_twice_is_refused():
    _, net, _ = made("resnet")
    with pytest.raises(TypeError, match="it already has exits"):
        fastee.attach(net, ["backbone.layer1"], 10, images(1))


def test_padding_that_the_nested_route_zeroes_comes_out_zero():
    torch.manual_seed(0)

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc, self.head = nn.TransformerEncoder(layer(), 2, norm=nn.LayerNorm(32)), nn.Linear(32, 10)

        def forward(self, x, padding):
            return self.head(self.enc(x, src_key_padding_mask=padding).mean(1))  # reads padded positions too

    backbone = Mean().eval()
    torch.nn.init.normal_(backbone.enc.norm.weight)  # layers end in a norm of their own: a second one with unit weights is no change
    torch.nn.init.normal_(backbone.enc.norm.bias)
    padding = torch.tensor([[False] * 6, [False] * 3 + [True] * 3])
    x = torch.randn(2, 6, 32)
    net = fastee.attach(backbone, ["enc.layers.0"], 10, (x, padding))
    with torch.no_grad():
        torch.testing.assert_close(chain(net, (x, padding)), backbone(x, padding), rtol=1e-4, atol=1e-5)
    assert math.isinf(net.thresholds[0])

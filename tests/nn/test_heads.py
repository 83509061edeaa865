"""Kinds of heads: the fused step answers like plain torch, whatever the batch; shared weights stay shared."""

import json
import math
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastee
from fastee.nn import ExitHead


def filled(**options):
    torch.manual_seed(0)
    head = ExitHead(24, 5, **options)
    for p in head.parameters():
        nn.init.normal_(p, std=0.5)
    if options.get("norm") == "batch":
        nn.init.normal_(head.norm.running_mean)
        nn.init.uniform_(head.norm.running_var, 0.5, 2)
    return head.eval()


@pytest.mark.parametrize("kind", ["linear", "two_layer", "two_layer:7", "low_rank:3"])
@pytest.mark.parametrize("norm", ["batch", "layer", "rms", None])
@pytest.mark.parametrize(("pool", "shape"), [("mean", (24, 3, 3)), ("none", (24,)), ("mean_tokens", (6, 24))])
def test_the_fused_step_is_the_module(kind, norm, pool, shape):
    head = filled(pool=pool, norm=norm, kind=kind)
    x = torch.randn(33, *shape, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(6)[None] < torch.randint(1, 7, (33, 1), generator=torch.Generator().manual_seed(2)) if pool == "mean_tokens" else None
    with torch.no_grad():
        want = head(x, mask)
        double = head.double()(x.double(), mask)
        head.float()
    step = head.step(x, "max_prob", 0.6, mask=mask, logits=True)
    assert torch.allclose(step.logits.double(), double, atol=1e-5, rtol=1e-5) and torch.allclose(want.double(), double, atol=1e-5, rtol=1e-5)
    sure = double.softmax(1).amax(1)
    clear = (sure - 0.6).abs() > 1e-5
    assert torch.equal(step.exits[clear], (sure >= 0.6)[clear]) and torch.equal(step.label, double.argmax(1))
    rows = [head.step(x[i : i + 1], "max_prob", 0.6, mask=None if mask is None else mask[i : i + 1], logits=True) for i in range(33)]
    assert torch.equal(torch.cat([r.logits for r in rows]), step.logits) and torch.equal(torch.cat([r.confidence for r in rows]), step.confidence)


@pytest.mark.parametrize(("kind", "macs"), [("linear", 24 * 5), ("two_layer:7", 24 * 7 + 7 * 5), ("low_rank", 24 * 24 + 24 * 5)])
def test_macs(kind, macs):
    assert filled(kind=kind).macs == macs


def body():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))


@pytest.mark.parametrize("head", ["linear", "two_layer:9", "low_rank:3", "shared"])
def test_every_kind_trains_runs_and_survives_a_file(head, tmp_path):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(600, 12, generator=g)
    y = 2 * (x[:, 0] > 0) + (x[:, 1] > 0).long()
    net = fastee.attach(body(), ["1", "3"], 4, x[:1], head=head)
    report = fastee.fit(net, [(x, y)] * 8, epochs=6, seed=0, cache=False, lr=0.03)
    assert min(report.accuracy) > 0.5
    assert (net.heads[0].linear is net.heads[1].linear) is (head == "shared")
    net.set_rule(thresholds=[0.7, 0.6])
    net.save(tmp_path / "n.safetensors")
    again = fastee.load(tmp_path / "n.safetensors", body())
    a, b = net(x), again(x)
    assert len(a.exit.unique()) > 1 and torch.equal(a.exit, b.exit) and torch.equal(a.logits, b.logits)
    assert (again.heads[0].linear is again.heads[1].linear) is (head == "shared")
    assert again.macs == net.macs and again.fingerprint == net.fingerprint


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 4))


@pytest.mark.parametrize(("count", "size", "width"), [("", (16, 16), 12), (":1", (8, 8), 6), (":3", (32, 17), 24)])
def test_a_branch_of_convolutions_is_plain_torch_and_counts_its_multiply_adds(count, size, width):
    torch.manual_seed(0)
    head, x = ExitHead(6, 5, kind=f"conv{count}", size=size).eval(), torch.randn(9, 6, *size)
    for norm in (m for m in head.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))):
        nn.init.normal_(norm.running_mean, std=0.1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    assert head.linear.in_features == width
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        want = head(x)
    assert head.macs == counter.get_total_flops() / 2 / len(x)
    step = head.step(x, "max_prob", 0.3, logits=True)
    assert torch.allclose(step.logits, want, atol=1e-5) and torch.equal(step.label, want.argmax(1)) and not step.logits.requires_grad
    assert torch.equal(step.exits, want.softmax(1).amax(1) >= 0.3)


@pytest.mark.parametrize("method", ["frozen", "joint", "distill", "gated"])
def test_branches_train_run_and_survive_a_file(method, tmp_path):
    x = torch.randn(256, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0].diff(dim=2).square().mean((1, 2)) > 2).long()  # no mean of the map says so
    net = fastee.attach(convolutional(), ["1", "3"], 4, x[:1], head="conv")
    before = net.heads[0].branch[0].weight.clone()
    fastee.fit(net, [(x, y)] * 4, method=method, epochs=6, seed=0, progress=False, lr=0.01)
    assert not torch.equal(before, net.heads[0].branch[0].weight)
    with torch.no_grad():
        sure = [h(m).softmax(1).amax(1).median().item() for h, m in zip(net.heads, (net.backbone[:2](x), net.backbone[:4](x)), strict=True)]
    net.set_rule(measure="max_prob", thresholds=sure)
    net.save(tmp_path / "n.safetensors")
    again = fastee.load(tmp_path / "n.safetensors", net.backbone)
    a, b = net(x), again(x)
    assert len(a.exit.unique()) > 1 and torch.equal(a.exit, b.exit) and torch.equal(a.logits, b.logits)
    assert again.macs == net.macs and again.fingerprint == net.fingerprint
    with pytest.raises(ValueError, match="net: exit '1' has a branch of convolutions, which no exported engine runs"):
        fastee.export(net, tmp_path / "exported")


def test_exits_may_have_a_kind_each_and_a_branch_of_your_own(tmp_path):
    stage = nn.Sequential(nn.Conv2d(6, 8, 3, 2), nn.ReLU())
    x, net = torch.randn(5, 3, 16, 16), fastee.attach(convolutional(), ["1", "3"], 4, torch.zeros(1, 3, 16, 16), head=[stage, "conv:1"]).eval()
    assert net.heads[0].branch is stage and net.heads[0].macs == 8 * 6 * 9 * 7 * 7 + 8 * 4
    net.set_rule(thresholds=[0.0, math.inf])
    with torch.no_grad():
        assert torch.allclose(net(x).logits, net.heads[0](net.backbone[:2](x)), atol=1e-5)
    with pytest.raises(ValueError, match=r"heads of different kinds, or branches of your own.*keep net.state_dict\(\)"):
        net.save(tmp_path / "n.safetensors")


def test_a_gradient_step_on_shared_heads_counts_a_weight_once():
    net = fastee.attach(body(), ["1", "3"], 4, torch.zeros(1, 12), head="shared", norm=None)
    x, y = torch.randn(64, 12), torch.randint(0, 4, (64,))
    for method in ("frozen", "joint", "gated"):
        fastee.fit(net, [(x, y)], method=method, epochs=1, seed=0)
    assert torch.equal(net.heads[0].linear.weight, net.heads[1].linear.weight)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: ExitHead(4, 2, kind="deep"), "head: expected 'linear', 'two_layer', 'two_layer:H', 'low_rank', 'low_rank:R', 'conv' or 'conv:N', got 'deep'"),
    (lambda: ExitHead(4, 2, kind="two_layer:0"), "got 'two_layer:0'"),
    (lambda: ExitHead(4, 2, kind="linear:3"), "got 'linear:3'"),
    (lambda: ExitHead(4, 2, kind=nn.Flatten(), size=(3, 3)), "head: a branch must give maps [B, D, H, W], got [1, 36] for one row of [4, 3, 3]"),
    (lambda: fastee.attach(convolutional(), ["1", "3"], 4, torch.zeros(1, 3, 16, 16), head=["conv"]), "for each of 2 exits, got ['conv']"),
    (lambda: fastee.attach(convolutional(), ["1", "3"], 4, torch.zeros(1, 3, 16, 16), head=nn.ReLU()), "for each of 2 exits, got ReLU"),
    (lambda: fastee.attach(body(), ["1"], 4, torch.zeros(1, 12), head="conv"), "head: 'conv' reads maps [B, D, H, W] and takes their mean, got pool 'none'"),
    (lambda: fastee.attach(body(), ["1"], 4, torch.zeros(1, 12), head="lowrank"), "got 'lowrank', did you mean 'low_rank'?"),
    (lambda: fastee.attach(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 6), nn.Linear(6, 2)), ["0", "1"], 2, torch.zeros(1, 3), head="shared"),
     "head: 'shared' needs exits of one width, got [4, 6] features"),
])  # fmt: skip
def test_bad_kinds_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_a_file_from_before_these_fields_is_linear(tmp_path):
    net = fastee.attach(body(), ["1"], 4, torch.zeros(1, 12)).eval().set_rule(thresholds=[0.3])
    net.save(tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", framework="pt") as file:
        header, tensors = json.loads(file.metadata()["fastee"]), {k: file.get_tensor(k) for k in file.keys()}
    for name in ("head", "temperatures", "gates"):
        del header[name]
    save_file(tensors, tmp_path / "old.safetensors", {"fastee": json.dumps(header)})
    x = torch.randn(20, 12)
    assert torch.equal(fastee.load(tmp_path / "old.safetensors", body())(x).exit, net(x).exit)

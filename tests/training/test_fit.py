import copy
import math
import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastee
from fastee.training.fit import TrainingDiverged


def backbone(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )  # fmt: skip


def data(n=800, seed=1):
    """Four well separated clouds."""
    g = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(4, 12, generator=torch.Generator().manual_seed(99))
    y = torch.randint(0, 4, (n,), generator=g)
    return TensorDataset(centres[y] + torch.randn(n, 12, generator=g), y)


def made():
    return fastee.attach(backbone(), ["2", "5"], 4, torch.zeros(1, 12))


def snapshot(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def accuracy(net, rule):
    net.set_rule(thresholds=rule)
    x, y = data(400, seed=2).tensors
    return float((net(x).label == y).float().mean())


@pytest.mark.parametrize("cache", [True, False])
def test_frozen_trains_the_heads_and_nothing_else(cache):
    net = made()
    before, untrained = snapshot(net.backbone), accuracy(net.eval(), [0.0, 0.0])
    report = fastee.fit(net, DataLoader(data(), batch_size=64), epochs=4, seed=0, cache=cache, val_loader=data(200, 3))
    assert same(before, snapshot(net.backbone)) and not net.training
    assert report.cached is cache and report.samples == 800 and len(report.history) == 4
    assert untrained < 0.6 and accuracy(net, [0.0, math.inf]) > 0.9 and accuracy(net, [math.inf, 0.0]) > 0.9
    first, last = report.history[0], report.history[-1]
    assert all(b < a for a, b in zip(first["loss"], last["loss"], strict=True)) and len(last["val_accuracy"]) == 3
    assert report.accuracy == last["val_accuracy"] and min(report.accuracy[:2]) > 0.9
    assert all(p.grad is None for p in net.backbone.parameters())


def test_joint_trains_everything():
    net = made()
    before = snapshot(net.backbone)
    report = fastee.fit(net, DataLoader(data(), batch_size=64, shuffle=True), method="joint", epochs=8, lr=0.01, seed=0, progress=False)
    assert not same(before, snapshot(net.backbone)) and not net.training
    assert len(report.accuracy) == 3 and accuracy(net, [math.inf, math.inf]) > 0.9 and accuracy(net, [0.0, 0.0]) > 0.9


@pytest.mark.parametrize("method", ["frozen", "joint"])
def test_a_seed_makes_it_repeatable(method):
    runs = []
    for _ in range(2):
        net = made()
        before = torch.random.get_rng_state()
        fastee.fit(net, DataLoader(data(300), batch_size=64, shuffle=True), method=method, epochs=2, seed=7)
        assert torch.equal(before, torch.random.get_rng_state())
        runs.append(snapshot(net))
    assert same(*runs)


def test_weights_choose_who_learns():
    net = made()
    before = [snapshot(h.linear) for h in net.heads]
    fastee.fit(net, data(300), epochs=1, weights=[0.0, 1.0], lr=1e-2)
    moved = [float((h.linear.weight - b["weight"]).detach().abs().max()) for h, b in zip(net.heads, before, strict=True)]
    assert moved[0] < 1e-4 < moved[1]  # only weight decay touches the first


def test_divergence_stops_and_puts_the_weights_back():
    x, y = data(300).tensors
    x = x.clone()
    x[250, 3] = math.nan
    for method in ("frozen", "joint"):
        net = made()
        before = snapshot(net)
        with pytest.raises(TrainingDiverged, match=re.escape("fit: the loss of '2' is nan in epoch 0")):
            fastee.fit(net, [(x, y)], method=method, epochs=2)
        assert same(before, snapshot(net)) and all(torch.isfinite(p).all() for p in net.parameters())


def test_batches_in_every_form():
    x, y = data(64).tensors
    net = made()
    for loader in ([(x, y)], [[x, y]], [{"input": x, "labels": y}], DataLoader(data(64), 16), data(64), [(x, y.to(torch.int32))]):
        assert fastee.fit(net, loader, epochs=1).samples == 64


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x, side):
        return self.b(torch.relu(self.a(torch.cat([x, side], 1))))


def test_a_model_of_two_inputs():
    x, y = data(200).tensors
    net = fastee.attach(Sum(), ["a"], 4, (x[:2, :3], x[:2, 3:6]))
    assert fastee.fit(net, [(x[:, :3], x[:, 3:6], y)], epochs=2).samples == 200
    named = fastee.attach(Sum(), ["a"], 4, {"x": x[:2, :3], "side": x[:2, 3:6]})
    assert fastee.fit(named, [{"x": x[:, :3], "side": x[:, 3:6], "y": y}], method="joint", epochs=1).samples == 200


X, Y = data(8).tensors
BAD = [
    (dict(method="frosen"), ValueError, "method: expected one of ['frozen', 'joint', 'distill', 'gated'] or an object of fastee.training, got 'frosen', did you mean 'frozen'?"),
    (dict(epochs=0), ValueError, "epochs: expected an integer >= 1, got 0"),
    (dict(epochs=1.5), ValueError, "epochs: expected an integer >= 1, got 1.5"),
    (dict(lr=-1), ValueError, "lr: expected a positive number, got -1.0"),
    (dict(lr=math.nan), ValueError, "lr: expected a positive number, got nan"),
    (dict(weights=[1.0]), ValueError, "weights: expected 2 numbers >= 0, not all zero, for method='frozen', got [1.0]"),
    (dict(weights=[1.0, -1.0]), ValueError, "weights: expected 2 numbers >= 0"),
    (dict(loader=[]), ValueError, "loader: it gave no batch"),
    (dict(loader=[(X, Y + 3)]), ValueError, "is outside 0..3"),
    (dict(loader=[(X, torch.full((8,), -100))]), ValueError, "loader: label -100 (batch 0, row 0) is outside 0..3"),
    (dict(loader=[(X, Y.float())]), TypeError, "loader: labels must be integers [B], got float32 [8] in batch 0"),
    (dict(loader=[(X, Y[:5])]), ValueError, "loader: batch 0 has 8 rows but 5 labels"),
    (dict(loader=[X]), TypeError, "loader: expected batches (x, y), got Tensor"),
    (dict(loader=[{"x": X}]), TypeError, "loader: a batch given as a dict needs one of ['labels', 'label', 'y'], got ['x']"),
    (dict(loader=iter([(X, Y)])), TypeError, "loader: an iterator can be walked once only"),
    (dict(loader=X), TypeError, "loader: expected a DataLoader, a Dataset or a list of (x, y) batches, got Tensor"),
    (dict(net=nn.Linear(2, 2)), TypeError, "net: expected an EarlyExit from fastee.attach, got Linear"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m[:40] for *_, m in BAD])
def test_bad_arguments_are_named(change, error, message):
    net = made()
    before = copy.deepcopy(snapshot(net))
    with pytest.raises(error, match=re.escape(message)):
        fastee.fit(**{"net": net, "loader": [(X, Y)], **change})
    assert same(before, snapshot(net))

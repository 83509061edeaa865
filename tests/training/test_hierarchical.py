"""Edge and cloud train apart: the same bits as one process with a detach at the cut, no gradient crosses, one side's trouble stays its own."""

import copy
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import fastee
from fastee.training import CutTimes, TrainingDiverged, choose_cut, cut_times, train_hierarchical
from tests.training.test_fit import data, same, snapshot


def made():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    return fastee.attach(body, ["2", "4"], 4, torch.zeros(1, 12))


def by_hand(net, loader, cut, epochs, edge_only=False):
    """One process, one thread, a detach at the cut."""
    names = {0: ("backbone.0", "backbone.1", "heads.0"), 1: ("backbone.0", "backbone.1", "backbone.3", "heads.1")}[cut]
    rest = {0: ("backbone.3", "backbone.5"), 1: ("backbone.5",)}[cut]
    pick = lambda heads: [p for n, p in net.named_parameters() if n.startswith(heads)]
    edge, cloud = (torch.optim.AdamW(pick(h), lr=0.01, weight_decay=1e-4) for h in (names, rest))
    net.train()
    for _ in range(epochs):
        for x, y in loader:
            h = net.backbone[: 3 if cut == 0 else 5](x)
            for optimizer, z in ((edge, net.heads[cut](h)), (cloud, net.backbone[3 if cut == 0 else 5 :](h.detach()))):
                if edge_only and optimizer is cloud:
                    continue
                optimizer.zero_grad()
                F.cross_entropy(z, y).backward()
                optimizer.step()
    return snapshot(net.eval())


@pytest.mark.parametrize("cut", [0, 1])
def test_the_same_bits_as_one_process_with_a_detach(cut):
    loader = [tuple(t) for t in DataLoader(data(300), 50)]
    net = made()
    want = by_hand(copy.deepcopy(net), loader, cut, 2)
    report = train_hierarchical(net, loader, cut, epochs=2, lr=0.01)
    assert same(snapshot(net), want) and not net.training
    assert report.edge_steps == report.cloud_steps == 12 and report.dropped == 0
    assert report.bytes_sent == 12 * (50 * 32 * 4 + 50 * 8) and report.edge_loss[1] < report.edge_loss[0] and report.cloud_loss[1] < report.cloud_loss[0]
    other = 1 - cut
    assert same(snapshot(net.heads[other]), snapshot(made().heads[other]))


def test_a_dead_link_changes_nothing_on_the_edge_and_stops_the_cloud():
    loader = [tuple(t) for t in DataLoader(data(300), 50)]
    net = made()
    want = by_hand(copy.deepcopy(net), loader, 0, 1, edge_only=True)
    report = train_hierarchical(net, loader, 0, lr=0.01, link="0mbit 0ms")
    assert same(snapshot(net), want) and report.cloud_steps == 0 and report.dropped == 6 and math.isnan(report.cloud_loss[0])


def test_both_sides_learn_over_int8_and_a_link():
    net = made()
    report = train_hierarchical(net, DataLoader(data(800), 50, shuffle=True), 0, epochs=4, lr=0.01, codec="int8", link="100mbit 1ms", seed=0)
    x, y = data(400, 2).tensors
    assert report.bytes_sent == 64 * (50 * 32 + 50 * 4 + 50 * 8)
    assert float((net.full(x).argmax(1) == y).float().mean()) > 0.9
    net.set_rule(thresholds=[0.0, math.inf])
    assert float((net(x).label == y).float().mean()) > 0.9


def test_a_slow_link_loses_the_oldest_when_asked():
    net = made()
    report = train_hierarchical(net, DataLoader(data(800), 20), 0, lr=0.01, link="20mbit 0ms", queue=1, on_full="drop")
    assert report.dropped > 0 and report.cloud_steps + report.dropped == report.edge_steps == 40 and report.cloud_steps > 0


def test_a_loss_that_is_not_finite_stops_its_side_alone():
    net = made()
    with torch.no_grad():
        net.backbone[5].bias[0] = math.nan
    with pytest.raises(TrainingDiverged, match="the cloud's loss is nan in its step 0; the other side has gone on") as caught:
        train_hierarchical(net, DataLoader(data(300), 50), 0, lr=0.01)
    assert caught.value.report.edge_steps == 6 and caught.value.report.cloud_steps == 0
    net = made()
    with torch.no_grad():
        net.heads[0].linear.bias[0] = math.nan
    with pytest.raises(TrainingDiverged, match="the edge's loss is nan") as caught:
        train_hierarchical(net, DataLoader(data(300), 50), 0, lr=0.01)
    assert caught.value.report.edge_steps == 0 and all(torch.isfinite(p).all() for p in net.backbone.parameters())


def test_times_and_the_choice_of_a_cut():
    t = CutTimes(0.1, 0.05, 0.2, 0.3, 0.6, 1e6)
    assert t.step(8e6) == pytest.approx(0.1 + max(0.25, 1.0 + 0.9)) and t.step(math.inf) == pytest.approx(1.0)
    assert t.step(8e6, 0.5) == pytest.approx(2.5) and t.pipelined(8e6) == 1.0 and t.pipelined(8e9) == pytest.approx(0.9)
    assert t.returned_gradients(8e6, 0.5) == pytest.approx(0.1 + 1 + 2 + 0.9 + 0.2) and t.step(0.0) == math.inf
    early, late = CutTimes(0.1, 0.1, 0.1, 0.8, 0.8, 1e6), CutTimes(0.7, 0.1, 0.7, 0.1, 0.1, 1e3)
    assert choose_cut([early, late], [0.9, 0.9], 1e9, pipelined=False) == 1 and choose_cut([early, late], [0.92, 0.9], 1e5, tol=0.01) == 0
    assert choose_cut([early, late], [0.9, 0.9], 1e5) == 1
    net = made()
    before = snapshot(net)
    x, y = data(200).tensors
    found = [cut_times(net, x, y, c, repeats=3) for c in (0, 1)]
    assert same(before, snapshot(net)) and all(v > 0 for f in found for v in (f.edge_forward, f.edge_exit, f.cloud_backward))
    assert found[0].bytes == 200 * (32 * 4 + 8) and cut_times(net, x, y, 0, repeats=1, codec="int8").bytes == 200 * (32 + 4 + 8)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4)

    def forward(self, x):
        return self.c(torch.relu(torch.nn.functional.linear(self.b(self.a(x)), self.a.weight)))


@pytest.mark.parametrize(("change", "message"), [
    (dict(cut=2), "cut: expected an exit in 0..1, got 2"),
    (dict(epochs=0), "epochs: expected an integer >= 1, got 0"),
    (dict(codec="zip"), "codec: expected one of ['raw', 'int8'], got 'zip'"),
    (dict(on_full="x"), "on_full: expected 'wait' or 'drop', got 'x'"),
    (dict(queue=0), "queue: expected an integer >= 1, got 0"),
    (dict(lr=0.0), "lr: expected a positive number, got 0.0"),
    (dict(loader=[]), "loader: it gave no batch"),
    (dict(net=fastee.attach(Tied(), ["b"], 4, torch.zeros(1, 12))), "cut: 1 weights are used on both sides of exit 'b'"),
])  # fmt: skip
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        train_hierarchical(**{"net": made(), "loader": [tuple(data(8).tensors)], **change})

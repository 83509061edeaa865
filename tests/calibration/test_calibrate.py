import functools
import math
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fastee
from fastee.calibration import collect


def data(n, seed):
    """Two rings of classes: half of the rows are easy (far apart), half overlap."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (n,), generator=g)
    centres = torch.eye(4, 8) * 6
    spread = torch.where(torch.rand(n, 1, generator=g) < 0.5, 0.5, 2.5)
    return TensorDataset(centres[y] + spread * torch.randn(n, 8, generator=g), y)


@functools.cache
def trained():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    net = fastee.attach(body, ["1", "3"], 4, torch.zeros(1, 8))
    fastee.fit(net, data(3000, 0), method="joint", epochs=6, lr=3e-3, seed=0)
    return net


@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy", "energy"])
@pytest.mark.parametrize("risk", ["accuracy", "agreement"])
def test_it_saves_cost_and_keeps_the_promise_on_fresh_rows(measure, risk):
    net = trained()
    report = fastee.calibrate(net, data(4000, 1), max_drop=0.02, confidence=0.95, measure=measure, risk=risk)
    assert net.measure == measure and net.thresholds == report.thresholds and not net.training
    assert report.cost < 0.8 and report.bound == 0.02 and report.drop <= 0.02 and report.note == ""
    x, y = data(20_000, 2).tensors
    out, full = net(x), net.full(x).argmax(1)
    lost = (full == y).float().mean() - (out.label == y).float().mean() if risk == "accuracy" else (out.label != full).float().mean()
    assert float(lost) <= 0.02
    shares = torch.bincount(out.exit, minlength=3) / len(y)
    np.testing.assert_allclose(shares.numpy(), report.exit_shares, atol=0.03)


def test_the_report_is_what_the_network_then_does():
    net, (x, y) = trained(), data(3000, 1).tensors
    report = fastee.calibrate(net, data(3000, 1), max_drop=0.02)
    out = net(x)
    assert report.exit_shares == [int((out.exit == k).sum()) / 3000 for k in range(3)]
    assert report.accuracy == pytest.approx(float((out.label == y).double().mean()))
    assert report.full_accuracy == pytest.approx(float((net.full(x).argmax(1) == y).double().mean()))
    assert report.drop == pytest.approx(report.full_accuracy - report.accuracy)
    spent = np.cumsum(np.array(net.macs["segments"]) + np.array([*net.macs["heads"], 0])) / sum(net.macs["segments"])
    assert report.cost == pytest.approx(spent[out.exit.numpy()].mean())
    assert report.samples == 3000 and report.exit_accuracy[-1] == report.full_accuracy


def test_agreement_counts_the_rows_whose_label_differs():
    net, (x, y) = trained(), data(3000, 1).tensors
    report = fastee.calibrate(net, data(3000, 1), max_drop=0.03, risk="agreement", confidence=None)
    out, full = net(x), net.full(x).argmax(1)
    assert 0 < report.drop == pytest.approx(float((out.label != full).double().mean()))
    assert report.accuracy == pytest.approx(float((out.label == y).double().mean()))


def test_collected_scores_are_those_of_the_running_network():
    net = trained()
    x, y = data(64, 5).tensors
    score, label, truth = collect(net, [(x[:40], y[:40]), (x[40:], y[40:])], "margin")
    assert score.shape == (64, 2) and label.shape == (64, 3) and truth.tolist() == y.tolist()
    for k in range(2):
        net.set_rule(measure="margin", thresholds=[0.0 if j == k else math.inf for j in range(2)])
        out = net(x)
        np.testing.assert_allclose(out.confidence.numpy(), score[:, k], rtol=1e-5, atol=1e-6)
        assert out.label.tolist() == label[:, k].tolist()


def test_too_few_rows_warn_and_leave_all_exits_off():
    net = trained()
    with pytest.warns(UserWarning, match="calibrate: max_drop=0.003 with confidence 0.95 needs at least .* rows, got 200; exits stay off"):
        report = fastee.calibrate(net, data(200, 1))
    assert net.thresholds == [math.inf] * 2 and report.cost == pytest.approx(1.0, abs=0.1) and report.bound == 0.0 and report.note
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = fastee.calibrate(net, data(200, 1), confidence=None)
    assert report.bound == math.inf and report.drop <= 0.003 and report.cost < 1.0


def test_latency_counts_this_machines_seconds():
    net = trained()
    net.profile = None
    report = fastee.calibrate(net, data(2000, 1), max_drop=0.05, objective="latency")
    seconds = net.profile.mean[:, 0, 0]
    assert report.cost == pytest.approx(float(np.cumsum(seconds / seconds.sum()) @ np.array(report.exit_shares)))


BAD = [
    (dict(measure="max_probs"), ValueError, "measure: expected one of ['max_prob', 'margin', 'entropy', 'energy', 'patience', 'gate'], got 'max_probs', did you mean 'max_prob'?"),
    (dict(risk="acuracy"), ValueError, "risk: expected one of ['accuracy', 'agreement'], got 'acuracy', did you mean 'accuracy'?"),
    (dict(objective="speed"), ValueError, "objective: expected one of ['cost', 'latency'], got 'speed'"),
    (dict(max_drop=2), ValueError, "max_drop: expected a number in [0, 1], got 2.0"),
    (dict(loader=[]), ValueError, "loader: it gave no batch"),
    (dict(net=nn.Linear(2, 2)), TypeError, "net: expected an EarlyExit from fastee.attach, got Linear"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m[:40] for *_, m in BAD])
def test_bad_arguments_are_named_and_change_nothing(change, error, message):
    net = trained().set_rule(measure="entropy", thresholds=[-0.1, -0.2])
    with pytest.raises(error, match=re.escape(message)):
        fastee.calibrate(**{"net": net, "loader": data(100, 0), **change})
    assert net.measure == "entropy" and net.thresholds == [-0.1, -0.2]

"""Distilled, gated and weighted training, early stop, and going on from a file."""

import copy
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastee
from fastee.errors import CheckpointMismatch
from fastee.nn.history import gate_features
from fastee.training import Distill, Frozen, Gated, Joint
from fastee.training.gated import best_exits, exit_probabilities, gate_loss, head_loss
from fastee.training.runs import distillation
from tests.training.test_fit import accuracy, backbone, data, made, same, snapshot


def agreement(net, rows):
    """Share of rows on which each exit gives the end's label."""
    x = rows.tensors[0]
    pooled, end = net.taps(x)
    return [
        float((h.eval().classify(p).argmax(1) == end.argmax(1)).float().mean())
        for h, p in zip(net.heads, pooled, strict=True)
    ]


# distilled


def test_distillation_is_the_formula():
    g = torch.Generator().manual_seed(0)
    z, t, y = torch.randn(6, 5, generator=g), torch.randn(6, 5, generator=g), torch.randint(0, 5, (6,), generator=g)
    p, q = F.softmax(t.double() / 3, 1), F.softmax(z.double() / 3, 1)
    want = 0.7 * 9 * (p * (p.log() - q.log())).sum(1).mean() + 0.3 * F.cross_entropy(z.double(), y)
    assert torch.allclose(distillation(z, t, y, 0.7, 3.0).double(), want, rtol=1e-5)
    assert torch.equal(distillation(z, t, y, 0.0, 3.0), F.cross_entropy(z, y))


def test_exits_learn_the_teacher_and_not_the_labels():
    rows = data(600)
    wrong = TensorDataset(rows.tensors[0], torch.randint(0, 4, (600,), generator=torch.Generator().manual_seed(5)))
    teacher = backbone(seed=3)
    fastee.fit(fastee.attach(teacher, ["2"], 4, torch.zeros(1, 12)), rows, method="joint", epochs=6, lr=0.01, seed=0)
    net = made()
    before = snapshot(net.backbone)
    fastee.fit(net, wrong, method=Distill(alpha=1.0, teacher=teacher), epochs=6, seed=0)
    assert (
        same(before, snapshot(net.backbone))
        and accuracy(net, [0.0, math.inf]) > 0.9
        and accuracy(net, [math.inf, 0.0]) > 0.9
    )


def test_the_end_teaches_the_exits():
    net = made()
    start = min(agreement(net, data(300, 2)))
    fastee.fit(net, data(), method=Distill(alpha=1.0), epochs=6, seed=0)
    assert min(agreement(net, data(300, 2))) > start + 0.4


def test_feature_transfer_pulls_the_features_together():
    found = {}
    for beta in (0.0, 30.0):
        net = made()
        report = fastee.fit(
            net,
            DataLoader(data(400), 100),
            method=Distill(alpha=0.5, beta=beta, backbone=True),
            epochs=8,
            lr=0.01,
            seed=0,
        )
        assert len(report.history[-1]["loss"]) == 3 and accuracy(net, [math.inf, math.inf]) > 0.9
        assert not any("project" in k for k in net.state_dict())
        found[beta] = report.history
    first, last = found[30.0][0]["loss"], found[30.0][-1]["loss"]
    assert found[30.0][0]["loss"][0] > found[0.0][0]["loss"][0] + 5 and last[0] < 0.6 * first[0]


# weights


def test_pabee_weighs_by_depth():
    net = made()
    fastee.fit(net, data(200), method=Joint(weights="pabee"), epochs=1, seed=0)
    by_hand = made()
    fastee.fit(by_hand, data(200), method="joint", weights=[1 / 6, 2 / 6, 3 / 6], epochs=1, seed=0)
    assert same(snapshot(net), snapshot(by_hand))
    assert not same(snapshot(net), snapshot(backbone()))


# gated


def recursion(g):
    """The official code's decision, in float64: the first exit whose A_m reaches 1/2."""
    p, a = [], []
    for m, value in enumerate(g):
        p.append(max(0.0, min(value, 1 - sum(g[:m]))))
        rest = math.prod(1 - x for x in a)
        a.append(min(max(p[m] / rest, 0.0), 1.0) if rest > 0 else 1.0)
        if a[m] >= 0.5:
            return m
    return len(g)


@given(st.lists(st.sampled_from([0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0]), min_size=1, max_size=6))
def test_both_decision_forms_agree(g):
    total, taken = 0.0, len(g)
    for m, value in enumerate(g):
        if value >= (1 - total) / 2:
            taken = m
            break
        total += value
    assert taken == recursion(g)
    p = exit_probabilities(torch.tensor([g], dtype=torch.float64))
    assert (
        float(p.min()) >= 0
        and float(p.sum()) <= 1 + 1e-12
        and math.isclose(float(p.sum()), min(1.0, sum(g)), abs_tol=1e-12)
    )


def test_best_exits_and_labels():
    g = torch.Generator().manual_seed(0)
    ce, cost = torch.rand(50, 4, generator=g), torch.tensor([0.25, 0.5, 0.75, 1.0])
    assert torch.equal(best_exits(ce, cost, 0.0), ce.argmin(1)) and not best_exits(ce, cost, 1e6).any()
    best = best_exits(ce, cost, 0.7)
    logits, weight = torch.randn(50, 3, generator=g), torch.tensor([2.0, 0.5, 5.0])
    want = 0.0
    for b in range(50):
        for m in range(3):
            label = 1.0 if m >= best[b] else 0.0
            q = 1 / (1 + math.exp(-float(logits[b, m])))
            want -= (float(weight[m]) if label else 1.0) * (label * math.log(q) + (1 - label) * math.log(1 - q)) / 150
    assert math.isclose(float(gate_loss(logits, best, weight)), want, rel_tol=1e-5)


def test_the_official_head_loss_has_the_gradient_of_the_plain_sum():
    g = torch.Generator().manual_seed(0)
    p = torch.rand(8, 3, generator=g, dtype=torch.float64) / 3
    grads = {}
    for weighting in ("code", "detached", "plain"):
        ce = torch.rand(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
        loss = ce.mean() if weighting == "plain" else head_loss(p, ce, weighting)
        loss.backward()
        grads[weighting] = ce.grad
    assert torch.allclose(grads["code"], grads["plain"], atol=1e-16) and not torch.allclose(
        grads["detached"], grads["plain"], atol=1e-3
    )
    nothing = torch.zeros(2, 3, dtype=torch.float64)
    assert float(head_loss(nothing, torch.rand(2, 3, dtype=torch.float64), "detached")) == 0.0


def test_gate_features_equal_float64():
    z = torch.randn(40, 7, generator=torch.Generator().manual_seed(0)) * 3
    p = F.softmax(z.double(), 1)
    top, q = p.topk(2, 1).values, p**2 / (p**2).sum(1, keepdim=True)
    want = torch.stack([top[:, 0], -(p * p.log()).sum(1), top[:, 0] - top[:, 1], -(q * q.log()).sum(1)], 1)
    assert torch.allclose(gate_features(z).double(), want, atol=1e-5)


def mixed(n, seed):
    """Half of the rows are linear, half are products of signs, which the first exit hardly sees; column 0 says which."""
    x = torch.randn(n, 12, generator=torch.Generator().manual_seed(seed))
    easy, hard = 2 * (x[:, 1] > 0) + (x[:, 2] > 0), 2 * (x[:, 3] * x[:, 4] > 0) + (x[:, 5] * x[:, 6] > 0)
    return TensorDataset(x, torch.where(x[:, 0] > 0, easy, hard).long())


@pytest.fixture(scope="module")
def trained():
    net = made()
    fastee.fit(net, DataLoader(mixed(3000, 1), 64, shuffle=True), method="joint", epochs=12, lr=0.01, seed=0)
    return net


def gated(trained, **options):
    net = copy.deepcopy(trained)
    before = snapshot(net.backbone)
    report = fastee.fit(net, mixed(3000, 3), method=Gated(phase=10, **options), epochs=6, seed=0, batch_size=64)
    assert same(before, snapshot(net.backbone))
    return net, report


def test_gates_let_the_easy_rows_go_first(trained):
    net, report = gated(trained, trade=0.1)
    assert net.measure == "gate" and net.thresholds == [0.0, 0.0] and report.history[-1]["phase"] == "gated"
    x, y = mixed(1000, 2).tensors
    out, easy = net(x), x[:, 0] > 0
    first = out.exit == 0
    assert float(first[easy].float().mean()) > 0.2 > 0.1 > float(first[~easy].float().mean())
    pooled, end = net.taps(x)
    alone = [float((h.classify(p).argmax(1) == y).float().mean()) for h, p in zip(net.heads, pooled, strict=True)]
    assert float((out.label == y).float().mean()) > alone[0] + 0.05  # the first exit is right where it is used


def test_warm_up_stops_and_keeps_the_best_head(trained):
    net, report = gated(trained, warm_up=30)
    warm = [e for e in report.history if e["phase"] == "warm-up"]
    assert len(warm) < 30 and len(report.history) == len(warm) + 6


def test_gates_survive_a_file(trained, tmp_path):
    net, _ = gated(trained)
    net.save(tmp_path / "net.safetensors", weights="all")
    again = fastee.load(tmp_path / "net.safetensors", backbone())
    x = mixed(100, 2).tensors[0]
    a, b = net(x), again(x)
    assert (
        again.measure == "gate"
        and torch.equal(a.exit, b.exit)
        and torch.equal(a.logits, b.logits)
        and torch.equal(a.confidence, b.confidence)
    )


def test_calibrate_moves_a_gate(trained):
    net, _ = gated(trained, trade=0.1)
    report = fastee.calibrate(net, mixed(2000, 4), max_drop=0.05, measure="gate")
    assert net.measure == "gate" and report.drop <= 0.05 and report.cost < 1


# stop and go on


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("method", [Frozen(), Joint(), Distill(), Gated(phase=3, warm_up=2)], ids=lambda m: m.name)
def test_a_run_goes_on_from_its_file_as_if_never_interrupted(tmp_path, monkeypatch, method):
    def run(path, stop=None):
        net, seen = made(), []
        import fastee.training.loop as loop

        real = loop._File.write

        def write(self, saved, best):
            real(self, saved, best)
            seen.append(saved.epoch)
            if len(seen) == stop:
                raise Interrupted

        monkeypatch.setattr(loop._File, "write", write)
        try:
            report = fastee.fit(
                net, DataLoader(data(300), 50, shuffle=True), method=method, epochs=4, seed=3, checkpoint=path
            )
        except Interrupted:
            return None, None, seen
        finally:
            monkeypatch.setattr(loop._File, "write", real)
        return net, report, seen

    whole, report, epochs = run(tmp_path / "a")
    assert run(tmp_path / "b", stop=2)[0] is None
    net, again, rest = run(tmp_path / "b")
    assert rest == epochs[2:] and same(snapshot(net), snapshot(whole))
    drop = [{k: v for k, v in e.items() if k != "seconds"} for e in report.history]
    assert (
        drop == [{k: v for k, v in e.items() if k != "seconds"} for e in again.history]
        and again.samples == report.samples
    )
    finished, _, none = run(tmp_path / "b")
    assert none == [] and same(snapshot(finished), snapshot(whole))


def test_a_file_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run"
    fastee.fit(made(), data(100), epochs=1, seed=0, checkpoint=path)
    for change in (dict(epochs=2), dict(seed=1), dict(lr=0.5), dict(method="distill")):
        net = made()
        before = snapshot(net)
        with pytest.raises(CheckpointMismatch, match="is of another run"):
            fastee.fit(net, data(100), **{"epochs": 1, "seed": 0, "checkpoint": path, **change})
        assert same(before, snapshot(net))
    other = fastee.attach(backbone(seed=5), ["2", "5"], 4, torch.zeros(1, 12))
    with pytest.raises(CheckpointMismatch, match="fixed weights differ"):
        fastee.fit(other, data(100), epochs=1, seed=0, checkpoint=path)
    whole = path.read_bytes()
    for broken in (b"", b"hello", whole[: len(whole) // 2], np.random.default_rng(0).bytes(400)):
        path.write_bytes(broken)
        with pytest.raises(CheckpointMismatch, match=re.escape("delete it")):
            fastee.fit(made(), data(100), epochs=1, seed=0, checkpoint=path)


def test_early_stop_puts_the_best_epoch_back():
    net = made()
    report = fastee.fit(net, data(60), epochs=60, seed=0, lr=0.05, patience=3, val_loader=data(300, 3), batch_size=16)
    means = [sum(e["val_accuracy"]) for e in report.history]
    assert len(means) < 60 and len(means) - 1 - int(np.argmax(means)) == 3
    x, y = data(300, 3).tensors
    pooled, _ = net.taps(x)
    now = [float((h.classify(p).argmax(1) == y).double().mean()) for h, p in zip(net.heads, pooled, strict=True)]
    assert now == pytest.approx(report.history[int(np.argmax(means))]["val_accuracy"][:2])


def test_losses_that_are_not_finite_name_the_exit_in_every_method():
    x, y = data(300).tensors
    x = x.clone()
    x[250, 3] = math.nan
    for method in (Distill(), Gated(warm_up=1), Gated(warm_up=0)):
        net = made()
        before = snapshot(net.backbone)
        with pytest.raises(fastee.training.TrainingDiverged, match=re.escape("fit: the loss of '2' is nan in epoch 0")):
            fastee.fit(net, [(x, y)], method=method, epochs=2, batch_size=300)
        assert same(before, snapshot(net.backbone)) and all(torch.isfinite(p).all() for p in net.parameters())


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda: Distill(alpha=1.5), ValueError, "alpha: expected a finite number in [0, 1], got 1.5"),
    (lambda: Distill(temperature=0), ValueError, "temperature: expected a finite number > 0, got 0"),
    (lambda: Distill(temperature=math.nan), ValueError, "temperature: expected a finite number > 0, got nan"),
    (lambda: Distill(beta=1.0), ValueError, "beta: on a fixed backbone feature transfer could train nothing"),
    (lambda: Distill(teacher="big"), TypeError, "teacher: expected a module or None, got str"),
    (lambda: Gated(trade=-1), ValueError, "trade: expected a finite number >= 0, got -1"),
    (lambda: Gated(weighting="x"), ValueError, "weighting: expected 'detached' or 'code', got 'x'"),
    (lambda: Gated(phase=0), ValueError, "phase: expected an integer >= 1, got 0"),
    (lambda: fastee.fit(made(), data(20), method="gated", weights=[1, 1]), ValueError, "weights: method='gated' weighs the exits by its gates"),
    (lambda: fastee.fit(made(), data(20), method="gated", cache=False), ValueError, "cache: method='gated' walks the features"),
    (lambda: fastee.fit(made(), data(20), patience=2), ValueError, "patience: it needs a val_loader"),
    (lambda: fastee.fit(made(), data(20), weights="deep"), ValueError, "weights: expected 2 numbers, None or 'pabee', got 'deep'"),
    (lambda: fastee.fit(made(), data(20), method=Distill(teacher=nn.Linear(12, 7))), ValueError, "teacher: expected logits [20, 4], got [20, 7]"),
    (lambda: fastee.fit(made(), data(20), method=Distill(beta=1.0, backbone=True, teacher=nn.Tanh())), ValueError, "beta: the teacher ends in no linear layer"),
    (lambda: made().set_rule(measure="gate"), ValueError, "measure: 'gate' needs trained gates"),
])  # fmt: skip
def test_bad_settings_are_named(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()

"""Measures that remember: patience and gate, in the runner, under a deadline, in any batch."""

import math

import pytest
import torch
from torch import nn

import fastee
from fastee.nn import history


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    wide = [nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)]
    net = fastee.attach(nn.Sequential(*wide), ["1", "3", "5"], 10, torch.zeros(2, 12)).eval()
    for head in net.heads:
        torch.nn.init.normal_(head.linear.weight, std=0.5)
        torch.nn.init.constant_(head.linear.bias[3:], -100.0)  # three classes, so that exits often agree
        with torch.no_grad():  # surer, leaves sooner
            head.add_gate().weight.copy_(torch.tensor([[3.0, -1.0, 0.5, -0.5]]))
            head.gate.bias.fill_(-2.5)
    return net


def rows(n=64):
    return 3 * torch.randn(n, 12, generator=torch.Generator().manual_seed(1))


def said(net, x):
    """Logits of every exit for all rows, each in plain torch."""
    pooled, _ = net.taps(x)
    return [h.classify(p) for h, p in zip(net.heads, pooled, strict=True)]


def patience_by_hand(labels, theta, ends):
    count = 0
    for k, label in enumerate(labels):
        count = count + 1 if k and label == labels[k - 1] else 0
        if count >= theta:
            return k
    return ends


def gate_by_hand(net, logits, row):
    total = 0.0
    for k, z in enumerate(logits):
        g = float(torch.sigmoid(net.heads[k].gate(history.gate_features(z[row : row + 1]))).detach())
        if g >= (1 - total) / 2:
            return k
        total += g
    return len(logits)


@pytest.mark.parametrize("theta", [1.0, 2.0, 3.0])
def test_patience_leaves_after_so_many_equal_answers(net, theta):
    x = rows()
    out = net.set_rule(measure="patience", thresholds=[theta] * 3)(x)
    labels = torch.stack([z.argmax(1) for z in said(net, x)], 1).tolist()
    want = [patience_by_hand(row, theta, 3) for row in labels]
    assert out.exit.tolist() == want and (theta == 3.0 or len(set(want)) > 1)
    left = out.exit < 3
    assert torch.equal(out.confidence[left], torch.full_like(out.confidence[left], theta))


def test_an_exit_that_is_off_does_not_break_the_run_of_answers(net):
    x = rows()
    out = net.set_rule(measure="patience", thresholds=[1.0, math.inf, 1.0])(x)
    first, _, third = (z.argmax(1) for z in said(net, x))
    assert torch.equal(out.exit, torch.where(first == third, 2, 3)) and 2 in out.exit


def test_gate_adds_up_what_the_exits_before_said(net):
    x = rows()
    out = net.set_rule(measure="gate", thresholds=[0.0] * 3)(x)
    logits = said(net, x)
    assert out.exit.tolist() == [gate_by_hand(net, logits, i) for i in range(len(x))] and len(out.exit.unique()) > 1


@pytest.mark.parametrize("measure", ["patience", "gate"])
def test_a_row_decides_alone_whatever_its_batch(net, measure):
    x = rows()
    net.set_rule(measure=measure, thresholds=[0.05] * 3)
    carry = net.run_segment(0, (x,))
    parts = [[tuple(t[i : i + size].clone() for t in carry) for i in range(0, len(x), size)] for size in (1, 7)]
    whole = net.exit_step(0, carry)
    for pieces in parts:
        steps = [net.exit_step(0, p) for p in pieces]
        assert torch.equal(torch.cat([s.confidence for s in steps]), whole.confidence)
        assert torch.equal(torch.cat([p[-1] for p in pieces]), carry[-1])


@pytest.mark.parametrize(("measure", "theta"), [("patience", 1.0), ("gate", 0.0)])
def test_a_deadline_far_away_changes_nothing(net, measure, theta):
    x = rows()
    now = net.set_rule(measure=measure, thresholds=[theta] * 3)(x)
    late = net(x, deadline=60.0)
    assert torch.equal(late.exit, now.exit) and torch.equal(late.label, now.label) and not late.forced.any()


def test_evaluating_an_exit_twice_changes_nothing(net):
    net.set_rule(measure="gate", thresholds=[0.0] * 3)
    carry = net.run_segment(0, (rows(8),))
    assert carry[-1].shape == (8, 3) and (carry[-1] == history.NOT_RUN).all()
    once, again = net.exit_step(0, carry), net.exit_step(0, carry)
    assert (
        torch.equal(once.confidence, again.confidence)
        and (carry[-1][:, 0] != history.NOT_RUN).all()
        and (carry[-1][:, 1:] == history.NOT_RUN).all()
    )
    end = net.run_segment(3, net.run_segment(2, net.run_segment(1, carry)))
    assert len(end) == 1 and end[0].shape == (8, 10)


def test_rows_with_nan_never_leave_early(net):
    x = rows(4)
    x[2] = math.nan
    for measure, theta in (("patience", 0.0), ("gate", -1.0)):
        out = net.set_rule(measure=measure, thresholds=[theta] * 3)(x)
        assert out.exit.tolist() == [0, 0, 3, 0] and int(out.label[2]) == -1 and math.isnan(float(out.confidence[2]))


def test_a_measure_that_remembers_needs_its_carry(net):
    net.set_rule(measure="max_prob")
    with pytest.raises(ValueError, match="measure: 'patience' needs a carry that remembers"):
        net.exit_step(0, net.run_segment(0, (rows(2),)), measure="patience")


def test_no_rows(net):
    assert len(net.set_rule(measure="gate", thresholds=[0.0] * 3)(rows(0))) == 0

"""DAISY: frame entropy decides how deep an input goes; the range learned while counting bounds the branches."""

import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastee.nn import FrameExits
from fastee.training import codebook, train_frames


class Layer(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.a = nn.Linear(d, d)

    def forward(self, h, mask=None):
        near = F.pad(h, (0, 0, 1, 1))
        return h + torch.tanh(self.a(near[:, :-2] + near[:, 1:-1] + near[:, 2:])) / 2


def made(n=4, clusters=6, **options):
    torch.manual_seed(0)
    return FrameExits(nn.Linear(5, 16), [Layer(16) for _ in range(n)], 16, clusters, **options).eval()


def tones(rows, noise, seed, frames=20):
    """Sequences that dwell on one of a few tones, with noise."""
    g = torch.Generator().manual_seed(seed)
    palette = 3 * torch.randn(6, 5, generator=torch.Generator().manual_seed(9))
    which = torch.randint(0, 6, (rows, frames // 5), generator=g).repeat_interleave(5, 1)
    return palette[which] + noise * torch.randn(rows, frames, 5, generator=g)


@pytest.fixture(scope="module")
def trained():
    net = made()
    before = {k: v.clone() for k, v in net.state_dict().items() if not k.startswith("branches")}
    report = train_frames(net, [tones(40, s, i) for i, s in enumerate((0.1, 0.5, 1.0, 2.0) * 3)], epochs=8)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert report.history[-1]["loss"][-1] < 0.6 * report.history[0]["loss"][-1] and len(report.accuracy) == 4
    return net


def entropy(net, x, m, mask=None):
    p = F.softmax(net.branches[m - 1](net.hidden(x, mask)[m]).double(), -1)
    h = -(p * p.clamp_min(1e-300).log()).sum(-1)
    real = torch.ones(h.shape) if mask is None else mask.double()
    return ((h * real).sum(1) / real.sum(1)).detach()


def test_thresholds_at_the_ends(trained):
    x = tones(8, 0.5, 1)
    trained.collect = True
    try:
        assert (trained.set_rule(-1.0)(x).exit == 4).all() and trained(x).branches == 4
        assert (trained.set_rule(math.inf)(x).exit == 1).all()
    finally:
        trained.collect = False
        trained.counts.zero_()


@pytest.mark.parametrize("mode", ["all", "per_sample"])
def test_the_exit_is_the_first_layer_below_the_threshold(trained, mode):
    x = torch.cat([tones(6, 0.05, 1), tones(6, 3.0, 2)])
    mask = torch.arange(20)[None] < torch.tensor([20, 12] * 6)[:, None]
    u = torch.stack([entropy(trained, x, m, mask) for m in (1, 2, 3, 4)], 1)
    frames = mask.sum(1).double()
    if mode == "all":
        u = ((u * frames[:, None]).sum(0) / frames.sum()).expand(12, 4)
    threshold = float(u[:, 1:].median())
    trained.collect = True
    try:
        out = trained.set_rule(threshold, batch_mode=mode)(x, mask)
        assert trained.counts.sum() == (1 if mode == "all" else 12)
    finally:
        trained.collect = False
        trained.counts.zero_()
    below = u <= threshold
    want = torch.where(below.any(1), below.int().argmax(1) + 1, 4)
    assert torch.equal(out.exit, want) and (mode == "all" or len(out.exit.unique()) > 1)
    hidden = trained.hidden(x, mask)
    for row, m in enumerate(out.exit.tolist()):
        w = trained.weights(m)
        assert float(w.sum().detach()) == pytest.approx(1.0)
        assert torch.allclose(out.feature[row], sum(w[k] * hidden[k][row] for k in range(m + 1)), atol=1e-6)


def test_padding_may_hold_anything(trained):
    x = tones(4, 0.5, 1)
    mask = torch.ones(4, 20, dtype=torch.bool)
    mask[:, 15:] = False
    other = x.clone()
    other[:, 17:] = 1e3  # further from the real frames than two layers of three frames see
    trained.counts.copy_(torch.tensor([0, 3, 0, 0]))
    try:
        a, b = trained.set_rule(0.5)(x, mask), trained(other, mask)
        assert torch.equal(a.entropy, b.entropy) and torch.equal(a.exit, b.exit)
    finally:
        trained.counts.zero_()


@pytest.mark.parametrize(("counts", "range", "want"), [
    ([0, 3, 1, 0], "avg", [2, 3]), ([0, 4, 0, 0], "avg", [2]), ([1, 0, 0, 3], "avg", [3, 4]), ([0, 1, 0, 5], "min-max", [2, 3, 4]),
    ([1, 5, 4, 0], "threshold", [2, 3]), ([0, 0, 0, 0], "avg", []),
])  # fmt: skip
def test_the_range_bounds_depth_and_branches(trained, counts, range, want):
    trained.counts.copy_(torch.tensor(counts))
    try:
        trained.set_rule(-1.0, range=range)
        assert trained.exit_range == want
        if want:
            out = trained(tones(3, 0.5, 1))
            assert (out.exit == max(want)).all() and out.branches == len(want)
            one = trained.set_rule(1.0, range=range, batch_mode="per_sample")(tones(1, 0.5, 1))
            assert torch.equal(one.exit, trained.set_rule(1.0, range=range, batch_mode="all")(tones(1, 0.5, 1)).exit)
        else:
            with pytest.warns(UserWarning, match="every input runs to full depth"):
                assert (trained(tones(3, 0.5, 1)).exit == 4).all()
    finally:
        trained.counts.zero_()


def test_gradients_reach_the_mixing_weights(trained):
    trained.counts.copy_(torch.tensor([0, 1, 0, 0]))
    trained.zero_grad(set_to_none=True)
    try:
        trained.set_rule(math.inf)(tones(3, 0.5, 1)).feature.square().sum().backward()
        assert trained.mix.grad[0, :3].abs().min() > 0 and not trained.mix.grad[0, 3:].any()
        assert all(p.grad is None for p in trained.branches.parameters())
    finally:
        trained.counts.zero_()
        trained.zero_grad(set_to_none=True)


def test_codebook_finds_separate_clouds():
    x = torch.cat([torch.randn(50, 3) * 0.1 + c for c in (torch.tensor([0.0, 0, 5]), torch.tensor([5.0, 0, 0]), torch.tensor([0.0, 5, 0]))])
    centres = codebook(x, 3)
    assert torch.equal(centres, codebook(x, 3)) and torch.cdist(x, centres).amin(1).max() < 1
    assert codebook(torch.ones(5, 2), 3).shape == (3, 2)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: made().set_rule(math.nan), "threshold: expected a number, got nan"),
    (lambda: made().set_rule(1.0, range="mean"), "range: expected one of ['avg', 'min-max', 'threshold'], got 'mean'"),
    (lambda: made().set_rule(1.0, batch_mode="row"), "batch_mode: expected one of ['all', 'per_sample'], got 'row'"),
    (lambda: FrameExits(nn.Identity(), [], 4, 4), "layers: expected at least one"),
    (lambda: made()(tones(2, 1, 1), torch.tensor([[True] * 20, [False] * 20])), "mask: row 1 has no real frame"),
    (lambda: codebook(torch.ones(2, 2), 3), "features: expected at least 3 rows [N, D], got [2, 2]"),
    (lambda: train_frames(made(), []), "loader: it gave no batch"),
])  # fmt: skip
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastee import ops, reference
from fastee.testing.tolerances import assert_decisions_match, assert_stats_close


def make(shape, classes, pool, seed=0, bias=True):
    g = torch.Generator().manual_seed(seed)
    features = shape[1] if pool in ("mean", "none") else shape[2]
    x = torch.randn(*shape, generator=g)
    w = torch.randn(classes, features, generator=g) * (2.0 / features**0.5) * (math.prod(shape[2:]) ** 0.5 if pool == "mean" else 1.0)
    w[: classes // 2 : 7] *= 3  # a few classes dominate: random rows alone never test the maximum
    return x, w, torch.randn(classes, generator=g) if bias else None


def check(way, x, w, b, pool="mean", norm=None, mask=None, measure="max_prob", threshold=0.5, temperature=1.0):
    got = ops.exit_head(x, w, b, pool, norm, measure, threshold, temperature=temperature, mask=mask, logits=True, backend=way)
    n64 = norm and norm._replace(weight=None if norm.weight is None else norm.weight.double(), bias=None if norm.bias is None else norm.bias.double())
    b64 = None if b is None else b.double()
    want = reference.exit_head(x.double(), w.double(), b64, pool, n64, measure, threshold, temperature, mask)
    plain = reference.exit_head(x, w, b, pool, norm, measure, threshold, temperature, mask)
    assert got.label.dtype == torch.int64 and got.confidence.dtype == torch.float32 and got.exits.dtype == torch.bool
    assert_stats_close(got.stats, plain.logits, truth=want.logits, temperature=temperature)
    scale = max(1.0, float(want.logits.nan_to_num(0, 0, 0).abs().max()) if want.logits.numel() else 1.0)
    assert torch.allclose(got.logits.double(), want.logits, atol=2e-6 * scale * max(1, w.shape[1] ** 0.5 / 8), rtol=1e-5, equal_nan=True)
    assert_decisions_match(got.exits, want.confidence, threshold, tol=1e-4 * scale)
    assert_decisions_match(got.exits, got.confidence, threshold)
    return got


SHAPES = [
    ((0, 8, 4, 4), 10, "mean"), ((1, 256, 8, 8), 10, "mean"), ((3, 5, 7, 7), 3, "mean"), ((2, 17, 3), 1, "mean"), ((33, 64, 4, 4), 100, "mean"),
    ((5, 16), 2, "mean"), ((65, 48), 1000, "none"), ((1, 4096), 1000, "none"), ((7, 2048), 33, "none"), ((64, 1025), 5, "none"), ((2, 31), 2500, "none"),
    ((4, 9, 24), 6, "mean_tokens"), ((3, 5, 130), 4, "cls"), ((3, 5, 63), 4, "last"), ((1, 1, 1), 1, "cls"), ((2, 3, 2, 2, 2), 4, "mean"),
]  # fmt: skip


@pytest.mark.parametrize("shape,classes,pool", SHAPES, ids=[f"{p}-{'x'.join(map(str, s))}-{c}" for s, c, p in SHAPES])
@pytest.mark.parametrize("bias", [True, False])
def test_exit_head_equals_float64(way, shape, classes, pool, bias):
    check(way, *make(shape, classes, pool, bias=bias), pool)


@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy", "energy"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_measures(way, measure, temperature):
    x, w, b = make((40, 32, 3, 3), 12, "mean")
    threshold = float(reference.exit_head(x, w, b, measure=measure, temperature=temperature).confidence.quantile(0.6))
    got = check(way, x, w, b, measure=measure, threshold=threshold, temperature=temperature)
    s = got.stats
    value = {"max_prob": s.max_prob, "margin": s.margin, "entropy": -s.entropy, "energy": temperature * s.lse}[measure]
    assert torch.allclose(got.confidence, value, rtol=1e-6)
    assert 0 < got.exits.sum() < 40


@pytest.mark.parametrize("kind", ["layer", "rms", "affine"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("features", [8, 33, 512])
def test_norms(way, kind, affine, features):
    x, w, b = make((6, features), 5, "none")
    x = x * 3 + 50.0 * (kind == "layer")  # a large mean: a one-pass variance would lose its digits
    g = torch.Generator().manual_seed(3)
    norm = ops.Norm(kind, torch.rand(features, generator=g) + 0.5 if affine else None, torch.randn(features, generator=g) if affine else None, 1e-5)
    got = ops.exit_head(x, w, b, "none", norm, backend=way, logits=True)
    n64 = norm._replace(weight=norm.weight.double(), bias=norm.bias.double()) if affine else norm
    want = reference.exit_head(x.double(), w.double(), b.double(), "none", n64)
    assert torch.allclose(got.logits.double(), want.logits, atol=3e-4 if kind == "layer" else 1e-4 * float(want.logits.abs().max()))


def test_batchnorm_folds_to_affine(way):
    bn = torch.nn.BatchNorm1d(20).eval()
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    scale = (bn.weight / (bn.running_var + bn.eps).sqrt()).detach()
    norm = ops.Norm("affine", scale, (bn.bias - bn.running_mean * scale).detach())
    x, w, b = make((9, 20), 4, "none")
    got = ops.exit_head(x, w, b, "none", norm, logits=True, backend=way)
    assert torch.allclose(got.logits, torch.nn.functional.linear(bn(x), w, b).detach(), atol=1e-4)


def test_channels_last_and_row_strides(way):
    x, w, b = make((6, 48, 5, 5), 10, "mean")
    want = check(way, x, w, b)
    last = check(way, x.to(memory_format=torch.channels_last), w, b)
    assert torch.allclose(last.confidence, want.confidence, atol=1e-5)
    wide = torch.zeros(12, 48, 5, 5)
    wide[::2] = x
    strided = ops.exit_head(wide[::2], w, b, backend=way)
    assert torch.equal(strided.confidence, want.confidence)
    table = torch.randn(10, 64)
    assert torch.equal(ops.exit_head(x, table[:, :48], b, backend=way).label, ops.exit_head(x, table[:, :48].contiguous(), b, backend=way).label)


def test_mask_counts_real_tokens_only(way):
    x, w, b = make((5, 7, 40), 3, "mean_tokens")
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4, [0] * 6 + [1], [0] * 7, [1, 0] * 3 + [1]], dtype=torch.bool)
    x[1, 3:] = math.nan  # padding may hold anything
    got = ops.exit_head(x, w, b, "mean_tokens", mask=mask, logits=True, backend=way)
    assert torch.allclose(got.logits[1], torch.nn.functional.linear(x[1, :3].mean(0), w, b), atol=1e-4)
    assert torch.allclose(got.logits[2], torch.nn.functional.linear(x[2, 6], w, b), atol=1e-4)
    assert got.label[3] == -1 and not got.exits[3] and got.confidence[3].isnan()


def test_nan_never_exits_and_stays_in_its_row(way):
    x, w, b = make((6, 16, 2, 2), 4, "mean")
    clean = ops.exit_head(x, w, b, threshold=0.0, backend=way)
    x[2, 3, 0, 0], x[4, 0, 1, 1] = math.nan, math.inf
    got = ops.exit_head(x, w, b, threshold=-math.inf, backend=way)
    bad = torch.tensor([False, False, True, False, True, False])
    assert torch.equal(got.label == -1, bad) and torch.equal(got.confidence.isnan(), bad) and torch.equal(got.exits, ~bad)
    assert torch.equal(got.confidence[~bad], clean.confidence[~bad])


@pytest.mark.parametrize("threshold,leaves", [(0.0, True), (1.5, False), (math.inf, False), (-math.inf, True)])
def test_extreme_thresholds(way, threshold, leaves):
    x, w, b = make((9, 12), 4, "none")
    w[0] *= 1e4  # drives some rows to p = 1 exactly, which must not exit at +inf
    assert bool(ops.exit_head(x, w, b, "none", threshold=threshold, backend=way).exits.all()) is leaves


@pytest.mark.parametrize("shape,classes,pool", [((97, 256, 4, 4), 10, "mean"), ((130, 1100), 1030, "none"), ((70, 5, 96), 7, "mean_tokens")])
def test_a_row_does_not_depend_on_its_batch(every_isa, shape, classes, pool):
    x, w, b = make(shape, classes, pool)

    def run():
        whole = ops.exit_step(x, w, b, pool, logits=True, backend="cpu")
        for start, stop in ((0, 1), (3, 7), (11, 75), (shape[0] - 2, shape[0])):
            part = ops.exit_step(x[start:stop], w, b, pool, logits=True, backend="cpu")
            for field in ("label", "confidence", "exits", "logits"):
                assert torch.equal(getattr(part, field), getattr(whole, field)[start:stop]), (field, start, stop)
        return whole

    results = every_isa(run)
    for isa, got in results[1:]:  # nor on the instruction set
        assert torch.equal(got.logits, results[0][1].logits), isa
        assert torch.equal(got.confidence, results[0][1].confidence) and torch.equal(got.exits, results[0][1].exits), isa


@pytest.mark.parametrize("kind", ["bf16", "fp16", "int8"])
def test_narrow_weights_keep_a_row_whatever_its_batch(every_isa, kind):
    x, w, b = make((131, 300), 75, "none")  # enough rows and classes for packed panels, with tails in rows, classes and features
    weight = ops.quantize_rows(w, "int8") if kind == "int8" else w.to(torch.bfloat16 if kind == "bf16" else torch.float16)
    results = every_isa(lambda: [ops.exit_head(x[at], weight, b, "none", logits=True, backend="cpu").logits for at in (slice(None), slice(5, 40), slice(7, 8))])
    for isa, (whole, some, one) in results:
        assert torch.equal(whole, results[0][1][0]) and torch.equal(some, whole[5:40]) and torch.equal(one, whole[7:8]), isa


@given(st.integers(0, 9), st.integers(1, 40), st.integers(1, 20), st.sampled_from(["max_prob", "margin", "entropy", "energy"]), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_native_equals_reference(rows, features, classes, measure, seed):
    x, w, b = make((rows, features), classes, "none", seed)
    got = ops.exit_step(x, w, b, "none", None, measure, 0.3)
    want = ops.exit_step(x, w, b, "none", None, measure, 0.3, backend="reference")
    assert torch.allclose(got.confidence, want.confidence, atol=2e-5)
    near = (want.confidence - 0.3).abs() < 1e-4
    if not near.any():
        assert torch.equal(got.exits, want.exits) and torch.equal(got.index, want.index) and got.count == want.count


def test_exit_step_orders_the_survivors(way):
    x, w, b = make((77, 24, 2, 2), 10, "mean")
    got = ops.exit_step(x, w, b, threshold=0.5, backend=way)
    stay, leave = (~got.exits).nonzero().flatten(), got.exits.nonzero().flatten()
    assert got.count == len(stay) and torch.equal(got.index, torch.cat([stay, leave.flip(0)]))


def test_native_result_reads_plain_numbers():
    x, w, b = make((4, 8), 3, "none")
    got = ops.exit_step(x, w, b, "none", threshold=0.5)
    if not hasattr(got, "label_at"):
        pytest.skip("native parts are not built")
    for i in range(4):
        assert got.label_at(i) == got.label[i].item() and got.exits_at(i) == got.exits[i].item()
        assert got.confidence_at(i) == got.confidence[i].item()
    with pytest.raises(IndexError, match=r"row must lie in \[0, 4\), got 4"):
        got.label_at(4)
    label = got.label
    del got
    assert label.tolist() == ops.exit_head(x, w, b, "none").label.tolist()  # the tensor keeps the memory alive


def test_linear_stats_is_the_head_without_a_rule(way):
    x, w, b = make((9, 70), 1500, "none")
    want = torch.nn.functional.linear(x.double(), w.double(), b.double())
    assert_stats_close(ops.linear_stats(x, w, b, backend=way), torch.nn.functional.linear(x, w, b), truth=want)

"""The ops as jax.ffi calls: the bits of fastee.ops, under jit and vmap, gradients of linear_stats against central differences."""

import numpy as np
import pytest
import torch

import fastee

jax = pytest.importorskip("jax", reason="needs jax: pip install 'fastee[jax]'")
jnp = jax.numpy
from pathlib import Path  # noqa: E402

from fastee.integrations import jax as fj  # noqa: E402

pytestmark = pytest.mark.skipif(not (Path(fastee.__file__).parent / "libfastee_jax.so").exists(), reason="libfastee_jax.so is not built")
NAMES = ("label", "confidence", "exits", "logits")


def arrays(*shapes):
    return [np.random.default_rng(7).standard_normal(s).astype("f") for s in shapes]


def equal(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True)


@pytest.mark.parametrize("pool, shape", [("mean", (8, 3, 3)), ("mean_tokens", (6, 8)), ("cls", (6, 8)), ("last", (6, 8)), ("none", (8,))])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_exit_step_is_the_op_under_jit(pool, shape, rows):
    x, w, b, gain = arrays((rows, *shape), (5, 8), 5, 8)
    norm, measure = ("layer", gain, None, 1e-5), "margin"
    run = jax.jit(lambda x, t: fj.exit_step(x, w, b, pool, fj.Norm(*norm), measure, t, temperature=1.5, logits=True))
    got = run(x, 0.3)
    tw, tb, tg = map(torch.from_numpy, (w, b, gain))
    want = fastee.ops.exit_step(torch.from_numpy(x), tw, tb, pool, fastee.ops.Norm("layer", tg, None, 1e-5), measure, 0.3, temperature=1.5, logits=True)
    assert all(equal(getattr(got, n), getattr(want, n)) for n in NAMES) and equal(got.index, want.index) and int(got.count) == want.count
    assert all(equal(getattr(got.stats, n), getattr(want.stats, n)) for n in fj.RowStats._fields)


def test_masks_reach_the_pool():
    x, w = arrays((4, 6, 8), (3, 8))
    mask = np.arange(6) < np.array([[6], [1], [4], [2]])
    want = fastee.ops.exit_head(torch.from_numpy(x), torch.from_numpy(w), pool="mean_tokens", mask=torch.from_numpy(mask))
    assert equal(fj.exit_head(x, w, pool="mean_tokens", mask=mask).confidence, want.confidence)
    assert equal(fj.pool(x, "mean_tokens", mask), fastee.ops.pool(torch.from_numpy(x), "mean_tokens", torch.from_numpy(mask)))


def test_the_other_ops_are_theirs():
    z, a, b, frames = arrays((9, 30), (5, 4, 3), (5, 4, 3), (3, 5, 7))
    t = torch.from_numpy
    assert all(equal(g, w) for g, w in zip(fj.row_stats(z, temperature=2.0), tuple(fastee.ops.row_stats(t(z), temperature=2.0))[:5], strict=True))
    assert equal(fj.feature_delta(a, b), fastee.ops.feature_delta(t(a), t(b)))
    mask = np.arange(5) < np.array([[5], [0], [2]])
    assert equal(fj.mean_entropy(frames, mask), fastee.ops.mean_entropy(t(frames), t(mask)))
    for format in ("int8", "int4", "fp8_e4m3", "bf16"):
        q, want = fj.quantize_rows(z, format), fastee.ops.quantize_rows(t(z), format)
        assert equal(np.asarray(q.data).view("u1"), want.data.view(torch.uint8))
        assert equal(fj.dequantize_rows(q, format), fastee.ops.dequantize_rows(want))
    grouped = fj.quantize_rows(z, "int8", 10)
    assert equal(grouped.scale, fastee.ops.quantize_rows(t(z), "int8", 10).scale) and equal(fj.dequantize_rows(grouped), fastee.ops.dequantize_rows(fastee.ops.quantize_rows(t(z), "int8", 10)))
    keep = z[:, 0] > 0
    assert equal(fj.compact(keep).index, fastee.ops.compact(t(keep)).index)
    assert equal(fj.gather_rows(z, np.array([3, 3, 0])), z[[3, 3, 0]])


def test_vmap_over_rows_is_one_call_and_over_weights_is_right(monkeypatch):
    x, w = arrays((3, 4, 8), (5, 8))
    calls, real = [], fj._call
    monkeypatch.setattr(fj, "_call", lambda name, *a, **k: calls.append(name) or real(name, *a, **k))
    got = jax.vmap(lambda x: fj.exit_head(x, w, pool="none"))(x)
    sizes = [fj.exit_head(x[i], w, pool="none") for i in range(3)]
    assert all(equal(got.confidence[i], sizes[i].confidence) and equal(got.label[i], sizes[i].label) for i in range(3))
    text = str(jax.make_jaxpr(jax.vmap(lambda x: fj.exit_head(x, w, pool="none").label))(x))
    assert text.count("ffi_call") == 1 and "f32[12,8]" in text, "the rows of all maps go through one call"
    by_weight = jax.vmap(lambda w: fj.exit_head(x[0], w, pool="none").confidence)(np.stack([w, -w]))
    assert equal(by_weight[1], fj.exit_head(x[0], -w, pool="none").confidence)
    masks = x[:, :, 0] > 0
    assert all(equal(jax.vmap(fj.compact)(masks).index[i], fj.compact(masks[i]).index) for i in range(3))


def test_gradients_of_linear_stats():
    x, w, b, d = arrays((3, 6), (4, 6), 4, (3, 6))

    def total(x, w, b):
        s = fj.linear_stats(x, w, b, temperature=1.3)
        return (s.max_prob + 2 * s.margin - s.entropy + 0.5 * s.lse).sum()

    grads = jax.jit(jax.grad(total, (0, 1, 2)))(x, w, b)
    for i, (g, step) in enumerate(zip(grads, (d, np.roll(w, 1), np.ones(4, "f")), strict=True)):
        args = [x, w, b]
        up, down = ([a + s * 1e-2 * step if j == i else a for j, a in enumerate(args)] for s in (1, -1))
        assert float((g * step).sum()) == pytest.approx(float(total(*up) - total(*down)) / 2e-2, rel=2e-2, abs=2e-3)
    want = fastee.ops.linear_stats(*map(torch.from_numpy, (x, w, b)), temperature=1.3)
    assert all(equal(g, getattr(want, n)) for n, g in fj.linear_stats(x, w, b, temperature=1.3)._asdict().items())


def test_vmap_of_calls_without_rows_runs_them_in_turn():
    x, index = arrays((3, 5, 4))[0], np.array([[0, 1], [2, 2], [4, 0]])
    assert equal(jax.vmap(fj.gather_rows)(x, index), np.stack([a[i] for a, i in zip(x, index, strict=True)]))
    assert equal(jax.vmap(fj.gather_rows, (None, 0))(x[0], index), x[0][index])
    last = jax.vmap(lambda a: fj.quantize_rows(a, "bf16").data, 2)(x)
    assert equal(last.astype("f"), np.moveaxis(x, 2, 0).astype(jnp.bfloat16).astype("f"))


def test_wrong_arguments_name_themselves():
    x, w = arrays((2, 8), (3, 8))
    with pytest.raises(TypeError, match=r"exit_head: x must be float32, bfloat16 or float16 .*, got int32 \[2, 8\]"):
        fj.exit_head(np.ones((2, 8), "i"), w, pool="none")
    with pytest.raises(ValueError, match=r"weight must be \[C, 8\] for x \[2, 8\] with pool 'none', got \[3, 7\]"):
        fj.exit_head(x, w[:, :7], pool="none")
    with pytest.raises(ValueError, match="pool must be one of .* did you mean 'mean'"):
        fj.exit_head(x, w, pool="meen")
    with pytest.raises(ValueError, match="exit_head has no gradient; linear_stats has one"):
        jax.grad(lambda x: fj.exit_head(x, w, pool="none").confidence.sum())(x)
    at_run_time = (ValueError, jax.errors.JaxRuntimeError)
    with pytest.raises(at_run_time, match="gather_rows: index must lie in"):
        jax.block_until_ready(fj.gather_rows(x, np.array([2])))
    with pytest.raises(at_run_time, match="exit_head: bias must be"):
        jax.block_until_ready(fj.exit_head(x, w, np.ones(4, "f"), pool="none").label)

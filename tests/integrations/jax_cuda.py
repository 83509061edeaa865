"""What the CUDA targets of fastee.integrations.jax must give: the CPU's ops. tests/gpu/test_jax_on_device.py asks a device.

``python -m tests.integrations.jax_cuda LIBRARY`` runs them without one: LIBRARY holds the targets over the emulated device of
``csrc/tests/cuda``, XLA's CPU calls it, and the lowering is that for CUDA.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

import fastee
from fastee.errors import BackendUnavailable
from fastee.integrations import jax as fj

t = torch.from_numpy


def arrays(*shapes):
    return [np.random.default_rng(7).standard_normal(s).astype("f") for s in shapes]


def same(got, want):
    """The CPU's values; floats within the last place of a double logarithm, which CUDA rounds to one unit."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    if want.dtype == np.float32:
        np.testing.assert_allclose(got, want, rtol=2e-7, atol=1e-7)
    else:
        np.testing.assert_array_equal(got, want)


def same_head(got, want, logits=False):
    for name in ("label", "exits", "confidence", *["logits"] * logits):
        same(getattr(got, name), getattr(want, name))
    for name in fj.RowStats._fields:
        same(getattr(got.stats, name), getattr(want.stats, name))


def _one_exit_step(pool, shape, rows, norm, measure):
    x, w, b, gain, shift = arrays((rows, *shape), (5, 8), 5, 8, 8)
    parts = {"none": (), "affine": (gain, shift)}.get(norm, (gain,))
    mask = np.arange(6) < np.arange(1, rows + 1)[:, None] % 7 if pool == "mean_tokens" and rows else None  # one row of no token
    rest = {"temperature": 1.5, "logits": True}

    @jax.jit
    def run(x, w, b, parts, threshold, mask):
        return fj.exit_step(x, w, b, pool, fj.Norm(norm, *parts) if parts else None, measure, threshold, mask=mask, **rest)

    theirs = fastee.ops.Norm(norm, *map(t, parts)) if parts else None
    for threshold in (0.3, -0.5, np.inf):
        got = run(x, w, b, parts, threshold, mask)
        keep = None if mask is None else t(mask)
        want = fastee.ops.exit_step(t(x), t(w), t(b), pool, theirs, measure, threshold, mask=keep, backend="cpu", **rest)
        same_head(got, want, logits=True)
        same(got.index, want.index)
        assert int(got.count) == want.count


def exit_step_pools_and_norms():
    for pool, shape in {"mean": (8, 3, 3), "mean_tokens": (6, 8), "cls": (6, 8), "last": (6, 8), "none": (8,)}.items():
        for rows, norm, measure in ((0, "layer", "margin"), (1, "rms", "entropy"), (37, "affine", "energy"), (5, "none", "max_prob")):
            _one_exit_step(pool, shape, rows, norm, measure)


def head_sliced_over_blocks_pools_first():
    x, w = arrays((9, 24, 3, 3), (500, 24))
    same_head(fj.exit_head(x, w, threshold=0.01), fastee.ops.exit_head(t(x), t(w), threshold=0.01, backend="cpu"))


def bf16_and_fp16():
    x, w = arrays((7, 40), (11, 40))
    for there, here in ((jnp.bfloat16, torch.bfloat16), (jnp.float16, torch.float16)):
        got = fj.exit_head(jnp.asarray(x, there), jnp.asarray(w, there), pool="none", threshold=0.3)
        same_head(got, fastee.ops.exit_head(t(x).to(here), t(w).to(here), pool="none", threshold=0.3, backend="cpu"))


def compact_with_and_without_look_back():
    for rows in (0, 1, 33, 4096, 4097, 9000):
        mask = arrays(rows)[0] > 0
        got, want = fj.compact(mask), fastee.ops.compact(t(mask), backend="cpu")
        same(got.index, want.index)
        assert int(got.count) == want.count


def calls_in_one_program_share_no_working_memory():
    mask = arrays(9000)[0] > 0
    same_order = jax.jit(lambda m: [fj.compact(m).index, fj.compact(~m).index, fj.compact(m).index])
    for _ in range(3):
        for got, m in zip(same_order(mask), (mask, ~mask, mask), strict=True):
            same(got, fastee.ops.compact(t(m), backend="cpu").index)


def quantize_rows_has_the_bytes():
    (x,) = arrays((9, 30))
    for format, group in (("int8", None), ("int8", 10), ("int4", None), ("int4", 5), ("fp8_e4m3", None), ("bf16", None)):
        got, want = fj.quantize_rows(x, format, group), fastee.ops.quantize_rows(t(x), format, group, backend="cpu")
        np.testing.assert_array_equal(np.asarray(got.data).view("u1"), want.data.view(torch.uint8).numpy())
        assert (got.scale is None) == (format == "bf16")
        if format != "bf16":
            same(np.asarray(got.scale).reshape(want.scale.shape), want.scale)


def linear_stats_and_its_gradient():
    x, w, b = arrays((3, 6), (4, 6), 4)
    want = fastee.ops.linear_stats(t(x), t(w), t(b), temperature=1.3, backend="cpu")
    for name, got in fj.linear_stats(x, w, b, temperature=1.3)._asdict().items():
        same(got, getattr(want, name))
    grad = jax.jit(jax.grad(lambda x: fj.linear_stats(x, w, b).lse.sum()))(x)
    np.testing.assert_allclose(grad, jax.nn.softmax(x @ w.T + b) @ w, rtol=1e-3, atol=1e-3)  # a GPU's default product is TF32


def vmap_over_rows_and_weights():
    x, w = arrays((3, 4, 8), (5, 8))
    same(jax.vmap(lambda x: fj.exit_head(x, w, pool="none"))(x).label[1], fj.exit_head(x[1], w, pool="none").label)
    by_weight = jax.vmap(lambda w: fj.exit_head(x[0], w, pool="none").confidence)(np.stack([w, -w]))
    same(by_weight[1], fj.exit_head(x[0], -w, pool="none").confidence)
    masks = x[:, :, 0] > 0
    same(jax.vmap(fj.compact)(masks).index[2], fj.compact(masks[2]).index)


def _raises(kinds, text, call):
    try:
        jax.block_until_ready(call())
    except kinds as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"nothing was raised, not: {text}")


def refusals_name_their_reason():
    x, w = arrays((2, 8), (3, 8))
    at_run_time = (ValueError, jax.errors.JaxRuntimeError)
    _raises(BackendUnavailable, "pool has no CUDA target, only exit_head, compact, quantize_rows have", lambda: fj.pool(x, "none"))
    _raises(BackendUnavailable, "gather_rows has no CUDA target", jax.jit(lambda: fj.gather_rows(x, np.array([1]))))
    _raises(at_run_time, "exit_head: bias must be", lambda: fj.exit_head(x, w, np.ones(4, "f"), pool="none").label)
    wide = np.zeros((1, 20_481), "f")
    _raises(at_run_time, "a head on CUDA takes at most 20480 features, got 20481", lambda: fj.exit_head(wide, wide, pool="none").label)


CHECKS = (
    exit_step_pools_and_norms, head_sliced_over_blocks_pools_first, bf16_and_fp16, compact_with_and_without_look_back,
    calls_in_one_program_share_no_working_memory, quantize_rows_has_the_bytes, linear_stats_and_its_gradient, vmap_over_rows_and_weights,
    refusals_name_their_reason,
)  # fmt: skip


if __name__ == "__main__":
    register = jax.ffi.register_ffi_target
    jax.ffi.register_ffi_target = lambda *a, platform: register(*a, platform="cpu")
    fj._LIBRARIES["cuda"] = (Path(sys.argv[1]).resolve(), "")
    fj.mlir.register_lowering(fj._ffi_call, fj.mlir.lower_fun(fj._on_cuda, multiple_results=True), platform="cpu")
    for check in CHECKS:
        check()
        print(check.__name__, flush=True)

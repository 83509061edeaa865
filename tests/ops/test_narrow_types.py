"""bf16 and fp16 activations and weights on the native kernels: widened on load, exactly, then the arithmetic of fp32."""

import itertools

import pytest
import torch

from fastee import ops

TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("wide,narrow", [p for p in itertools.product(TYPES, TYPES) if p != (torch.float32, torch.float32)])
@pytest.mark.parametrize("shape,classes,pool", [((3, 40, 5, 5), 10, "mean"), ((2, 33), 1030, "none"), ((5, 9, 48), 7, "mean_tokens"), ((3, 4, 65), 3, "last"), ((9, 64, 4, 4), 5, "mean")])
def test_narrow_equals_widened_bit_for_bit(every_isa, wide, narrow, shape, classes, pool):
    g = torch.Generator().manual_seed(0)
    features = shape[1] if pool in ("mean", "none") else shape[2]
    x, w, b = torch.randn(*shape, generator=g).to(wide), torch.randn(classes, features, generator=g).to(narrow), torch.randn(classes, generator=g).to(narrow)
    if pool == "mean" and shape[0] == 9:
        x = x.to(memory_format=torch.channels_last)

    def run():
        return ops.exit_step(x, w, b, pool, logits=True, backend="cpu"), ops.exit_step(x.float(), w.float(), b.float(), pool, logits=True, backend="cpu")

    results = every_isa(run)
    for isa, (got, want) in results:
        assert torch.equal(got.logits, want.logits) and torch.equal(got.confidence, want.confidence) and torch.equal(got.index, want.index), isa
        assert torch.equal(got.logits, results[0][1][0].logits), isa
    want = ops.exit_head(x, w, b, pool, backend="reference")
    assert torch.allclose(results[0][1][0].confidence, want.confidence, atol=2e-5)


@pytest.mark.parametrize("dtype", TYPES[1:])
def test_every_bit_pattern_is_widened_right(every_isa, dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    x = bits.view(dtype)
    x = x[x.isfinite()]
    x = x[: x.numel() // 16 * 16].view(-1, 16)
    for isa, got in every_isa(lambda: ops.pool(x, "none", backend="cpu")):
        assert torch.equal(got.view(torch.int32), x.float().view(torch.int32)), isa


def test_narrow_logits(every_isa):
    z = (4 * torch.randn(6, 1500)).bfloat16()
    z[2, 7], z[3, 0] = float("nan"), float("inf")
    for _, got in every_isa(lambda: ops.row_stats(z, backend="cpu")):
        want = ops.row_stats(z.float(), backend="cpu")
        for a, b in zip(got[:5], want[:5], strict=True):
            assert torch.equal(a.nan_to_num(-9.0), b.nan_to_num(-9.0))
    frames = torch.randn(2, 3, 70).half()
    for _, got in every_isa(lambda: ops.mean_entropy(frames, backend="cpu")):
        assert torch.equal(got, ops.mean_entropy(frames.float(), backend="cpu"))


def test_an_int8_head_reads_a_quarter_of_the_bytes(every_isa):
    g = torch.Generator().manual_seed(1)
    x, w, b = torch.randn(5, 100, generator=g), torch.randn(40, 100, generator=g), torch.randn(40, generator=g)
    q = ops.quantize_rows(w)
    want = torch.nn.functional.linear(x.double(), ops.dequantize_rows(q).double(), b.double())
    results = every_isa(lambda: ops.exit_step(x, q, b, "none", logits=True))
    for isa, got in results:
        assert torch.allclose(got.logits.double(), want, atol=1e-4) and torch.equal(got.logits, results[0][1].logits), isa
        alone = ops.exit_step(x[3:4], q, b, "none", logits=True)
        assert torch.equal(alone.logits[0], got.logits[3])
    slow = ops.exit_step(x, q, b, "none", logits=True, backend="reference")
    assert torch.allclose(slow.logits, results[0][1].logits, atol=1e-4)
    with pytest.raises(ValueError, match="exit_step: weight must be int8 with one scale per class, got int8 with group 10"):
        ops.exit_step(x, ops.quantize_rows(w, group=10), b, "none")


@pytest.mark.parametrize("rows,features,classes", [(1, 1, 3), (3, 63, 17), (70, 130, 40), (2, 4096, 5), (1, 9001, 33)])
def test_int8_products_are_exact_in_fixed_point(every_isa, rows, features, classes):
    g = torch.Generator().manual_seed(features)
    x = torch.randn(rows, features, generator=g) * 10.0 ** torch.randint(-30, 30, (rows, 1), generator=g)
    w = torch.randint(-128, 128, (classes, features), generator=g).to(torch.int8)
    q = ops.QuantizedRows(w, torch.ones(classes))
    lift = 2.0 ** (21 - torch.frexp(x.abs().amax(1, keepdim=True).double()).exponent + 1)  # the largest value comes to [2^21, 2^22)
    want = ((x.double() * lift).round() @ w.double().T / lift).float()  # whole numbers below 2^53: exact in fp64
    results = every_isa(lambda: ops.exit_head(x, q, pool="none", logits=True, backend="cpu"))
    for isa, got in results:
        assert torch.equal(got.logits, want), isa
    truth, largest = x.double() @ w.double().T, x.abs().amax(1, keepdim=True).double()
    assert ((want.double() - truth).abs() <= features * 128 * largest * 2.0**-22 + truth.abs() * 2.0**-23).all()


def test_int8_heads_of_unusual_rows(every_isa):
    x = torch.randn(8, 70, generator=torch.Generator().manual_seed(3))
    x[0], x[1, 5], x[2, 69], x[3, 0], x[4] = 0.0, float("nan"), float("inf"), -float("inf"), x[4] * 1e-42
    x[5], x[6, 0] = x[5] * 1e34, 1e34
    q = ops.quantize_rows(torch.randn(20, 70, generator=torch.Generator().manual_seed(4)))
    want = ops.exit_head(x, q, pool="none", backend="reference")
    results = every_isa(lambda: ops.exit_head(x, q, pool="none", logits=True, backend="cpu"))
    for isa, got in results:
        assert got.label.tolist()[:6] == want.label.tolist()[:6] and not got.exits[1:4].any(), isa
        assert torch.equal(got.logits.nan_to_num(-1), results[0][1].logits.nan_to_num(-1)), isa
        for row in range(8):
            alone = ops.exit_head(x[row : row + 1], q, pool="none", logits=True, backend="cpu")
            assert torch.equal(alone.logits.nan_to_num(-1), got.logits[row : row + 1].nan_to_num(-1)), row


@pytest.mark.parametrize("dtype", TYPES[1:], ids=str)
def test_rows_of_narrow_types_are_packed_as_if_widened(every_isa, dtype):
    g = torch.Generator().manual_seed(6)
    x = torch.randn(5, 3, 700, generator=g).to(dtype)  # a row is longer than what is widened at a time
    x[1, 0, 3], x[2, 2, 699], x[3] = float("nan"), float("inf"), 0.0
    w = torch.randn(4, 3, generator=g)
    for format, group in (("int8", None), ("int8", 2100), ("int4", 75), ("fp8_e4m3", 1050), ("bf16", None)):
        want = ops.quantize_rows(x.float(), format, group, backend="reference")
        exit_want = ops.exit_pack(x.float(), w, threshold=float("inf"), format=format, group=group, backend="cpu")
        for isa, q in every_isa(lambda format=format, group=group: ops.quantize_rows(x, format, group, backend="cpu")):
            assert torch.equal(q.data.view(torch.uint8), want.data.view(torch.uint8)) and torch.equal(q.scale.nan_to_num(-1), want.scale.nan_to_num(-1)), isa
        for isa, out in every_isa(lambda format=format, group=group: ops.exit_pack(x, w, threshold=float("inf"), format=format, group=group, backend="cpu")):
            assert torch.equal(out.wire, exit_want.wire) and torch.equal(out.label, exit_want.label), isa
    a, b = x[[0, 4]], x[[4, 0]]
    for isa, got in every_isa(lambda: ops.feature_delta(a, b, backend="cpu")):
        assert torch.equal(got, ops.feature_delta(a.float(), b.float(), backend="cpu")), isa


@pytest.mark.parametrize("second_moment", [False, True])
def test_linear_stats_takes_int8_weights(second_moment):
    g = torch.Generator().manual_seed(0)
    x, w, b = torch.randn(7, 96, generator=g), torch.randn(33, 96, generator=g), torch.randn(33, generator=g)
    q = ops.quantize_rows(w)
    got = ops.linear_stats(x, q, b, temperature=1.5, second_moment=second_moment)
    want = ops.linear_stats(x, ops.dequantize_rows(q), b, temperature=1.5, second_moment=second_moment, backend="reference")
    assert torch.equal(got.label, want.label)
    for name in ("max_prob", "margin", "entropy", "lse") + (("entropy_p2",) if second_moment else ()):
        assert torch.allclose(getattr(got, name), getattr(want, name), atol=1e-5), name
    assert second_moment or got.entropy_p2 is None

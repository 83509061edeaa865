"""exit_pack: the same decisions as exit_step and the same bytes as gather_rows + quantize_rows, whatever the chunks."""

import re

import pytest
import torch

from fastee import ops

FORMATS = ("int8", "int4", "fp8_e4m3", "bf16")


def same(out, x, step, format, group):
    q = ops.quantize_rows(ops.gather_rows(x, step.index[: step.count]), format, group)
    assert out.count == step.count and torch.equal(out.index, step.index) and torch.equal(out.exits, step.exits) and torch.equal(out.label, step.label)
    assert out.packed.data.dtype == q.data.dtype and out.packed.data.shape == q.data.shape and out.packed.shape == q.shape
    assert torch.equal(out.packed.data.view(torch.uint8), q.data.view(torch.uint8)) and torch.equal(out.packed.scale, q.scale)
    wire = torch.cat([part.reshape(-1).view(torch.uint8) for part in (q.scale, q.data)])
    assert torch.equal(out.wire, wire) and out.packed.nbytes == out.wire.numel()
    assert torch.equal(ops.dequantize_rows(out.packed), ops.dequantize_rows(q))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("pool,shape", [("mean", (37, 16, 5, 5)), ("mean", (0, 16, 3)), ("mean", (300, 8, 9)), ("mean", (9, 128, 64)), ("none", (70, 33)), ("mean_tokens", (6, 7, 20)), ("cls", (6, 7, 20)), ("last", (6, 7, 20))])
def test_equals_the_separate_calls(way, format, pool, shape):
    if way == "triton":
        shape = (min(shape[0], 5), *shape[1:])  # a program per row, each some 30 ms in the interpreter
    g = torch.Generator().manual_seed(5)
    x, features = torch.randn(shape, generator=g), shape[1] if pool in ("mean", "none") else shape[2]
    w, b, row = torch.randn(4, features, generator=g), torch.randn(4, generator=g), x[:1].numel() if shape[0] else x.shape[1:].numel()
    mask = torch.rand(shape[:2], generator=g) < 0.7 if pool == "mean_tokens" else None
    for threshold in (0.0, 0.6, float("inf")):  # nobody stays, some do, all do
        for group in (None, row) if format != "bf16" else (None,):
            args = (x, w, b, pool, ops.Norm("layer"), "margin", threshold)
            step = ops.exit_step(*args, mask=mask, backend=way)
            same(ops.exit_pack(*args, format, group=group, mask=mask, backend=way), x, step, format, group)


@pytest.mark.parametrize("group,format", [(25, "int8"), (5, "int4"), (80, "fp8_e4m3")])
def test_groups(way, group, format):
    x, w = torch.randn(9 if way == "triton" else 37, 16, 5, 5, generator=torch.Generator().manual_seed(6)), torch.eye(16)[:3]
    same(ops.exit_pack(x, w, threshold=0.4, format=format, group=group, backend=way), x, ops.exit_step(x, w, threshold=0.4, backend=way), format, group)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_value_that_the_pool_finds(format, dtype):
    """A mean pool finds each row's scale on its way: the same bytes as from a pass of their own, whatever the row holds."""
    g = torch.Generator().manual_seed(11)
    for shape in ((7, 18, 9, 9), (7, 17, 3, 3)):  # features one after another, four abreast; neither a multiple of sixteen
        x, w = torch.randn(shape, generator=g).to(dtype), torch.randn(4, shape[1], generator=g)
        x[1, 3, 2, 2], x[2, -1, -1, -1], x[3], x[4] = float("nan"), float("-inf"), 0.0, x[4] * 1e-30
        x[5, -1, -1, -1], x[6, 0, 0, 0] = -100.0, 100.0  # the last value and the first
        for threshold in (0.6, float("inf")):
            step, out = ops.exit_step(x, w, threshold=threshold), ops.exit_pack(x, w, threshold=threshold, format=format)
            q = ops.quantize_rows(ops.gather_rows(x, step.index[: step.count]), format)
            assert torch.equal(out.index, step.index) and out.count == step.count >= 2
            assert torch.equal(out.wire, torch.cat([part.reshape(-1).view(torch.uint8) for part in (q.scale, q.data)]))


def test_row_strides_logits_and_other_dtypes():
    wide, w = torch.randn(20, 2, 8, 3, generator=torch.Generator().manual_seed(7)), torch.eye(8)[:3]
    x = wide[:, 1]
    out = ops.exit_pack(x, w, threshold=0.5, logits=True)
    step = ops.exit_step(x, w, threshold=0.5, logits=True)
    same(out, x, step, "int8", None)
    assert torch.equal(out.logits, step.logits) and torch.equal(out.confidence, step.confidence) and torch.equal(out.stats.entropy, step.stats.entropy)
    double = ops.exit_pack(x.double(), w.double(), threshold=0.5)  # the reference takes what the native form declines
    assert double.packed.data.dtype == torch.int8 and double.count == out.count
    half = x.to(torch.bfloat16)
    same(ops.exit_pack(half, w, threshold=0.5), half, ops.exit_step(half, w, threshold=0.5), "int8", None)


def test_every_instruction_set_packs_the_same_bytes(every_isa):
    x, w = torch.randn(150, 32, 4, 4, generator=torch.Generator().manual_seed(8)), torch.randn(5, 32, generator=torch.Generator().manual_seed(9))
    for format in FORMATS:
        results = every_isa(lambda format=format: ops.exit_pack(x, w, threshold=0.4, format=format))
        assert 0 < results[0][1].count < 150
        assert all(torch.equal(r.wire, results[0][1].wire) for _, r in results)


def test_compiled_equals_eager():
    x, w = torch.randn(9, 8, 4), torch.eye(8)[:3]

    def packed(x):
        out = ops.exit_pack(x, w, threshold=0.5)
        return out.label, out.index, out.packed.data, out.packed.scale, out.wire

    torch._dynamo.reset()
    for a, b in zip(torch.compile(packed, fullgraph=True)(x), packed(x), strict=True):
        assert torch.equal(a, b)


def test_bad_input():
    x, w = torch.zeros(2, 8, 4), torch.zeros(3, 8)
    for call, error, message in (
        (lambda: ops.exit_pack(x, w, format="int7"), ValueError, "exit_pack: format must be one of int8, int4, fp8_e4m3, bf16, got 'int7', did you mean 'int8'?"),
        (lambda: ops.exit_pack(x, w, group=5), ValueError, "exit_pack: group must divide the 32 elements of a row, got 5"),
        (lambda: ops.exit_pack(x, w, group=0), ValueError, "exit_pack: group must divide the 32 elements of a row, got 0"),
        (lambda: ops.exit_pack(x, w, format="bf16", group=8), ValueError, "exit_pack: group must be None for bf16, which has no scales, got 8"),
        (lambda: ops.exit_pack(x, w[0]), ValueError, "exit_pack: weight must be"),
        (lambda: ops.exit_pack(x, w, measure="max"), ValueError, "exit_pack: measure must be one of"),
    ):
        with pytest.raises(error, match="^" + re.escape(message)):
            call()

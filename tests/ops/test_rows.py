"""compact, gather_rows, scatter_rows, pool, quantize_rows, dequantize_rows."""

import gc
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastee import native, ops, reference
from fastee.testing.inputs import edge_masks, edge_rows
from fastee.testing.tolerances import assert_compacted, assert_quantized

SIZES = [0, 1, 3, 7, 31, 32, 33, 63, 64, 65, 1023, 1024, 1025, 70_000]
ROWS = edge_rows()


@pytest.mark.parametrize("size", SIZES)
def test_compact_keeps_order(way, size):
    for _, mask in edge_masks(size):
        index, count = ops.compact(mask, backend=way)
        assert_compacted(index, count, mask)
    index, count = ops.compact(torch.full((size,), 5, dtype=torch.uint8), backend=way)  # any non-zero byte is true
    assert count == size


@given(st.lists(st.booleans(), max_size=200))
@settings(max_examples=50, deadline=None)
def test_compact_is_a_permutation(keep):
    mask = torch.tensor(keep, dtype=torch.bool)
    index, count = ops.compact(mask)
    assert sorted(index.tolist()) == list(range(len(keep))) and mask[index[:count]].all() and not mask[index[count:]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.float64])
@pytest.mark.parametrize("shape", [(5, 3), (7,), (6, 2, 3), (4, 0)])
def test_gather_and_scatter_move_any_dtype(way, dtype, shape):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2, shape, generator=g).to(dtype)
    index = torch.randperm(shape[0], generator=g)[: shape[0] - 1]
    rows = ops.gather_rows(x, index, backend=way)
    assert torch.equal(rows, x[index])
    out = torch.zeros(shape, dtype=dtype)
    assert ops.scatter_rows(out, index, rows, backend=way) is out
    want = torch.zeros(shape, dtype=dtype)
    want[index] = x[index]
    assert torch.equal(out, want)


def test_moves_touch_nothing_else(way):
    guarded = torch.full((10, 6), 77.0)
    out = guarded[2:8, :4]  # row stride 6: the two columns beside and the rows around are guards
    ops.scatter_rows(out, torch.tensor([4, 0]), torch.ones(2, 4), backend=way)
    expected = torch.full((10, 6), 77.0)
    expected[6, :4] = expected[2, :4] = 1.0
    assert torch.equal(guarded, expected)
    wide = torch.arange(40.0).view(8, 5)[::2]
    assert torch.equal(ops.gather_rows(wide, torch.tensor([3, 0, 3]), backend=way), wide[[3, 0, 3]])


@pytest.mark.parametrize("index", [[-1], [5], [0, 99]])
def test_index_out_of_range(way, index):
    x = torch.zeros(5, 2)
    bad = next(i for i in index if not 0 <= i < 5)
    with pytest.raises(ValueError, match=rf"gather_rows: index must lie in \[0, 5\), got {bad}"):
        ops.gather_rows(x, torch.tensor(index), backend=way)
    with pytest.raises(ValueError, match=rf"scatter_rows: index must lie in \[0, 5\), got {bad}"):
        ops.scatter_rows(x, torch.tensor(index), torch.ones(len(index), 2), backend=way)
    assert not x.any()  # checked before anything is written


def test_gather_trains_through_the_reference():
    x = torch.randn(4, 3, requires_grad=True)
    ops.gather_rows(x, torch.tensor([1, 1])).sum().backward()
    assert x.grad.sum(1).tolist() == [0.0, 6.0, 0.0, 0.0]


@pytest.mark.parametrize("kind,shape", [("mean", (3, 19, 5, 7)), ("mean", (2, 4)), ("mean", (2, 100, 33)), ("mean_tokens", (3, 6, 70)), ("cls", (2, 4, 9)), ("last", (2, 4, 9)), ("none", (5, 11))])
def test_pool(way, kind, shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    got = ops.pool(x, kind, backend=way)
    assert got.dtype == torch.float32 and torch.allclose(got.double(), reference.pool(x.double(), kind), atol=1e-6)
    assert got.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert ops.pool(x[:0], kind, backend=way).shape == (0, got.shape[1])


@pytest.mark.parametrize("name,x", ROWS, ids=[n for n, _ in ROWS])
def test_quantize_rows(way, name, x):
    q = ops.quantize_rows(x, backend=way)
    assert_quantized(q.data, q.scale, x)
    back = ops.dequantize_rows(q, backend=way)
    assert back.dtype == torch.float32 and torch.equal(back.flatten(1), q.data.float().flatten(1) * q.scale[:, None])


@pytest.mark.parametrize("group", [1, 4, 16, 48])
def test_quantize_groups(way, group):
    x = torch.randn(5, 4, 12, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 3, 5)[:, None, None]
    q = ops.quantize_rows(x, group=group, backend=way)
    assert q.scale.shape == (5, 48 // group) and q.nbytes == 240 + 4 * q.scale.numel()
    assert_quantized(q.data.reshape(-1, group), q.scale.flatten(), x.reshape(-1, group))
    assert torch.allclose(ops.dequantize_rows(q, backend=way), x, atol=float(q.scale.max()) / 2 * 1.001)


def test_quantize_multiplies_by_one_rounded_quotient(way):
    # 127 / max is rounded once. Where it was 127 * (1 / max), the half of a maximum of 2.859375 came to 63.499996, not 63.5.
    x = torch.arange(128, 256)[:, None] / 64.0 * torch.tensor([1.0, 0.5, 0.25, 0.75, -0.5])
    q, want = ops.quantize_rows(x, backend=way), reference.quantize_rows(x)
    assert torch.equal(q.data, want[0]) and torch.equal(q.scale, want[1])
    exact = (x * (torch.full((128, 1), 127.0) / x.amax(1, keepdim=True))).round().to(torch.int8)
    assert torch.equal(q.data, exact) and q.data[55, 1] == 64


def test_quantize_edge_rows(way):
    x = torch.ones(7, 20)
    x[0] = 0
    x[1, 3], x[2, 19], x[3, 0] = math.nan, math.inf, -math.inf
    x[4] = 1e-39  # denormal
    x[5] = torch.finfo(torch.float32).max
    q = ops.quantize_rows(x, backend=way)
    assert q.scale[0] == 0 and not q.data[0].any()
    assert q.scale[1:4].isnan().all() and not q.data[1:4].any() and ops.dequantize_rows(q, backend=way)[1:4].isnan().all()
    assert (q.data[4:] == 127).all()
    back = ops.dequantize_rows(q, backend=way)
    assert torch.allclose(back[5:], x[5:], rtol=1e-6) and torch.allclose(back[4], x[4], rtol=0.01)


def test_quantized_bytes_agree_across_instruction_sets(every_isa):
    x = torch.cat([v.flatten(1)[:2, :9] for _, v in ROWS if v.numel() and v.flatten(1).shape[1] >= 9] + [torch.randn(300, 9)])
    results = every_isa(lambda: ops.quantize_rows(x, backend="cpu"))
    want = reference.quantize_rows(x)
    for isa, q in results:
        assert torch.equal(q.data, want[0]) and torch.equal(q.scale, want[1]), isa


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
@settings(max_examples=50, deadline=None)
def test_quantize_any_row(values):
    x = torch.tensor([values], dtype=torch.float32)
    q = ops.quantize_rows(x)
    data, scale = reference.quantize_rows(x)
    assert torch.equal(q.data, data) and torch.equal(q.scale, scale)


FORMATS = ("int4", "fp8_e4m3", "bf16")


def same_rows(q, x, format, group=None):
    data, scale = reference.quantize_rows(x, format, group)
    assert q.format == format and q.shape == tuple(x.shape) and q.data.dtype == data.dtype and q.data.shape == data.shape
    assert torch.equal(q.data.view(torch.uint8), data.view(torch.uint8)) and torch.equal(q.scale.nan_to_num(-1), scale.nan_to_num(-1))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape,group", [((0, 5), None), ((3, 0), None), ((6,), None), ((4, 1), None), ((3, 7), None), ((2, 15), 5), ((2, 33), 11), ((5, 16), 4), ((2, 3, 341), 341), ((3, 2049), None), ((2, 64, 96), 64)])
def test_formats_are_bit_equal_to_the_definition(way, format, shape, group):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 10.0
    for rows in (x, x.relu(), x.neg() * 1e-40, x * 1e37):
        group = None if format == "bf16" else group
        q = ops.quantize_rows(rows, format, group, backend=way)
        same_rows(q, rows, format, group)
        back = ops.dequantize_rows(q, backend=way)
        want = reference.dequantize_rows(q.data, q.scale, group, format, q.shape)
        assert back.shape == x.shape and torch.equal(back.view(torch.int32), want.view(torch.int32))


@pytest.mark.parametrize("format,step", [("int4", 1 / 14), ("fp8_e4m3", 1 / 16), ("bf16", 1 / 256)])
def test_formats_stay_within_half_a_step(way, format, step):
    x = torch.randn(20, 333, generator=torch.Generator().manual_seed(4))
    q = ops.quantize_rows(x, format, backend=way)
    error = (ops.dequantize_rows(q, backend=way) - x).abs()
    assert (error <= step * (x.abs().amax(1, keepdim=True) if format == "int4" else x.abs()) * 1.0001 + 2.0**-9 * q.scale.sum()).all()


@pytest.mark.parametrize("format", FORMATS)
def test_formats_at_the_edges(way, format):
    x = torch.ones(8, 21)
    x[0] = 0
    x[0, ::2] = -0.0
    x[1, 3], x[2, 20], x[3, 0] = math.nan, math.inf, -math.inf
    x[4] = 1e-39
    x[5], x[6] = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
    x[7] = torch.linspace(-500, 448, 21)
    same_rows(q := ops.quantize_rows(x, format, backend=way), x, format)
    back = ops.dequantize_rows(q, backend=way)
    if format != "bf16":
        assert back[1:4].isnan().all() and back[4:].isfinite().all() and q.scale[0] == 0
    want = reference.dequantize_rows(q.data, q.scale, None, format, q.shape)
    assert torch.equal(back.view(torch.int32)[4:], want.view(torch.int32)[4:]) and torch.equal(back.isnan(), want.isnan())


def test_int4_layout():
    q = ops.quantize_rows(torch.tensor([[1.0, -7.0, 3.0]]), "int4")
    assert q.data.tolist() == [[1 | (16 - 7) << 4, 3]] and q.scale.tolist() == [1.0] and q.nbytes == 6


def test_bf16_rounds_every_tie_to_even_and_quiets_nan(every_isa):
    high = torch.arange(0, 1 << 16, dtype=torch.int32) << 16
    x = torch.cat([high + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(torch.float32).view(-1, 1 << 12)
    for isa, q in every_isa(lambda: ops.quantize_rows(x, "bf16", backend="cpu")):
        ours = q.data.view(torch.int16)
        assert torch.equal(ours[~x.isnan()], x.bfloat16().view(torch.int16)[~x.isnan()]), isa
        assert torch.equal(ours[x.isnan()].int() & 0xFFFF, (x.view(torch.int32)[x.isnan()] >> 16 | 0x40) & 0xFFFF), isa


def test_every_fp8_code_comes_back(every_isa):
    codes = torch.arange(256, dtype=torch.uint8)
    q = ops.QuantizedRows(codes.view(torch.float8_e4m3fn)[None], torch.ones(1), "fp8_e4m3", None, (1, 256))
    values = codes.view(torch.float8_e4m3fn).float()
    for isa, back in every_isa(lambda: ops.dequantize_rows(q, backend="cpu")):
        assert torch.equal(back[0].nan_to_num(999.0), values.nan_to_num(999.0)) and torch.equal(back[0].signbit(), values.signbit()), isa
    grid = torch.cat([values[:127], values[128:255]])
    between = torch.cat([grid, (grid[:-1] + grid[1:]) / 2, grid * 1.01])[None]  # the grid, its midpoints, values beside it
    row = torch.cat([between.clamp(-448, 448), torch.full((1, 1), 448.0)], 1)  # the scale is 1
    for isa, q in every_isa(lambda: ops.quantize_rows(row, "fp8_e4m3", backend="cpu")):
        assert q.scale.item() == 1.0 and torch.equal(q.data.view(torch.uint8), row.to(torch.float8_e4m3fn).view(torch.uint8)), isa


@given(st.lists(st.floats(width=32), min_size=1, max_size=60), st.sampled_from(FORMATS))
@settings(max_examples=50, deadline=None)
def test_any_row_in_any_format(values, format):
    x = torch.tensor([values, values[::-1]], dtype=torch.float32)
    same_rows(ops.quantize_rows(x, format), x, format)


def test_compact_touches_nothing_else(every_isa):
    for size in (0, 5, 16, 17, 40, 1000):
        mask = torch.rand(size, generator=torch.Generator().manual_seed(size)) < 0.5
        for _, (index, count) in every_isa(lambda mask=mask: ops.compact(mask.repeat_interleave(3)[::3])):  # strided flags
            assert_compacted(index, count, mask)
        for isa, (index, count) in every_isa(lambda mask=mask: ops.compact(mask)):
            assert torch.equal(index, reference.compact(mask).index) and count == int(mask.sum()), isa


def test_native_rows_are_like_the_tuple_and_their_tensors_outlive_them():
    x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(3))
    for format, group in (("int8", None), ("int8", 8), ("int4", 12), ("fp8_e4m3", None), ("bf16", None)):
        want = ops.quantize_rows(x, format, group, backend="reference")
        made = ops.quantize_rows(x, format, group)
        copy = made if format == "fp8_e4m3" else pickle.loads(pickle.dumps(made))  # torch 2.13 cannot read back a pickled float8 tensor
        for q in (made, copy):
            data, scale, *rest = q
            assert q._fields == want._fields and len(q) == 5 and rest == list(want[2:]) == list(q[2:]) and q.nbytes == want.nbytes
            assert data.dtype == want.data.dtype and torch.equal(data.view(torch.uint8), want.data.view(torch.uint8)) and torch.equal(scale, want.scale)
            assert torch.equal(ops.dequantize_rows(q), ops.dequantize_rows(want)) and q._replace(shape=None).shape is None
            del q
            gc.collect()
            assert torch.equal(data.view(torch.uint8), want.data.view(torch.uint8)) and torch.equal(scale, want.scale)


@pytest.mark.skipif(native.hot is None, reason=f"native parts: {native.reason.get('_hot')}")
def test_without_the_exchange_table_results_are_the_same():
    x, w = torch.randn(5, 8, 6, generator=torch.Generator().manual_seed(4)), torch.eye(8)[:3]
    mask = torch.tensor([True, False, True])

    def results():
        rows = [ops.quantize_rows(x, format) for format in ("int8", "int4", "fp8_e4m3", "bf16")]
        out = ops.exit_pack(x, w, threshold=0.5, logits=True)
        return [*[t for q in rows for t in (q.data.view(torch.uint8), q.scale, ops.dequantize_rows(q))], out.label, out.logits, out.wire, out.packed.data, *ops.compact(mask)[:1]]

    with_table = results()
    assert native.hot.use_exchange_table(True), "this torch should have the table"
    try:
        assert not native.hot.use_exchange_table(False)
        without = results()
    finally:
        native.hot.use_exchange_table(True)
    assert all(torch.equal(a, b) for a, b in zip(with_table, without, strict=True))


@pytest.mark.skipif(native.hot is None, reason="native parts are missing")
def test_a_large_result_leaves_its_memory_to_the_next_and_only_then():
    x, y = torch.randn(3, 70_000), torch.randn(3, 70_000)
    data = ops.quantize_rows(x).data
    where, want = data.data_ptr(), data.clone()
    other = ops.quantize_rows(y).data
    assert other.data_ptr() != where and torch.equal(data, want)  # alive: nobody else's
    del data, other
    gc.collect()
    again = ops.quantize_rows(x).data
    kept = again[1, 5:9]  # a view keeps the memory as well as the whole
    want, where = kept.clone(), again.data_ptr()
    del again
    for rows in (1, 3, 30, 3):  # smaller, as large, too large to be kept, as large again
        assert ops.quantize_rows(torch.randn(rows, 70_000)).data.data_ptr() != where
    assert torch.equal(kept, want)

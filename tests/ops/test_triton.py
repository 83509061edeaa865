"""The Triton backend's own promises; the kernels run in the interpreter (TRITON_INTERPRET=1, see tests/compile/test_interpreter.py)."""

import dataclasses
import os
import re

import pytest
import torch

import fastee
from fastee import dispatch, ops
from fastee.kernels import triton
from fastee.ops import _triton
from fastee.testing.tolerances import assert_compacted

interpreted = pytest.mark.skipif(
    triton.missing() is not None or not (triton.INTERPRETED or os.environ.get("FASTEE_TEST_DEVICE")),
    reason=triton.missing() or "triton's kernels run in a process of its own: tests/compile/test_interpreter.py",
)
ON = {"backend": "triton"}


@pytest.fixture
def tuned(monkeypatch):
    """Return a function that sets fields of the heuristics."""

    def change(**fields):
        from fastee.kernels.triton._tuning import Tuning

        made = dataclasses.replace(Tuning(), **fields)
        monkeypatch.setattr(_triton, "tuning", lambda x: made)

    return change


@pytest.fixture
def launches(monkeypatch):
    """Return the names of the kernels that are launched, in order."""
    names = []
    for name in triton.KERNELS:
        module = triton.load(name)
        if hasattr(module, "launch"):

            def noted(kernel, grid, *args, before=module.launch, **meta):
                names.append(kernel.fn.__name__)
                before(kernel, grid, *args, **meta)

            monkeypatch.setattr(module, "launch", noted)
    return names


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


TILES = {"row_classes": 0, "tile_classes": 32, "tile_features": 256}
SMALL_TILES = {"row_classes": 0, "wide_classes": 8, "vocabulary_classes": 16, "vocabulary_features": 128}
GROUPS = {**SMALL_TILES, "merge_tiles": 1}


def test_every_op_has_the_backend_and_explains_itself():
    for op in dispatch._ops.values():
        assert "triton" in [b.name for b in op.backends], op.name
    if not triton.INTERPRETED:
        why = dict(fastee.explain("exit_step", torch.zeros(1, 4), torch.zeros(2, 4), pool="none").rows)["triton"]
        assert "CUDA devices" in why or "not installed" in why


def test_heuristics_are_found_by_the_device_name():
    from fastee.kernels.triton._tuning import HERE, Tuning, slug, tuning

    for path in HERE.glob("*.json"):
        assert tuning(path.stem) != Tuning(), f"{path.name} changes nothing"
    assert (
        slug("NVIDIA H200") == "nvidia-h200"
        and tuning("NVIDIA H200 NVL") == tuning("NVIDIA H200")
        and tuning("NVIDIA GeForce 1") == Tuning()
    )


def test_kernels_know_nothing_of_torch_and_allocate_nothing():
    for path in triton.HERE.glob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(import torch|from torch|import fastee|from fastee)|\.item\(|\.cpu\(|\.empty|synchronize", text, re.M), (
            path.name
        )


def test_a_failed_launch_is_named(monkeypatch):
    if triton.missing():
        pytest.skip(triton.missing())
    from fastee.kernels.triton import _launch

    class Kernel:
        def __init__(self, why):
            self.why, self.fn = why, ops.compact

        def __getitem__(self, grid):
            def run(*args, **options):
                assert options == {"enable_fp_fusion": False, "num_warps": 4}
                if self.why:
                    raise RuntimeError(self.why)

            return run

    monkeypatch.setattr(_launch, "_before", None)
    call = lambda why, grid=(1,): _launch.launch(Kernel(why), grid, 1, num_warps=4, enable_fp_fusion=False)
    with pytest.raises(RuntimeError, match=r"^compact\.compact: Triton Error \[CUDA\]: out of memory$"):
        call("Triton Error [CUDA]: out of memory")
    with pytest.raises(RuntimeError, match=r"^compact\.compact: .*sticky: .*launch before this one: none\)"):
        call("Triton Error [CUDA]: an illegal memory access was encountered")
    call(None)
    call("never called", grid=(3, 0))
    with pytest.raises(RuntimeError, match=r"sticky: .*launch before this one: compact\.compact\)"):
        call("CUDA error: misaligned address")


def test_tickets_that_a_graph_holds_are_nobody_elses(monkeypatch):
    pool = _triton._Tickets()

    class Device:
        type, index = "cuda", 0

    class Somewhere:
        device = Device()

    stream = type("Stream", (), {"cuda_stream": 7})
    made = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **k: made(*size, **k))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    eager = pool.take(Somewhere, 10)
    assert pool.take(Somewhere, 10).data_ptr() == eager.data_ptr()
    stream.cuda_stream = 8
    assert pool.take(Somewhere, 10).data_ptr() != eager.data_ptr()
    capturing, ranges = True, []
    for _ in range(20):
        taken = pool.take(Somewhere, 10_000)
        ranges.append((taken.data_ptr(), taken.data_ptr() + 4 * 10_000, taken))
    ranges.sort(key=lambda r: r[0])
    assert all(a[1] <= b[0] for a, b in zip(ranges, ranges[1:], strict=False))
    assert all(not t.any() for *_, t in ranges)


@interpreted
@pytest.mark.parametrize("way", [{}, TILES, SMALL_TILES, GROUPS], ids=["rows", "tiles", "vocabulary", "groups"])
@pytest.mark.parametrize("norm", ["layer", "rms", "affine", None])
@pytest.mark.parametrize("pool,shape", [("mean", (3, 24, 3, 3)), ("mean_tokens", (3, 5, 24)), ("none", (3, 24))])
def test_every_way_through_a_head_agrees_with_float64(tuned, way, norm, pool, shape):
    tuned(**way)
    g = gen(1)
    x, w, b = torch.randn(shape, generator=g), torch.randn(11, 24, generator=g), torch.randn(11, generator=g)
    norm = norm and ops.Norm(norm, torch.rand(24, generator=g) + 0.5, torch.randn(24, generator=g))
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 1, 0], [1] * 5], dtype=torch.bool) if pool == "mean_tokens" else None
    got = ops.exit_step(x, w, b, pool, norm, "margin", 0.4, mask=mask, logits=True, **ON)
    n64 = norm and norm._replace(weight=norm.weight.double(), bias=norm.bias.double())
    want = ops.exit_step(x.double(), w.double(), b.double(), pool, n64, "margin", 0.4, mask=mask, backend="reference")
    assert torch.allclose(got.logits.double(), want.logits, atol=1e-5) and torch.allclose(got.confidence, want.confidence, atol=1e-5)
    assert_compacted(got.index, got.count, ~got.exits)


@interpreted
@pytest.mark.parametrize("way", [{}, TILES, SMALL_TILES, GROUPS], ids=["rows", "tiles", "vocabulary", "groups"])
def test_a_row_does_not_depend_on_its_batch(tuned, way):
    tuned(**way)
    x, w = torch.randn(67, 40, generator=gen(2)), torch.randn(87, 40, generator=gen(3))
    rows = slice(60, 67) if way else slice(64, 67)
    whole, part = (ops.exit_step(v, w, None, "none", ops.Norm("layer"), logits=True, **ON) for v in (x if way else x[58:], x[rows]))
    for field in ("label", "confidence", "exits", "logits"):
        a, b = getattr(whole, field), getattr(part, field)
        assert torch.equal(a[len(a) - len(b) :], b), field


@interpreted
@pytest.mark.parametrize("classes", [17, 100, 129, 1030])
def test_tiles_merged_in_one_level_or_in_two(tuned, launches, classes):
    """2, 7, 9 and 65 tiles; the last group is a part of one, or one tile alone."""
    x, w = torch.randn(9, 50, generator=gen(4)), torch.randn(classes, 50, generator=gen(5)) / 7
    x[4, 2] = float("nan")
    made = []
    for most in (128, 1):
        tuned(row_classes=0, wide_classes=1 << 20, tile_classes=16, tile_features=64, merge_tiles=most)
        made.append(ops.exit_step(x, w, None, "none", threshold=0.2, **ON))
    assert launches == ["head_kernel"] * 2
    want = ops.exit_step(x.double(), w.double(), None, "none", threshold=0.2, backend="reference")
    for got in made:
        assert torch.equal(got.label, want.label) and torch.equal(got.exits, want.exits) and got.label[4] == -1
        assert torch.equal(got.index, want.index) and got.count == want.count
        for name in ("max_prob", "margin", "entropy", "lse"):
            assert torch.allclose(getattr(got.stats, name), getattr(want.stats, name).float(), atol=2e-6, equal_nan=True), name


@interpreted
@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("features", [64, 72, 65])
def test_bulk_copies_change_no_bit(tuned, monkeypatch, weights, features):
    """Tiles that hang over both edges; rows of 65 features are not what a bulk copy takes, and go the other way."""
    x, w = torch.randn(70, features, generator=gen(12)).bfloat16(), torch.randn(33, features, generator=gen(13))
    w = w.bfloat16() if weights == "bf16" else ops.quantize_rows(w)
    module, made = triton.load("exit_head"), []
    described = module.described
    monkeypatch.setattr(module, "described", lambda *a: made.append(described(*a)) or made[-1])
    out = []
    for bulk in (False, True):
        tuned(row_classes=0, wide_classes=0, vocabulary_classes=16, vocabulary_features=32, bulk_copies=bulk)
        out.append(ops.exit_step(x, w, None, "none", logits=True, **ON))
        if not bulk:
            assert not made
    fits = [features % 8 == 0, features % (8 if weights == "bf16" else 16) == 0]
    assert [d is not None for d in made] == fits
    for field in ("label", "confidence", "exits", "logits", "index"):
        assert torch.equal(getattr(out[0], field), getattr(out[1], field)), field


@interpreted
def test_counters_are_left_at_zero(tuned, monkeypatch):
    """A graph is replayed with the same counters: what one launch leaves, the next one finds."""
    taken, take = [], _triton._tickets.take
    monkeypatch.setattr(_triton._tickets, "take", lambda x, size: taken.append(take(x, size)) or taken[-1])
    for way in ({}, TILES, SMALL_TILES, GROUPS):
        tuned(**way)
        ops.exit_step(torch.randn(5 if not way else 70, 8), torch.randn(100, 8), None, "none", **ON)
    assert len(taken) == 4 and taken[3].numel() > taken[2].numel() > 1 and not any(t.any() for t in taken)


@interpreted
@pytest.mark.parametrize("classes", [3, 10, 1000, 1024, 3000, 20_000])
def test_launches_of_an_exit_step(launches, classes):
    x, w = torch.randn(3, 32, generator=gen(6)), torch.randn(classes, 32, generator=gen(7))
    out = ops.exit_step(x, w, None, "none", ops.Norm("rms"), **ON)
    assert launches == ["head_kernel"] and out.logits is None
    ops.exit_step(torch.randn(2, 32, 2, 2), w, **ON)
    assert launches == ["head_kernel"] * 2  # pooling this little again for every tile costs less than a launch
    ops.exit_step(torch.randn(2, 32, 2, 2), w, None, "mean", ops.Norm("rms"), **ON)
    rows = classes <= _triton.tuning(x.to(os.environ.get("FASTEE_TEST_DEVICE", "cpu"))).row_classes  # a program takes a row and all its classes: pooled once
    assert launches[2:] == (["head_kernel"] if rows else ["pool_kernel", "head_kernel"])


@interpreted
@pytest.mark.parametrize(
    "x_type,w_type",
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.bfloat16, torch.float32), (torch.float16, "int8")],
)
def test_narrow_types_are_widened_exactly(x_type, w_type):
    x, w = torch.randn(4, 40, generator=gen(8)).to(x_type), torch.randn(30, 40, generator=gen(9))
    weight = ops.quantize_rows(w) if w_type == "int8" else w.to(w_type)
    got = ops.exit_head(x, weight, None, "none", logits=True, **ON)
    full = ops.dequantize_rows(weight) if w_type == "int8" else weight
    assert torch.allclose(got.logits.double(), x.double() @ full.double().T, atol=2e-5)


@interpreted
def test_a_head_over_nothing_and_in_any_count_of_tiles(tuned):
    tuned(**SMALL_TILES)
    out = ops.exit_step(torch.zeros(0, 4), torch.zeros(20, 4), None, "none", **ON)
    assert out.count == 0 and out.index.shape == (0,) and out.stats.lse.shape == (0,)


@interpreted
@pytest.mark.skipif(not triton.INTERPRETED, reason="looks at the buffer itself, which is not moved from a device")
@pytest.mark.parametrize("format", ["int8", "int4", "fp8_e4m3", "bf16"])
def test_a_pack_leaves_the_rest_of_its_buffer_alone(format, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *size, dtype=None, **k: empty(*size, dtype=dtype, **k).fill_(77) if dtype == torch.uint8 else empty(*size, dtype=dtype, **k),
    )
    x, w = torch.randn(6, 8, generator=gen(10)), torch.eye(8)[:3] * 3
    out = ops.exit_pack(x, w, None, "none", threshold=0.6, format=format, **ON)
    assert 0 < out.count < 6 and out.wire.data_ptr() == out.buffer.data_ptr() and (out.buffer[out.wire.numel() :] == 77).all()
    want = ops.quantize_rows(x[out.index[: out.count]], format, backend="reference")
    assert torch.equal(out.packed.data.view(torch.uint8), want.data.view(torch.uint8)) and torch.equal(out.packed.scale, want.scale)


@interpreted
def test_every_fp8_code_and_the_values_between():
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float()
    back = ops.dequantize_rows(ops.QuantizedRows(codes.view(torch.float8_e4m3fn)[None], torch.ones(1), "fp8_e4m3", None, (1, 256)), **ON)
    assert torch.equal(back[0].nan_to_num(999.0), values.nan_to_num(999.0)) and torch.equal(back[0].signbit(), values.signbit())
    grid = torch.cat([values[:127], values[128:255]])
    row = torch.cat([grid, (grid[:-1] + grid[1:]) / 2, (grid * 1.01).clamp(-448, 448), torch.tensor([448.0])])[None]
    q = ops.quantize_rows(row, "fp8_e4m3", **ON)
    assert q.scale.item() == 1.0 and torch.equal(q.data.view(torch.uint8), row.to(torch.float8_e4m3fn).view(torch.uint8))


@interpreted
def test_the_last_of_several_rows_for_one_place_wins():
    out = ops.scatter_rows(torch.zeros(4, 3), torch.tensor([2, 0, 2, 2]), torch.arange(12.0).view(4, 3), **ON)
    assert out.tolist() == [[3, 4, 5], [0, 0, 0], [9, 10, 11], [0, 0, 0]]


@interpreted
def test_compaction_by_several_programs(tuned):
    tuned(compact_single=100, compact_block=64)
    for size in (100, 101, 5000):
        mask = torch.rand(size, generator=gen(size)) < 0.5
        assert_compacted(*ops.compact(mask, **ON), mask)
        assert_compacted(*ops.compact(torch.stack([mask, mask], 1)[:, 0], **ON), mask)


@interpreted
@pytest.mark.parametrize("change", [(8, 200), (9, 3), (16, 255), (20, 1), (23, 128), (40, 7), (47, 9), (48, 200), (-1, 3)])
def test_damaged_planes_raise_like_the_reference(change):
    data = ops.pack_planes(torch.randn(1500, generator=gen(11)).relu(), backend="reference").data
    at, value = change
    data[at] = value
    results = []
    for backend in ("triton", "reference"):
        try:
            results.append(ops.unpack_planes(data, backend=backend).view(torch.int32))
        except ValueError as why:
            results.append(str(why))
    assert results[0] == results[1] if isinstance(results[0], str) or isinstance(results[1], str) else torch.equal(*results)

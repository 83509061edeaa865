"""Every op on every backend and instruction set, in every input type and layout it takes, through one body: the definition on the widened input."""

import itertools

import pytest
import torch

from fastee import dispatch, ops

TYPES = (torch.float32, torch.bfloat16, torch.float16)
WEIGHTS = ("float32", "bfloat16", "float16", "int8")
FORMATS = (("int8", None), ("int8", 64), ("int4", 96), ("fp8_e4m3", None), ("bf16", None))


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layouts(x):
    """Yield x contiguous, as every second row of a larger tensor, and channels-last where it is a map; NaN stands between the rows."""
    yield x
    yield torch.stack([x, torch.full_like(x, torch.nan)], 1).flatten(0, 1)[::2]
    if x.dim() == 4:
        yield x.to(memory_format=torch.channels_last)


def head(op, pool="mean", shape=(5, 24, 4, 4), **more):
    def run(dtype, backend):
        for weight in WEIGHTS:
            w = ops.quantize_rows(values(7, 24, seed=1)) if weight == "int8" else values(7, 24, seed=1).to(getattr(torch, weight))
            wide = ops.dequantize_rows(w, backend="reference") if weight == "int8" else w.float()
            for x in layouts(values(*shape).to(dtype)):
                if op is ops.exit_pack and not x[0].is_contiguous():
                    continue  # it packs rows as they lie
                got = op(x, w, None, pool, threshold=0.4, backend=backend, **more)
                want = op(x.float(), wide, None, pool, threshold=0.4, backend="reference", **more)
                yield (got.label, got.exits, got.confidence, *got.stats[1:5]), (want.label, want.exits, want.confidence, *want.stats[1:5])
                if op is not ops.exit_head:
                    yield (got.index, torch.tensor(got.count)), (want.index, torch.tensor(want.count))
                if op is ops.exit_pack:
                    yield (got.wire, got.packed.data), (want.wire, want.packed.data)

    return run


def head_of_each_pool(op):
    def run(dtype, backend):
        for pool, shape in (("mean", (5, 24, 4, 4)), ("mean", (5, 24, 7, 7)), ("mean_tokens", (5, 6, 24)), ("cls", (5, 6, 24)), ("last", (5, 6, 24)), ("none", (5, 24))):
            yield from head(op, pool, shape)(dtype, backend)

    return run


def pack(dtype, backend):
    for format, group in FORMATS:
        yield from head(ops.exit_pack, format=format, group=group)(dtype, backend)


def pool(dtype, backend):
    for kind, shape in (("mean", (5, 24, 4, 4)), ("mean", (5, 70, 9, 9)), ("mean_tokens", (5, 6, 24)), ("cls", (5, 6, 24)), ("last", (5, 6, 24)), ("none", (5, 24))):
        for x in layouts(values(*shape).to(dtype)):
            yield (ops.pool(x, kind, backend=backend),), (ops.pool(x.float(), kind, backend="reference"),)


def linear_stats(dtype, backend):
    for x in layouts(values(5, 24).to(dtype)):
        for w in (values(7, 24, seed=1), values(7, 24, seed=1).bfloat16(), ops.quantize_rows(values(7, 24, seed=1))):
            wide = ops.dequantize_rows(w, backend="reference") if isinstance(w, tuple) or hasattr(w, "scale") else w.float()
            yield tuple(ops.linear_stats(x, w, second_moment=True, backend=backend)), tuple(ops.linear_stats(x.float(), wide, second_moment=True, backend="reference"))


def row_stats(dtype, backend):
    for z in layouts(3 * values(5, 33).to(dtype)):
        yield tuple(ops.row_stats(z, second_moment=True, backend=backend)), tuple(ops.row_stats(z.float(), second_moment=True, backend="reference"))


def mean_entropy(dtype, backend):
    for z in layouts(3 * values(5, 3, 33).to(dtype)):
        yield (ops.mean_entropy(z, backend=backend),), (ops.mean_entropy(z.float(), backend="reference"),)


def feature_delta(dtype, backend):
    for a, b in zip(layouts(values(5, 3, 33).to(dtype)), layouts(values(5, 3, 33, seed=1).to(dtype)), strict=True):
        yield (ops.feature_delta(a, b, backend=backend),), (ops.feature_delta(a.float(), b.float(), backend="reference"),)


def raw(q):
    return q.data.contiguous().view(torch.uint8), q.scale


def quantize_rows(dtype, backend):
    for format, group in FORMATS:
        for x in layouts(values(5, 2, 96).to(dtype)):
            yield raw(ops.quantize_rows(x, format, group, backend=backend)), raw(ops.quantize_rows(x.float(), format, group, backend="reference"))


def dequantize_rows(dtype, backend):
    for format, group in FORMATS:
        q = ops.quantize_rows(values(5, 2, 96).to(dtype), format, group, backend="reference")
        gaps = torch.stack([q.data, q.data], 1).flatten(0, 1)[::2]
        for data in (q.data, gaps):
            yield (ops.dequantize_rows(q._replace(data=data), backend=backend),), (ops.dequantize_rows(q, backend="reference"),)


def planes(dtype, backend):
    for x in layouts(values(5, 30, 4, 4).to(dtype)):
        p = ops.pack_planes(x, backend=backend)
        yield (p.data,), (ops.pack_planes(x, backend="reference").data,)
        yield (ops.unpack_planes(p, backend=backend).view(torch.uint8),), (x.contiguous().view(torch.uint8),)


def moves(dtype, backend):
    index = torch.tensor([4, 0, 2])
    for x in layouts(values(5, 3, 33).to(dtype)):
        rows = ops.gather_rows(x, index, backend=backend)
        yield (rows,), (x[index],)
        yield (ops.scatter_rows(torch.zeros(5, 3, 33, dtype=dtype), index, rows, backend=backend),), (torch.zeros(5, 3, 33, dtype=dtype).index_copy(0, index, x[index]),)


def compact(dtype, backend):
    for mask in (torch.arange(40) % 3 == 0, (torch.arange(80) % 3 == 0)[::2]):
        (index, count), (want, total) = ops.compact(mask, backend=backend), ops.compact(mask, backend="reference")
        yield (index, torch.tensor(count)), (want, torch.tensor(total))


BODIES = {
    "compact": compact, "dequantize_rows": dequantize_rows, "exit_head": head_of_each_pool(ops.exit_head), "exit_pack": pack,
    "exit_step": head_of_each_pool(ops.exit_step), "feature_delta": feature_delta, "gather_rows": moves, "linear_stats": linear_stats,
    "mean_entropy": mean_entropy, "pack_planes": planes, "pool": pool, "quantize_rows": quantize_rows, "row_stats": row_stats,
    "scatter_rows": moves, "unpack_planes": planes,
}  # fmt: skip


def test_the_table_holds_every_op():
    assert BODIES.keys() == dispatch._ops.keys()


@pytest.mark.parametrize("op", [name for name in BODIES if name not in ("scatter_rows", "unpack_planes")])
def test_every_type_and_layout_gives_what_the_definition_says(way, op):
    seen = 0
    for dtype in TYPES:
        for got, want in BODIES[op](dtype, way):
            for a, b in itertools.zip_longest(got, want):
                assert a.shape == b.shape
                if b.dtype.is_floating_point and op != "gather_rows":
                    assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=2e-5), (op, dtype)
                else:
                    assert torch.equal(a, b), (op, dtype)
            seen += 1
    assert seen >= 6

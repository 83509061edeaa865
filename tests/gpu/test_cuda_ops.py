"""libfastee_cuda on a device: the CPU kernels' bits (but for a logarithm's last place), graphs, streams, memory that must not be touched.

The same kernels run without a device in ``csrc/tests/cuda``.
"""

import pytest
import torch

from fastee import native, ops
from fastee.kernels import cuda

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))]
ON = {"backend": "cuda"}
# The CPU kernels give the same bits; a machine that cannot build them compares with the definition, within its rounding.
EXACT = native.hot is not None
HERE = {"backend": "cpu" if EXACT else "reference"}
NEAR = {"rtol": 2e-7, "atol": 1e-7} if EXACT else {"rtol": 1e-4, "atol": 1e-5}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_head(there, here):
    for name in ("label", "exits", "confidence"):
        a, b = getattr(there, name).cpu(), getattr(here, name)
        assert torch.equal(a, b) if a.dtype != torch.float32 else torch.allclose(a, b, equal_nan=True, **NEAR), name
    for a, b in zip(there.stats[1:5], tuple(here.stats)[1:5], strict=True):
        assert torch.allclose(a.cpu(), b, equal_nan=True, **NEAR)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows, features, classes", [(0, 8, 4), (1, 768, 1000), (1, 2048, 10), (7, 100, 3), (32, 768, 2), (33, 1030, 129), (256, 768, 100)]
)
def test_exit_step_is_the_cpus(rows, features, classes, dtype):
    x, w, b = (
        numbers(rows, features, dtype=dtype),
        numbers(classes, features, dtype=dtype, seed=1) * features**-0.5,
        numbers(classes, seed=2),
    )
    if rows > 2:
        x[1] = torch.nan
    here = ops.exit_step(x, w, b, "none", threshold=0.3, logits=True, **HERE)
    there = ops.exit_step(x.cuda(), w.cuda(), b.cuda(), "none", threshold=0.3, logits=True, **ON)
    same_head(there, here)
    assert torch.equal(there.index.cpu(), here.index) and int(there.count) == here.count
    assert torch.allclose(there.logits.cpu(), here.logits, equal_nan=True, **({"rtol": 0, "atol": 0} if EXACT else NEAR))


@pytest.mark.parametrize(
    "pool, shape", [("mean", (9, 64, 7, 7)), ("mean_tokens", (5, 13, 96)), ("cls", (5, 13, 96)), ("last", (5, 13, 96))]
)
@pytest.mark.parametrize("norm", [None, "layer", "rms", "affine"])
@pytest.mark.parametrize("classes", [10, 500])
def test_exit_head_pools_and_norms(pool, shape, norm, classes):
    features = shape[1] if pool == "mean" else shape[2]
    x, w = numbers(*shape), numbers(classes, features, seed=1)
    mask = (torch.arange(shape[1]) % 3 != 1).expand(shape[:2]) if pool == "mean_tokens" else None
    parts = (numbers(features, seed=3), numbers(features, seed=4))
    make = lambda device: ops.Norm(norm, *(t.to(device) for t in parts)) if norm else None
    here = ops.exit_head(x, w, None, pool, make("cpu"), "entropy", -1.0, mask=mask, **HERE)
    there = ops.exit_head(x.cuda(), w.cuda(), None, pool, make("cuda"), "entropy", -1.0, mask=None if mask is None else mask.cuda(), **ON)
    same_head(there, here)


@pytest.mark.parametrize("format", ["int8", "int4", "fp8_e4m3", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, group", [((3, 7), None), ((64, 4096), None), ((16, 4096), 128), ((5, 15), 5), ((2, 64, 56, 56), None)])
def test_quantize_rows_has_the_cpus_bytes(format, dtype, shape, group):
    x = numbers(*shape, dtype=dtype)
    group = None if format == "bf16" else group
    here, there = ops.quantize_rows(x, format, group, **HERE), ops.quantize_rows(x.cuda(), format, group, **ON)
    assert torch.equal(there.data.cpu().view(torch.uint8), here.data.view(torch.uint8)) and torch.equal(there.scale.cpu(), here.scale)


@pytest.mark.parametrize("format", ["int8", "int4", "fp8_e4m3", "bf16"])
@pytest.mark.parametrize("threshold", [-1.0, 0.3, 2.0])
def test_exit_pack_has_the_cpus_bytes(format, threshold):
    x, w = numbers(33, 24, 7, 7), numbers(10, 24, seed=1)
    here = ops.exit_pack(x, w, None, threshold=threshold, format=format, **HERE)
    there = ops.exit_pack(x.cuda(), w.cuda(), None, threshold=threshold, format=format, **ON)
    same_head(there, here)
    assert int(there.count) == here.count and torch.equal(there.wire.cpu(), here.wire)
    assert torch.equal(there.packed.data.cpu().view(torch.uint8), here.packed.data.view(torch.uint8))


@pytest.mark.parametrize("rows", [0, 1, 31, 33, 1024, 4096, 4097, 70_000, 3_000_000])
@pytest.mark.parametrize("kind", ["none", "all", "alternating", "first", "last", "random"])
def test_compact_is_the_cpus(rows, kind):
    mask = {"none": lambda i: i < 0, "all": lambda i: i >= 0, "alternating": lambda i: i % 2 == 1, "first": lambda i: i == 0, "last": lambda i: i == rows - 1,
            "random": lambda i: numbers(rows) > 0}[kind](torch.arange(rows))  # fmt: skip
    here, there = ops.compact(mask, **HERE), ops.compact(mask.cuda(), **ON)
    assert torch.equal(there.index.cpu(), here.index) and int(there.count) == here.count


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 2047, 2048, 2049, 1_000_003])
def test_planes_have_the_cpus_bytes_and_come_back(dtype, n):
    x = numbers(n, dtype=dtype)
    x[::50] *= 1e-6
    here, there = ops.pack_planes(x, **HERE), ops.pack_planes(x.cuda(), **ON)
    assert torch.equal(there.data.cpu(), here.data)
    back = ops.unpack_planes(there, **ON)
    assert torch.equal(back.cpu().view(torch.uint8), x.view(torch.uint8))
    if n > 10:
        assert torch.equal(ops.unpack_planes(there, 3, n - 2, **ON).cpu(), x[3 : n - 2])
    if n > 2049:
        bad = there.data.clone()
        bad[24] ^= 255  # where the second block ends
        with pytest.raises(ValueError, match="damaged"):
            ops.unpack_planes(bad, **ON)


def test_graphs_replay_what_eager_calls_give():
    """Twice with other data: memory that has to be zero between launches is, and nothing was allocated in between."""
    x, w = numbers(40, 256).cuda(), numbers(10, 256, seed=1).cuda()
    ops.exit_step(x, w, None, "none", threshold=0.5, **ON)  # warm-up outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step = ops.exit_step(x, w, None, "none", threshold=0.5, **ON)
        packed = ops.exit_pack(x, w, None, "none", threshold=0.5, **ON)
    for seed in (3, 4, 5):
        x.copy_(numbers(40, 256, seed=seed))
        graph.replay()
        eager = ops.exit_step(x, w, None, "none", threshold=0.5, **ON)
        assert (
            torch.equal(step.index, eager.index) and torch.equal(step.confidence, eager.confidence) and int(step.count) == int(eager.count)
        )
        assert torch.equal(packed.wire, ops.exit_pack(x, w, None, "none", threshold=0.5, **ON).wire)


def test_kernels_run_on_the_current_stream():
    side, x = torch.cuda.Stream(), torch.zeros(1 << 20, dtype=torch.bool, device="cuda")
    ops.compact(x, **ON)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.fill_(True)
        result = ops.compact(x, **ON)
    assert not side.query()  # queued behind the sleep, not beside it
    side.synchronize()
    assert int(result.count) == x.numel()


def test_two_streams_do_not_share_what_must_be_zero():
    masks = [numbers(300_000, seed=s).cuda() > 0 for s in range(2)]
    streams = [torch.cuda.Stream() for _ in masks]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for mask, stream in zip(masks, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append((mask, ops.compact(mask, **ON)))
    torch.cuda.synchronize()
    for mask, r in results:
        assert int(r.count) == int(mask.sum()) and torch.equal(r.index[: r.count].sort().values, mask.nonzero()[:, 0])

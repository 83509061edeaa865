"""What only a device can show: streams, graphs, memory, 64-bit offsets, batches, errors. The ops' bodies run there through tests/ops."""

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastee import ops
from fastee.errors import BackendUnavailable
from tests.gpu import small

BACKENDS = ("triton", "cuda")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=BACKENDS)
def backend(request):
    try:
        ops.compact(torch.ones(3, dtype=torch.bool, device="cuda"), backend=request.param)
    except BackendUnavailable as why:
        pytest.skip(str(why))
    return request.param


def able(call):
    try:
        return call()
    except BackendUnavailable as why:
        pytest.skip(str(why))


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


HEADS = [((37, 256, 4, 4), 10, "mean"), ((67, 768), 1000, "none"), ((9, 512), 32_000, "none"), ((5, 12, 64), 7, "mean_tokens")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape,classes,pool", HEADS)
def test_heads_against_float64(backend, shape, classes, pool, dtype):
    features = shape[1] if pool in ("mean", "none") else shape[2]
    x, w, b = randn(*shape, dtype=dtype), randn(classes, features, dtype=dtype, seed=1) / features**0.5, randn(classes, seed=2)
    got = able(lambda: ops.exit_step(x, w, b, pool, threshold=0.3, logits=True, backend=backend))
    want = ops.exit_step(x.double(), w.double(), b.double(), pool, threshold=0.3, backend="reference")
    bound = 2e-5 * max(1.0, float(want.logits.abs().max()))
    assert (got.logits.double() - want.logits).abs().max() <= bound
    for name in ("max_prob", "margin", "entropy", "lse"):
        assert (getattr(got.stats, name).double() - getattr(want.stats, name).double()).abs().max() <= 2 * bound, name
    away = (want.confidence - 0.3).abs() > 2 * bound
    assert torch.equal(got.exits[away], want.exits[away])
    assert torch.equal(got.index, ops.compact(~got.exits.cpu(), backend="reference").index.cuda()) and int(got.count) == int(
        (~got.exits).sum()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape,classes,pool", [((130, 64, 4, 4), 10, "mean"), ((130, 768), 1000, "none"), ((130, 512), 8000, "none")])
def test_a_row_does_not_depend_on_its_batch(backend, shape, classes, pool, dtype):
    x, w = randn(*shape, dtype=dtype), randn(classes, shape[1], dtype=dtype, seed=1)
    whole = able(lambda: ops.exit_step(x, w, None, pool, logits=True, backend=backend))
    for start, stop in ((0, 1), (63, 65), (77, 130)):
        part = ops.exit_step(x[start:stop], w, None, pool, logits=True, backend=backend)
        for field in ("label", "confidence", "exits", "logits"):
            assert torch.equal(getattr(part, field), getattr(whole, field)[start:stop]), (field, start, stop)


def test_everything_runs_on_the_current_stream(backend):
    stream, x = torch.cuda.Stream(), torch.zeros(64, 512, device="cuda")
    w = randn(10, 512)
    able(lambda: ops.exit_step(x, w, None, "none", backend=backend))  # compiled before the clock runs
    torch.cuda.synchronize()
    late = randn(64, 512, seed=3)
    want = ops.exit_step(late, w, None, "none", backend=backend)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # some 0.1 s: a launch on another stream would see the zeros
        x.copy_(late)
        got = ops.exit_step(x, w, None, "none", backend=backend)
        packed = ops.quantize_rows(x, backend="triton")
    stream.synchronize()
    assert torch.equal(got.label, want.label) and torch.equal(got.confidence, want.confidence) and packed.scale.all()


CAPTURED = {
    "exit_step rows": lambda x, w, on: ops.exit_step(x, w[:10], None, "none", **on)[:3],
    "exit_step tiles": lambda x, w, on: ops.exit_step(x, w[:1000], None, "none", **on)[:3],
    "exit_step vocabulary": lambda x, w, on: (lambda s: (s.label, s.confidence, s.index, s.count))(ops.exit_step(x, w, None, "none", **on)),
    "linear_stats": lambda x, w, on: tuple(ops.linear_stats(x, w, **on))[:5],
    "exit_pack": lambda x, w, on: (lambda r: (r.label, r.index, r.count))(ops.exit_pack(x, w[:10], None, "none", threshold=0.5, **on)),
    "quantize_rows": lambda x, w, on: ops.quantize_rows(x, "fp8_e4m3", **on)[:2],
    "compact": lambda x, w, on: tuple(ops.compact(x[:, 0] > 0, **on)),
}


@pytest.mark.parametrize("name", CAPTURED)
def test_a_replayed_graph_equals_the_call(backend, name):
    run, on = CAPTURED[name], {"backend": backend}
    x, w = randn(100, 256), randn(3000, 256, seed=1) / 16
    able(lambda: run(x, w, on))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x, w, on)
    for seed in (5, 6, 7):  # the counters of one replay must serve the next
        x.copy_(randn(100, 256, seed=seed))
        graph.replay()
        got = [t.view(torch.uint8).clone() if t.dtype == torch.float8_e4m3fn else t.clone() for t in out]
        for a, b in zip(got, run(x, w, on), strict=True):
            assert torch.equal(a, b.view(torch.uint8) if b.dtype == torch.float8_e4m3fn else b), (name, seed)


def test_logits_of_a_vocabulary_never_reach_memory(backend):
    x, w = randn(64, 512, dtype=torch.bfloat16), randn(128_256, 512, dtype=torch.bfloat16, seed=1)
    able(lambda: ops.linear_stats(x, w, backend=backend))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.linear_stats(x, w, backend=backend)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 64 * 128_256 * 4 / 8


def test_more_than_two_billion_elements(backend):
    rows, row = 33_000, 1 << 16  # 2^31 elements lie before row 32,768
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("needs 14 GB of device memory")
    x = torch.zeros(rows, row, dtype=torch.bfloat16, device="cuda")
    x[-1] = randn(row).bfloat16()
    q = able(lambda: ops.quantize_rows(x, backend=backend))
    want = ops.quantize_rows(x[-1:].cpu(), backend="reference")
    assert torch.equal(q.data[-1].cpu(), want.data[0]) and torch.equal(q.scale[-1:].cpu(), want.scale) and not q.scale[:-1].any()
    at = torch.tensor([rows - 1, 0], device="cuda")
    assert torch.equal(ops.gather_rows(x, at, backend="triton"), x[at])
    head = ops.exit_step(x, randn(3, row, seed=1).bfloat16(), None, "none", backend=backend)
    assert int(head.label[-1]) == int((x[-1].double() @ randn(3, row, seed=1).bfloat16().double().T).argmax())


def test_wrong_input_has_the_errors_of_the_cpu():
    x, w = torch.zeros(2, 8, 4, 4, device="cuda"), torch.zeros(3, 8, device="cuda")
    for call, error, text in (
        (lambda: ops.exit_head(x, w.cpu()), ValueError, "exit_head: weight must be on cuda:0 like x, got cpu"),
        (
            lambda: ops.exit_head(x.int(), w),
            TypeError,
            "exit_head: x must be float32 or bfloat16 or float16 or float64 [B, D, ...], got int32 [2, 8, 4, 4] on cuda:0",
        ),
        (lambda: ops.exit_head(x, w, measure="maxprob"), ValueError, "exit_head: measure must be one of"),
        (lambda: ops.gather_rows(x, torch.tensor([5], device="cuda")), ValueError, "gather_rows: index must lie in [0, 2), got 5"),
        (lambda: ops.quantize_rows(x, group=7), ValueError, "quantize_rows: group must divide the 128 elements of a row, got 7"),
        (
            lambda: ops.unpack_planes(torch.zeros(40, dtype=torch.uint8, device="cuda")),
            ValueError,
            "unpack_planes: data holds no packed planes",
        ),
        (lambda: ops.exit_head(x, w, backend="cpu"), BackendUnavailable, "exit_head: backend='cpu' cannot run: tensor on cuda:0"),
    ):
        with pytest.raises(error, match="^" + re.escape(text)):
            call()
    torch.cuda.synchronize()  # nothing was launched that failed


def network(wait):
    """Return a small network with three exits on the device, whose rows leave at all of them."""
    pytest.importorskip("msgspec", reason="msgspec is not installed (fastee.nn needs it)")
    import fastee
    from fastee.kernels import cuda

    if wait == "device" and cuda.missing():
        pytest.skip(cuda.missing())
    torch.manual_seed(0)
    body = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh()) for _ in range(4)], torch.nn.Linear(64, 10))
    net = fastee.attach(body.eval(), exits=["0", "1", "2"], num_classes=10, example=torch.zeros(2, 64)).eval().cuda()
    for head in net.heads:
        torch.nn.init.normal_(head.linear.weight, std=0.6)
    return net.set_rule("max_prob", [0.9, 0.85, 0.8])


@pytest.mark.parametrize("wait", ["never", "auto", "always", "device"])
def test_a_network_in_graphs_answers_like_itself(wait):
    net = network(wait).capture_segments(randn(32, 64), wait=wait)
    for rows in (32, 1, 19, 32):
        x = randn(rows, 64, seed=rows)
        out = net(x)
        runner, net._graphs = net._graphs, None
        want = net(x)
        net._graphs = runner
        assert torch.equal(out.exit, want.exit) and torch.equal(out.label, want.label), (wait, rows)
        assert torch.allclose(out.logits, want.logits, atol=1e-4)
    assert runner._key is not None  # graphs ran
    side, xs = torch.cuda.Stream(), [randn(32, 64, seed=s) for s in range(8)]
    alone = [(o.label, o.exit) for o in map(runner, xs)]
    torch.cuda.synchronize()
    got = []
    for i, x in enumerate(xs):  # two streams in turn: a batch waits for the one before, whose memory it takes
        with torch.cuda.stream(side if i % 2 else torch.cuda.current_stream()):
            if i % 2:
                torch.cuda._sleep(20_000_000)
            out = runner(x)
            got.append((out.label, out.exit))
    torch.cuda.synchronize()
    for (label, exit), (a, b) in zip(alone, got, strict=True):
        assert torch.equal(label, a) and torch.equal(exit, b)


def test_a_network_in_one_graph_against_float64():
    """Everybody leaves at once, nobody leaves, and some."""
    net = network("device")
    x = randn(32, 64, seed=9)
    for thresholds in ([0.0, 0.9, 0.9], [9.0, 9.0, 9.0], [0.6, 0.6, 0.6]):
        net.set_rule(thresholds=thresholds).capture_segments(x, wait="device")
        out = net(x)
        want = copy.deepcopy(net).cpu().double()(x.cpu().double())
        sure = (want.confidence - 0.6).abs() > 1e-4
        assert torch.equal(out.exit.cpu()[sure], want.exit[sure]) and torch.equal(out.label.cpu()[sure], want.label[sure])


@pytest.mark.parametrize("name", [name for name, _ in small.calls("triton")] if torch.cuda.is_available() else [])
def test_small_shapes(backend, name):
    able(dict(small.calls(backend))[name])
    torch.cuda.synchronize()


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(backend, tool):
    program = shutil.which("compute-sanitizer") or next(map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None)
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "tests/gpu/small.py", backend]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True)
    if "Device not supported" in run.stdout + run.stderr:
        pytest.skip("compute-sanitizer: device not supported here")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]

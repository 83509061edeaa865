"""benchmarks/gpu.py without a device, at small shapes: every part runs to its rows, and what surrounds the parts holds when one fails.

Kernels are launched into nothing, graphs replay by calling again, and the clock is a counter: what is tested is that a first run on a
device will not stop at a slip, and that every bar of the GPU kernels is judged by some row.
"""

import contextlib
import itertools
import json
import subprocess
import sys
import types

import pytest
import torch

from benchmarks import gpu
from fastee.kernels import triton
from fastee.testing.rows import Row

WHY = triton.missing() or ("TRITON_INTERPRET=1: kernels would run" if triton.INTERPRETED else "")
pytestmark = pytest.mark.skipif(bool(WHY), reason=WHY)


class Graph:
    def __init__(self, body):
        self.replay = body


class Layer:
    """Graphs that replay by calling again; every stage and every look at the clock takes longer than the last."""

    seconds = staticmethod(lambda graph, ticks=itertools.count(1): float(next(ticks)))
    entered = staticmethod(contextlib.nullcontext)
    flags = staticmethod(lambda count: torch.zeros(count, dtype=torch.int64))

    def event(self):
        return type("Event", (), {"record": lambda s: None, "query": lambda s: True, "synchronize": lambda s: None})()

    def capture(self, body, join=False):
        out = body()
        return Graph(body), out

    def join(self, stages):
        return Exits(stages)


class Exits:
    def __init__(self, stages):
        self.stages = stages

    def replay(self):
        for graphs, _ in self.stages:
            graphs[max(graphs)].replay()


class NoGpu:
    device = torch.device("cpu")
    name = staticmethod(lambda: "NVIDIA Testing 1")
    l2 = staticmethod(lambda: 1000)
    free = staticmethod(lambda: 1 << 20)
    finish = staticmethod(lambda: None)
    layer = staticmethod(Layer)
    record = staticmethod(lambda body, keep_graph=False: Graph(body))

    def __init__(self):
        self.ticks = itertools.count(1)

    def seconds(self, graph):
        graph.replay()
        return next(self.ticks) * 1e-6

    def clock(self):
        return next(self.ticks) * 1e-6


class Residual(torch.nn.Module):
    """Stands in for ResNet-18: stages of the same names on images, 1,000 classes."""

    def __init__(self):
        super().__init__()
        self.layer1, self.layer2, self.layer3 = (torch.nn.Conv2d(c, 8, 3, 2, 1) for c in (3, 8, 8))
        self.fc = torch.nn.Linear(8, 1000)

    def forward(self, x):
        return self.fc(torch.relu(self.layer3(torch.relu(self.layer2(self.layer1(x))))).mean((2, 3)))


SMALL = {
    "ROOF": {"copy": 1 << 10, "product": 16}, "EXIT_STEPS": [(1, 16, 2), (3, 32, 1100), (3, 16, 70)],
    "VOCABULARY": (1100, 64), "BATCHES": (1, 3), "COMPILED": (3,), "QUANTISED": [(4, 32)], "PACKED": [((3, 8, 2, 2), 5)], "COMPACTED": (9,), "RESNET": (3, 32, 32), "BATCH": 4,
    "BERT": {"layers": 4, "width": 32, "heads": 2, "inner": 32, "tokens": 5}, "BERT_BATCHES": (1, 3),
    "LINEAR": {"rows": 4, "width": 16, "layers": 1},
}  # fmt: skip


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """A `Bench` on no device; Triton's launches go nowhere."""
    from fastee.kernels.triton import _launch
    from fastee.kernels.triton._tuning import Tuning
    from fastee.ops import _triton

    modules = [_launch, *map(triton.load, triton.KERNELS)]  # before the next lines: a kernel's module takes INTERPRETED when it is imported
    for name, value in SMALL.items():
        assert type(value) is type(getattr(gpu, name))
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu, "GPU", NoGpu())
    monkeypatch.setattr(triton, "INTERPRETED", True)  # the ops then take CPU tensors; the kernels were decorated before
    monkeypatch.setattr(_triton, "tuning", lambda x: Tuning())
    for module in modules:
        if hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", lambda *args, **meta: None)
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    return gpu.Bench(tmp_path, rounds=2, roofs=(4000.0, 700_000.0))


BARS = {
    "roofs": 0, "exit_steps": 3, "checks": 4, "exit_graphs": 1, "networks": 8, "quantises": 4, "vocabularies": 3, "packs": 0, "counters": 0,
}  # fmt: skip


@pytest.mark.parametrize("part", gpu.PARTS, ids=lambda part: part.__name__)
def test_a_part_runs_to_its_rows(bench, part, monkeypatch, capsys):
    if part in (gpu.networks, gpu.exit_graphs):
        monkeypatch.setattr(triton, "INTERPRETED", False)  # these need what the ops compute
    if part is gpu.networks:
        models = types.SimpleNamespace(resnet18=Residual)
        monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(models=models))
    if part is gpu.exit_graphs:
        from fastee.kernels import cuda

        monkeypatch.setattr(cuda, "missing", lambda: None)
        monkeypatch.setattr(cuda, "ExitGraph", Exits)
    part(bench)
    rows = [json.loads(line) for file in bench.results.glob("*.jsonl") for line in file.read_text().splitlines()]
    assert rows == bench.rows and (rows or part is gpu.counters)
    for row in rows:
        import msgspec

        msgspec.convert(row, Row)  # what `benchmarks plot` reads
        if row["provider"] == "cuda":
            assert "libfastee_cuda is not built" in row["skipped"] or "no CUDA device" in row["skipped"]
        else:
            assert row["skipped"] is None and row["p50_us"] > 0, row
    bars = [b for row in rows for b in row["bars"]]
    assert len(bars) == BARS[part.__name__] and all(b["met"] is not None for b in bars), bars


def test_the_calls_that_ncu_watches_run(bench):
    for kernel in gpu.KERNELS:
        gpu.kernel_calls(kernel)


NCU = """==PROF== Connected
"ID","Kernel Name","gpu__time_duration.sum","dram__bytes.sum","smsp__average_warps_issue_stalled_long_scoreboard.ratio","sm__x"
"","","ns","byte","warp",""
"0","head_kernel","3100","1,000","4.1","1"
"1","head_kernel","3000","1,024","4.2","1"
"""


def test_what_ncu_says_is_read():
    said = gpu.told_by_ncu(NCU, "")
    assert said[:2] == ["2 launches in three calls", "Kernel Name: head_kernel"]
    assert said[2:4] == ["gpu__time_duration.sum: 3000 ns", "dram__bytes.sum: 1,024 byte"]
    assert len(said) == 5 and said[4].endswith("4.2 warp")
    assert gpu.told_by_ncu("==ERROR== ERR_NVGPUCTRPERM", "") == ["skipped: ==ERROR== ERR_NVGPUCTRPERM"]


def test_bars_are_judged():
    rows = {"a": {"skipped": None, "p50_us": 2.0}, "b": {"skipped": None, "p50_us": 4.0}, "c": {"skipped": "why"}}
    for (_, judge), want in (
        (gpu.at_most("a", 2.0), (2.0, True)), (gpu.at_most("a", 1.9), (2.0, False)), (gpu.at_most("c", 9.0), (None, None)),
        (gpu.faster("a", "b", 2.0), (2.0, True)), (gpu.faster("a", "b", 2.0, strictly=True), (2.0, False)),
        (gpu.faster("a", "c", 1.0), (None, None)),
        (gpu.saves("a", "b", 0.5), (0.5, True)), (gpu.saves("b", "a", 0.1), (-1.0, False)), (gpu.part_of("a", "b", 0.4), (0.5, False)),
        (gpu.share("a", 0.85), (None, None)),
    ):  # fmt: skip
        assert judge(rows) == want


def test_a_part_that_fails_or_hangs_takes_no_other_along(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "GPU", NoGpu())
    called = []

    def child(command, timeout):
        name = command[command.index("--part") + 1]
        called.append((name, command[command.index("--roofs") + 1 :] if "--roofs" in command else None, timeout))
        if name == "checks":
            raise subprocess.TimeoutExpired(command, timeout)
        bars = [{"text": "p50 <= 10 us", "value": 12.5, "met": False}]
        made = {
            "roofs": [{"op": "copy", "gbps": 4000.0}, {"op": "gemm", "flops": 2_000_000, "p50_us": 2.0}],
            "packs": [{"op": "compact", "shape": "9", "bars": bars}],
        }.get(name, [])
        with open(tmp_path / "nvidia-testing-1.jsonl", "a") as file:
            file.writelines(json.dumps({"skipped": None, "bars": [], **row}) + "\n" for row in made)
        return subprocess.CompletedProcess(command, name == "exit_steps")

    of_another_run = {"op": "copy", "gbps": 1.0, "skipped": None, "bars": []}
    (tmp_path / "nvidia-testing-1.jsonl").write_text(json.dumps(of_another_run) + "\n")
    monkeypatch.setattr(subprocess, "run", child)
    assert gpu.run(["roofs", "exit_steps", "checks", "packs"], tmp_path, 5, 100.0) == 2
    roofs = ["4000.0", "1000.0"]
    assert called == [("roofs", None, 40), ("exit_steps", roofs, 60), ("checks", roofs, 40), ("packs", roofs, 40)]
    said = capsys.readouterr().out
    assert "exit_steps: FAILED (True)" in said and "checks: FAILED (more than 40 s)" in said and "packs: ok" in said
    assert "compact 9 p50 <= 10 us: MISSED: 12.5" in said and "0 of 1 bars met" in said
    called.clear()
    assert gpu.run(["roofs", "packs"], tmp_path, 5, 3.0) == 2 and not called  # no time is left for any
    with pytest.raises(SystemExit):
        gpu.main(["--only", "roof"])
    assert "expected of roofs, exit_steps" in capsys.readouterr().err


def test_a_real_child_says_why_it_failed(monkeypatch, tmp_path, capfd):
    if torch.cuda.is_available():
        pytest.skip("there is a device here: make bench-gpu")
    monkeypatch.setattr(gpu, "GPU", NoGpu())
    assert gpu.run(["roofs"], tmp_path, 1, 60.0) == 1
    said = capfd.readouterr()
    assert "roofs: FAILED (1)" in said.out and ("CUDA" in said.err or "NVIDIA" in said.err) and sys.executable

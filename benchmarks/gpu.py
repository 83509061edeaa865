"""python -m benchmarks.gpu: the device kernels beside torch, torch.compile and the device's own limits; one row per measurement.

Every time is that of one CUDA graph holding many calls over inputs of more than three times the L2 cache, replayed interleaved with the
others of its group; the roofs (a device copy, a bf16 product) are measured in the same run. Each part runs in a process of its own and
within a time, so that one that fails takes no other along; rows are written as they come. They have the schema of `fastee.testing.rows`,
written without it, so that a machine that has only torch and triton can run this (networks and exit graphs want fastee's dependencies).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic, perf_counter

import torch

from fastee import ops
from fastee.errors import BackendUnavailable
from fastee.kernels.triton._tuning import slug

HERE = Path(__file__).parent
BF16 = torch.bfloat16
# Shapes; the test that runs this file without a device has smaller ones.
ROOF = {"copy": 4 << 30, "product": 8192}
EXIT_STEPS = [(1, 768, 2), (32, 768, 2), (256, 768, 2), (1, 1024, 1000), (32, 2048, 1000), (256, 2048, 1000), (256, 768, 100)]
VOCABULARY, BATCHES, COMPILED = (128_256, 4096), (1, 16, 64), (1, 64)
QUANTISED = [(16_384, 4096), (65_536, 1024)]
PACKED = [((32, 256, 8, 8), 10), ((256, 64, 32, 32), 10)]
COMPACTED = (32, 256, 70_000)
BERT, BERT_BATCHES = {"layers": 12, "width": 768, "heads": 12, "inner": 3072, "tokens": 128}, (1, 32, 256)
RESNET, BATCH = (3, 224, 224), 32
LINEAR = {"rows": 32, "width": 8192, "layers": 4}  # a block of the network of `exit_graphs`: layers of one quarter of a gigabyte


class Gpu:
    """What is asked of the device; a test stands in for it where there is none."""

    device = torch.device("cuda")

    def name(self) -> str:
        return torch.cuda.get_device_name()

    def l2(self) -> int:
        return torch.cuda.get_device_properties(0).L2_cache_size

    def free(self) -> int:
        return torch.cuda.mem_get_info()[0]

    def finish(self) -> None:
        torch.cuda.synchronize()

    def record(self, body: Callable[[], object], keep_graph: bool = False) -> object:
        """Return a graph of `body`, which has run once before; kept as an exit graph takes it, if need be."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            body()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True) if keep_graph else torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            body()
        return graph

    def seconds(self, graph) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def clock(self) -> float:
        return perf_counter()

    def layer(self):
        """Return the layer of the graph runners, None for their own."""
        return None


GPU = Gpu()


def randn(*shape: int, dtype=torch.float32, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator(GPU.device).manual_seed(seed), device=GPU.device).to(dtype)


class Timed:
    """One provider: `calls` in a captured graph, round-robin over inputs."""

    def __init__(self, provider: str, make: Callable[[int], Callable[[], object]], inputs: int, calls: int, note: str = ""):
        self.provider, self.calls, self.note, self.times, self.skipped = provider, calls, note, [], None
        try:
            bodies = [make(i) for i in range(inputs)]
            for body in bodies:
                body()
            self.graph = GPU.record(lambda: [bodies[i % inputs]() for i in range(calls)] and None)
        except (BackendUnavailable, RuntimeError) as why:
            self.skipped = str(why).splitlines()[0][:200]

    def round(self) -> None:
        self.times.append(GPU.seconds(self.graph) * 1e6 / self.calls)


class Called(Timed):
    """A provider that launches by itself, graphs included: timed from the host, to its end."""

    def __init__(self, provider: str, call: Callable, note: str = "captured graphs, host included"):
        self.provider, self.call, self.calls, self.note, self.times, self.skipped = provider, call, 1, note, [], None
        try:
            call()
        except (BackendUnavailable, RuntimeError) as why:
            self.skipped = str(why).splitlines()[0][:200]

    def round(self) -> None:
        GPU.finish()
        start = GPU.clock()
        self.call()
        GPU.finish()
        self.times.append((GPU.clock() - start) * 1e6)


def percentile(values: list[float], q: float) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[q - 1] if len(values) > 1 else values[0]


class Bench:
    """Rows of one part; `roofs`: copy GB/s and product GFLOP/s of this run, None where they are not known yet."""

    def __init__(self, results: Path, rounds: int, roofs: tuple[float, float] | None = None):
        self.rounds, self.rows, self.results = rounds, [], results
        git = subprocess.run(["git", "-C", HERE, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        import triton

        import fastee

        self.machine = {
            "slug": slug(GPU.name()), "cpu": f"{GPU.name()}, CUDA {torch.version.cuda}, triton {triton.__version__}",
            "cores": os.cpu_count() or 1, "isa": None,
            "python": platform.python_version(), "torch": str(torch.__version__), "fastee": fastee.__version__,
            "commit": git.stdout.strip() or "unknown", "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        }  # fmt: skip
        self.copy_gbps, self.gemm_gflops = roofs or (None, None)

    def inputs(self, nbytes: int) -> int:
        """Return how many inputs of `nbytes` are more than three times the L2 cache."""
        return max(2, min(64, -(-3 * GPU.l2() // max(1, nbytes))))

    def group(
        self, op: str, shape: str, dtype: str, cases: list[Timed], nbytes: int = 0, flops: int = 0, bars: tuple = ()
    ) -> dict[str, dict]:
        """Replay the cases in turn and make their rows; `bars`: (text, function of {provider: row} -> (value, met))."""
        live = [c for c in cases if c.skipped is None]
        for _ in range(3):
            for c in live:
                c.round()
        for c in live:
            c.times.clear()
        for r in range(self.rounds):
            for c in live[r % len(live) :] + live[: r % len(live)] if live else []:
                c.round()
        made = {}
        baseline = cases[-1].provider
        for c in cases:
            row = {
                "schema": 1, "op": op, "provider": c.provider, "shape": shape, "dtype": dtype, "regime": "cold", "baseline": baseline,
                "note": c.note,
                "skipped": c.skipped, "bytes": nbytes, "flops": flops, "roof": "copy", "rounds": len(c.times), "inner": c.calls, "bars": [],
                "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"), "loadavg": os.getloadavg()[0],
                "machine": self.machine,
            }  # fmt: skip
            if c.skipped is None:
                t = c.times
                row.update({f"p{q}_us": round(percentile(t, q), 4) for q in (20, 50, 80, 95, 99)}, min_us=round(min(t), 4))
                if cases[-1].skipped is None:
                    row["speedup"] = round(statistics.median(b / a for a, b in zip(t, cases[-1].times, strict=True)), 4)
                if nbytes:
                    row["gbps"] = round(nbytes / row["p50_us"] / 1e3, 2)
                if self.copy_gbps and (nbytes or flops):
                    floor = max(nbytes / self.copy_gbps / 1e3, flops / self.gemm_gflops / 1e3)
                    row.update(
                        roof_gbps=self.copy_gbps,
                        roof_gflops=round(self.gemm_gflops, 1),
                        floor_us=round(floor, 4),
                        roof_share=round(floor / row["p50_us"], 4),
                        bandwidth_share=round(nbytes / self.copy_gbps / 1e3 / row["p50_us"], 4),
                    )
            made[c.provider] = row
        for text, judge in bars:
            value, met = judge(made)
            made[cases[0].provider]["bars"].append({"text": text, "value": None if value is None else round(value, 4), "met": met})
        for row in made.values():
            self.rows.append(row)
            verdicts = " ".join(
                f"[{b['text']}: {b['value']} {'met' if b['met'] else 'MISSED' if b['met'] is False else 'not measured'}]"
                for b in row["bars"]
            )
            told = (
                row["skipped"]
                or f"{row['p50_us']:.2f} us  {row.get('gbps', 0):.0f} GB/s  {row.get('roof_share', 0):.0%} of roof  "
                f"{row.get('speedup', 0):.2f}x {baseline}"
            )
            print(f"{op:14} {shape:28} {dtype:12} {row['provider']:10} {told} {verdicts}", flush=True)
        self.results.mkdir(parents=True, exist_ok=True)
        with open(self.results / f"{self.machine['slug']}.jsonl", "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in made.values())
        return made


def judged(text: str, providers: tuple[str, ...], value: Callable[..., float], met: Callable[[float], bool]):
    """A bar on a value of the rows of `providers`; it is not measured where one of them was skipped."""

    def judge(rows):
        if any(rows[p]["skipped"] is not None for p in providers):
            return None, None
        found = value(*(rows[p] for p in providers))
        return (None, None) if found is None else (found, met(found))

    return text, judge


def at_most(provider: str, limit: float):
    return judged(f"p50 <= {limit:g} us", (provider,), lambda row: row["p50_us"], lambda v: v <= limit)


def share(provider: str, least: float):
    return judged(f">= {least:.0%} of the copy bandwidth", (provider,), lambda row: row.get("bandwidth_share"), lambda v: v >= least)


def faster(provider: str, other: str, least: float, strictly: bool = False):
    text = f"{provider} {'>' if strictly else '>='} {least:g}x {other}"
    return judged(text, (provider, other), lambda a, b: b["p50_us"] / a["p50_us"], lambda v: v > least if strictly else v >= least)


def part_of(provider: str, whole: str, most: float):
    return judged(f"<= {most:.0%} of {whole}", (provider, whole), lambda a, b: a["p50_us"] / b["p50_us"], lambda v: v <= most)


def saves(provider: str, whole: str, least: float):
    return judged(f"saves >= {least:.0%} of {whole}", (provider, whole), lambda a, b: 1 - a["p50_us"] / b["p50_us"], lambda v: v >= least)


def device_providers(make: Callable[[str, int], Callable], inputs: int, calls: int) -> list[Timed]:
    return [Timed(b, lambda i, b=b: make(b, i), inputs, calls) for b in ("triton", "cuda")]


# Parts


def roofs(bench: Bench) -> None:
    n, side = min(ROOF["copy"], GPU.free() // 4), ROOF["product"]
    a, b = torch.empty(n, dtype=torch.uint8, device=GPU.device).random_(), torch.empty(n, dtype=torch.uint8, device=GPU.device)
    p, q = randn(side, side, dtype=BF16), randn(side, side, dtype=BF16, seed=1)
    bench.group("copy", f"{n} bytes", "uint8", [Timed("torch", lambda i: lambda: b.copy_(a), 1, 5)], nbytes=2 * n)
    bench.group("gemm", f"{side}x{side}x{side}", "bf16", [Timed("torch", lambda i: lambda: p @ q, 1, 5)], flops=2 * side**3)


def exit_steps(bench: Bench) -> None:
    for rows, features, classes in EXIT_STEPS:
        nbytes = 2 * features * (rows + classes)
        n = bench.inputs(nbytes)
        xs = [randn(rows, features, dtype=BF16, seed=i) for i in range(n)]
        ws = [randn(classes, features, dtype=BF16, seed=100 + i) / features**0.5 for i in range(n)]

        def step(backend, i, xs=xs, ws=ws):
            return lambda: ops.exit_step(xs[i], ws[i], None, "none", backend=backend)

        def eager(i, xs=xs, ws=ws):
            return lambda: torch.max(torch.softmax(xs[i] @ ws[i].T, -1), -1)

        auto = Timed("fastee", lambda i, step=step: step(None, i), n, 200, "the backend that is chosen by itself")
        cases = [auto, *device_providers(step, n, 200), Timed("torch", eager, n, 200, "linear, softmax, max: no compaction")]
        bars = (at_most("fastee", 10.0),)
        bench.group("exit_step", f"{rows}x{features}->{classes}", "bf16", cases, nbytes, 2 * rows * features * classes, bars)


def tuned(call: Callable[[], object], **fields) -> Callable[[], object]:
    """Return the call under other heuristics, e.g. a variant that is off by default."""
    from fastee.ops import _triton

    def run():
        before = _triton.tuning
        try:
            _triton.tuning = lambda x: dataclasses.replace(before(x), **fields)
            return call()
        finally:
            _triton.tuning = before

    return run


# Heuristics that a first run on a new device decides about: what is fastest becomes heuristics/<gpu>.json.
VARIANTS = {
    "bulk": {"bulk_copies": True},
    "two blocks": {"vocabulary_stages": 2},
    "half width": {"vocabulary_classes": 128, "vocabulary_warps": 4},
    "half, bulk": {"vocabulary_classes": 128, "vocabulary_warps": 4, "bulk_copies": True},
    "deep": {"vocabulary_features": 128, "vocabulary_stages": 2},
}


def vocabularies(bench: Bench) -> None:
    classes, features = VOCABULARY
    w = randn(classes, features, dtype=BF16) / features**0.5

    def plain(x):
        return torch.softmax(torch.nn.functional.linear(x, w), -1).max(-1)

    compiled = torch.compile(plain, mode="max-autotune-no-cudagraphs", dynamic=False)  # the measuring graph is the only one
    for rows in BATCHES:
        xs = [randn(rows, features, dtype=BF16, seed=i) for i in range(4)]
        ours = lambda i, xs=xs: lambda: ops.linear_stats(xs[i], w, backend="triton")
        cases = [Timed("triton", ours, 4, 8)]
        for name, fields in VARIANTS.items() if rows == max(BATCHES) else ():
            cases.append(Timed(name, lambda i, f=fields, ours=ours: tuned(ours(i), **f), 4, 8, str(fields)))
        bars = [share("triton", 0.85)]
        if rows in COMPILED:
            cases.append(Timed("compile", lambda i, xs=xs: lambda: compiled(xs[i]), 4, 8, "max-autotune of linear + softmax + max"))
            bars.append(faster("triton", "compile", 1.25))
        cases.append(Timed("torch", lambda i, xs=xs: lambda: plain(xs[i]), 4, 8, "eager"))
        nbytes = 2 * features * (classes + rows)
        bench.group("linear_stats", f"{rows}x{features}->{classes}", "bf16", cases, nbytes, 2 * rows * features * classes, tuple(bars))


def quantises(bench: Bench) -> None:
    for dtype, name in ((torch.float32, "fp32"), (BF16, "bf16")):
        for rows, row in QUANTISED:
            xs = [randn(rows, row, dtype=dtype, seed=i) for i in range(2)]
            for format in ("int8", "fp8_e4m3", "int4"):
                out = rows * row // (2 if format == "int4" else 1)
                nbytes = xs[0].nbytes + out + 4 * rows
                quantise = lambda b, i, xs=xs, f=format: lambda: ops.quantize_rows(xs[i], f, backend=b)
                cases = [
                    Timed("fastee", lambda i, q=quantise: q(None, i), 2, 4, "the backend that is chosen by itself"),
                    *device_providers(quantise, 2, 4),
                    Timed("torch", lambda i, q=quantise: q("reference", i), 2, 1, "the definition, eager"),
                ]
                bars = (share("fastee", 0.85),) if format != "int4" else ()
                bench.group("quantize_rows", f"{rows}x{row}", f"{name}->{format}", cases, nbytes, bars=bars)


def packs(bench: Bench) -> None:
    for shape, classes in PACKED:
        x, w = randn(*shape, dtype=BF16), randn(classes, shape[1], dtype=BF16, seed=1)
        separate = lambda i, x=x, w=w: lambda: (ops.exit_step(x, w, threshold=0.3), ops.quantize_rows(x))
        cases = [
            *device_providers(lambda b, i, x=x, w=w: lambda: ops.exit_pack(x, w, threshold=0.3, backend=b), 1, 20),
            Timed("separate", separate, 1, 20, "exit_step, then quantize_rows of all rows"),
        ]
        bench.group("exit_pack", "x".join(map(str, shape)) + f"->{classes}", "bf16->int8", cases, x.nbytes)
    for rows in COMPACTED:
        masks = [randn(rows, seed=i) > 0 for i in range(4)]
        cases = [
            *device_providers(lambda b, i, m=masks: lambda: ops.compact(m[i], backend=b), 4, 100),
            Timed("torch", lambda i, m=masks: lambda: ops.compact(m[i], backend="reference"), 4, 100, "the definition, eager"),
        ]
        bench.group("compact", str(rows), "bool", cases)


def bert(layers: int, width: int, heads: int, inner: int, tokens: int) -> torch.nn.Module:
    """An encoder of BERT-base's size on embeddings [B, T, D]; its first token is classified."""

    class First(torch.nn.Module):
        def forward(self, x):
            return x[:, 0]

    layer = lambda: torch.nn.TransformerEncoderLayer(width, heads, inner, 0.0, "gelu", batch_first=True)
    return torch.nn.Sequential(*(layer() for _ in range(layers)), First(), torch.nn.Linear(width, 2))


def checks(bench: Bench) -> None:
    """An exit's check beside one forward of an encoder of BERT-base's size, of the same batch."""
    torch.manual_seed(0)
    body = bert(**BERT).eval().to(GPU.device, BF16)
    w, width = randn(2, BERT["width"], dtype=BF16), BERT["width"]
    for rows in BERT_BATCHES:
        x = randn(rows, BERT["tokens"], width, dtype=BF16)

        @torch.no_grad()
        def forward(x=x):
            body(x)

        cases = [
            Timed("fastee", lambda i, x=x: lambda: ops.exit_step(x, w, None, "cls"), 1, 100),
            Timed("encoder", lambda i, f=forward: f, 1, 1, "12 layers, 768 wide, 128 tokens" if BERT["layers"] == 12 else "small"),
        ]
        shape = f"{rows}x{BERT['tokens']}x{width}->2"
        bench.group("exit_check", shape, "bf16", cases, bars=(part_of("fastee", "encoder", 0.01), at_most("fastee", 10.0)))


class Stacked(torch.nn.Module):
    def __init__(self, width: int, layers: int):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def exit_graphs(bench: Bench) -> None:
    """What a conditional node costs, and what an exit graph saves when everybody leaves at the first of four exits."""
    import fastee
    from fastee.kernels import cuda

    if cuda.missing() is None:
        tick, count = torch.zeros((), device=GPU.device), torch.zeros((), dtype=torch.int64, device=GPU.device)
        stage = GPU.record(lambda: tick.add_(1), keep_graph=True)

        def chain(stages, left):
            graph = cuda.ExitGraph([({1: stage}, count)] * (stages - 1) + [({1: stage}, None)])
            return lambda: (count.fill_(left), graph.replay())

        def kernels(n):
            graph = GPU.record(lambda: [tick.add_(1) for _ in range(n)] and None)
            return lambda: (count.fill_(0), graph.replay())

        cases = [
            Called("IF, skipped", chain(2, 0), "one kernel, then a node that is skipped"),
            Called("8 IF, taken", chain(9, 1), "a kernel, and eight more in one node each, nested"),
            Called("9 kernels", kernels(9), "a plain graph"),
            Called("1 kernel", kernels(1), "a plain graph: the empty node costs the difference"),
        ]
        bench.group("conditional", "1", "int64", cases)
    torch.manual_seed(0)
    rows, width = LINEAR["rows"], LINEAR["width"]
    body = torch.nn.Sequential(*(Stacked(width, LINEAR["layers"]) for _ in range(4)), torch.nn.Linear(width, 10)).eval()
    net = fastee.attach(body, exits=["0", "1", "2"], num_classes=10, example=torch.zeros(1, width)).eval().to(GPU.device, BF16)
    x, cases = randn(rows, width, dtype=BF16), []
    for name, threshold in (("all leave at 1 of 4", -1.0), ("nobody leaves", 9.0)):
        runner = _runner(net.set_rule("max_prob", [threshold] * 3), x, "device", (rows,))
        cases.append(Called(name, lambda runner=runner, t=threshold: (net.set_rule(thresholds=[t] * 3), runner(x))))
    bench.group("exit_graph", f"{rows}x{width}, 4 segments", "bf16", cases, bars=(saves(cases[0].provider, cases[1].provider, 0.6),))


def _runner(net, x, wait: str, batch_sizes: tuple[int, ...]):
    from fastee.nn.exit_graph import ExitGraphRunner
    from fastee.nn.graphs import GraphRunner

    if wait == "device":
        return ExitGraphRunner(net, x, batch_sizes=batch_sizes, layer=GPU.layer())
    return GraphRunner(net, x, batch_sizes=batch_sizes, wait=wait, layer=GPU.layer())


def networks(bench: Bench) -> None:
    """Whole networks of which half the rows leave at the first exit."""
    import fastee

    torch.manual_seed(0)
    bodies = [("bert-base sized", bert(**BERT), (BERT["tokens"], BERT["width"]), str(BERT["layers"] // 4), 2, BF16)]
    try:
        import torchvision

        bodies.append(("resnet18", torchvision.models.resnet18(), RESNET, "layer2", 1000, torch.float32))
    except ImportError as why:
        print(f"resnet18: skipped: {why}")
    for name, body, example, exit, classes, dtype in bodies:
        net = fastee.attach(body.eval(), exits=[exit], num_classes=classes, example=torch.zeros(1, *example))
        net = net.eval().to(GPU.device, dtype)
        x = randn(BATCH, *example, dtype=dtype)
        net.set_rule("max_prob", [0.0])
        ranked = net(x).confidence.float().sort(descending=True).values
        net.set_rule("max_prob", [float(ranked[BATCH // 2 - 1 : BATCH // 2 + 1].mean())])  # half leave
        sizes = (max(1, BATCH // 4), BATCH // 2, BATCH)

        def call(wait, sizes, net=net, x=x):
            runner = _runner(net, x, wait, sizes)
            return lambda: runner(x)

        with torch.no_grad():
            plain = GPU.record(lambda net=net, x=x: net.full(x) is None)
        cases = [
            Called("fastee", call("auto", sizes)),
            Called("device", call("device", sizes), "one exit graph"),
            Called("never wait", call("never", sizes)),
            Called("wait for all", call("never", (BATCH,)), "every segment on every row: no bucket to move to"),
            Called("plain", plain.replay, "one captured graph of the network without exits"),
        ]
        bars = [faster(p, other, 1.0, strictly=True) for p in ("fastee", "device") for other in ("plain", "wait for all")]
        left = int((net(x).exit == 0).sum())
        bench.group("network", f"{name} {BATCH} rows, {left} leave", str(dtype)[6:], cases, bars=tuple(bars))


KERNELS = ("exit_step", "linear_stats", "quantize_rows")
STALLS = r"Kernel Name|time_duration|dram__bytes|dram__throughput|registers_per_thread|stalled_(long_scoreboard|barrier|wait|math)"


def kernel_calls(kernel: str) -> None:
    """Run one of three kernels a few times; `counters` calls this under ncu."""
    (classes, features), small = VOCABULARY, EXIT_STEPS[-2]
    w = randn(classes, features, dtype=BF16)
    x, head = randn(max(BATCHES), features, dtype=BF16), w[: small[2], : small[1]].contiguous()
    call = {
        "exit_step": lambda: ops.exit_step(x[:, : small[1]].contiguous(), head, None, "none", backend="triton"),
        "linear_stats": lambda: ops.linear_stats(x, w, backend="triton"),
        "quantize_rows": lambda: ops.quantize_rows(w[: QUANTISED[0][0]], backend="triton"),
    }[kernel]
    for _ in range(3):
        call()
    GPU.finish()


def counters(bench: Bench) -> None:
    """Print launches, bytes and stalls of the three main kernels, if ncu can read the counters here."""
    program = shutil.which("ncu") or next(map(str, sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"), reverse=True)), None)
    if program is None:
        print("ncu: skipped: not installed")
        return
    for kernel in KERNELS:
        command = [
            program, "--clock-control", "none", "--csv", "--page", "raw", "--section", "WarpStateStats", "--section", "LaunchStats",
            "--metrics", "gpu__time_duration.sum,dram__bytes.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed",
            "-k", "regex:head_kernel|quantize_kernel", sys.executable, "-m", "benchmarks.gpu", "--kernel", kernel,
        ]  # fmt: skip
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            print(f"ncu {kernel}: skipped: more than 60 s", flush=True)
            continue
        print(f"ncu {kernel}:", *told_by_ncu(run.stdout, run.stderr), sep="\n  ", flush=True)


def told_by_ncu(out: str, err: str) -> list[str]:
    """Return "column: value unit" of the last launch in ncu's table, and how many launches it has."""
    import csv
    import re

    table = list(csv.reader(line for line in out.splitlines() if line.startswith('"')))
    if len(table) < 3:
        return [f"skipped: {(out + err)[-300:]}"]
    names, units, *launches = table
    found = [f"{n}: {v} {u}".rstrip() for n, u, v in zip(names, units, launches[-1], strict=True) if re.search(STALLS, n)]
    return [f"{len(launches)} launches in three calls", *found]


# A part's seconds: what it takes where it goes well is a third of that or less.
PARTS = {
    roofs: 40, exit_steps: 60, checks: 40, exit_graphs: 50, networks: 90, quantises: 50, vocabularies: 150, packs: 40, counters: 120,
}  # fmt: skip


def read_roofs(rows: list[dict]) -> tuple[float, float] | None:
    """Return GB/s and GFLOP/s of the last copy and product among rows, None without both."""
    copy = next((r["gbps"] for r in reversed(rows) if r["op"] == "copy" and r["skipped"] is None), None)
    gemm = next((r["flops"] / r["p50_us"] / 1e3 for r in reversed(rows) if r["op"] == "gemm" and r["skipped"] is None), None)
    return None if copy is None or gemm is None else (copy, gemm)


def run(names: list[str], results: Path, rounds: int, seconds: float) -> int:
    """Run parts, each in a process of its own; return how many failed or ran out of time."""
    file, began, said = results / f"{slug(GPU.name())}.jsonl", monotonic(), []
    before = len(file.read_text().splitlines()) if file.exists() else 0
    rows = lambda: [json.loads(line) for line in file.read_text().splitlines()[before:]] if file.exists() else []
    limits = {part.__name__: limit for part, limit in PARTS.items()}
    for name in names:
        left, start = seconds - (monotonic() - began), monotonic()
        if left < 5:
            said.append(f"{name}: not run: the {seconds:g} s are over")
            continue
        found = read_roofs(rows())
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--results", str(results), "--rounds", str(rounds)]
        try:
            code = subprocess.run(command + (["--roofs", *map(str, found)] if found else []), timeout=min(left, limits[name])).returncode
        except subprocess.TimeoutExpired:
            code = f"more than {min(left, limits[name]):.0f} s"
        said.append(f"{name}: {'ok' if code == 0 else f'FAILED ({code})'} in {monotonic() - start:.0f} s")
    verdicts = [(r, b) for r in rows() for b in r["bars"]]
    print("", *said, sep="\n")
    for row, bar in verdicts:
        if not bar["met"]:
            print(row["op"], row["shape"], f"{bar['text']}:", "not measured" if bar["met"] is None else f"MISSED: {bar['value']}")
    met = [b["met"] for _, b in verdicts]
    print(f"{met.count(True)} of {len(met)} bars met, {met.count(None)} not measured; rows in {file}")
    return sum(not s.split(": ")[1].startswith("ok") for s in said)


def main(argv: list[str] | None = None) -> int:
    names = [part.__name__ for part in PARTS]
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    p.add_argument("--results", type=Path, default=HERE / "results", metavar="DIR")
    p.add_argument("--rounds", type=int, default=30)
    p.add_argument("--only", default=",".join(names), help="comma separated, in this order: %(default)s")
    p.add_argument("--seconds", type=float, default=260, help="for all parts together; default %(default)s")
    p.add_argument("--part", choices=names, help="this one, in this process")
    p.add_argument("--roofs", nargs=2, type=float, metavar=("GB/s", "GFLOP/s"), help="of this run, for --part")
    p.add_argument("--kernel", choices=KERNELS, help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    if a.kernel:
        kernel_calls(a.kernel)
    elif a.part:
        {part.__name__: part for part in PARTS}[a.part](Bench(a.results, a.rounds, a.roofs and tuple(a.roofs)))
    else:
        unknown = set(a.only.split(",")) - set(names)
        if unknown:
            p.error(f"argument --only: expected of {', '.join(names)}, got {', '.join(sorted(unknown))}")
        return min(run(a.only.split(","), a.results, a.rounds, a.seconds), 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())

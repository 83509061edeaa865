"""python -m benchmarks.gpu: the device kernels beside torch, torch.compile and the device's own limits; one row per measurement.

Every time is that of one CUDA graph holding many calls over inputs of more than three times the L2 cache, replayed interleaved with the
others of its group; the roofs (a device copy, a bf16 product) are measured in the same run. Rows have the schema of `fastee.testing.rows`,
written without it, so that a machine that has only torch and triton can run this.
"""

from __future__ import annotations

import argparse
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

import torch

from fastee import ops
from fastee.errors import BackendUnavailable
from fastee.kernels.triton._tuning import slug

HERE = Path(__file__).parent
DEVICE = torch.device("cuda")
BF16 = torch.bfloat16


def randn(*shape: int, dtype=torch.float32, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device=DEVICE).to(dtype)


class Timed:
    """One provider: `calls` in a captured graph, round-robin over inputs."""

    def __init__(self, provider: str, make: Callable[[int], Callable[[], object]], inputs: int, calls: int, note: str = ""):
        self.provider, self.calls, self.note, self.times, self.skipped = provider, calls, note, [], None
        try:
            bodies = [make(i) for i in range(inputs)]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for body in bodies:
                    body()
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                for i in range(calls):
                    bodies[i % inputs]()
        except (BackendUnavailable, RuntimeError) as why:
            self.skipped = str(why).splitlines()[0][:200]

    def round(self) -> None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        self.times.append(start.elapsed_time(end) * 1e3 / self.calls)


def percentile(values: list[float], q: float) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[q - 1] if len(values) > 1 else values[0]


class Bench:
    def __init__(self, results: Path | None, rounds: int):
        self.rounds, self.rows, self.results = rounds, [], results
        name = torch.cuda.get_device_name()
        git = subprocess.run(["git", "-C", HERE, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        import triton

        import fastee

        self.machine = {
            "slug": slug(name), "cpu": f"{name}, CUDA {torch.version.cuda}, triton {triton.__version__}", "cores": os.cpu_count() or 1,
            "isa": None,
            "python": platform.python_version(), "torch": str(torch.__version__), "fastee": fastee.__version__,
            "commit": git.stdout.strip() or "unknown", "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        }  # fmt: skip
        self.l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self.copy_gbps = self.gemm_gflops = None
        self.copy_gbps, self.gemm_gflops = self._roofs()

    def _roofs(self) -> tuple[float, float]:
        n = min(4 << 30, torch.cuda.mem_get_info()[0] // 4)
        a, b = torch.empty(n, dtype=torch.uint8, device=DEVICE).random_(), torch.empty(n, dtype=torch.uint8, device=DEVICE)
        p, q = randn(8192, 8192, dtype=BF16), randn(8192, 8192, dtype=BF16, seed=1)
        self.group("copy", f"{n} bytes", "uint8", [Timed("torch", lambda i: lambda: b.copy_(a), 1, 5)], nbytes=2 * n)
        copy = self.rows[-1]["gbps"]
        self.group("gemm", "8192x8192x8192", "bf16", [Timed("torch", lambda i: lambda: p @ q, 1, 5)], flops=2 * 8192**3)
        return copy, 2 * 8192**3 / self.rows[-1]["p50_us"] / 1e3

    def inputs(self, nbytes: int) -> int:
        """Return how many inputs of `nbytes` are more than three times the L2 cache."""
        return max(2, min(64, -(-3 * self.l2 // max(1, nbytes))))

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
                if self.copy_gbps:
                    floor = max(nbytes / self.copy_gbps / 1e3, flops / (self.gemm_gflops or 1) / 1e3 if flops else 0.0)
                    row.update(
                        roof_gbps=self.copy_gbps,
                        roof_gflops=round(self.gemm_gflops, 1),
                        floor_us=round(floor, 4),
                        roof_share=round(floor / row["p50_us"], 4),
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
        if self.results is not None:
            self.results.mkdir(parents=True, exist_ok=True)
            with open(self.results / f"{self.machine['slug']}.jsonl", "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in made.values())
        return made


def at_most(provider: str, limit: float):
    def judge(rows):
        value = rows[provider].get("p50_us")
        return value, None if value is None else value <= limit

    return f"p50 <= {limit:g} us", judge


def share(provider: str, least: float):
    def judge(rows):
        value = rows[provider].get("roof_share")
        return value, None if value is None else value >= least

    return f">= {least:.0%} of the copy bandwidth", judge


def faster(provider: str, other: str, least: float):
    def judge(rows):
        a, b = rows[provider].get("p50_us"), rows[other].get("p50_us")
        return (None, None) if a is None or b is None else (b / a, b / a >= least)

    return f">= {least:g}x {other}", judge


def device_providers(make: Callable[[str, int], Callable], inputs: int, calls: int) -> list[Timed]:
    return [Timed(b, lambda i, b=b: make(b, i), inputs, calls) for b in ("triton", "cuda")]


def exit_steps(bench: Bench) -> None:
    for rows, features, classes in (
        (1, 768, 2),
        (32, 768, 2),
        (256, 768, 2),
        (1, 1024, 1000),
        (32, 2048, 1000),
        (256, 2048, 1000),
        (256, 768, 100),
    ):
        nbytes = 2 * features * (rows + classes)
        n = bench.inputs(nbytes)
        xs = [randn(rows, features, dtype=BF16, seed=i) for i in range(n)]
        ws = [randn(classes, features, dtype=BF16, seed=100 + i) / features**0.5 for i in range(n)]

        def step(backend, i, xs=xs, ws=ws):
            return lambda: ops.exit_step(xs[i], ws[i], None, "none", backend=backend)

        def eager(i, xs=xs, ws=ws):
            return lambda: torch.max(torch.softmax(xs[i] @ ws[i].T, -1), -1)

        cases = [*device_providers(step, n, 200), Timed("torch", eager, n, 200, "linear, softmax, max: no compaction")]
        bench.group(
            "exit_step", f"{rows}x{features}->{classes}", "bf16", cases, nbytes, 2 * rows * features * classes, (at_most("triton", 10.0),)
        )


def vocabularies(bench: Bench) -> None:
    w = randn(128_256, 4096, dtype=BF16) / 64
    for rows in (1, 16, 64):
        xs = [randn(rows, 4096, dtype=BF16, seed=i) for i in range(4)]

        def plain(x, w=w):
            return torch.softmax(torch.nn.functional.linear(x, w), -1).max(-1)

        compiled = torch.compile(plain, mode="max-autotune-no-cudagraphs")  # the measuring graph is the only one
        cases = [
            *device_providers(lambda b, i, xs=xs: lambda: ops.linear_stats(xs[i], w, backend=b), 4, 8),
            Timed("compile", lambda i, xs=xs, f=compiled: lambda: f(xs[i]), 4, 8, "max-autotune of linear + softmax + max"),
            Timed("torch", lambda i, xs=xs, f=plain: lambda: f(xs[i]), 4, 8, "eager"),
        ]
        nbytes = 2 * 4096 * (128_256 + rows)
        bars = (share("triton", 0.85), faster("triton", "compile", 1.25))
        bench.group("linear_stats", f"{rows}x4096->128256", "bf16", cases, nbytes, 2 * rows * 4096 * 128_256, bars)


def quantises(bench: Bench) -> None:
    for dtype, name in ((torch.float32, "fp32"), (BF16, "bf16")):
        for rows, row in ((16_384, 4096), (65_536, 1024)):
            xs = [randn(rows, row, dtype=dtype, seed=i) for i in range(2)]
            for format in ("int8", "fp8_e4m3", "int4"):
                out = rows * row // (2 if format == "int4" else 1)
                nbytes = xs[0].nbytes + out + 4 * rows
                cases = [
                    *device_providers(lambda b, i, xs=xs, f=format: lambda: ops.quantize_rows(xs[i], f, backend=b), 2, 4),
                    Timed(
                        "torch",
                        lambda i, xs=xs, f=format: lambda: ops.quantize_rows(xs[i], f, backend="reference"),
                        2,
                        1,
                        "the definition, eager",
                    ),
                ]
                bench.group(
                    "quantize_rows",
                    f"{rows}x{row}",
                    f"{name}->{format}",
                    cases,
                    nbytes,
                    bars=(share("triton", 0.85),) if format != "int4" else (),
                )


def packs(bench: Bench) -> None:
    for shape, classes in (((32, 256, 8, 8), 10), ((256, 64, 32, 32), 10)):
        x, w = randn(*shape, dtype=BF16), randn(classes, shape[1], dtype=BF16, seed=1)
        cases = [
            *device_providers(lambda b, i, x=x, w=w: lambda: ops.exit_pack(x, w, threshold=0.3, backend=b), 1, 20),
            Timed(
                "separate",
                lambda i, x=x, w=w: lambda: (ops.exit_step(x, w, threshold=0.3, backend="triton"), ops.quantize_rows(x, backend="triton")),
                1,
                20,
            ),
        ]
        bench.group("exit_pack", "x".join(map(str, shape)) + f"->{classes}", "bf16->int8", cases, x.nbytes)
    for rows in (32, 256, 70_000):
        masks = [randn(rows, seed=i) > 0 for i in range(4)]
        cases = [
            *device_providers(lambda b, i, m=masks: lambda: ops.compact(m[i], backend=b), 4, 100),
            Timed("torch", lambda i, m=masks: lambda: ops.compact(m[i], backend="reference"), 4, 100, "the definition, eager"),
        ]
        bench.group("compact", str(rows), "bool", cases)


def networks(bench: Bench) -> None:
    try:
        import torchvision

        import fastee
        from fastee.nn.graphs import CudaLayer, GraphRunner
    except ImportError as why:
        print(f"networks: skipped: {why}")
        return
    torch.manual_seed(0)
    x = randn(32, 3, 224, 224)
    body = torchvision.models.resnet18().eval()
    net = fastee.attach(body, exits=["layer2"], num_classes=1000, example=x[:1].cpu()).eval().cuda()
    net.set_rule("max_prob", [0.0])
    scores = net(x).confidence
    net.set_rule("max_prob", [float(scores.median()) + 1e-9])  # half leave
    plain, _ = CudaLayer(DEVICE).capture(lambda: (net.full(x),))
    cases = []
    for name, wait in (("fastee", "auto"), ("never wait", "never"), ("wait for all", None)):
        runner = GraphRunner(net, x, batch_sizes=(8, 16, 32), wait=wait or "never").capture()
        if wait is None:
            runner.gain = lambda *a: -1.0
        cases.append(Called(name, lambda runner=runner: runner(x)))
    bench.group(
        "network",
        "resnet18 32x3x224x224, half leave",
        "fp32",
        [*cases, Called("plain", plain)],
        bars=(faster("fastee", "plain", 1.0), faster("fastee", "wait for all", 1.0)),
    )


class Called(Timed):
    """A provider that launches by itself, graphs included: timed from the host, to its end."""

    def __init__(self, provider: str, call: Callable):
        self.provider, self.call, self.calls, self.note, self.times, self.skipped = (
            provider,
            call,
            1,
            "captured graphs, host included",
            [],
            None,
        )

    def round(self) -> None:
        from time import perf_counter

        torch.cuda.synchronize()
        start = perf_counter()
        self.call()
        torch.cuda.synchronize()
        self.times.append((perf_counter() - start) * 1e6)


NCU = ",".join((
    "gpu__time_duration.sum", "dram__bytes.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "smsp__warps_issue_stalled_long_scoreboard.avg", "launch__registers_per_thread",
))  # fmt: skip


def ncu(kernel: str) -> None:
    """Run one of three kernels a few times; `summary` calls this under ncu."""
    x, w = randn(64, 4096, dtype=BF16), randn(128_256, 4096, dtype=BF16)
    call = {
        "exit_step": lambda: ops.exit_step(x[:, :2048].contiguous(), w[:1000, :2048].contiguous(), None, "none", backend="triton"),
        "linear_stats": lambda: ops.linear_stats(x, w, backend="triton"),
        "quantize_rows": lambda: ops.quantize_rows(w[:16_384], backend="triton"),
    }[kernel]
    for _ in range(3):
        call()
    torch.cuda.synchronize()


def summary() -> None:
    """Print launches, bytes and stalls of the three main kernels, if ncu can read the counters here."""
    program = shutil.which("ncu")
    if program is None:
        print("ncu: skipped: not installed")
        return
    for kernel in ("exit_step", "linear_stats", "quantize_rows"):
        command = [
            program,
            "--clock-control",
            "none",
            "--csv",
            "--page",
            "raw",
            "--metrics",
            NCU,
            "-k",
            "regex:head_kernel|merge_kernel|quantize_kernel",
        ]
        run = subprocess.run(
            [*command, sys.executable, "-m", "benchmarks.gpu", "--ncu", kernel], capture_output=True, text=True, timeout=120
        )
        lines = [line for line in run.stdout.splitlines() if line.startswith('"')]
        print(
            f"ncu {kernel}:",
            *(lines[:2] + lines[-2:] if lines else [f"skipped: {(run.stdout + run.stderr)[-300:]}"]),
            sep="\n  ",
            flush=True,
        )


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    p.add_argument("--results", type=Path, default=HERE / "results", metavar="DIR")
    p.add_argument("--rounds", type=int, default=30)
    p.add_argument("--only", default="exit_steps,vocabularies,quantises,packs,networks,summary", help="comma separated, in this order")
    p.add_argument("--ncu", choices=("exit_step", "linear_stats", "quantize_rows"), help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    if a.ncu:
        ncu(a.ncu)
        return 0
    bench = Bench(a.results, a.rounds)
    for name in a.only.split(","):
        if name == "summary":
            summary()
        else:
            {"exit_steps": exit_steps, "vocabularies": vocabularies, "quantises": quantises, "packs": packs, "networks": networks}[name](
                bench
            )
            torch.cuda.empty_cache()
    verdicts = [b["met"] for r in bench.rows for b in r["bars"]]
    print(f"{verdicts.count(True)} of {len(verdicts)} bars met, {verdicts.count(None)} not measured, {bench.machine['slug']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

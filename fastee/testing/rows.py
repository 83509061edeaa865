"""Benchmark rows: their schema, the machine that made them, reading and appending JSON lines, comparing two files."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import msgspec

SCHEMA = 1


class Bar(msgspec.Struct, forbid_unknown_fields=True):
    """A target and its verdict: `text` as written in the bench file, the measured `value` in its unit; None = its peer was skipped."""

    text: str
    value: float | None
    met: bool | None


class Machine(msgspec.Struct, forbid_unknown_fields=True):
    """Where and with what a row was measured."""

    slug: str
    cpu: str
    cores: int
    isa: str | None
    python: str
    torch: str
    fastee: str
    commit: str
    command: str


class Row(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One provider on one shape. Times are microseconds per call over batches of `inner` calls; None where the provider was skipped."""

    schema: int = SCHEMA
    op: str
    provider: str
    shape: str
    dtype: str
    regime: str  # warm: a few rotated inputs; cold: more inputs than the last-level cache holds
    baseline: str
    note: str = ""  # which path ran
    skipped: str | None = None  # why there are no times
    min_us: float | None = None
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    p95_us: float | None = None
    p99_us: float | None = None
    speedup: float | None = None  # median over rounds of baseline time / this time in the same round
    ratio: float | None = None  # codecs: stored bytes / raw bytes; threshold searches: expected cost / cost of the whole network
    rounds: int = 0
    inner: int = 0
    timer_share: float | None = None  # what reading the clock adds to a batch, as a share of its median
    bytes: int = 0
    flops: int = 0
    working_set: int = 0
    gbps: float | None = None
    roof: str = "read"
    roof_gbps: float | None = None
    roof_gflops: float | None = None
    floor_us: float | None = None  # max(bytes / roof_gbps, flops / roof_gflops)
    roof_share: float | None = None  # floor_us / p50_us: the larger of the next two
    bandwidth_share: float | None = None  # of the read or copy roof
    gemm_share: float | None = None  # of the fp32 product's roof
    instructions: float | None = None
    instructions_note: str = ""
    bars: list[Bar] = []
    threads: int = 1
    peer: str = ""  # whose environment the row was measured in, beside fastee; "" = fastee's own
    peer_version: str = ""
    loadavg: float = 0.0
    date: str = ""
    machine: Machine

    def key(self) -> tuple[str, ...]:
        """What makes two rows the same measurement."""
        return (self.op, self.shape, self.dtype, self.regime, self.provider, self.peer)


def cpu_name() -> str:
    """Return the CPU's marketing name, with the core's generation where the name hides it (virtual machines say only 'AMD EPYC')."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    field = lambda key: (m := re.search(rf"^{key}\s*:\s*(.+)$", info, re.M)) and m.group(1).strip()
    name = field("model name") or platform.machine()
    zen = {"23": "Zen", "25": "Zen4" if "avx512f" in (field("flags") or "") else "Zen3", "26": "Zen5"}.get(field("cpu family") or "")
    return f"{name} {zen}" if zen and field("vendor_id") == "AuthenticAMD" and not re.search(r"\d{4}", name) else name


def machine(command: str | None = None) -> Machine:
    """Return this machine's record; the slug (such as ``amd-epyc-zen5-2c``) names its results file."""
    import torch

    import fastee
    from fastee import native

    cpu, cores = cpu_name(), os.cpu_count() or 1
    words = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|\d+-core|@.*", " ", cpu.lower())
    slug = "-".join(re.findall(r"[a-z0-9]+", words)) + f"-{cores}c"
    try:
        root = Path(fastee.__file__).parents[1]
        git = lambda *a: subprocess.run(["git", "-C", root, *a], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        commit = git("rev-parse", "--short=12", "HEAD") + ("+dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        commit = "unknown"
    if command is None:
        command = " ".join(["python", "-m", "benchmarks", *sys.argv[1:]])
    return Machine(slug, cpu, cores, native.isa(), platform.python_version(), str(torch.__version__), fastee.__version__, commit, command)


def now() -> str:
    """Return the date of a row, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def dumps(row: Row) -> str:
    """Return the row as one line of JSON."""
    return msgspec.json.encode(row).decode()


def append_rows(path: Path, rows: list[Row]) -> None:
    """Append rows to a JSONL file in one write; earlier rows are never touched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write("".join(dumps(r) + "\n" for r in rows))


def read_rows(path: Path) -> list[Row]:
    """Return all rows of a JSONL file; a damaged line raises ``ValueError`` with its number."""
    rows = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = msgspec.json.decode(line, type=Row)
        except msgspec.DecodeError as error:
            raise ValueError(f"{path}:{number}: not a benchmark row: {error}") from None
        if row.schema != SCHEMA:
            raise ValueError(f"{path}:{number}: row schema {row.schema}, this program reads {SCHEMA}")
        rows.append(row)
    return rows


def latest(rows: list[Row]) -> dict[tuple, Row]:
    """Return the last row of every measurement, in order of first appearance."""
    return {r.key(): r for r in rows}


def compare(old: list[Row], new: list[Row], tolerance: float = 1.15) -> tuple[list[str], list[str]]:
    """Return (report lines, regressions): a provider regressed when its speed-up over the baseline of its own run fell by more than `tolerance`.

    Times of two runs are never compared directly: machines are shared and clocks move, the ratio inside one run holds.
    """
    if not tolerance >= 1.0:
        raise ValueError(f"tolerance: got {tolerance}, expected a factor >= 1.0")
    a, b = latest(old), latest(new)
    lines, bad = [], []
    for key in [k for k in a if k in b]:
        x, y = a[key], b[key]
        if x.provider == x.baseline or x.baseline != y.baseline or x.speedup is None:
            continue
        name = " ".join(filter(None, key))
        if y.speedup is None:
            bad.append(f"{name}: was {x.speedup:.2f}x {x.baseline}, now skipped: {y.skipped}")
            continue
        change = x.speedup / y.speedup
        lines.append(f"{name}: {x.speedup:.2f}x -> {y.speedup:.2f}x {x.baseline} (cost x{change:.2f})")
        if change > tolerance:
            bad.append(lines[-1] + f", more than x{tolerance:g}")
    return lines, bad

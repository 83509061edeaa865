"""Finds bench files, times their groups, counts instructions, appends the rows and prints them with their verdicts."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from fastee.errors import did_you_mean
from fastee.testing import instructions
from fastee.testing.bench import Context, Group, Roofs, llc_bytes, measure
from fastee.testing.rows import Row, append_rows, machine

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def ops() -> list[str]:
    """Return the names that ``run`` takes: one per bench_<op>.py."""
    return sorted(p.stem.removeprefix("bench_") for p in HERE.glob("bench_*.py"))


def load(op: str) -> Callable[[Context], Iterator[Group]]:
    """Return the ``cases`` function of bench_<op>.py."""
    if op not in ops():
        raise ValueError(f"op: got {op!r}, expected one of {', '.join(ops())}{did_you_mean(op, ops())}")
    return importlib.import_module(f"{__package__}.bench_{op}").cases


def countable(group: Group) -> bool:
    """Say whether instructions are worth counting: a count knows no cache, and valgrind emulates a fused multiply-add in about 50 ns."""
    return group.regime != "cold" and max(group.flops, group.bytes) <= 4_000_000


def _counts(op: str, ctx: Context) -> tuple[dict[tuple, float], str]:
    """Return instructions per call by (op, shape, regime, provider), and why there are none."""
    reason = instructions.unavailable()
    if reason:
        return {}, reason
    with_names = instructions.count_named(["-m", __package__, "_count", op, ctx.shapes])
    return {tuple(json.loads(name)): n for name, n in with_names.items()}, ""


def count_all(op: str, shapes: str) -> None:
    """Run every case of an op under the callgrind that holds this process; prints one name a line."""
    for group in load(op)(Context(quick=True, shapes=shapes, against=("torch",))):
        if not countable(group):
            continue
        for case in group.cases:
            if case.fn is not None:
                instructions.count_in_this_process(case)
                print(json.dumps([group.op, group.shape, group.regime, case.provider]), flush=True)


def run(
    cases: dict[str, Callable[[Context], Iterator[Group]]],
    ctx: Context,
    results: Path | None,
    console: Console,
    emit: Callable[[Row], None],
    command: str | None = None,
    with_instructions: bool = False,
) -> list[Row]:
    """Time the groups of every op, hand each row to `emit` as it is made, append them to ``<results>/<machine>.jsonl`` (None: nowhere)."""
    here, roofs, rows = machine(command), Roofs(0.02 if ctx.quick else 0.05), []
    seconds, warmup = (0.1, 0.05) if ctx.quick or ctx.shapes == "all" else (0.6, 0.2)
    # drawn between the groups only: a thread that refreshes the bar would be timed with them
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console, auto_refresh=False, transient=True)
    with bar:
        task = bar.add_task("", total=len(cases))
        for op, groups in cases.items():
            if with_instructions:
                console.print(f"{op}: counting instructions, which takes about fifty times as long as the calls do", highlight=False)
            counts, reason = _counts(op, ctx) if with_instructions else ({}, "")
            for group in groups(ctx):
                if ctx.regime == "cold":
                    if len(group.cases[0].inputs) * group.bytes < llc_bytes():
                        console.print(f"{group.op} {group.shape}: its inputs fit into the cache, no cold row", highlight=False)
                        continue
                    group.regime, group.working_set = "cold", max(group.working_set, 2 * llc_bytes())
                name = f"{group.op} {group.shape} {group.dtype} {group.regime}"
                if console.is_terminal:
                    bar.update(task, description=name, refresh=True)
                else:
                    console.print(name, highlight=False)
                made = measure(group, roofs, here, seconds, warmup)
                for row in made:
                    row.instructions = counts.get((row.op, row.shape, row.regime, row.provider))
                    if with_instructions:
                        counted = "callgrind; it hides AVX-512" if row.instructions else "not counted for this provider or size"
                        row.instructions_note = reason or counted
                    emit(row)
                if results:
                    append_rows(results / f"{here.slug}.jsonl", made)
                rows += made
            bar.advance(task)
    return rows


def show(rows: list[Row], console: Console) -> None:
    """Print rows and every bar's verdict."""
    fmt = lambda v, spec: "" if v is None else format(v, spec)
    columns = {
        "p50 us": [fmt(r.p50_us, ".3f") for r in rows],
        "p99 us": [fmt(r.p99_us, ".3f") for r in rows],
        "min us": [fmt(r.min_us, ".3f") for r in rows],
        "speed-up": [fmt(r.speedup, ".2f") + "x" * (r.speedup is not None) for r in rows],
        "ratio": [fmt(r.ratio, ".3f") for r in rows],
        "GB/s": [fmt(r.gbps, ".2f") for r in rows],
        "floor us": [fmt(r.floor_us, ".3f") for r in rows],
        "of roof": [fmt(r.roof_share, ".0%") for r in rows],
        "instr": [fmt(r.instructions, ",.0f") for r in rows],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("op", "shape", "provider"):
        table.add_column(name, overflow="fold", no_wrap=name != "shape")
    for name in columns:
        table.add_column(name, justify="right")
    table.add_column("path")
    for r, *cells in zip(rows, *columns.values(), strict=True):
        shape = r.shape + (" cold" if r.regime == "cold" else "")
        table.add_row(r.op, shape, r.provider, *cells, f"skipped: {r.skipped}" if r.skipped else r.note)
    console.print(table)
    verdict = {True: "[green]met[/green]", False: "[red]missed[/red]", None: "[yellow]not measured[/yellow]"}
    bars = [(r, b) for r in rows for b in r.bars]
    for r, b in bars:
        console.print(f"{verdict[b.met]}  {r.op} {r.shape} {r.regime}: {b.text}  (measured {b.value})", highlight=False)
    if bars:
        met = sum(b.met is True for _, b in bars)
        console.print(f"{met} of {len(bars)} bars met, load {rows[-1].loadavg:.1f}, {rows[-1].machine.slug}, {rows[-1].machine.isa or 'no native code'}")

"""Tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from fastee.report.result import Row

COLUMNS = (
    ("way", "left"), ("accuracy %", "right"), ("mean exit", "right"), ("MACs %", "right"), ("mean ms", "right"),
    ("p50 ms", "right"), ("p99 ms", "right"), ("bytes/sample", "right"), ("answered %", "right"), ("in time %", "right"),
)  # fmt: skip


def cells(row: Row, exits: int) -> list[str]:
    """Return the row's texts, one per entry of ``COLUMNS``; `exits` = number of places where a sample can end.

    A mean or percentile that an unanswered sample makes infinite is "-".
    """

    def ms(seconds: float) -> str:
        return f"{1e3 * seconds:.2f}" if math.isfinite(seconds) else "-"

    return [
        row.name, f"{100 * row.accuracy:.2f}", f"{row.depth:.2f}/{exits}", f"{100 * row.macs:.1f}", ms(row.mean),
        ms(row.p50), ms(row.p99), f"{row.wire_bytes:,.0f}", f"{100 * (1 - row.failed / row.samples):.1f}", f"{100 * row.hits:.1f}",
    ]  # fmt: skip


def best(rows: Sequence[Row], exits: int) -> dict[str, str]:
    """Return the winning text of each column that has a winner; every row that shows this text has won."""
    if not rows:
        return {}
    winners = {
        "accuracy %": max(rows, key=lambda r: r.accuracy),
        "MACs %": min(rows, key=lambda r: r.macs),
        "mean ms": min(rows, key=lambda r: r.mean),
        "p50 ms": min(rows, key=lambda r: r.p50),
        "p99 ms": min(rows, key=lambda r: r.p99),
        "bytes/sample": min(rows, key=lambda r: r.wire_bytes),
        "answered %": min(rows, key=lambda r: r.failed / r.samples),
        "in time %": max(rows, key=lambda r: r.hits),
    }
    order = [name for name, _ in COLUMNS]
    return {name: cells(row, exits)[order.index(name)] for name, row in winners.items()}


def table(rows: Sequence[Row], title: str, exits: int, caption: str | None = None) -> Table:
    """Return a rich table, one line per row; the best value of each column is bold."""
    out = Table(title=title, caption=caption, caption_justify="left", title_justify="left")
    for name, side in COLUMNS:
        out.add_column(name, justify=side, no_wrap=name != "way")
    winners = best(rows, exits)
    for row in rows:
        texts = zip(COLUMNS, cells(row, exits), strict=True)
        out.add_row(*(f"[bold]{text}[/bold]" if winners.get(name) == text else text for (name, _), text in texts))
    return out


def profile_table(profile, exits: Sequence[str]) -> Table:
    """Return a rich table of a `fastee.Profile`: milliseconds per segment, node and batch size, and the bytes that a cut before the segment sends."""
    out = Table(title="milliseconds per segment (median ± spread)", title_justify="left")
    out.add_column("segment", no_wrap=True)
    for node in profile.nodes:
        for size in profile.batch_sizes:
            out.add_column(f"{node}, batch {size}", justify="right", no_wrap=True)
    for codec in profile.codecs:
        out.add_column(f"bytes in, {codec}", justify="right", no_wrap=True)
    for s in range(profile.num_segments):
        ends = f"to {exits[s]}" if s < len(exits) else "to the end"
        times = [f"{1e3 * m:.3f} ± {1e3 * d:.3f}" for m, d in zip(profile.mean[s].ravel(), profile.spread[s].ravel(), strict=True)]
        out.add_row(f"{s} {ends}", *times, *(f"{b:,.0f}" for b in profile.wire_bytes[s]))
    return out


def calibration_table(report, exits: Sequence[str]) -> Table:
    """Return a rich table of a `fastee.calibration.CalibrationReport`, one line per exit, the promise below."""
    promise = f"bound {100 * report.bound:.2f} points with confidence {report.confidence:g}" if math.isfinite(report.bound) and report.confidence else "no guarantee"
    caption = (
        f"cost {report.cost:.3f} of the backbone ({report.objective}), {report.risk} drop {100 * report.drop:+.2f} points on {report.samples} rows, {promise}\n"
        f"accuracy {100 * report.accuracy:.2f} %, backbone {100 * report.full_accuracy:.2f} %" + (f"\n{report.note}" if report.note else "")
    )
    out = Table(title=f"exits by {report.measure}", caption=caption, caption_justify="left", title_justify="left")
    for name in ("exit", "threshold", "rows leaving %", "accuracy if all left %", "temperature"):
        out.add_column(name, justify="left" if name == "exit" else "right", no_wrap=True)
    thresholds = [f"{t:.4f}" if math.isfinite(t) else "off" for t in report.thresholds]
    for name, shown, share, right, t in zip(
        [*exits, "end"], [*thresholds, ""], report.exit_shares, report.exit_accuracy, [*(f"{t:.2f}" for t in report.temperatures), ""], strict=True
    ):
        out.add_row(name, shown, f"{100 * share:.1f}", f"{100 * right:.2f}", t)
    return out

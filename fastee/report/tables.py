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

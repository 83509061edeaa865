"""The doctor's report for a reader."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def _text(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items()) or "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(inner) for inner in value) or "-"
    return str(value)


def show(found: dict, console: Console) -> None:
    """Print what ``fastee.doctor()`` returned: facts, backends per op, then what is wrong and the command that repairs it."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in found.items():
        if key not in ("backends", "problems"):
            table.add_row(key.replace("_", " "), escape(_text(value)))
    console.print(table)
    console.print("\n[bold]backends, best first[/bold]")
    for op, backends in found["backends"].items():
        console.print(f"  {op:<16} {escape(_text(backends))}")
    if not found["problems"]:
        console.print("\n[green]everything is in place[/green]")
    for problem in found["problems"]:
        why = problem["why"]
        console.print(f"\n[bold red]{escape(problem['what'])}[/bold red]: {escape(why)}", soft_wrap=True)
        console.print(f"  repair: {escape(problem['repair'])}", soft_wrap=True)

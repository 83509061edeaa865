"""One self-contained HTML page of a run: no script, no link to a file, images inline."""

from __future__ import annotations

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fastee.report.plots import accuracy_against_cost, exit_histogram, latency_distribution
from fastee.report.result import Result
from fastee.report.tables import COLUMNS, best, cells

_TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True)


def page(result: Result) -> str:
    """Return the HTML page of `result`: summary, tables, three plots, setting, machine, notes."""

    def inline(png: bytes) -> str:
        return "data:image/png;base64," + base64.b64encode(png).decode()

    def lines(rows):
        exits = len(result.exit_names) + 1
        winners = best(rows, exits)
        for row in rows:
            yield row, [(text, winners.get(name) == text) for (name, _), text in zip(COLUMNS, cells(row, exits), strict=True)]

    return _TEMPLATES.get_template("page.html.j2").render(
        result=result,
        columns=[name for name, _ in COLUMNS],
        rows=list(lines(result.rows)),
        local=list(lines(result.local)),
        plots=[
            ("Accuracy against cost", "Up and to the left is better. The bars are 95 % Wilson intervals of each accuracy alone; "
             "all ways ran the same samples, so differences between them are known better than the bars suggest. A way far below the others is drawn at the lower edge.",
             inline(accuracy_against_cost(result.rows))),
            ("Latency", "How many of the samples had their answer within a given time.",
             inline(latency_distribution(result.rows, result.deadline))),
            ("Where samples ended", "Numbers are percent of the samples.", inline(exit_histogram(result.rows, result.exit_names))),
        ],
    )  # fmt: skip

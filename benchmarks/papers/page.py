"""docs/papers.md from the rows: one table per system, its verdict, what is published and what differs. Nothing on the page is typed by hand."""

from __future__ import annotations

import importlib
from pathlib import Path

from benchmarks.papers.common import Row, mean_and_error

MOST = 16  # points of one method in a table


def write(path: Path, rows: list[Row]) -> None:
    """Write the page."""
    parts = [
        "# Papers, tested beside ours",
        "Written by `python -m benchmarks papers table` from `benchmarks/results/papers.jsonl`. Every system runs on the same network and data as ours, in one"
        " process per seed; ± is the standard error over seeds. *quick* uses the embedded 10,000 Fashion-MNIST images. Systems without readable source are"
        " marked (reconstructed) and must not be quoted as the paper's. The verdict follows a rule that stood in the code before the run.",
    ]
    from benchmarks.papers import SYSTEMS

    for name in SYSTEMS:
        for size in ("full", "quick"):
            mine = [r for r in rows if r.system == name and r.size == size]
            if mine:
                parts += _system(importlib.import_module(f"benchmarks.papers.{name}"), mine, size)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _system(module, rows: list[Row], size: str) -> list[str]:
    verdict, said = module.verdict(rows)
    seeds = sorted({r.seed for r in rows})
    rule = " ".join(module.__doc__.split("Verdict rule:")[1].split())
    right = getattr(module, "ACCURACY", "accuracy")
    lines = [f"| method | provenance | point | {right} % | cost % of the network without exits |", "|---|---|---:|---:|---:|"]
    order: list[tuple] = []
    for r in rows:
        if (r.method, r.provenance, r.point) not in order:
            order.append((r.method, r.provenance, r.point))
    many = {m for m, *_ in order if sum(o[0] == m for o in order) > MOST}
    for place, (method, provenance, point) in enumerate(sorted(order, key=lambda k: (order.index(next(o for o in order if o[0] == k[0])), k[2] is not None, k[2] or 0))):
        if method in many and place % 4:
            continue  # a long curve is shown thinned, the rows have all of it
        group = [r for r in rows if (r.method, r.provenance, r.point) == (method, provenance, point)]
        cost = mean_and_error([r.cost for r in group])
        value = "" if group[0].accuracy is None else _pm(mean_and_error([r.accuracy for r in group]))
        lines.append(f"| {method} | {provenance} | {'' if point is None else f'{point:g}'} | {value} | {_pm(cost)} |")
    return [
        f"## {module.TITLE}",
        f"Published: {module.PUBLISHED}. Here ({size}, {len(seeds)} seeds): **{verdict}**. {said}.",
        f"Rule: {rule}",
        "\n".join(lines),
    ]


def _pm(value: tuple[float, float]) -> str:
    return f"{100 * value[0]:.2f}" + ("" if value[1] != value[1] else f" ± {100 * value[1]:.2f}")

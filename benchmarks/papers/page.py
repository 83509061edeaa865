"""docs/papers.md from the rows: per system its verdict, one table and one plot, what is published and what differs. Nothing on the page is typed by hand."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from benchmarks.papers.common import Row, mean_and_error

MOST = 16  # points of one method in a table
CURVE = ", curve"  # rows of such a method are drawn, not listed
MARKS = {"ours": "*", "baseline": "o", "official code": "s", "reconstructed": "D", "published": "^"}


def write(path: Path, rows: list[Row]) -> None:
    """Write the page, and its plots into the folder of the page's name beside it."""
    parts = [
        "# Papers, tested beside ours",
        "Written by `python -m benchmarks papers table` from `benchmarks/results/papers/papers.jsonl`. Every system runs on the same network and data as ours, in one"
        " process per seed; ± is the standard error over seeds. *quick* uses the embedded 10,000 Fashion-MNIST images, *full* what the folder `FASTEE_DATA` holds."
        " Systems without readable source are marked (reconstructed) and must not be quoted as the paper's. The verdict follows a rule that stood in the code before"
        " the run.",
    ]
    from benchmarks.papers import SYSTEMS

    for name in SYSTEMS:
        mine = [r for r in rows if r.system == name]
        for size in sorted({r.size for r in mine}):  # "full, ..." before "quick"
            drawn = path.with_suffix("") / f"{name}-{re.sub('[^a-z0-9]+', '-', size.lower())}.svg"
            parts += _system(importlib.import_module(f"benchmarks.papers.{name}"), [r for r in mine if r.size == size], size, drawn)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _system(module, rows: list[Row], size: str, drawn: Path) -> list[str]:
    verdict, said = module.verdict(rows)
    seeds = sorted({r.seed for r in rows})
    rule = " ".join(module.__doc__.split("Verdict rule:")[1].split())
    right, cost = getattr(module, "ACCURACY", "accuracy") + " %", getattr(module, "COST", "cost % of the network without exits")
    lines = [f"| method | provenance | point | {right} | {cost} |", "|---|---|---:|---:|---:|"]
    keys = list(dict.fromkeys((r.method, r.provenance, r.point) for r in rows))
    order = list(dict.fromkeys(m for m, *_ in keys))
    means = {k: _means([r for r in rows if (r.method, r.provenance, r.point) == k]) for k in keys}
    keys.sort(key=lambda k: (order.index(k[0]), k[2] is not None, k[2] or 0))
    many = {m for m in order if sum(k[0] == m for k in keys) > MOST}
    for place, key in enumerate(k for k in keys if CURVE not in k[0]):
        method, provenance, point = key
        if method in many and place % 4:
            continue  # a long curve is shown thinned, the rows have all of it
        accuracy, spent = means[key]
        lines.append(f"| {method} | {provenance} | {'' if point is None else f'{point:g}'} | {_pm(accuracy)} | {_pm(spent)} |")
    _draw(drawn, {k: means[k] for k in keys}, right, cost)
    return [
        f"## {module.TITLE}",
        f"Published: {module.PUBLISHED}. Here ({size}, {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}): **{verdict}**. {said}.",
        f"Rule: {rule}",
        *([module.NOTE] if size.startswith("full") and hasattr(module, "NOTE") else []),
        "\n".join(lines),
        f"![{module.TITLE}]({drawn.parent.name}/{drawn.name})",
    ]


def _means(group: list[Row]) -> tuple[tuple[float, float] | None, tuple[float, float]]:
    accuracy = None if group[0].accuracy is None else mean_and_error([r.accuracy for r in group])
    return accuracy, mean_and_error([r.cost for r in group])


def _draw(path: Path, means: dict[tuple, tuple], right: str, cost: str) -> None:
    """Draw accuracy over cost, or cost over the point where a system has no accuracy; a method with points is a line."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    bare = all(accuracy is None for accuracy, _ in means.values())
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for i, method in enumerate(dict.fromkeys(k[0] for k in means)):
        found = [(100 * spent[0], *((k[2], 0.0) if bare else (100 * accuracy[0], 100 * accuracy[1]))) for k, (accuracy, spent) in means.items() if k[0] == method and (bare or accuracy)]
        x, y, error = zip(*((p, c, 0.0) if bare else (c, p, e) for c, p, e in sorted(found)), strict=True)
        provenance = next(k[1] for k in means if k[0] == method)
        line = "-" if CURVE in method or len(x) > 1 else ""
        size = 10 if provenance == "ours" else 4
        axes.errorbar(x, y, None if any(e != e for e in error) else error, fmt=line + ("" if CURVE in method else MARKS[provenance]), ms=size, lw=1, color=f"C{i % 10}", label=method)
    axes.set(xlabel="point" if bare else cost, ylabel=cost if bare else right)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "fastee", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def _pm(value: tuple[float, float] | None) -> str:
    if value is None:
        return ""
    return f"{100 * value[0]:.2f}" + ("" if value[1] != value[1] else f" ± {100 * value[1]:.2f}")

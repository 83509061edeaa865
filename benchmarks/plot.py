"""Draws results/<machine>.jsonl: time per shape with the physical floor, and bandwidth under the measured roof line."""

from __future__ import annotations

from pathlib import Path

from fastee.testing.rows import Row, latest, read_rows

COLOURS = {"fastee": "#1f6feb", "torch": "#8b949e", "compile": "#bf8700"}


def _draw(rows: list[Row], op: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys((r.shape, r.regime) for r in rows))
    providers = list(dict.fromkeys(r.provider for r in rows))
    figure = Figure(figsize=(12, 1.6 + 0.28 * len(shapes)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    height = 0.8 / len(providers)
    for i, provider in enumerate(providers):
        mine = [r for r in rows if r.provider == provider]
        colour = COLOURS.get(provider, f"C{i}")
        at = [shapes.index((r.shape, r.regime)) + (i - (len(providers) - 1) / 2) * height for r in mine]
        left.barh(at, [r.p50_us for r in mine], height, label=provider, color=colour)
        timed = [r for r in mine if r.gbps]
        right.plot([r.working_set for r in timed], [r.gbps for r in timed], "o", ms=4, color=colour, label=provider)
    floors = {(r.shape, r.regime): r.floor_us for r in rows if r.floor_us}
    left.plot(list(floors.values()), [shapes.index(k) for k in floors], "|", ms=10, color="#cf222e", label="physical floor")
    left.set(xscale="log", xlabel="us per call (p50)", yticks=range(len(shapes)), title=op)
    left.set_yticklabels([s + (" cold" if regime == "cold" else "") for s, regime in shapes], fontsize=7)
    left.invert_yaxis()
    roof = sorted({(r.working_set, r.roof_gbps) for r in rows if r.roof_gbps and r.working_set})
    if roof:  # an op that moves no bytes worth counting has no roof to draw
        right.plot(*zip(*roof, strict=True), "-", color="#cf222e", lw=1, label=f"measured {rows[0].roof} bandwidth")
        right.set(xscale="log", yscale="log", xlabel="working set, bytes", ylabel="GB/s")
        right.legend(fontsize=7)
    else:
        right.set_axis_off()
    left.legend(fontsize=7)
    machine = rows[-1].machine
    figure.suptitle(f"{machine.cpu}, {machine.isa or 'no native code'}, torch {machine.torch}, {rows[-1].threads} thread, commit {machine.commit}", fontsize=8)
    figure.savefig(path)


def _codecs(rows: list[Row], path: Path) -> None:
    """Stored share against speed, one panel per op and type: the best is at the lower right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((r.op, r.dtype) for r in rows))
    figure = Figure(figsize=(5 * len(panels), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    providers = list(dict.fromkeys(r.provider for r in rows))
    for axes, (op, dtype) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for i, provider in enumerate(providers):
            mine = [r for r in rows if (r.op, r.dtype, r.provider) == (op, dtype, provider)]
            axes.plot([r.gbps for r in mine], [r.ratio for r in mine], "o", ms=5, color=COLOURS.get(provider, f"C{i}"), label=provider)
        axes.set(xscale="log", xlabel="GB/s of raw values", ylabel="stored bytes / raw bytes", title=f"{op} {dtype}")
    axes.legend(fontsize=7)
    figure.savefig(path)


def plot(results: Path) -> list[Path]:
    """Write ``plots/<machine>-<op>.svg`` for the latest row of every measurement and return the paths."""
    files = sorted(Path(results).glob("*.jsonl"))
    if not files:
        raise ValueError(f"no results in {results}: run `python -m benchmarks run all` first")
    made = []
    for file in files:
        every = [r for r in latest(read_rows(file)).values() if r.p50_us is not None]
        rows = [r for r in every if not r.peer]
        for op in dict.fromkeys(r.op for r in rows):
            path = file.parent / "plots" / f"{file.stem}-{op}.svg"
            path.parent.mkdir(exist_ok=True)
            _draw([r for r in rows if r.op == op], op, path)
            made.append(path)
        coded = [r for r in every if r.ratio is not None and r.gbps]
        if coded:
            made.append(file.parent / "plots" / f"{file.stem}-codecs.svg")
            made[-1].parent.mkdir(exist_ok=True)
            _codecs(coded, made[-1])
    return made

"""Plots as PNG bytes; one colour per row, the same in every plot."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fastee.report.result import Row

# Okabe and Ito's colours, told apart by colour-blind readers. Rows whose names differ only in the batch share a colour.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#7F7F7F", "#000000")
_MARKERS = ("o", "^", "D", "v", "s", "P", "X", "*")
_LINES = ("-", "--", ":", "-.")
_BLUES = ("#08519c", "#3182bd", "#6baed6", "#c6dbef", "#deebf7", "#f0f0f0")
_POINTS_SHOWN = 6  # a row further below the best than this many points of accuracy is drawn at the lower edge, with its value


def _styles(rows: Sequence[Row]) -> list[dict]:
    """Return per row its colour, marker, line style and whether its marker is filled."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row.name.rsplit(", batch", 1)[0], []).append(row)
    styles = {}
    for i, members in enumerate(families.values()):
        for variant, row in enumerate(members):
            colour = _COLOURS[i % len(_COLOURS)]
            styles[row.key] = {
                "color": colour, "marker": _MARKERS[i % len(_MARKERS)], "ls": _LINES[variant % len(_LINES)],
                "markerfacecolor": "white" if variant else colour, "markeredgecolor": colour,
            }  # fmt: skip
    return [styles[row.key] for row in rows]


def _figure(width: float, height: float, columns: int = 1, **grid) -> tuple[Figure, Sequence]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False, **grid)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def _log_axis(axis) -> None:
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return out.getvalue()


def _need(rows: Sequence[Row]) -> None:
    if not rows:
        raise ValueError("rows must not be empty")


def accuracy_against_cost(rows: Sequence[Row]) -> bytes:
    """Return a PNG: accuracy (with its 95 % interval) against mean latency, multiply-adds and bytes; up and left is better."""
    _need(rows)
    figure, axes = _figure(12, 4.6, columns=3, sharey=True)
    costs = (
        ("mean latency (ms, log scale)", lambda r: 1e3 * r.mean, "log"),
        ("multiply-adds (% of the full network)", lambda r: 100 * r.macs, "linear"),
        ("bytes on the wire per sample (log above 100)", lambda r: r.wire_bytes, "symlog"),
    )
    best = max(row.accuracy for row in rows)
    floor = 100 * max(min(row.interval[0] for row in rows), best - _POINTS_SHOWN / 100) - 0.5
    styles = _styles(rows)
    for axis, (label, cost, scale) in zip(axes, costs, strict=True):
        for row, style in zip(rows, styles, strict=True):
            x, y = cost(row), 100 * row.accuracy
            if not math.isfinite(x):
                continue
            if y < floor:
                axis.annotate(f"{y:.1f} %", (x, floor), xytext=(9, 4), textcoords="offset points", fontsize=8.5, color=style["color"])
            else:
                bars = [[y - 100 * row.interval[0]], [100 * row.interval[1] - y]]
                axis.errorbar([x], [y], yerr=bars, fmt="none", ecolor=style["color"], elinewidth=1, alpha=0.35)
            axis.plot([x], [max(y, floor)], **{**style, "ls": ""}, markersize=8, markeredgewidth=1.6, clip_on=False, zorder=3)
        if scale == "log":
            _log_axis(axis)
        elif scale == "symlog":
            axis.set_xscale("symlog", linthresh=100)
            axis.set_xlim(left=-10)
            axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        else:
            axis.set_xlim(0, max(105.0, *(100 * r.macs for r in rows if math.isfinite(r.macs))))
        axis.set_xlabel(label)
    axes[0].set_ylim(bottom=floor)
    axes[0].set_ylabel("accuracy (%), bar: 95 % interval")
    handles = [Line2D([], [], **{**style, "ls": ""}, markersize=8, label=row.name) for row, style in zip(rows, styles, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(rows)), frameon=False)
    return _png(figure)


def latency_distribution(rows: Sequence[Row], deadline: float | None = None) -> bytes:
    """Return a PNG: share of the samples answered within t, per row (empirical distribution, log time), and the deadline."""
    _need(rows)
    figure, (axis,) = _figure(10, 5.2)
    for row, style in zip(rows, _styles(rows), strict=True):
        seconds = np.sort([x for x in row.latency if math.isfinite(x)])
        if not len(seconds):
            continue
        share = np.arange(1, len(seconds) + 1) / row.samples
        seen = [f"{name} {1e3 * value:.1f} ms" for name, value in (("p50", row.p50), ("p99", row.p99)) if math.isfinite(value)]
        if row.failed:
            seen.append(f"{100 * row.failed / row.samples:.0f} % without an answer")
        axis.step(
            1e3 * seconds, 100 * share, where="post", color=style["color"], ls=style["ls"], linewidth=1.8, label=f"{row.name}: {', '.join(seen)}"
        )
    if deadline is not None:
        axis.axvline(1e3 * deadline, color="#b00000", linewidth=1, ls=":")
        axis.annotate(
            f"deadline {1e3 * deadline:g} ms", (1e3 * deadline, 101), xytext=(0, 2), textcoords="offset points", ha="center", color="#b00000",
            fontsize=9, annotation_clip=False,
        )  # fmt: skip
    _log_axis(axis)
    axis.set_ylim(0, 101)
    axis.set_xlabel("latency (ms, log scale)")
    axis.set_ylabel("samples answered within (%)")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return _png(figure)


def exit_histogram(rows: Sequence[Row], exit_names: Sequence[str]) -> bytes:
    """Return a PNG: the share of the samples of each row that ended at each exit; the last one is the end of the network."""
    _need(rows)
    figure, (axis,) = _figure(10, 1.2 + 0.42 * len(rows))
    places = np.arange(len(rows))
    left = np.zeros(len(rows))
    names = [*exit_names, "end of the network"]
    for exit, name in enumerate(names):
        share = np.asarray([100 * row.exits[exit] / row.samples for row in rows])
        colour = _BLUES[exit % len(_BLUES)]
        axis.barh(places, share, left=left, color=colour, edgecolor="white", label=name, height=0.72)
        for place, (start, width) in enumerate(zip(left, share, strict=True)):
            if width >= 5:
                axis.text(start + width / 2, place, f"{width:.0f}", ha="center", va="center", fontsize=8.5, color="white" if exit < 2 else "#222222")
        left += share
    lost = np.asarray([100 * row.failed / row.samples for row in rows])
    if lost.any():
        axis.barh(places, lost, left=left, color="white", edgecolor="#b00000", hatch="///", linewidth=0, label="no answer", height=0.72)
    axis.set_yticks(places, [row.name for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.grid(False, axis="y")
    axis.set_xlabel("samples (%) by the exit that answered")
    figure.legend(loc="outside lower center", ncols=len(names) + 1, frameon=False, fontsize=9)
    return _png(figure)


def calibration_plot(report) -> bytes:
    """Return a PNG of a `fastee.calibration.CalibrationReport`: drop against cost, reliability of each exit, rows per exit."""
    figure, (trade, reliable, shares) = _figure(13, 4, 3)
    if report.curve:
        trade.plot([c for c, _ in report.curve], [100 * d for _, d in report.curve], color=_COLOURS[6], marker=".", label="other thresholds")
    trade.plot([report.cost], [100 * report.drop], color=_COLOURS[4], marker="s", ls="", label="chosen")
    if 0 < report.bound < 1:
        trade.axhline(100 * report.bound, color=_COLOURS[0], ls="--", label=f"bound with confidence {report.confidence:g}")
    trade.set(xlabel="mean cost (1 = the backbone alone)", ylabel="drop in points")
    trade.legend(frameon=False)
    reliable.plot([0, 1], [0, 1], color="#bbbbbb", lw=1)
    for k, bins in enumerate(report.reliability):
        colour, label = _COLOURS[k % len(_COLOURS)], f"exit {k}: error {report.calibration_error[k]:.3f}"
        reliable.plot([u for u, _, _ in bins], [a for _, a, _ in bins], color=colour, marker=_MARKERS[k % len(_MARKERS)], ms=4, label=label)
    if report.reliability:
        reliable.legend(frameon=False)
    else:
        reliable.text(0.5, 0.5, f"{report.measure} is no probability", ha="center", va="center")
    reliable.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    ends = len(report.exit_shares) - 1
    names = [f"exit {k}" for k in range(ends)] + ["end"]
    shares.bar(names, [100 * s for s in report.exit_shares], color=[_COLOURS[k % len(_COLOURS)] for k in range(ends)] + [_COLOURS[6]])
    shares.set(ylabel="share of the rows in %")
    return _png(figure)

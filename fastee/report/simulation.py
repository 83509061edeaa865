"""Plots and tables of simulations, in the style of the other reports."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from rich.table import Table

from fastee.report.plots import _COLOURS, _figure, _png

_NODES_SHOWN = 40


def simulation_table(results: Sequence, title: str = "") -> Table:
    """Return a rich table, one line per `SimulationResult`; latencies are those of the answered tasks."""
    out = Table(title=title or None, title_justify="left")
    columns = ("policy", "in time %", "answered %", "accuracy %", "p50 ms", "p99 ms", "cost", "compute ms", "KB/task", "forced %", "retries", "exits %")
    for name in columns:
        out.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    ms = lambda seconds: "-" if seconds is None else f"{1e3 * seconds:.2f}"
    for result in results:
        s = result.summary()
        answered = max(1, sum(s["exits"]))
        accuracy = "-" if s["accuracy"] is None else f"{100 * s['accuracy']:.2f}"
        out.add_row(s["policy"], f"{100 * s['hit_rate']:.2f}", f"{100 * s['answered']:.2f}", accuracy, ms(s["p50"]), ms(s["p99"]), f"{s['mean_cost']:.4g}",
                    ms(s["mean_compute"]), f"{s['mean_bytes'] / 1e3:.2f}", f"{100 * s['forced']:.2f}", f"{s['retries']:,}",
                    " ".join(f"{100 * n / answered:.0f}" for n in s["exits"]))  # fmt: skip
    return out


def simulation_plots(result) -> dict[str, bytes]:
    """Return PNGs by name: `latency` (share answered within t), `timeline` (load, answers in time, per second), `nodes` (how busy, which exits)."""
    return {"latency": _latency(result), "timeline": _timeline(result), "nodes": _nodes(result)}


def _latency(result) -> bytes:
    figure, (axis,) = _figure(9, 4.6)
    seconds = np.sort(result.latency[np.isfinite(result.latency)])
    if len(seconds):
        axis.plot(1e3 * seconds, 100 * np.arange(1, len(seconds) + 1) / len(result.latency), color=_COLOURS[0], label=f"{result.policy}: {len(seconds):,} of {len(result.latency):,} answered")
        axis.set_xscale("log")
    limits = result.deadline[np.isfinite(result.deadline)]
    if len(limits):
        axis.axvline(1e3 * float(np.median(limits)), color=_COLOURS[4], ls="--", label="deadline")
    axis.set_ylim(0, 101)
    axis.set_xlabel("latency (ms, log scale)")
    axis.set_ylabel("tasks answered within (%)")
    axis.legend(loc="lower right", frameon=False)
    return _png(figure)


def _timeline(result) -> bytes:
    figure, (axis,) = _figure(11, 4.2)
    end = float(result.arrival.max()) if len(result.arrival) else 0.0
    width = max(0.1, 10.0 ** math.ceil(math.log10(max(end, 1e-3) / 200)))
    edges = np.arange(0.0, end + 2 * width, width)
    load, _ = np.histogram(result.arrival, edges)
    good, _ = np.histogram(result.arrival[result.in_time], edges)
    centre = (edges[:-1] + edges[1:]) / 2
    axis.fill_between(centre, load / width, step="mid", color="#c6dbef", label="tasks arriving")
    axis.step(centre, good / width, where="mid", color=_COLOURS[0], label="of these answered in time")
    axis.set_xlabel("virtual time of arrival (s)")
    axis.set_ylabel("tasks per second")
    axis.set_ylim(bottom=0)
    axis.legend(loc="upper right", frameon=False)
    return _png(figure)


def _nodes(result) -> bytes:
    figure, (left, right) = _figure(11, 4.6, columns=2)
    order = np.argsort(-result.utilisation)[:_NODES_SHOWN]
    left.barh([result.nodes[i] for i in order][::-1], 100 * result.utilisation[order][::-1], color=_COLOURS[0])
    left.set_xlabel("busy (% of the time)" + (f", the busiest {_NODES_SHOWN} of {len(result.nodes)}" if len(result.nodes) > _NODES_SHOWN else ""))
    left.set_xlim(0, 100)
    left.tick_params(axis="y", labelsize=8 if len(order) > 12 else 10)
    exits = result.summary()["exits"]
    right.bar([*(f"exit {i}" for i in range(len(exits) - 1)), "end"], exits, color=_COLOURS[2])
    right.set_ylabel("tasks answered")
    return _png(figure)

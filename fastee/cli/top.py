"""``fastee top``: what the nodes of a running cluster say of themselves, as tables or JSON."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

import fastee


def state(cluster: fastee.Cluster) -> dict[str, Any]:
    """Return nodes, links (bytes so far), answers by exit and by deadline over all nodes."""
    nodes = cluster.beats()
    names = list(nodes)
    exits: dict[int, int] = {}
    for beat in nodes.values():
        for k, n in enumerate(beat["exits"]):
            exits[k] = exits.get(k, 0) + n
    links = {f"{a}->{names[j]}": n for a, beat in nodes.items() for j, n in enumerate(beat["sent"]) if names[j] != a}
    return {
        "nodes": nodes, "link_bytes": links, "exits": exits, "answers": sum(exits.values()),
        "late": sum(b["late"] for b in nodes.values()), "forced": sum(b["forced"] for b in nodes.values()),
    }  # fmt: skip


def tables(now: dict[str, Any], before: dict[str, Any] | None, seconds: float) -> Group:
    """Return the state as tables; rates need the state `seconds` before."""
    nodes = Table("node", "state", "queue", "service ms", "handled", "per s", "cpu", "C", title="nodes")
    for name, b in now["nodes"].items():
        rate = "" if before is None else f"{(b['handled'] - before['nodes'][name]['handled']) / seconds:.1f}"
        condition = "down" if not b["up"] else "leaving" if b["leaving"] else "up"
        hot = f"{b['celsius']:.0f}" if b["celsius"] else ""
        nodes.add_row(name, condition, str(b["queue"]), f"{1e3 * b['service']:.2f}", str(b["handled"]), rate, f"{100 * b['cpu']:.0f} %", hot)
    links = Table("link", "bytes", "bytes/s", title="links")
    for name, total in now["link_bytes"].items():
        links.add_row(name, f"{total:,}", "" if before is None else f"{(total - before['link_bytes'].get(name, 0)) / seconds:,.0f}")
    exits = Table("exit", "answers", "", title="exits")
    most = max([*now["exits"].values(), 1])
    for k, n in now["exits"].items():
        exits.add_row("end" if k == len(now["exits"]) - 1 else str(k), str(n), "#" * round(30 * n / most))
    held = now["answers"] - now["late"]
    return Group(nodes, links, exits, f"answers {now['answers']}, in time {held}, late {now['late']}, forced by the deadline {now['forced']}")


def watch(console: Console, config: Path, keys: Path | None, once: bool, as_json: bool, every: float) -> None:
    """Print the state once, or again and again until ctrl-C."""
    with fastee.Cluster.connect(config, keys=keys) as cluster:
        now = state(cluster)
        if as_json:
            typer.echo(json.dumps(now))
        elif once:
            console.print(tables(now, None, every))
        else:
            _watch_live(console, cluster, now, every)


def _watch_live(console: Console, cluster: fastee.Cluster, now: dict[str, Any], every: float) -> None:
    # A flag rather than KeyboardInterrupt: raised just anywhere, it can vanish in a destructor, and the view would go on.
    stop = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        with Live(tables(now, None, every), console=console, screen=console.is_terminal) as live:
            while not stop.wait(every):
                last, now = now, state(cluster)
                live.update(tables(now, last, every))
    finally:
        signal.signal(signal.SIGINT, before)
    raise KeyboardInterrupt

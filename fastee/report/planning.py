"""A plan as a picture: its segments by node, and what it was weighed against."""

from __future__ import annotations

from fastee.report.plots import _COLOURS, _figure, _png


def plan_plot(plan) -> bytes:
    """Return a PNG of a `fastee.planning.Plan`: left the segments on their nodes with the moves between them, right the objective beside every
    alternative that can run (hatched: not allowed under the limits)."""
    figure, (left, right) = _figure(12, 4.6, columns=2)
    at, before = {name: i for i, name in enumerate(plan.nodes)}, plan.source
    for s, node in enumerate(plan.place):
        left.barh(at[node], 0.9, left=s - 0.45, height=0.5, color=_COLOURS[at[node] % len(_COLOURS)])
        if node != before:
            left.annotate(plan.codecs[s], (s - 0.5, at[node]), (s - 0.5, at[before]), ha="center", arrowprops={"arrowstyle": "->"})
        if s < len(plan.exits) and plan.exits[s]:
            left.text(s, at[node], "exit", ha="center", va="center")
        before = node
    left.set_yticks(range(len(plan.nodes)), plan.nodes)
    left.set_xlabel("segment")
    left.set_title("who runs what")
    rows = [("this plan", plan.value, ""), *((o.name, o.value, o.reason) for o in plan.alternatives if o.value is not None)]
    for i, (_, value, reason) in enumerate(rows):
        right.barh(i, value, color=_COLOURS[i > 0], hatch="//" if reason else None)
    right.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    right.invert_yaxis()
    right.set_xlabel({"latency": "seconds", "throughput": "seconds per batch at the bottleneck", "cost": "cost units"}[plan.objective])
    right.set_title("weighed against")
    return _png(figure)

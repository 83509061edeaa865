"""A plan in words and numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastee.planning.plan import Figures, Plan


def seconds(value: float | None) -> str:
    """Return a time as people read it.

    >>> seconds(0.0125), seconds(3.2e-06), seconds(None)
    ('12.5 ms', '3.2 us', 'impossible')
    """
    if value is None or not math.isfinite(value):
        return "impossible"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value * 1e9:.4g} ns"


def size(value: float | None) -> str:
    """Return bytes as people read them: powers of ten."""
    if value is None:
        return "-"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value:.4g} B"


def runs(plan: Plan) -> list[tuple[int, int, str]]:
    """Return (first segment, last segment, node) of each stretch that stays on one node."""
    stretches: list[tuple[int, int, str]] = []
    for s, node in enumerate(plan.place):
        if stretches and stretches[-1][2] == node:
            stretches[-1] = (stretches[-1][0], s, node)
        else:
            stretches.append((s, s, node))
    return stretches


def _goal(plan: Plan, figures: Figures) -> str:
    if plan.objective == "latency":
        return seconds(figures.latency)
    if plan.objective == "throughput":
        return "impossible" if figures.latency is None else f"{math.inf if figures.throughput is None else figures.throughput:.4g} tasks/s"
    return "impossible" if figures.cost is None else f"{figures.cost:.4g} cost units"


def _against(plan: Plan, value: float | None) -> str:
    if value is None:
        return ""
    if value == plan.value:
        return ", the same"
    if plan.value == 0:
        return ", this plan is better"
    ratio = value / plan.value
    if ratio < 1:
        return f", {1 / ratio:.3g}x better but not allowed"
    return f", this plan is {ratio:.3g}x better" if ratio >= 1.005 else ", this plan is better by under 0.5 %"


def text(plan: Plan) -> str:
    """Return the explanation: the way of a task, the numbers, and what the plan was weighed against."""
    how = f" with every segment at its {plan.quantile:g} quantile" if plan.quantile is not None else ""
    best = "the optimum of the model" if plan.exact else f"within {max(0.0, plan.value / plan.bound - 1) * 100 if plan.bound > 0 else math.inf:.3g} % of the optimum"
    lines = [f"{plan.kind} plan for least {plan.objective if plan.objective != 'throughput' else 'bottleneck (throughput)'}{how}: {_goal(plan, plan.figures)}, {best}"]
    at = plan.source
    for first, last, node in runs(plan):
        span = f"segment {first}" if first == last else f"segments {first}-{last}"
        if node != at:
            lines.append(f"  send {'the input' if first == 0 else f'what enters segment {first}'} as {plan.codecs[first]}: {at} -> {node}"
                         f" ({plan.reach[first] * 100:.3g} % of the tasks)")  # fmt: skip
        exits = [k for k in range(first, min(last + 1, len(plan.exits))) if plan.exits[k]]
        shown = f"; exits on: {', '.join(map(str, exits))}" if exits else ""
        memory = f", {size(plan.memory[node])} of memory" if plan.memory.get(node) else ""
        lines.append(f"  {span} on {node}{memory}{shown}")
        at = node
    if at != plan.source:
        lines.append(f"  the answer goes home: {at} -> {plan.source}")
    f = plan.figures
    rate = "unbounded" if f.throughput is None else f"{f.throughput:.4g} tasks/s"
    lines.append(f"  expected: {seconds(f.latency)}, {rate}, {size(f.bytes)} sent, cost {f.cost:.4g}, accuracy loss {f.drop:.3g}")
    if plan.deadline is not None:
        lines.append(f"  deadline {seconds(plan.deadline)}: {seconds(plan.deadline - f.latency)} to spare" if f.latency <= plan.deadline else f"  deadline {seconds(plan.deadline)} missed")
    lines.append("weighed against:")
    for other in plan.alternatives:
        same = f" ({_goal(plan, other.figures)}{_against(plan, other.value)})"
        lines.append(f"  {other.name}: {other.reason or 'possible'}{same if other.value is not None else ''}")
    return "\n".join(lines)

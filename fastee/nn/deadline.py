"""The batch runner under a deadline: the scheduler decides after every exit who stays."""

from __future__ import annotations

import math
from time import perf_counter_ns
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastee import ops
from fastee.nn.result import End, ExitResult, Parts
from fastee.scheduling import Action, QoS, Scheduler

_FORCED = 8  # bit of a decision's code, see fastee.scheduling.Decision
_LAST = (1 << 63) - 1


def check_deadline(deadline: Any) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless `deadline` is a number of seconds."""
    if isinstance(deadline, bool) or not isinstance(deadline, (int, float)):
        raise TypeError(f"deadline: expected seconds as a number, got {type(deadline).__name__} {deadline!r}")
    if deadline != deadline:
        raise ValueError("deadline: expected seconds, got NaN")


def make_scheduler(net, qos: QoS, capacity: int) -> Scheduler:
    """Return a scheduler for this machine alone: every segment is hosted here (node 0 of the profile)."""
    hosts = np.zeros((net.num_segments, len(net.profile.nodes)), dtype=bool)
    hosts[:, 0] = True
    return Scheduler(net.profile, qos, policy="deadline", thresholds=net.thresholds, node=0, hosts=hosts, max_tasks=capacity)


def run_deadline(net, sched: Scheduler, carry: tuple[Tensor, ...], total: int, entry: int, deadline: float) -> ExitResult:
    """Run a batch of `total` rows that entered at `entry` (ns) and must be answered `deadline` seconds later.

    Rows that cannot be admitted (late already) leave at exit 0; all others leave when the scheduler says so, forced or not. A row that is
    told to wait leaves forced: in a batch that is run by its caller nothing happens that it could wait for.
    """
    due = _LAST if deadline == math.inf else int(min(max(entry + deadline * 1e9, -_LAST), _LAST))
    tasks = np.array([sched.admit(entry, due) for _ in range(total)], dtype=np.int64)
    parts: list[tuple[int, Tensor | None, Tensor | None, Any, Any]] = []
    rows: Tensor | None = None
    start = perf_counter_ns()
    for i in range(net.num_exits):
        carry = net.run_segment(i, carry)
        step = net.exit_step(i, carry, logits=True)
        scores = step.confidence.cpu().numpy()
        now = perf_counter_ns()
        sched.observe(i, 0, len(tasks), max(1, now - start))
        start = now
        live = tasks >= 0
        codes = np.full(len(tasks), int(Action.EXIT) | _FORCED, dtype=np.int64)
        if not live.all():
            codes[step.exits.cpu().numpy()] &= ~_FORCED
        codes[live] = sched.decide_batch(tasks[live], i, scores[live], now)
        waits = (codes & 7) == int(Action.WAIT)
        for task in tasks[waits].tolist():
            sched.finish(task)
        codes[waits] = int(Action.EXIT) | _FORCED
        stays = (codes & 7) == int(Action.CONTINUE)
        count = int(stays.sum())
        if count == len(tasks):
            continue
        device = carry[0].device
        leave = torch.from_numpy(np.flatnonzero(~stays)).to(device)
        late = torch.from_numpy((codes[~stays] & _FORCED) != 0).to(device)
        if count == 0:
            parts.append((i, rows, None, step, late))
            return ExitResult._of(Parts(total, parts))
        keep = torch.from_numpy(np.flatnonzero(stays)).to(device)
        parts.append((i, leave if rows is None else rows[leave], leave, step, late))
        carry = tuple(ops.gather_rows(t, keep) for t in carry)
        rows, tasks = keep if rows is None else rows[keep], tasks[stays]
    carry = net.run_segment(net.num_exits, carry)
    if carry[0].device.type != "cpu":
        torch.cuda.synchronize(carry[0].device)
    now = perf_counter_ns()
    sched.observe(net.num_exits, 0, len(tasks), max(1, now - start))
    sched.decide_batch(tasks, net.num_exits, np.zeros(len(tasks)), now)
    parts.append((net.num_exits, rows, None, End(carry[0], net.measure), None))
    return ExitResult._of(Parts(total, parts))

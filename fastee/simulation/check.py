"""Proof from the event log alone that tasks are conserved and that nothing impossible happened."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from fastee.errors import FasteeError
from fastee.simulation.events import FaultKind, Outcome, What


class ConservationError(FasteeError, RuntimeError):
    """An event log in which a task was lost, ended twice, or ran where it cannot have run."""


def check_log(lines: Iterable, complete: bool = True) -> int:
    """Check log lines (time, what, task, attempt, node, a, b); returns the number of tasks, raises `ConservationError` at the first breach.

    Every task that arrived ends exactly once, and nothing ends that did not arrive; an answer that counts was sent before; a copy runs
    only where it was admitted, segment by segment; a node runs one batch at a time and none while it is dead; attempts follow each
    other; time never runs backwards. `complete=False` allows tasks without an end (a log cut short).
    """
    now, running = None, {}
    arrived, ended, attempt = set(), {}, {}
    admitted, runs, rans, answers = defaultdict(int), defaultdict(int), defaultdict(int), set()
    dead: set[int] = set()

    def breach(text: str):
        raise ConservationError(f"{where}: {text}")

    for number, line in enumerate(lines):
        where = f"line {number}"
        time, what, task, tried, node, a, b = (int(v) for v in line)
        if now is not None and time < now:
            breach(f"time runs backwards, {time} after {now}")
        now = time
        if what not in What._value2member_map_:
            breach(f"unknown event {what}")
        if what == What.FAULT:
            if a == FaultKind.DEATH:
                dead.add(node)
                running.pop(node, None)
            elif a == FaultKind.RESTART:
                dead.discard(node)
            continue
        if what in (What.DOWN, What.UP, What.THAW):
            continue
        if what == What.ARRIVE:
            if task in arrived:
                breach(f"task {task} arrives twice")
            arrived.add(task)
            continue
        if task not in arrived:
            breach(f"{What(what).name} of task {task}, which never arrived")
        key = task, tried
        if what in (What.ADMIT, What.DECIDE, What.RUN, What.RAN, What.DELIVER) and node in dead:
            breach(f"{What(what).name} of task {task} on node {node}, which is dead")
        if what == What.START:
            if tried != attempt.get(task, -1) + 1:
                breach(f"task {task} starts attempt {tried} after {attempt.get(task, -1)}")
            if task in ended:
                breach(f"task {task} starts after its end")
            attempt[task] = tried
        elif what == What.ADMIT:
            if attempt.get(task, -1) < tried:
                breach(f"task {task} is admitted in attempt {tried}, which never started")
            admitted[(*key, node)] += 1
        elif what == What.RUN:
            if not admitted[(*key, node)]:
                breach(f"task {task} runs on node {node}, which did not admit it")
            if a > 0 and not rans[(*key, a - 1)]:
                breach(f"task {task} runs segment {a} before segment {a - 1}")
            if running.get(node, (time, a)) != (time, a):
                breach(f"node {node} starts segment {a} at {time} while it runs since {running[node][0]}")
            running[node] = time, a
            runs[(*key, node, a)] += 1
        elif what == What.RAN:
            runs[(*key, node, a)] -= 1
            if runs[(*key, node, a)] < 0:
                breach(f"task {task} is done with segment {a} on node {node}, where it did not run")
            rans[(*key, a)] += 1
            running.pop(node, None)
        elif what == What.ANSWER:
            if not admitted[(*key, node)] and a != Outcome.REFUSED:
                breach(f"task {task} is answered by node {node}, which did not admit it")
            if a == Outcome.ANSWERED and (b < 0 or not rans[(*key, b)]):
                breach(f"task {task} is answered from exit {b}, which did not run")
            answers.add((task, a, b if a == Outcome.ANSWERED else -1))
        elif what == What.END:
            if task in ended:
                breach(f"task {task} ends twice")
            if a not in (Outcome.EXPIRED, Outcome.LOST) and (task, a, b) not in answers:
                breach(f"task {task} ends as {Outcome(a).name} from exit {b}, but no such answer was sent")
            ended[task] = a
        elif what == What.DUPLICATE and not any((task, a, e) in answers for e in (b, -1)):
            breach(f"an answer for task {task} is dropped that was never sent")
    where = "end"
    if complete and len(ended) != len(arrived):
        missing = sorted(arrived - set(ended))
        breach(f"{len(missing)} tasks never ended, the first is {missing[0]}")
    return len(arrived)


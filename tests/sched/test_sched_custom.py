"""Rules and policies of the user: compiled, called natively, equal to the same Python function, and clear where numba cannot."""

import math

import numpy as np
import pytest
from sched_worlds import play, random_arguments, small_profile

import fastee
from fastee.errors import CannotCompile
from fastee.scheduling import Action, QoS, Scheduler, rules
from fastee.scheduling import scheduler as face

needs_core = pytest.mark.skipif(face._C is None, reason="fastee._C is not built")


@fastee.rule
def sure_or_late(stats, task, node):
    return stats.margin > 0.3 or (task.slack < 0.004 and stats.confidence > 0.2) or node.queue > 3


@fastee.policy
def by_the_score(stats, task, nodes):
    if task.best >= 0 and stats.confidence > 0.6:
        return rules.EXIT
    if task.slack < 0.002 and task.best < 0:
        return rules.REJECT
    if nodes[0].fits and nodes[0].wait > 0.001:
        return rules.WAIT
    return nodes[0].action  # not always possible: then the core does what "threshold" does


@needs_core
def test_compiled_rule_and_policy_equal_the_plain_functions_in_random_worlds():
    seen = set()
    for seed in range(60):
        arguments = random_arguments(np.random.default_rng(seed), "threshold")
        del arguments["params"]
        if seed % 3:
            arguments["policy"] = by_the_score
        if seed % 2:
            arguments["rule"] = sure_or_late
        logs, snapshots = [], []
        for native in (True, False):
            sched = Scheduler(**arguments, native=native)
            logs.append(play(sched, np.random.default_rng(seed), 80))
            snapshots.append(sched.snapshot())
        assert logs[0] == logs[1] and snapshots[0] == snapshots[1], f"seed {seed}"
        seen |= {name for name, value in snapshots[0].items() if isinstance(value, int) and value > 0}
    assert {"waited", "exits", "rejected", "continued", "offloaded", "invalid"} <= seen


def test_a_rule_knows_whether_it_reads_the_node():
    def through_a_helper(stats, task, place):
        return helper(place)

    def through_a_closure(stats, task, place):
        return any(place.queue > i for i in range(3))

    def never(stats, task, place):
        return stats.confidence > task.slack

    helper = lambda record: record.queue > 3
    assert [fastee.rule(f).reads_node for f in (through_a_helper, through_a_closure, never)] == [True, True, False]


@needs_core
def test_a_rule_that_leaves_the_node_alone_decides_as_in_python():
    @fastee.rule
    def short_of_time(stats, task, node):
        return stats.confidence > 0.5 and task.slack < 0.01

    logs = []
    for native in (True, False):
        sched = Scheduler(small_profile(), QoS(deadline=0.02), thresholds=[0.9, 0.9], rule=short_of_time, native=native)
        logs.append(play(sched, np.random.default_rng(3), 200))
    assert logs[0] == logs[1] and any(entry for entry in logs[0])


@needs_core
def test_records_are_the_structs_of_the_core():
    seen = []

    def spy(stats, task, node):
        seen.append((stats, task, node))
        return False

    twin = Scheduler(small_profile(), QoS(deadline=1.0), rule=fastee.rule(spy), native=False)
    twin.observe_queue(0, 2)
    twin.decide(twin.admit(0), 1, 0.25, 0, gate=0.5, delta=0.6, label=7, pool=1, max_prob=0.1, margin=0.2, entropy=0.3, lse=0.4)
    stats, task, node = seen[0]
    assert (stats.confidence, stats.max_prob, stats.margin, stats.entropy, stats.lse, stats.gate, stats.delta, stats.label, stats.exit) == (
        0.25, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 7, 1)  # fmt: skip
    assert (task.slack, task.weight, task.segment, task.exits, task.best, task.tenant) == (1.0, 1.0, 2, 2, 1, 0)
    assert (node.index, node.here, node.fits, node.queue, node.action, node.wait) == (0, 1, 1, 2, 8, pytest.approx(8e-3))


def test_a_rule_is_never_asked_where_an_exit_is_off_or_the_row_is_invalid():
    always = fastee.rule(lambda stats, task, node: True)
    for native in (None, False):
        sched = Scheduler(small_profile(), QoS(), thresholds=[math.inf, 0.9], rule=always, native=native)
        task = sched.admit(0)
        assert sched.decide(task, 0, 0.99, 0).action != Action.EXIT
        assert sched.decide(task, 1, math.nan, 0).action != Action.EXIT
        assert sched.decide(task, 1, 0.0, 0).action == Action.EXIT


def _with(stats, task, node):
    with open("x") as f:
        return f.read() == "1"


def _field(stats, task, node):
    return stats.margn > 0.5


def _object(stats, task, node):
    return stats.margin > Unknown("x")


class Unknown:
    def __init__(self, x): ...


@needs_core
@pytest.mark.parametrize("function, pattern", [
    (_with, r"rule: numba cannot compile _with, line \d+ of .*: `with open\("),
    (_field, r"rule: _field, line \d+: `stats` has no field 'margn'; .* did you mean 'margin'\?"),
    (_object, r"rule: numba cannot compile _object, line \d+ of .*: `return stats.margin > Unknown\("),
])  # fmt: skip
def test_what_numba_cannot_compile_is_named_with_its_line(function, pattern):
    rule = fastee.rule(function)
    with pytest.raises(CannotCompile, match=pattern) as caught:
        Scheduler(small_profile(), QoS(), rule=rule, native=True)
    first = function.__code__.co_firstlineno
    assert f"line {first + 1}" in str(caught.value)


def test_decorators_refuse_what_is_no_function_of_three():
    with pytest.raises(TypeError, match=r"rule: expected a Python function of \(stats, task, node\), got int"):
        fastee.rule(3)
    with pytest.raises(TypeError, match=r"policy: two must take \(stats, task, nodes\), got \(stats, task\)"):

        @fastee.policy
        def two(stats, task): ...

    with pytest.raises(TypeError, match="Scheduler: rule must be made by @fastee.rule, got function"):
        Scheduler(small_profile(), QoS(), thresholds=[1, 1], rule=lambda s, t, n: True)

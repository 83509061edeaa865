"""The planners against brute force, and what must hold in every world."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_worlds import brute_force, contiguous, profile_of, random_world, walk

from fastee.planning import ClusterSpec, NodeSpec, NoPlan, Replanner, plan
from fastee.planning.problem import question
from fastee.scheduling import QoS

OBJECTIVES = ("latency", "cost", "throughput")


def numbers_of(world: dict, objective: str, kind: str, qos=None, quantile=None) -> dict:
    rest = {k: v for k, v in world.items() if k not in ("prof", "cluster")}
    return question(world["prof"], world["cluster"], qos, objective=objective, batch=1, quantile=quantile, choose_exits=kind == "joint", **rest).numbers


def check(world: dict, objective: str, kind: str, qos=None) -> None:
    n = numbers_of(world, objective, kind, qos)
    truth = brute_force(n, objective)
    if math.isinf(truth):
        with pytest.raises(NoPlan):
            plan(kind=kind, objective=objective, qos=qos, **world)
        return
    made = plan(kind=kind, objective=objective, qos=qos, **world)
    assert made.exact and made.value == pytest.approx(truth, rel=1e-9, abs=1e-15)
    codec = [-1 if c is None else world["prof"].codecs.index(c) for c in made.codecs]
    again = walk(n, made.indices, codec, made.exits)
    assert again[objective] == pytest.approx(made.value, rel=1e-9, abs=1e-15)
    assert again["latency"] == pytest.approx(made.latency, rel=1e-9) and again["cost"] == pytest.approx(made.cost, rel=1e-9)
    assert again["throughput"] == pytest.approx(1 / made.throughput, rel=1e-9) and again["drop"] == pytest.approx(made.figures.drop, abs=1e-12)
    for name, used in made.memory.items():
        assert used <= n["room"][n["nodes"] and made.nodes.index(name)]
    if objective == "throughput":
        assert contiguous(made.place)
    for other in made.alternatives:  # all here, all there
        assert other.reason or made.value <= other.value * (1 + 1e-12)


@pytest.mark.parametrize("kind", ["pipeline", "joint"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("seed", range(12))
def test_equals_brute_force(seed, objective, kind):
    rng = np.random.default_rng(seed)
    check(random_world(seed, int(rng.integers(1, 5)), int(rng.integers(1, 4)), int(rng.integers(1, 3))), objective, kind)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("seed", range(20))
def test_equals_brute_force_under_limits(seed, objective):
    rng = np.random.default_rng(100 + seed)
    world = random_world(seed, int(rng.integers(2, 5)), int(rng.integers(2, 4)), int(rng.integers(1, 3)), limits=True)
    n = numbers_of(world, objective, "joint")
    free = brute_force({**n, "room": [math.inf] * n["nodes"]}, "latency")
    deadline = None if math.isinf(free) or seed % 3 == 0 else free * float(rng.uniform(0.95, 1.6))
    check(world, objective, "joint", QoS(deadline=deadline, max_drop=[None, 0.01, 0.03][seed % 3]))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(OBJECTIVES), st.booleans())
def test_equals_brute_force_anywhere(seed, objective, limits):
    check(random_world(seed, 3, 3, 2, limits), objective, "joint", QoS(max_drop=0.02) if limits else None)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(OBJECTIVES), st.floats(1.0, 10.0))
def test_more_bandwidth_and_faster_nodes_are_never_worse(seed, objective, factor):
    world = random_world(seed, 12, 4, 3)
    prof, cluster = world["prof"], world["cluster"]
    try:
        before = plan(objective=objective, **world)
    except NoPlan:
        return
    wider = {f: getattr(prof, f) for f in prof.__dataclass_fields__} | {"bandwidth": prof.bandwidth * factor}
    assert plan(objective=objective, **{**world, "prof": type(prof)(**wider)}).value <= before.value * (1 + 1e-12)
    faster = ClusterSpec([NodeSpec(n.name, n.memory, n.speed * factor, n.price, n.watts, n.hosts) for n in cluster.nodes])
    assert plan(objective=objective, **{**world, "cluster": faster}).value <= before.value * (1 + 1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_never_loses_to_all_here_or_all_there(objective):
    for seed in range(30):
        world = random_world(seed, 20, 5, 3)
        try:
            made = plan(objective=objective, **world)
        except NoPlan:
            continue
        assert len(made.alternatives) >= 5 and made.alternatives[0].name == "all here"
        for other in made.alternatives:
            assert other.reason or made.value <= other.value * (1 + 1e-12), (seed, other)


def test_bound_holds_where_the_search_is_cut_short():
    for seed in range(6):
        world = random_world(seed, 4, 3, 2, limits=True)
        n = numbers_of(world, "latency", "joint")
        from fastee import _C

        narrow = _C.Pipeline({**n, "max_width": 1}).solve()
        truth = brute_force(n, "latency")
        assert narrow["bound"] <= truth * (1 + 1e-9)
        if narrow["found"]:
            assert narrow["value"] >= truth * (1 - 1e-9)


def test_throughput_keeps_its_bound_at_size():
    world = random_world(3, 30, 8, 2)
    made = plan(objective="throughput", **world)
    assert contiguous(made.place) and made.bound <= made.value
    assert made.exact or made.value <= 1.5 * made.bound


def test_a_quantile_takes_each_segment_at_mean_plus_z_spread():
    prof = profile_of([[0.010, 0.004]] * 2, [[100.0]] * 2, [[0, 1e9], [1e9, 0]], np.zeros((2, 2)), spread=[[0.0, 0.006]] * 2)
    assert plan(prof).place == ("n1", "n1")  # faster in the mean
    tail = plan(prof, quantile=0.99)
    assert tail.place == ("n0", "n0") and tail.latency == pytest.approx(0.02)
    assert plan(prof, quantile=0.5).value == plan(prof).value


def test_an_exit_is_on_only_where_it_pays():
    prof = profile_of([[0.010], [0.010]], [[10.0]] * 2, [[0]], [[0]])
    ask = dict(kind="joint", head_seconds=[0.004])
    assert plan(prof, exit_probability=[0.5], **ask).exits == (True,)
    assert plan(prof, exit_probability=[0.5], **ask).latency == pytest.approx(0.010 + 0.5 * 0.010)
    useless = plan(prof, exit_probability=[0.2], **ask)
    assert useless.exits == (False,) and useless.latency == pytest.approx(0.006 + 0.010)
    assert plan(prof, exit_probability=[0.2], head_seconds=[0.004], kind="pipeline").exits == (True,)
    forbidden = plan(prof, qos=QoS(max_drop=0.01), exit_probability=[0.5], exit_loss=[0.1], **ask)
    assert forbidden.exits == (False,) and forbidden.figures.drop == 0


def test_the_carry_may_visit_nodes_in_any_order():
    run = [[1.0, 0.001], [0.001, 1.0], [1.0, 0.001]]
    prof = profile_of(run, [[10.0]] * 3, [[0, 1e9], [1e9, 0]], np.zeros((2, 2)))
    assert plan(prof).place == ("n1", "n0", "n1")
    assert contiguous(plan(prof, objective="throughput").place)


# -- re-planning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_replanning_equals_planning_anew(seed):
    rng = np.random.default_rng(seed)
    world = random_world(seed, 8, 2, 3)
    world["weights"] = None
    replanner = Replanner(**world, hysteresis=0.0)
    prof, cluster = world["prof"], world["cluster"]
    bandwidth, delay, speed, leave = prof.bandwidth.copy(), prof.delay.copy(), np.ones(2), np.array(world["exit_probability"])
    for _ in range(12):
        a = int(rng.integers(2))
        bandwidth[a, 1 - a], delay[a, 1 - a] = 10.0 ** rng.uniform(4, 9), rng.uniform(0, 0.02)
        replanner.set_link(a, 1 - a, bandwidth[a, 1 - a], delay[a, 1 - a])
        speed[a] = rng.uniform(0.3, 3)
        replanner.set_speed(a, speed[a])
        k = int(rng.integers(len(leave)))
        leave[k] = rng.uniform(0, 1)
        replanner.set_leave(k, leave[k])
        replanner.replan()
        fields = {f: getattr(prof, f) for f in prof.__dataclass_fields__} | {"bandwidth": bandwidth, "delay": delay}
        nodes = ClusterSpec([NodeSpec(n.name, speed=n.speed / s) for n, s in zip(cluster.nodes, speed, strict=True)])
        anew = plan(kind="joint", **{**world, "prof": type(prof)(**fields), "cluster": nodes, "exit_probability": leave})
        assert replanner.value == pytest.approx(anew.value, rel=1e-9) and replanner.feasible


def two_nodes(**changes) -> Replanner:
    prof = profile_of([[0.010, 0.001]] * 2, [[1000.0]] * 2, [[0, 1e6], [1e6, 0]], [[0, 0.001], [0.001, 0]])
    return Replanner(prof, **changes)


def test_hysteresis_holds_a_plan_until_another_is_a_tenth_better():
    r = two_nodes(hysteresis=0.1)
    assert r.place == [1, 1] and r.value == pytest.approx(0.001 + 0.008 + 0.002 + 0.001 + 64 * 8e-6)
    r.set_link(0, 1, 8000 / 0.0165, 0.001)  # 16.5 ms on the wire: 21 ms in all against 20 ms here
    assert r.replan() is False and r.place == [1, 1] and r.value > r.best_value == pytest.approx(0.02)
    r.set_link(0, 1, 8000 / 0.0200, 0.001)
    assert r.replan() is True and r.place == [0, 0]
    assert two_nodes(hysteresis=0.0).replan() is False
    eager = two_nodes(hysteresis=0.0)
    eager.set_link(0, 1, 8000 / 0.0165, 0.001)
    assert eager.replan() is True and eager.place == [0, 0]


def test_a_dead_link_forces_the_plan_and_no_host_is_said():
    r = two_nodes()
    r.set_link(1, 0, 0.0, 0.0)  # no way home
    assert r.replan() is True and r.place == [0, 0] and r.feasible
    stuck = two_nodes(cluster=ClusterSpec([NodeSpec("n0", hosts=[0]), NodeSpec("n1")]))
    assert stuck.feasible and stuck.place[1] == 1
    stuck.set_link(0, 1, 0.0, 0.0)
    assert stuck.replan() is True and not stuck.feasible and stuck.value == math.inf
    stuck.set_link(0, 1, 1e6, 0.0)
    assert stuck.replan() is True and stuck.feasible


@pytest.mark.parametrize("call, arguments, error, message", [
    ("set_link", (0, 2, 1.0, 0.0), ValueError, "set_link: dst must be in 0..1, got 2"),
    ("set_link", (0, 1, -1.0, 0.0), ValueError, "set_link: bandwidth must be finite and >= 0, got -1.0"),
    ("set_link", (0, 1, math.nan, 0.0), ValueError, "set_link: bandwidth must be finite and >= 0, got nan"),
    ("set_link", (0, 1, 1.0, math.inf), ValueError, "set_link: delay must be finite and >= 0, got inf"),
    ("set_link", (0.5, 1, 1.0, 0.0), TypeError, "set_link: src must be an int, got 0.5"),
    ("set_link", (0, 1, 1.0), TypeError, "set_link: takes 4 arguments, got 3"),
    ("set_speed", (0, 0.0), ValueError, "set_speed: factor must be finite and > 0, got 0.0"),
    ("set_speed", (-1, 1.0), ValueError, "set_speed: node must be in 0..1, got -1"),
    ("set_speed", (0, "fast"), TypeError, "set_speed: factor must be a number, got str"),
    ("set_leave", (0, 1.5), ValueError, "set_leave: share must be finite and >= 0 and <= 1, got 1.5"),
    ("set_leave", (1, 0.5), ValueError, "set_leave: exit must be in 0..0, got 1"),
    ("replan", (1,), TypeError, "replan: takes 0 arguments, got 1"),
])  # fmt: skip
def test_bad_calls_of_the_replanner(call, arguments, error, message):
    r = two_nodes()
    with pytest.raises(error) as caught:
        getattr(r, call)(*arguments)
    assert str(caught.value) == message and r.replan() is False

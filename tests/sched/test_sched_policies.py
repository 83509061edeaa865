"""The invariants that algorithms of the papers promise, policy by policy, held against both cores."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sched_worlds import local_profile, small_profile

from fastee.scheduling import Action, Costs, Decision, QoS, Scheduler

MS = 1_000_000
common = settings(deadline=None, max_examples=30, derandomize=True)
CORES = (None, False)  # what is there (the C++ core), and the twin


def make(native, policy, params=None, profile=None, thresholds=None, **more):
    more.setdefault("qos", QoS())
    return Scheduler(profile or local_profile(5), policy=policy, params=params, thresholds=thresholds, native=native, **more)


def leave(sched, samples, **admit) -> int:
    """The exit at which one task leaves a network that runs here, given what each exit says."""
    task = sched.admit(0, **admit)
    for exit, sample in enumerate(samples):
        d = sched.decide(task, exit, sample.pop("confidence", 0.0), exit, **sample)
        if d.action == Action.EXIT:
            return exit
        assert d.action == Action.CONTINUE
    raise AssertionError("a task must leave at the end of the network")


# -- patience ------------------------------------------------------------------------------------------------------------


@common
@given(labels=st.lists(st.integers(-1, 2), min_size=5, max_size=5), patience=st.integers(1, 4))
def test_patience_leaves_where_the_label_has_been_repeated_often_enough(labels, patience):
    run, expected = 0, 4
    for exit in range(1, 4):
        run = run + 1 if labels[exit] == labels[exit - 1] >= 0 else 0
        if run >= patience:
            expected = exit
            break
    for native in CORES:
        assert leave(make(native, "patience", {"patience": patience}), [{"label": label} for label in labels]) == expected


# -- distree -------------------------------------------------------------------------------------------------------------


def test_distree_delta_zero_runs_to_the_end_and_infinity_leaves_at_the_second_exit():
    for native in CORES:
        rows = [{"delta": d} for d in (math.inf, 0.0, 0.0, 0.0, 0.0)]
        assert leave(make(native, "distree", {"delta": 0.0}), [dict(r) for r in rows]) == 4
        assert leave(make(native, "distree", {"delta": math.inf}), [dict(r) for r in rows]) == 1
        nan = [{"delta": math.nan, "confidence": math.nan} for _ in range(5)]
        assert leave(make(native, "distree", {"delta": math.inf}), nan) == 4


@common
@given(deltas=st.lists(st.floats(0, 1.5), min_size=5, max_size=5), low=st.floats(0, 1), more=st.floats(0, 1))
def test_distree_exit_never_rises_when_delta_rises(deltas, low, more):
    for native in CORES:
        exits = [leave(make(native, "distree", {"delta": d}), [{"delta": x} for x in deltas]) for d in (low, low + more)]
        assert exits[1] <= exits[0]


def test_distree_waits_for_the_slowest_live_student():
    for native in CORES:
        sched = make(native, "distree", {"delta": 0.0}, small_profile(), answer_bytes=0)
        need = 10 * MS + 400_000  # the cloud's 0.4 ms and its way home outlast the 4 ms here
        assert sched.decide(sched.admit(0, need), 0, 0.0, 0) == Decision(Action.CONTINUE, 0)
        assert sched.decide(sched.admit(0, need - 1), 0, 0.0, 0).forced
        sched.set_node_up(1, False)
        assert sched.decide(sched.admit(0, 4 * MS), 0, 0.0, 0) == Decision(Action.CONTINUE, 0)


# -- jei_gate ------------------------------------------------------------------------------------------------------------


@common
@given(gates=st.lists(st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(0, 1)), min_size=4, max_size=4))
def test_jei_gate_equals_the_recursive_form_of_the_paper(gates):
    left, spent, expected = 1.0, 0.0, 4
    for m, g in enumerate(gates):
        p = max(0.0, min(g, 1.0 - spent))
        if left <= 0 or min(max(p / left, 0.0), 1.0) >= 0.5:
            expected = m
            break
        spent, left = spent + g, left * (1.0 - min(max(p / left, 0.0), 1.0))
    margins = [abs(g - (1 - sum(gates[:m])) / 2) for m, g in enumerate(gates)]
    if min(margins) < 1e-9:
        return  # the two forms round differently on the edge itself
    for native in CORES:
        assert leave(make(native, "jei_gate"), [*({"gate": g} for g in gates), {}]) == expected


def test_jei_gate_ignores_what_is_no_probability():
    for native in CORES:
        assert leave(make(native, "jei_gate"), [{"gate": g, "confidence": math.nan} for g in (math.nan, -1.0, 1.5, math.inf, 1.0)]) == 4


# -- daisy ---------------------------------------------------------------------------------------------------------------


def test_daisy_train_mode_counts_and_eval_mode_stays_in_the_range_learned():
    for native in CORES:
        train = make(native, "daisy", {"mode": "train", "u_threshold": -1.0})
        assert leave(train, [{"confidence": -0.5}] * 0 + [{"confidence": -0.5} for _ in range(5)]) == 4
        train = make(native, "daisy", {"mode": "train", "u_threshold": math.inf})
        assert leave(train, [{"confidence": -9.0} for _ in range(5)]) == 0
        assert train.snapshot()["daisy_counts"] == [1, 0, 0, 0, 0]
        for way, first, last in (("avg", 1, 2), ("min_max", 0, 3), ("threshold", 1, 1)):
            params = {"counts": [2, 10, 0, 4, 0], "range": way, "inf_threshold": 0.3, "u_threshold": 0.5}
            assert leave(make(native, "daisy", params), [{"confidence": -0.1} for _ in range(5)]) == first
            assert leave(make(native, "daisy", params), [{"confidence": -0.9} for _ in range(5)]) == last
            assert leave(make(native, "daisy", params), [{"confidence": math.nan} for _ in range(5)]) == last


def test_daisy_batch_mode_all_decides_once_for_the_batch_and_one_row_is_the_same_in_both_modes():
    params = {"counts": [0, 1, 0, 1, 0], "range": "min_max", "u_threshold": 0.5}
    for native in CORES:
        for scores, expected in (([-0.2, -0.7], [0, 0]), ([-0.2, -0.9], [1, 1]), ([-0.2, math.nan], [1, 1])):
            sched = make(native, "daisy", {**params, "batch_mode": "all"})
            tasks = [sched.admit(0) for _ in scores]
            assert [Decision.from_code(c).action for c in sched.decide_batch(tasks, 1, scores, 0)] == expected
        for score in (-0.2, -0.9):
            one = [make(native, "daisy", {**params, "batch_mode": mode}) for mode in ("all", "per_sample")]
            assert len({s.decide_batch([s.admit(0)], 1, [score], 0).item() for s in one}) == 1
    with pytest.warns(UserWarning, match="full depth"):
        assert leave(make(None, "daisy"), [{"confidence": -0.0} for _ in range(5)]) == 4


# -- dimee ---------------------------------------------------------------------------------------------------------------

TIERS = dict(nodes=("mobile", "edge", "cloud"), batch_sizes=(1,), mean=np.full((4, 3, 1), 1e-3), spread=np.zeros((4, 3, 1)),
             codecs=("raw",), wire_bytes=np.full((4, 1), 1000.0), codec_seconds=np.zeros((4, 1)), bandwidth=np.full((3, 3), 1e8),
             delay=np.full((3, 3), 1e-3))  # fmt: skip


def dimee_path(native, pool, scores, alpha=0.8, down=()):
    """(nodes visited, exit) of one sample of `pool`, one scheduler per node."""
    prof = small_profile(**TIERS)
    scheds = [make(native, "dimee", {"alpha": alpha, "tiers": [0, 1, 2], "cuts": [0, 1]}, prof, node=n, home=n) for n in range(3)]
    for s in scheds:
        for n in down:
            s.set_node_up(n, False)
    node, path, exit, segment = 0, [0], -1, 0
    task = scheds[0].admit(0)
    while True:
        d = scheds[node].decide(task, exit, scores[exit] if exit >= 0 else 0.0, 0, pool=pool)
        if d.action == Action.EXIT:
            return path, exit
        if d.action == Action.OFFLOAD:
            node = d.node
            path.append(node)
            task = scheds[node].admit(0, segment=segment)
            d = scheds[node].decide(task, -1, 0.0, 0, pool=pool)
            assert d == Decision(Action.CONTINUE, node), "whoever was sent a sample runs it"
        exit, segment = segment, segment + 1


@common
@given(pool=st.integers(0, 2), scores=st.lists(st.floats(0, 1), min_size=4, max_size=4), alpha=st.sampled_from([0.5, 0.8, 1.1]))
def test_dimee_visits_the_tiers_in_order_and_ends_at_a_cut(pool, scores, alpha):
    sure = [np.float32(u) >= np.float32(alpha) for u in scores]
    easy = ([0], 0) if sure[0] else ([0, 1], 1) if sure[1] else ([0, 1, 2], 3)
    expected = (easy, ([0, 1], 1) if sure[1] else ([0, 1, 2], 3), ([0, 2], 3))[pool]  # the plain cascade, edge first, all cloud
    for native in CORES:
        assert dimee_path(native, pool, scores, alpha) == expected


def test_dimee_edge_down_goes_to_the_cloud_and_all_down_runs_on_here():
    for native in CORES:
        assert dimee_path(native, 1, [0.1] * 4, down=(1,)) == ([0, 2], 3)
        assert dimee_path(native, 0, [0.1] * 4, down=(1,)) == ([0, 2], 3)
        assert dimee_path(native, 2, [0.1] * 4, down=(1, 2)) == ([0], 3)


# -- splitee -------------------------------------------------------------------------------------------------------------


def test_splitee_learns_the_better_arm_and_counts_every_play():
    for native in CORES:
        prof = small_profile()
        sched, again = (make(native, "splitee", {"alpha": 0.7, "layer_cost": 0.05, "offload_cost": 0.5, "explore": 0.3}, prof) for _ in range(2))
        rng, plays = random.Random(0), []
        for _ in range(300):
            scores = [0.3, 0.9 + 0.05 * rng.random(), 0.95]  # the second exit is nearly always sure, the first one never
            arms = []
            for s in (sched, again):
                task = s.admit(0)
                for exit in range(3):
                    d = s.decide(task, exit, scores[exit], 0)
                    if d.action == Action.EXIT:
                        break
                    if d.action == Action.OFFLOAD:
                        assert d.node == 1
                        s.finish(task, 0.95)
                        break
                arms.append(exit)
            assert arms[0] == arms[1], "the same world, the same arms"
            plays.append(arms[0])
        state = sched.snapshot()
        assert sum(state["splitee_plays"]) == 300 and state["splitee_plays"] == state["splitee_rewarded"]
        assert plays[:3] == [0, 1, 2] and plays.count(1) > 200
        assert state["splitee_reward"][0] == pytest.approx(state["splitee_plays"][0] * (0.95 - 0.5 - 0.05))


# -- mdi_exit ------------------------------------------------------------------------------------------------------------


def mdi(native, profile=None, thresholds=(0.9, 0.9), deadline=None, **params):
    return make(native, "mdi_exit", params, profile or small_profile(), list(thresholds), qos=QoS(deadline=deadline))


def test_mdi_exit_waits_offloads_and_is_never_idle_with_work_at_hand():
    for native in CORES:
        sched = mdi(native)
        sched.observe_queue(0, 3)
        a, b = sched.admit(0), sched.admit(0)
        assert sched.decide(a, 0, 0.9, 0).action == Action.WAIT, "C > T, not C >= T; and somebody waits before it"
        assert sched.decide(b, 0, 0.1, 0).action == Action.WAIT
        assert sched.poll(0) is None, "no report of the neighbour"
        sched.observe_queue(1, 0)
        found = [sched.poll(0) for _ in range(3)]
        sent = [f for f in found if f]
        assert len(sent) <= 1 and all(f[1].action == Action.OFFLOAD and f[1].node == 1 for f in sent), "one at a time on a link"
        sched.observe_queue(0, 0)
        sched.set_idle(True)
        task, d = sched.poll(0)
        assert d == Decision(Action.CONTINUE, 0) and task == (b if sent else a)
        assert sched.poll(0) is None, "no longer idle"


def test_mdi_exit_never_sends_to_a_longer_queue_nor_on_an_old_report():
    for native in CORES:
        for queue, age, waiting, expected in ((0, 0, 1, True), (1, 0, 1, False), (1, 0, 2, True), (0, 1600 * MS, 1, False)):
            sched = mdi(native, small_profile(mean=[[[1.0, 1.0], [4e-4, 8e-4]]] * 3))  # slow here: lhs > rhs, no chance involved
            sched.observe_queue(0, 3)
            sched.admit(1)
            sched.observe_queue(1, queue)
            for _ in range(waiting):
                assert sched.decide(sched.admit(age + 1), 0, 0.1, age + 1).action == Action.WAIT
            assert (sched.poll(age + 1) is not None) is expected


def test_mdi_exit_infinite_thresholds_never_leave_early_and_one_node_is_one_queue():
    for native in CORES:
        assert leave(mdi(native, local_profile(3), (math.inf, math.inf)), [{"confidence": 1.0} for _ in range(3)]) == 2
        sched = mdi(native, local_profile(3))
        sched.observe_queue(0, 2)
        tasks = [sched.admit(0) for _ in range(5)]
        assert {sched.decide(t, 0, 0.1, 0).action for t in tasks} == {Action.WAIT}
        sched.observe_queue(0, 0)
        order = []
        for _ in tasks:
            sched.set_idle(True)
            task, d = sched.poll(0)
            assert d.action == Action.CONTINUE
            order.append(task)
            assert sched.poll(0) is None, "busy again"
        assert order == tasks


def test_mdi_exit_waiting_task_is_answered_at_its_deadline():
    for native in CORES:
        sched = mdi(native, local_profile(3, 2e-3), deadline=0.01)
        sched.observe_queue(0, 1)
        task = sched.admit(0)
        d = sched.decide(task, 0, 0.1, 0)
        assert (d.action, d.until, sched.next_tick()) == (Action.WAIT, 6 * MS, 6 * MS), "2 ms of queue and 2 ms of segment before 10 ms"
        assert sched.poll(6 * MS - 1) is None
        assert sched.poll(6 * MS) == (task, Decision(Action.CONTINUE, 0)), "the last moment: begin it"
        late = sched.admit(6 * MS)
        assert sched.decide(late, 0, 0.1, 6 * MS).action == Action.WAIT
        assert sched.poll(15 * MS) == (late, Decision(Action.EXIT, 0, forced=True))


@common
@given(queues=st.lists(st.integers(0, 40), min_size=1, max_size=60), adapt=st.sampled_from(["rate", "threshold"]))
def test_mdi_exit_adaptation_stays_inside_its_bounds_and_moves_the_right_way(queues, adapt):
    for native in CORES:
        sched = mdi(native, adapt=adapt, mu_min=1e-3, mu_max=0.05, t_min=0.5, t_max=0.99)
        sched.tick(0)
        now = 0
        for q in queues:
            sched.observe_queue(0, q)
            before, now = sched.snapshot(), sched.next_tick()
            sched.tick(now)
            after = sched.snapshot()
            (mu0,), (mu1,), (t0,), (t1,) = before["mdi_mu"], after["mdi_mu"], before["mdi_threshold"], after["mdi_threshold"]
            assert 1e-3 <= mu1 <= 0.05 and 0.5 <= t1 <= 0.99 and sched.next_tick() == now + 500 * MS
            assert (mu1 - mu0) * (1 if q >= 20 else -1) >= 0 and (t1 - t0) * (-1 if q >= 20 else 1) >= 0
            assert sched.admit_interval() in (0.0, mu1)


def test_mdi_exit_rate_takes_over_when_the_threshold_has_nothing_left_to_give():
    for native in CORES:
        sched = mdi(native, adapt="threshold", t_min=0.85)
        sched.observe_queue(0, 30)
        sched.tick(0)
        for _ in range(5):
            assert sched.admit_interval() == 0.0
            sched.tick(sched.next_tick())
        assert sched.admit_interval() > 0


# -- what every policy keeps ---------------------------------------------------------------------------------------------


def test_tenants_have_their_own_deadline_and_hit_rate():
    for native in CORES:
        prof = local_profile(3, 2e-3, spread=np.full((3, 1, 1), 1e-3))
        sched = Scheduler(prof, QoS(deadline=1.0, hit_rate=0.5), thresholds=[0.9, 0.9], native=native, tenants=[QoS(deadline=0.003, hit_rate=0.99)])
        assert sched.decide(sched.admit(0, 3 * MS), 0, 0.1, 0).action == Action.CONTINUE, "2 ms on average"
        assert sched.decide(sched.admit(0, tenant=1), 0, 0.1, 0).forced, "2 ms + 2.33 sigma = 4.3 ms"
        with pytest.raises(ValueError, match=r"admit: tenant must be in 0\.\.1, got 2"):
            sched.admit(0, tenant=2)


def test_energy_moves_a_task_to_the_frugal_node():
    near = small_profile(mean=[[[4e-3, 8e-3], [4e-5, 8e-5]]] * 3, delay=[[0, 0], [0, 0]], bandwidth=[[0, 1e12], [1e12, 0]])
    for native in CORES:
        for weight, expected in ((0.0, 1), (1.0, 0)):
            qos = QoS(cost_weight=1.0, energy_weight=weight)
            sched = make(native, "deadline", None, near, [0.9, 0.9], qos=qos, costs=Costs(watts=[1.0, 1000.0]))
            assert sched.decide(sched.admit(0), 0, 0.1, 0).node == expected
    with pytest.raises(ValueError, match="Costs: QoS.cost_weight must be > 0"):
        make(None, "deadline", None, near, [0.9, 0.9], costs=Costs(watts=[1.0, 1000.0]))


def test_rebatching_pays_where_the_time_saved_exceeds_the_merge():
    for native in CORES:
        sched = make(native, "threshold", None, local_profile(2, batch_sizes=(1, 8), mean=[[[1e-3, 2e-3]]] * 2, spread=np.zeros((2, 1, 2))), [0.5])
        saved = 2 * (1e-3 + 3 / 7 * 1e-3) - 2e-3  # 4 + 4 rows apart, 8 together
        assert sched.rebatch(0, 4, 4, int(saved * 1e9) - 10) and not sched.rebatch(0, 4, 4, int(saved * 1e9) + 10)
        assert not sched.rebatch(0, 8, 8, 0), "full batches gain nothing"


def test_a_step_in_speed_is_noticed_and_learned_within_a_few_values():
    for native in CORES:
        sched = make(native, "threshold", None, local_profile(2, 1e-3), [0.5])
        for _ in range(60):
            sched.observe(0, 0, 1, MS)
        needed = 0
        while abs(sched.snapshot()["segment_ratio"][0][0] - 1.6) > 0.16:
            sched.observe(0, 0, 1, 1_600_000)
            needed += 1
        assert sched.snapshot()["changes"] == 1 and needed <= 8, needed  # a plain EWMA of weight 0.1 needs 13


@pytest.mark.parametrize("params, policy, message", [
    ({"t_q3": 1}, "mdi_exit", "params has no 't_q3'; the params of policy 'mdi_exit' are .* did you mean 't_q2'"),
    ({"t_q1": 20}, "mdi_exit", "params must have t_q1 < t_q2, got 20 and 20"),
    ({"a": 0.1, "b": 0.2}, "mdi_exit", "params must have 0 < b < a < 1"),
    ({"z": 0.0}, "mdi_exit", r"params\['z'\] must be in 1e-09..1.0, got 0.0"),
    ({"adapt": "both"}, "mdi_exit", r"params\['adapt'\] must be one of \['none', 'rate', 'threshold'\], got 'both'"),
    ({"delta": [0.1, 0.2, 0.3]}, "distree", r"params\['delta'\] must hold 2 numbers, got 3"),
    ({"delta": math.nan}, "distree", r"params\['delta'\] must hold numbers in 0.0..inf, got nan"),
    ({"cuts": [1, 0]}, "dimee", r"params\['cuts'\] must rise"),
    ({"tiers": [0, 1, 2]}, "dimee", r"params\['tiers'\] must hold numbers in 0..1, got 2"),
    ({"cloud": 7}, "splitee", r"params\['cloud'\] must be in -1..1, got 7"),
    ({"patience": 0}, "patience", r"params\['patience'\] must be in 1..1024, got 0"),
    ({"counts": [1, 2]}, "daisy", r"params\['counts'\] must hold 3 numbers, got 2"),
    ({"alpha": 1}, "deadline", "params has no 'alpha'; policy 'deadline' has none"),
])  # fmt: skip
def test_params_are_checked_by_name(params, policy, message):
    with pytest.raises(ValueError, match="Scheduler: " + message):
        make(None, policy, params, small_profile(), [0.9, 0.9])

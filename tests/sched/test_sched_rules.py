"""What every scheduler promises, held against both cores."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sched_worlds import local_profile, play, random_arguments, small_profile

from fastee.scheduling import POLICIES, Action, Decision, QoS, Scheduler

MS = 1_000_000
common = settings(deadline=None, max_examples=30, derandomize=True)


def make(native, profile=None, deadline=1.0, thresholds=(0.9, 0.9), **more):
    qos = more.pop("qos", QoS(deadline=deadline, hit_rate=0.99))
    return Scheduler(profile or small_profile(), qos, thresholds=list(thresholds), native=native, **more)


# -- waiting -----------------------------------------------------------------------------------------------------------


def crowded(native, now=0):
    """A scheduler whose own queue is too long and whose link is full of tasks with an answer: the last task admitted had to wait."""
    sched = make(native, deadline=0.05)
    sched.observe_queue(0, 100)
    for _ in range(200):
        task = sched.admit(now)
        if sched.decide(task, 0, 0.5, now).action != Action.OFFLOAD:
            break
        sched.finish(task)
    else:
        raise AssertionError("the link never filled")
    task = sched.admit(now)
    return sched, task, sched.decide(task, -1, math.nan, now)


def test_a_task_without_an_answer_is_bound_late(native):
    sched = make(native)
    sched.observe_queue(0, 2)  # two before it here, although a batch never held more than one
    kinds = []
    while not kinds or kinds[-1] == Action.OFFLOAD:
        kinds.append(sched.decide(sched.admit(0), -1, math.nan, 0).action)
    assert kinds[-1] == Action.WAIT  # although here and there are both in time
    assert len(kinds) == 4  # two messages may be before one's own, so the third still goes
    with_answer = sched.decide(sched.admit(0), 0, 0.5, 0).action
    assert with_answer in (Action.CONTINUE, Action.OFFLOAD)
    sched.observe_queue(0, 1)
    assert sched.poll(0)[1] == Decision(Action.CONTINUE, 0)


def test_a_task_without_a_deadline_joins_the_line(native):
    sched = make(native, deadline=None)
    sched.observe_queue(0, 100)
    for _ in range(50):
        assert sched.decide(sched.admit(0), -1, math.nan, 0).action in (Action.CONTINUE, Action.OFFLOAD)


def test_a_task_without_an_answer_waits_while_it_could_still_be_in_time_alone(native):
    sched, task, decision = crowded(native)
    assert decision.action == Action.WAIT
    assert decision.until == 46 * MS  # 4 ms before its deadline the first segment could begin here
    assert sched.poll(2 * MS) is None
    sched.observe_queue(0, 1)
    assert sched.poll(3 * MS) == (task, Decision(Action.CONTINUE, 0))
    assert sched.snapshot()["rejected"] == 0


def test_who_waited_to_the_last_moment_in_vain_is_rejected(native):
    sched, task, decision = crowded(native)
    assert sched.poll(decision.until - 1) is None
    assert sched.poll(decision.until) == (task, Decision(Action.REJECT))


def test_a_task_that_cannot_be_in_time_even_alone_does_not_wait(native):
    sched, _, _ = crowded(native)
    assert sched.decide(sched.admit(0, 3 * MS), -1, math.nan, 0).action == Action.REJECT


def test_who_has_an_answer_takes_it_where_a_run_would_cost_another_one_its_last_moment(native):
    sched, task, decision = crowded(native)
    assert decision.until == 46 * MS
    other = sched.admit(0, 1000 * MS)
    assert sched.decide(other, 0, 0.5, 41 * MS).action in (Action.CONTINUE, Action.OFFLOAD)  # a run takes 4 ms
    assert sched.decide(other, 0, 0.5, 43 * MS) == Decision(Action.EXIT, 0, forced=True)
    sched.finish(task)
    assert sched.decide(sched.admit(43 * MS, 1000 * MS), 0, 0.5, 43 * MS).action != Action.EXIT


def test_an_offload_that_the_host_could_not_send_leaves_no_trace(native):
    sched = make(native, deadline=0.05)
    sched.observe_queue(0, 100)
    task = sched.admit(0)
    first = sched.decide(task, -1, math.nan, 0)
    assert first.action == Action.OFFLOAD
    for _ in range(1000):
        assert sched.decide(task, -1, math.nan, 0) == first


def test_a_walk_over_those_who_wait_ends_although_each_comes_back(native):
    sched, _, _ = crowded(native)
    sched.decide(sched.admit(0), -1, math.nan, 0)
    assert sched.snapshot()["waiting"] == 2
    asked = 0
    sched.observe_queue(0, 0)
    while (found := sched.poll(2 * MS)) is not None:
        asked += 1
        assert asked <= 2
        sched.observe_queue(0, 100)  # it did not get the place
        assert sched.decide(found[0], -1, math.nan, 2 * MS).action == Action.WAIT
        sched.observe_queue(0, 0)
    assert asked == 2


# -- the exit rule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["deadline", "threshold"])
def test_zero_thresholds_exit_at_first_and_inf_never_early(native, policy):
    first = make(native, thresholds=(0.0, 0.0), policy=policy)
    assert first.decide(first.admit(0), 0, 0.0, 0) == Decision(Action.EXIT, 0)
    never = make(native, thresholds=(math.inf, math.inf), policy=policy, deadline=None)
    task = never.admit(0)
    for exit in (0, 1):
        assert never.decide(task, exit, 1e30, exit).action in (Action.CONTINUE, Action.OFFLOAD)
    end = never.decide(task, 2, 0.0, 9)
    assert end.action == Action.EXIT and not end.forced
    assert never.snapshot()["per_exit"] == [0, 0, 1]


def test_inf_threshold_is_not_an_exit_for_the_gain_table_either(native):
    sched = make(native, local_profile(gain=np.full((2, 4), -0.5)), thresholds=(math.inf, 0.9))
    task = sched.admit(0)
    assert sched.decide(task, 0, 0.99, 0).action == Action.CONTINUE
    assert sched.decide(task, 1, 0.1, 0).action == Action.EXIT


@pytest.mark.parametrize("policy", ["deadline", "threshold"])
def test_nan_never_exits_early_but_ends_at_the_end(native, policy):
    sched = make(native, local_profile(gain=np.full((2, 4), -0.5)), thresholds=(-math.inf, -math.inf), policy=policy)
    task = sched.admit(0)
    assert sched.decide(task, 0, math.nan, 0).action == Action.CONTINUE
    assert sched.decide(task, 1, math.nan, 0).action == Action.CONTINUE
    assert sched.decide(task, 2, math.nan, 0) == Decision(Action.EXIT, 0)


def test_threshold_is_compared_in_fp32_like_the_kernels(native):
    for threshold in (0.1, 0.3, 0.7, 0.9):
        sched = make(native, thresholds=(threshold, 0.9))
        assert sched.decide(sched.admit(0), 0, float(np.float32(threshold)), 0).action == Action.EXIT
        assert sched.decide(sched.admit(0), 0, threshold, 0).action == Action.EXIT
        below = float(np.nextafter(np.float32(threshold), np.float32(0)))
        assert sched.decide(sched.admit(0), 0, below, 0).action != Action.EXIT


# -- the deadline ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["deadline", "threshold"])
def test_deadline_past_refuses_rejects_or_forces(native, policy):
    sched = make(native, policy=policy)
    assert sched.admit(10, 10) == -1 and sched.admit(10, 5) == -1
    assert sched.decide(sched.admit(10, 20), -1, 0.0, 21) == Decision(Action.REJECT)
    assert sched.decide(sched.admit(21, 23), 0, 0.1, 24) == Decision(Action.EXIT, 0, forced=True)
    sure = sched.decide(sched.admit(24, 26), 0, 0.95, 27)
    assert sure == Decision(Action.EXIT, 0), "an answer that satisfies the rule is not forced, only late"
    snap = sched.snapshot()
    assert (snap["refused_late"], snap["rejected"], snap["forced"], snap["late"]) == (2, 1, 1, 2)


@pytest.mark.parametrize("policy", ["deadline", "threshold"])
def test_stops_exactly_where_the_next_segment_no_longer_fits(native, policy):
    sched = make(native, local_profile(seconds=2e-3), policy=policy, deadline=None)
    fits, late = sched.admit(0, 10 * MS), sched.admit(0, 10 * MS)
    assert sched.decide(fits, 0, 0.1, 8 * MS) == Decision(Action.CONTINUE, 0)
    assert sched.decide(late, 0, 0.1, 8 * MS + 1) == Decision(Action.EXIT, 0, forced=True)


def test_hit_rate_adds_the_quantile_of_the_spread(native):
    prof = local_profile(seconds=2e-3, spread=np.full((3, 1, 1), 1e-3))
    for hit_rate, sure_ns in ((0.5, 2_000_000), (0.99, 2_000_000 + 2_326_347)):
        sched = make(native, prof, qos=QoS(hit_rate=hit_rate))
        assert sched.snapshot()["next_answer_ns"][0][0] == pytest.approx(sure_ns, abs=1)
        assert sched.decide(sched.admit(0, sure_ns + 2), 0, 0.1, 0).action == Action.CONTINUE
        assert sched.decide(sched.admit(0, sure_ns - 2), 0, 0.1, 0).forced


@common
@given(seed=st.integers(0, 10_000), exit=st.integers(-1, 5), short=st.integers(1, 40 * MS), more=st.integers(0, 200 * MS))
def test_a_longer_deadline_never_forces_what_a_shorter_did_not(seed, exit, short, more):
    for native in (True, False):
        arguments = random_arguments(np.random.default_rng(seed))
        arguments["max_tasks"], stopped = 1000, []
        for deadline in (short, short + more):
            sched = Scheduler(**arguments, native=native and None)
            play(sched, np.random.default_rng(seed), 40)
            now = 10**12
            d = sched.decide(sched.admit(now, now + deadline), min(exit, sched.profile.num_exits), 0.2, now)
            stopped.append(d.forced or d.action == Action.REJECT)
        assert not (stopped[1] and not stopped[0])


def test_clock_backwards_is_held_and_counted(native):
    sched = make(native, local_profile(seconds=2e-3))
    task = sched.admit(100 * MS, 103 * MS)
    assert sched.decide(task, 0, 0.1, 102 * MS).forced
    task = sched.admit(0, 103 * MS)  # the clock stands at 102 ms
    assert sched.decide(task, 0, 0.1, -5).forced
    assert sched.snapshot()["clock_backwards"] == 2


# -- placement ---------------------------------------------------------------------------------------------------------


def test_here_there_and_the_codec(native):
    """4 ms per segment here, 0.4 ms there behind 10 ms: all three segments are sooner here, a slow link or not."""
    near = make(native)
    assert near.decide(near.admit(0), -1, 0.0, 0) == Decision(Action.CONTINUE, 0)
    slow_here = small_profile(mean=[[[40e-3, 80e-3], [4e-4, 8e-4]]] * 3)
    far = make(native, slow_here)
    assert far.decide(far.admit(0), -1, 0.0, 0) == Decision(Action.OFFLOAD, 1, 1), "int8 is sooner on 20 Mbit/s"
    slow_codec = small_profile(mean=slow_here.mean, codec_seconds=[[0, 0.5]] * 3)
    raw = make(native, slow_codec)
    assert raw.decide(raw.admit(0), -1, 0.0, 0) == Decision(Action.OFFLOAD, 1, 0), "raw is sooner than half a second of coding"


def test_threshold_policy_offloads_only_when_here_is_too_late(native):
    sched = make(native, small_profile(mean=[[[40e-3, 80e-3], [4e-4, 8e-4]]] * 3), policy="threshold")
    assert sched.decide(sched.admit(0, 45 * MS), 0, 0.1, 0) == Decision(Action.CONTINUE, 0)
    assert sched.decide(sched.admit(0, 35 * MS), 0, 0.1, 0) == Decision(Action.OFFLOAD, 1, 1)
    assert sched.decide(sched.admit(0, 5 * MS), 0, 0.1, 0) == Decision(Action.EXIT, 0, forced=True)


@pytest.mark.parametrize("policy", ["deadline", "threshold"])
def test_nothing_goes_to_a_node_or_over_a_link_that_is_down(native, policy):
    hosts = np.array([[True, False], [False, True], [False, True]])
    sched = make(native, policy=policy, hosts=hosts)
    ask = lambda: sched.decide(sched.admit(0), 0, 0.1, 0).action
    assert ask() == Action.OFFLOAD
    sched.set_link_up(0, 1, False)
    assert ask() == Action.EXIT
    sched.set_link_up(0, 1, True)
    assert ask() == Action.OFFLOAD
    sched.set_node_up(1, False)
    assert ask() == Action.EXIT
    sched.set_node_up(1, True)
    sched.set_link_up(1, 0, False)  # no way back for the answer
    assert ask() == Action.EXIT
    no_link = make(native, small_profile(bandwidth=np.zeros((2, 2))), policy=policy, hosts=hosts)
    assert no_link.decide(no_link.admit(0), 0, 0.1, 0).forced


def test_a_hosted_elsewhere_segment_is_never_run_here(native):
    hosts = np.array([[True, True], [False, True], [True, True]])
    sched = make(native, hosts=hosts)
    assert sched.decide(sched.admit(0), 0, 0.1, 0).action == Action.OFFLOAD


def test_queue_moves_work_away(native):
    sched = make(native)
    assert sched.decide(sched.admit(0), 0, 0.1, 0).action == Action.CONTINUE
    sched.observe_queue(0, 50)
    assert sched.decide(sched.admit(0), 0, 0.1, 0).action == Action.OFFLOAD
    sched.observe_queue(0, 0)
    sched.observe_queue(1, 100)
    assert sched.decide(sched.admit(0), 0, 0.1, 0).action == Action.CONTINUE


@pytest.mark.parametrize("policy", ["deadline", "threshold"])
def test_queued_tasks_must_be_done_in_time_too(native, policy):
    sched = make(native, local_profile(seconds=2e-3), policy=policy)
    sched.observe_queue(0, 3)
    assert sched.decide(sched.admit(0, 8 * MS + 1), 0, 0.1, 0).action == Action.CONTINUE
    assert sched.decide(sched.admit(0, 8 * MS - 1), 0, 0.1, 0).forced


@pytest.mark.parametrize("policy", ["deadline", "threshold"])
def test_earlier_batches_must_be_done_in_time_too(native, policy):
    prof = local_profile(batch_sizes=(1, 8), mean=[[[1e-3, 5e-3]]] * 3, spread=np.zeros((3, 1, 2)))
    for deadline, forced in ((15 * MS + 1, False), (15 * MS - 1, True)):  # 20 rows: three batches of 8
        sched = make(native, prof, policy=policy)
        codes = sched.decide_batch([sched.admit(0, deadline) for _ in range(20)], 0, [0.1] * 20, 0)
        assert [Decision.from_code(c).forced for c in codes] == [forced] * 20


def test_no_answer_comes_home_to_a_node_that_is_down(native):
    sched = make(native, node=1, home=0)
    assert sched.decide(sched.admit(0), 0, 0.1, 0).action == Action.CONTINUE
    sched.set_node_up(0, False)
    assert sched.decide(sched.admit(0), 0, 0.1, 0).forced


def test_own_sends_fill_the_link(native):
    """Rows of one batch share the link: 16 KB at 20 Mbit/s take 6.6 ms each, so after some of them here is sooner again."""
    prof = small_profile(batch_sizes=(1, 64), mean=[[[40e-3, 80e-3], [4e-4, 8e-4]]] * 3, codec_seconds=[[0, 1.0]] * 3)
    sched = make(native, prof, deadline=None)
    codes = sched.decide_batch([sched.admit(0) for _ in range(40)], 0, np.full(40, 0.1), 0)
    actions = [Decision.from_code(c).action for c in codes]
    sent = actions.count(Action.OFFLOAD)
    assert 0 < sent < 40 and actions == [Action.OFFLOAD] * sent + [Action.CONTINUE] * (40 - sent)
    later = sched.decide(sched.admit(10**10), 0, 0.1, 10**10)  # the link is free again; hysteresis keeps small differences
    assert later.action == Action.OFFLOAD


def test_a_batch_takes_back_all_that_could_not_be_sent_before_it_decides(native):
    """The first row has 30 ms for a way of 22; asked again it would queue behind twenty messages of 1.6 ms that never left."""
    sched = make(native, small_profile(mean=[[[1.0, 2.0], [4e-4, 8e-4]]] * 3), policy="threshold")
    tasks = [sched.admit(0, 30 * MS), *(sched.admit(0) for _ in range(20))]
    first = sched.decide_batch(tasks, 0, [0.1] * 21, 0).tolist()
    assert {Decision.from_code(c).action for c in first} == {Action.OFFLOAD}
    assert sched.decide_batch(tasks, 0, [0.1] * 21, 0).tolist() == first


@pytest.mark.filterwarnings("ignore:.*daisy")
@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_in_one_bucket_equals_the_twin_asked_row_by_row(native, policy):
    """With one batch size above the number of rows nothing is left of a batch but its rows, links and learning included."""
    kinds = set()
    for seed in range(24):
        rng = np.random.default_rng(seed)
        arguments = random_arguments(rng, policy, alike=True)
        arguments["max_tasks"], now = 64, 0
        if policy == "daisy":
            arguments["params"]["batch_mode"] = "per_sample"
        many, one = Scheduler(**arguments, native=native), Scheduler(**arguments, native=False)
        exit = 0
        for _ in range(12):
            now += int(rng.integers(0, 2)) * 10 * MS  # a moment may see several batches and arrivals
            rows = int(rng.integers(1, 16))
            if rng.random() < 0.3:
                exit = int(rng.integers(-1, many.profile.num_exits + 1))
            deadline = None if rng.random() < 0.5 else now + 80 * MS
            tasks, same = ([s.admit(now, deadline) for _ in range(rows)] for s in (many, one))
            assert tasks == same
            scores, labels = rng.random(rows), rng.integers(-1, 2, rows)
            codes = many.decide_batch(np.array(tasks), exit, scores, now, {"label": labels}).tolist()
            assert codes == [one.decide(t, exit, float(u), now, label=int(x)).code for t, u, x in zip(tasks, scores, labels, strict=True)], seed
            kinds |= {Decision.from_code(c).action for c in codes}
            gone = [t for t, c in zip(tasks, codes, strict=True) if Decision.from_code(c).action == Action.OFFLOAD and rng.random() < 0.7]
            peer, queue, what = int(rng.integers(len(many.profile.nodes))), int(rng.integers(0, 3)), rng.random()
            for s in (many, one):
                for task in gone:
                    s.finish(task)
                if what < 0.4:
                    s.observe_link(s.node, peer, 100, 20 * MS, now)  # so short that only its arrival counts
                elif what < 0.5:
                    s.observe_queue(peer, queue)
        assert many.snapshot() == one.snapshot(), seed
    assert {Action.EXIT, Action.CONTINUE, Action.REJECT} < kinds, "a comparison in which little happens proves little"


def tiers(native, **more):
    """Node 0 with links of 20 Mbit/s and 10 ms to two equal machines: a message is 1.6 ms on the wire."""
    rate = np.array([[0, 20e6, 20e6], [20e6, 0, 20e6], [20e6, 20e6, 0]])
    profile = small_profile(
        nodes=("phone", "edge", "cloud"), mean=[[[0.5, 1.0], [4e-4, 8e-4], [5e-4, 1e-3]]] * 3, spread=np.zeros((3, 3, 2)), codecs=("raw",),
        wire_bytes=[[4000]] * 3, codec_seconds=[[0]] * 3, bandwidth=rate, delay=np.where(rate > 0, 0.01, 0),
    )  # fmt: skip
    return make(native, profile, policy="threshold", deadline=0.1, **more)


def sent_in_time(sched, now=0, most=200):
    """How many tasks are sent off at `now`, and where to, until no place is in time."""
    places = []
    for _ in range(most):
        d = sched.decide(sched.admit(now), -1, math.nan, now)
        if d.action != Action.OFFLOAD:
            return places
        places.append(d.node)
    raise AssertionError("the links never filled")


def test_links_that_share_a_radio_wait_for_one_another(native):
    apart, shared = sent_in_time(tiers(native)), sent_in_time(tiers(native, media=[[1, 2]]))
    assert set(apart) == {1, 2} and len(apart) == 2 * len(shared)
    assert sent_in_time(tiers(native, media=[[0, 1], [2]])) == apart  # this node itself has no link to share


def test_a_message_that_is_not_there_holds_the_link_and_its_arrival_frees_it(native):
    def filled(told):
        sched = tiers(native, media=[[1, 2]])
        sched.decide(sched.admit(-100 * MS), -1, math.nan, -100 * MS)
        sched.observe_link(0, 1, 4000, 11_600_000, *([-88 * MS] if told else []))  # who tells it once is believed to tell it always
        return sched, sent_in_time(sched)

    (silent, before), (told, same) = filled(False), filled(True)
    assert before == same
    # 40 ms later 24 more should be there. Who is told nothing believes it; who waits in vain for the first knows that all are behind it.
    assert len(sent_in_time(silent, 40 * MS)) > 20
    more = sent_in_time(told, 40 * MS)
    assert len(more) < 10
    for i, node in enumerate(same + more):  # the radio was silent for 34 ms and is as fast as ever since
        now = 46 * MS + i * 1_600_000
        told.observe_link(0, node, 4000, 11_600_000, now)
    assert len(sent_in_time(told, now)) > 20


def test_a_lost_message_does_not_close_its_link_for_ever(native):
    sched = tiers(native)
    sched.decide(sched.admit(0), -1, math.nan, 0)
    sched.observe_link(0, 1, 4000, 11_600_000, now=12 * MS)
    usual = len(sent_in_time(sched, 100 * MS))
    later = 1_300 * MS  # a second after the watched one was due
    assert len(sent_in_time(sched, later)) == usual


def test_batch_costs_count_only_rows_that_stay(native):
    prof = local_profile(batch_sizes=(1, 8), mean=[[[1e-3, 5e-3]]] * 3, spread=np.zeros((3, 1, 2)))
    sched = make(native, prof)
    tasks = [sched.admit(0, 3 * MS) for _ in range(8)]
    codes = sched.decide_batch(tasks, 0, [0.95] * 7 + [0.1], 0)
    assert [Decision.from_code(c).action for c in codes] == [Action.EXIT] * 7 + [Action.CONTINUE]
    tasks = [sched.admit(0, 3 * MS) for _ in range(8)]
    assert all(Decision.from_code(c).forced for c in sched.decide_batch(tasks, 0, [0.1] * 8, 0)), "8 rows need 5 ms"


def test_hysteresis_keeps_the_place_until_another_is_a_tenth_sooner(native):
    prof = small_profile(mean=[[[10e-3, 10e-3], [1e-6, 1e-6]]] * 3, wire_bytes=np.full((3, 2), 1.0), codec_seconds=np.zeros((3, 2)),
                         delay=[[0, 4.9e-3], [4.9e-3, 0]])  # fmt: skip
    hosts = np.array([[True, True], [True, True], [True, True]])
    sched = make(native, prof, hosts=hosts, thresholds=(math.inf, math.inf))
    ask = lambda: sched.decide(sched.admit(0), 1, 0.1, 0)  # last segment: 10 ms here against 9.8 ms there
    assert ask().node == 1
    for _ in range(60):  # here becomes 9.4 ms: sooner, but by less than a tenth
        sched.observe(2, 0, 1, 9_400_000)
    assert sched.snapshot()["completion_ns"][2][0] < sched.snapshot()["completion_ns"][2][1]
    assert ask().node == 1
    for _ in range(60):
        sched.observe(2, 0, 1, 8_000_000)
    assert ask().node == 0
    for _ in range(60):  # and back: 10 ms again is later, but not by a tenth
        sched.observe(2, 0, 1, 10_000_000)
    assert ask().node == 0


# -- the gain table ----------------------------------------------------------------------------------------------------


def test_gain_against_the_cost_of_time(native):
    gain = np.array([[0.05, 0.02, 0.0, -0.01]] * 2)
    prof = local_profile(seconds=10e-3, gain=gain)
    ask = lambda s, u: s.decide(s.admit(0), 1, u, 0).action  # one segment left: 10 ms
    free = Scheduler(prof, QoS(), native=native)
    assert [ask(free, u) for u in (0.1, 0.3, 0.6, 0.9)] == [Action.CONTINUE, Action.CONTINUE, Action.EXIT, Action.EXIT]
    dear = Scheduler(prof, QoS(cost_weight=3.0), native=native)  # 10 ms cost 0.03
    assert [ask(dear, u) for u in (0.1, 0.3, 0.6)] == [Action.CONTINUE, Action.EXIT, Action.EXIT]
    safe = Scheduler(prof, QoS(cost_weight=3.0, max_drop=0.01), native=native)
    assert [ask(safe, u) for u in (0.1, 0.3, 0.6)] == [Action.CONTINUE, Action.CONTINUE, Action.EXIT]
    ruled = Scheduler(prof, QoS(), thresholds=[0.2, 0.2], native=native)
    assert ask(ruled, 0.3) == Action.EXIT, "a score above its threshold exits whatever the table says"


def test_gain_range_covers_scores_that_are_not_probabilities(native):
    prof = local_profile(gain=[[0.1, -0.1]] * 2, gain_range=(-2.0, 0.0))
    sched = Scheduler(prof, QoS(), native=native)
    ask = lambda u: sched.decide(sched.admit(0), 0, u, 0).action
    assert [ask(u) for u in (-math.inf, -9.0, -1.5, -0.5, 3.0)] == [Action.CONTINUE] * 3 + [Action.EXIT] * 2


# -- what is learned ---------------------------------------------------------------------------------------------------


def test_observe_corrects_and_ignores_outliers(native):
    sched = make(native, local_profile(seconds=1e-3))
    ratio = lambda: sched.snapshot()["segment_ratio"][1][0]
    for _ in range(40):
        sched.observe(1, 0, 1, 2 * MS)
    assert ratio() == pytest.approx(2.0, rel=0.02)
    assert sched.snapshot()["next_answer_ns"][1][0] == pytest.approx(2 * MS, rel=0.4)
    for _ in range(4):
        sched.observe(1, 0, 1, 900 * MS)
    assert ratio() == pytest.approx(2.0, rel=0.02) and sched.snapshot()["outliers"] == 4
    sched.observe(1, 0, 1, 900 * MS)
    assert ratio() == pytest.approx(900.0), "the fifth in a row is a new regime"
    assert sched.snapshot()["segment_ratio"][0][0] == 1.0


def test_the_first_observations_weigh_a_half_a_third_a_quarter_and_then_a_tenth(native):
    sched, ratio = make(native, local_profile(seconds=1e-3)), 1.0
    for i in range(12):
        ratio += max(0.1, 1 / (i + 2)) * (2.0 - ratio)
        sched.observe(0, 0, 1, 2 * MS)
        assert sched.snapshot()["segment_ratio"][0][0] == pytest.approx(ratio, rel=1e-12)


def test_observe_scales_with_the_batch(native):
    prof = local_profile(batch_sizes=(1, 8), mean=[[[1e-3, 8e-3]]] * 3, spread=np.zeros((3, 1, 2)))
    sched = make(native, prof)
    for batch, ns in ((1, MS), (4, 4 * MS), (8, 8 * MS), (16, 16 * MS)):
        sched.observe(0, 0, batch, ns)
    assert sched.snapshot()["segment_ratio"][0][0] == 1.0


def test_observe_link_corrects_the_rate(native):
    sched = make(native)
    for _ in range(40):
        sched.observe_link(0, 1, 25_000, 10 * MS + 20 * MS)  # 10 ms on the wire were expected
    assert sched.snapshot()["link_ratio"][0][1] == pytest.approx(2.0, rel=0.02)
    assert sched.snapshot()["link_ratio"][1][0] == 1.0
    before = sched.snapshot()["ignored"]
    sched.observe_link(0, 1, 10, 30 * MS)  # ten bytes tell the delay only
    sched.observe_link(1, 1, 10_000, MS)
    assert sched.snapshot()["ignored"] == before + 2


def test_exit_probabilities_are_learned_and_change_the_choice(native):
    sched = make(native, deadline=None)
    for i in range(64):
        sched.finish(sched.admit(i))
        task = sched.admit(i)
        sched.decide(task, 0, 0.95 if i % 8 else 0.1, i)
        sched.finish(task)
    assert sched.snapshot()["exit_probability"][0] == pytest.approx(56 / 64, abs=0.03)


# -- tasks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_every_admitted_task_ends_exactly_once(native, seed):
    sched = Scheduler(**random_arguments(np.random.default_rng(seed)), native=native)
    log = play(sched, np.random.default_rng(seed), 400)
    snap = sched.snapshot()
    assert snap["admitted"] == snap["exits"] + snap["rejected"] + snap["finished"] + snap["live"]
    assert sum(snap["per_exit"]) == snap["exits"] and snap["live"] <= snap["capacity"]
    handles = [entry for entry in log if type(entry) is int and entry >= 0]
    assert len(handles) == len(set(handles)) == snap["admitted"], "a handle is never given twice"
    left = sum(sched.finish(task) for task in handles)
    assert left == snap["live"] and sched.snapshot()["live"] == 0


def test_stale_handles_are_harmless(native):
    sched = make(native, max_tasks=2)
    task = sched.admit(0)
    assert sched.decide(task, 0, 0.95, 0).action == Action.EXIT
    for handle in (task, -1, 7, 2**62, -(2**63), 2**63 - 1):
        assert sched.decide(handle, 0, 0.5, 0) == Decision(Action.REJECT)
        assert sched.finish(handle) is False
    again = sched.admit(0)
    assert again != task and again & 0xFFFFFFFF == task & 0xFFFFFFFF, "the slot is used again under another handle"
    assert sched.decide(task, 0, 0.5, 0).action == Action.REJECT
    assert sched.decide(again, 0, 0.1, 0).action != Action.REJECT
    assert sched.snapshot()["stale"] == 13


def test_capacity_is_a_limit_not_a_crash(native):
    sched = make(native, max_tasks=2)
    a, b = sched.admit(0), sched.admit(0)
    assert sched.admit(0) == -1 and sched.snapshot()["refused_full"] == 1
    assert sched.finish(a) is True and sched.finish(a) is False
    assert sched.admit(0) >= 0 and sched.finish(b)


def test_a_task_that_arrives_with_answered_heads_may_be_forced_out(native):
    sched = make(native, local_profile())
    assert sched.decide(sched.admit(0, 10, segment=2), -1, 0.0, 5) == Decision(Action.EXIT, 0, forced=True)
    assert sched.decide(sched.admit(5, 10, segment=0), -1, 0.0, 5) == Decision(Action.REJECT)
    assert sched.snapshot()["per_exit"] == [0, 1, 0]


@pytest.mark.parametrize("rows", [0, 1, 7, 64])
def test_decide_batch_without_links_equals_decide(native, rows):
    rng = np.random.default_rng(rows)
    one, many = (make(native, local_profile(), deadline=None) for _ in range(2))
    scores = rng.random(rows)
    codes = many.decide_batch(np.array([many.admit(0) for _ in range(rows)], np.int64), 0, scores, 5)
    assert codes.dtype == np.int64 and codes.shape == (rows,)
    assert [Decision.from_code(c) for c in codes] == [one.decide(one.admit(0), 0, float(u), 5) for u in scores]


@pytest.mark.parametrize("kind", ["list", "numpy", "strided", "fp32", "torch", "int32 tasks"])
def test_decide_batch_takes_any_array(native, kind):
    torch = pytest.importorskip("torch")
    sched, scores = make(native), np.array([0.25, 0.95, 0.5, math.nan, 0.9375])
    tasks = np.array([sched.admit(0) for _ in scores])
    wide = np.zeros((5, 3), np.int64), np.zeros((5, 3))
    wide[0][:, 1], wide[1][:, 1] = tasks, scores
    given = {"list": (tasks.tolist(), scores.tolist()), "numpy": (tasks, scores), "strided": (wide[0][:, 1], wide[1][:, 1]),
             "fp32": (tasks, scores.astype(np.float32)), "torch": (torch.from_numpy(tasks), torch.from_numpy(scores).float()),
             "int32 tasks": (tasks.astype(np.int32), scores)}[kind]  # fmt: skip
    codes = sched.decide_batch(given[0], 0, given[1], 0)
    assert codes.dtype == np.int64
    assert [Decision.from_code(c).action == Action.EXIT for c in codes] == [False, True, False, False, True]


def test_a_network_without_exits(native):
    sched = make(native, local_profile(segments=1), thresholds=())
    task = sched.admit(0)
    assert sched.decide(task, -1, 0.0, 0).action == Action.CONTINUE
    assert sched.decide(task, 0, math.nan, 0) == Decision(Action.EXIT, 0)


# -- decisions ---------------------------------------------------------------------------------------------------------


@common
@given(st.sampled_from(Action), st.integers(-1, 1023), st.integers(-1, 63), st.booleans(), st.integers(0, 2**31 - 1), st.integers(0, 2**40))
def test_codes_round_trip(action, node, codec, forced, wait_us, now):
    import pickle

    d = Decision(action, node, codec, forced, wait_us, now)
    back = Decision.from_code(d.code, now)
    assert (back.action, back.node, back.codec, back.forced, back.until) == (action, node, codec, forced, d.until)
    assert d == back == pickle.loads(pickle.dumps(d)) and hash(d) == hash(back)
    assert d.until == (now + wait_us * 1000 if action == Action.WAIT else 0)


def test_decision_is_immutable_and_refuses_foreign_codes():
    with pytest.raises(AttributeError, match="immutable"):
        Decision(Action.EXIT).node = 3
    for code in (-1, 5, 7, 1 << 63):
        with pytest.raises(ValueError, match=f"from_code: code must be a packed Decision, got {code}"):
            Decision.from_code(code)

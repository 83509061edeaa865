import math
import re
import time

import pytest
import torch
from small_nets import ResNet, images

import fastee
from fastee.nn.deadline import run_deadline
from fastee.scheduling import Profile, QoS, Scheduler, rules


def profile_of(seconds, rows=(1, 64)):
    s = len(seconds)
    table = [[[t] * len(rows)] for t in seconds]
    return Profile(
        nodes=("here",), batch_sizes=rows, mean=table, spread=[[[0.0] * len(rows)]] * s, codecs=("raw",), wire_bytes=[[1.0]] * s,
        codec_seconds=[[0.0]] * s, bandwidth=[[0.0]], delay=[[0.0]],
    )  # fmt: skip


@pytest.fixture
def net():
    torch.manual_seed(0)
    return fastee.attach(ResNet().eval(), ["layer1", "layer2"], 10, images(2))


@pytest.mark.parametrize("deadline", [0, -1.0, 1e-9])
def test_rows_that_are_late_leave_at_the_first_exit_forced(net, deadline):
    net.profile = profile_of([1e-4] * 3)
    x = images(5)
    out = net(x, deadline=deadline)
    assert out.exit.tolist() == [0] * 5 and out.forced.tolist() == [True] * 5
    with torch.no_grad():
        want = net.heads[0](net.run_segment(0, (x,))[0])
    torch.testing.assert_close(out.logits, want, rtol=1e-4, atol=1e-4)
    net.set_rule(thresholds=[-1.0, 0.5])  # they would have left there anyway
    assert net(x, deadline=deadline).forced.tolist() == [False] * 5


@pytest.mark.parametrize("deadline", [100.0, math.inf, 1e300])
def test_a_far_deadline_changes_nothing(net, deadline):
    net.profile = profile_of([1e-4] * 3)
    x = images(12)
    with torch.no_grad():
        u = net.exit_step(0, net.run_segment(0, (x,))).confidence.sort().values
    net.set_rule(thresholds=[float((u[5] + u[6]) / 2), math.inf])
    want, got = net(x), net(x, deadline=deadline)
    assert torch.equal(got.exit, want.exit) and torch.equal(got.label, want.label) and torch.equal(got.logits, want.logits)
    assert got.exit.tolist().count(0) == 6 and not got.forced.any()


def test_the_profile_decides_how_far_a_row_gets(net):
    x = images(4)
    for last, reached in ((0.5, 1), (1e-4, 2)):
        net.profile = profile_of([1e-4, 1e-4, last])
        out = net(x, deadline=0.25)
        assert out.exit.tolist() == [reached] * 4 and out.forced.tolist() == [reached == 1] * 4
        net.profile = profile_of([1e-4, last, 1e-4])
        assert net(x, deadline=0.25).exit.tolist() == [0 if last > 0.1 else 2] * 4


def test_observed_times_correct_a_profile_that_is_wrong(net):
    net.profile = profile_of([1e-3, 60.0, 1e-3])  # claims a minute for what takes milliseconds
    assert net(images(1), deadline=5.0).exit.tolist() == [0]
    for _ in range(20):
        net(images(1), deadline=1000.0)
    assert net(images(1), deadline=5.0).exit.tolist() == [2]


def test_a_profile_is_measured_on_demand_before_the_clock_starts(net):
    assert net.profile is None
    out = net(images(3), deadline=2.0)
    assert out.exit.tolist() == [2] * 3 and net.profile.batch_sizes == (1, 3) and net.profile.num_segments == 3
    kept = net.profile
    assert net.ensure_profile(images(8)) is kept
    assert kept.fingerprint == net.fingerprint


def test_no_task_stays_open(net):
    net.profile = profile_of([1e-4] * 3)
    net.set_rule(thresholds=[0.2, 0.3])
    for deadline in (0, 1e-3, 10):
        net(images(6), deadline=deadline)
    seen = net.scheduler().snapshot()
    assert seen["live"] == 0 and seen["admitted"] == seen["exits"] and seen["stale"] == 0


def test_a_row_that_is_told_to_wait_is_answered_and_ends(net):
    x = images(6)
    with torch.no_grad():
        middle = float(net.exit_step(0, net.run_segment(0, (x,))).confidence.median())

    @fastee.policy
    def unsure_wait(stats, task, nodes):
        return rules.WAIT if task.segment == 1 and stats.confidence <= middle else nodes[0].action

    net.profile = profile_of([1e-4] * 3)
    net.set_rule(thresholds=[math.inf, math.inf])
    sched = Scheduler(net.profile, QoS(), policy=unsure_wait, thresholds=net.thresholds, native=False)
    out, want = run_deadline(net, sched, (x,), 6, time.perf_counter_ns(), 100.0), net(x)
    waited = out.exit == 0
    assert waited.sum() == 3 and out.forced[waited].all() and not out.forced[out.exit == 2].any()
    torch.testing.assert_close(out.logits[out.exit == 2], want.logits[out.exit == 2], rtol=1e-4, atol=1e-5)
    seen = sched.snapshot()
    assert seen["live"] == 0 and seen["finished"] == 3 and seen["waited"] == 3


def test_a_failing_run_leaves_no_task_behind(net):
    net.profile = profile_of([1e-4] * 3)
    with pytest.raises(RuntimeError):
        net(torch.zeros(2, 4, 16, 16), deadline=1.0)
    assert net.scheduler().snapshot()["live"] == 0
    assert len(net(images(2), deadline=1.0)) == 2


def test_more_rows_than_the_scheduler_held_before(net):
    net.profile = profile_of([1e-5] * 3)
    net.scheduler(1)
    small = net.scheduler(1).max_tasks
    assert net.scheduler(small + 1).max_tasks == small + 1


@pytest.mark.timed
def test_a_slow_network_answers_near_its_deadline(net):
    """A segment that takes 30 ms is not started 10 ms before the deadline."""
    run = net.run_segment

    def slow(i, carry):
        if i == 2:
            time.sleep(0.03)
        return run(i, carry)

    object.__setattr__(net, "run_segment", slow)
    net.ensure_profile(images(2))
    assert net.profile.mean[2, 0, 0] >= 0.03
    start = time.perf_counter()
    out = net(images(2), deadline=0.02)
    assert time.perf_counter() - start < 1.0
    assert (out.exit < 2).all() and out.forced.all()


def test_other_profiles_and_promises_are_refused(net):
    with pytest.raises(ValueError, match=re.escape("profile: this network has 3 segments, the profile 2")):
        net.profile = profile_of([1e-4] * 2)
    with pytest.raises(TypeError, match=re.escape("profile: expected a fastee.Profile or None, got dict")):
        net.profile = {}
    with pytest.raises(TypeError, match=re.escape("qos: expected a fastee.QoS, got float")):
        net.qos = 0.99
    net.qos = QoS(hit_rate=0.9)
    net.profile = profile_of([1e-4] * 3)
    assert net.scheduler().qos.hit_rate == 0.9

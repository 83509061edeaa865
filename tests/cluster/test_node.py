"""A node alone: no socket, a clock of its own where time matters, every frame that it emits looked at."""

import re

import pytest
import torch
from answers import local_answers, rows

from fastee.cluster import codec as codecs
from fastee.cluster.frame import FREE, NO_DEADLINE, Flag, Frame, Kind
from fastee.cluster.messages import Moved, Refused, from_payload
from fastee.cluster.node import Node, Settings
from fastee.scheduling import Profile

NAMES = ("mobile", "edge", "cloud")


class World:
    """Node `index` of three, with a clock that stands unless told; segments cost `mean` seconds in the profile."""

    def __init__(self, net, index=0, credit=8, mean=0.001, slowdown=1.0, bandwidth=2e7):
        self.sent, self.now = [], 1_000_000_000
        segments = net.num_segments
        profile = Profile(
            nodes=NAMES,
            batch_sizes=(1,),
            mean=[[[mean]] * 3] * segments,
            spread=[[[0.0]] * 3] * segments,
            codecs=("raw", "int8"),
            wire_bytes=[[2048.0, 516.0]] * segments,
            codec_seconds=[[0.0, 0.0]] * segments,
            bandwidth=[[bandwidth] * 3] * 3,
            delay=[[0.005] * 3] * 3,
        )
        self.settings = Settings(index, NAMES, bytes(16), slowdown, tuple(net.thresholds), credit=credit)
        self.node = Node(net, self.settings, profile, self.sent.append, clock=lambda: self.now)
        for other in {0, 1, 2} - {index}:
            self.node.post("up", other, True)

    def task(self, x, number=1, sender=-1, **fields):
        table, payload = codecs.pack((x,))
        frame = Frame(Kind.TASK, **{"task": number, "origin": 9, "codec": 0, "tensors": table, "payload": payload, **fields})
        self.node.post("task", frame, sender)

    def run(self, steps=30, spend=0):
        """Drive the node; every segment takes `spend` ns on its clock."""
        with torch.inference_mode():
            for _ in range(steps):
                self.node.step(longest=0)
                self.now += spend * (self.node._busy is not None)

    def of(self, kind):
        return [out for out in self.sent if out.frame.kind is kind]


def test_a_task_leaves_at_the_same_exit_with_the_same_logits(net):
    world, x = World(net), rows(12)
    for i in range(len(x)):
        world.task(x[i : i + 1], number=i)
    world.run(120)
    want = local_answers(net, x)
    answers = {out.frame.task: out.frame for out in world.of(Kind.ANSWER)}
    assert sorted(answers) == list(range(12)) and len(set(want["exit"].tolist())) > 1
    for i, frame in answers.items():
        logits, label, confidence = codecs.unpack(frame)
        assert torch.equal(logits[0], want["logits"][i]) and frame.exit == want["exit"][i]
        assert label == want["label"][i] and confidence == want["confidence"][i]


def test_a_plan_is_followed_and_the_client_told(net):
    world, x = World(net), rows(1)
    world.task(x, route=bytes([0, 1, 2]), flags=Flag.EXITS_OFF)
    world.run()
    (task,), (moved,) = world.of(Kind.TASK), world.of(Kind.MOVED)
    assert task.target == 1 and task.frame.segment == 1 and task.frame.hops == 1
    assert moved.target == -1 and moved.frame.origin == 9 and from_payload(moved.frame, Moved).node == 1
    assert torch.equal(codecs.unpack(task.frame)[0], net.run_segment(0, (x,))[0])
    assert not world.of(Kind.ANSWER)


def test_a_plan_is_followed_at_once_under_a_policy_that_queues(net):
    # MDI-Exit moves a task only to a neighbour whose queue is shorter than its own: one planned task would wait for ever.
    world = World(net)
    world.node.settings.policy = "mdi_exit"
    world.node.post("queue", 1, 5)
    world.task(rows(1), route=bytes([1] * net.num_segments))
    world.run()
    assert [out.target for out in world.of(Kind.TASK)] == [1]


def test_without_credit_a_planned_task_waits_for_it(net):
    world = World(net, credit=2)
    for i in range(3):
        world.task(rows(1), number=i, route=bytes([1, 1, 1]))
    world.run()
    assert len(world.of(Kind.TASK)) == 2 and world.node.queue_length == 1
    world.node.post("credit", 1)
    world.run()
    assert len(world.of(Kind.TASK)) == 3 and world.node.queue_length == 0


def test_without_credit_a_free_task_goes_elsewhere(net):
    # Node 0 is 100 times dearer than the others, so everything is sent away: to the first while it has credit, then to the next.
    world = World(net, credit=1, mean=1e-4)
    slow = {k: getattr(world.node.profile, k) for k in world.node.profile.__dataclass_fields__}
    slow["mean"] = [[[5.0], [0.001], [0.002]]] * net.num_segments
    world.node.profile = Profile(**slow)
    for i in range(3):
        world.task(rows(1), number=i)
    world.run()
    assert [out.target for out in world.of(Kind.TASK)] == [1, 2]
    assert len(world.of(Kind.ANSWER)) == 1  # nobody has credit for the third: it runs here
    assert world.of(Kind.TASK)[0].frame.segment == 0


@pytest.mark.parametrize(("sender", "hops", "stays"), [(1, 1, True), (2, 1, False), (2, 7, True), (-1, 0, False)])
def test_a_task_without_progress_is_not_thrown_to_and_fro(net, sender, hops, stays):
    # Node 0 believes that node 1 is 5,000 times faster. A task from node 1, which believes the like of node 0, is computed here all the same.
    world = World(net, mean=1e-4, bandwidth=1e9)
    slow = {k: getattr(world.node.profile, k) for k in world.node.profile.__dataclass_fields__}
    slow["mean"] = [[[5.0], [0.001], [0.002]]] * net.num_segments
    world.node.profile = Profile(**slow)
    world.task(rows(1), sender=sender, hops=hops)
    world.run()
    sent = [(out.target, out.frame.segment) for out in world.of(Kind.TASK)]
    assert (1, 0) not in sent if stays else sent == [(1, 0)]
    assert sent or world.of(Kind.ANSWER)  # after a segment it may go on


def test_a_deadline_forces_the_exit_that_was_reached(net):
    hard = rows(64)[local_answers(net, rows(64))["exit"] == 2][:1]
    world = World(net, mean=0.010)
    world.task(hard, time_left=15_000_000)
    world.run(spend=10_000_000)
    (answer,) = world.of(Kind.ANSWER)
    assert answer.frame.exit == 0 and answer.frame.flags & Flag.FORCED
    assert torch.equal(codecs.unpack(answer.frame)[0], net.exit_step(0, net.run_segment(0, (hard,)), logits=True).logits)


def test_with_exits_off_the_deadline_forces_nothing(net):
    world = World(net, mean=0.010)
    world.task(rows(1), time_left=15_000_000, flags=Flag.EXITS_OFF)
    world.run(spend=10_000_000)
    assert world.of(Kind.ANSWER)[0].frame.exit == 2


def test_a_deadline_that_cannot_be_met_is_rejected(net):
    world = World(net, mean=0.010)
    world.task(rows(1), time_left=5_000_000)
    world.task(rows(1), number=2, time_left=-1)
    world.run()
    assert [from_payload(out.frame, Refused).code for out in world.of(Kind.REFUSED)] == ["rejected", "late"]


def waiting(net):
    """A node busy with one task, and a second one that could be in time only if it were not: 10 ms of work, 15 ms left, 20 ms elsewhere."""
    easy = rows(64)[local_answers(net, rows(64))["exit"] == 0][:1]
    world = World(net, mean=0.010)
    world.task(easy)
    world.run(1)
    world.task(easy, number=2, time_left=15_000_000)
    return world


def test_a_waiting_task_goes_on_as_soon_as_the_node_is_free(net):
    world = waiting(net)
    world.run(1)
    assert [out.frame.task for out in world.of(Kind.ANSWER)] == [1] and world.node.queue_length == 1
    assert world.node.pause() == 0.0
    world.run(2)
    answer = world.of(Kind.ANSWER)[1].frame
    assert answer.task == 2 and answer.exit == 0 and not answer.flags & Flag.FORCED and world.node.queue_length == 0


def test_a_waiting_task_is_rejected_when_nothing_can_be_in_time_any_more(net):
    world = waiting(net)
    world.node._busy = (world.now + 10**9, world.node._busy[1])
    world.run(1)
    assert not world.of(Kind.REFUSED) and world.node.queue_length == 2 and 0.004 < world.node.pause() <= 0.005
    world.now += 5_000_001
    world.run(1)
    (refused,) = world.of(Kind.REFUSED)
    assert refused.frame.task == 2 and from_payload(refused.frame, Refused).code == "rejected" and world.node.queue_length == 1
    (scheduler,) = world.node._schedulers.values()
    assert scheduler.snapshot()["live"] == 1 and not world.node._waiting


def test_time_up_on_arrival_is_answered_from_the_last_exit(net):
    world, x = World(net, index=2, mean=0.010), rows(1)
    carry = net.run_segment(0, (x,))
    table, payload = codecs.pack(carry)
    world.task(x, segment=1, exit=0, time_left=7_000_000, tensors=table, payload=payload)
    world.run()
    (answer,) = world.of(Kind.ANSWER)
    assert answer.frame.exit == 0 and answer.frame.flags & Flag.FORCED
    assert torch.equal(codecs.unpack(answer.frame)[0], net.exit_step(0, carry, logits=True).logits)


def test_a_plan_over_a_lost_node_goes_back_to_the_client(net):
    world = World(net)
    world.node.post("up", 2, False)
    world.task(rows(1), route=bytes([0, 2, 2]))
    world.run()
    assert not world.of(Kind.ANSWER)
    assert from_payload(world.of(Kind.REFUSED)[0].frame, Refused).code == "undeliverable"


def test_credit_is_renewed_exactly_once_per_task(net):
    world = World(net, index=1)
    world.task(rows(1), sender=0, number=5, hops=1)
    world.task(rows(1), sender=0, number=6, hops=1, segment=9)
    world.task(rows(1), sender=0, number=7, hops=1, route=bytes([2, 2, 2]))
    world.run()
    credits = world.of(Kind.CREDIT)
    assert sorted(out.frame.task for out in credits) == [5, 6, 7] and {out.target for out in credits} == {0}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"segment": 3}, "segments 0..2"),
        ({"tensors": (), "payload": b""}, "0 tensors"),
        ({"route": bytes([0, 1])}, "plan"),
        ({"route": bytes([0, 1, 3])}, "plan"),
        ({"codec": 200}, "codec id 200"),
        ({"segment": 1}, "segment 1 on node 'mobile'"),
        ({"payload": bytes(255)}, "the payload ends inside tensor 0"),
    ],
    ids=["segment", "no tensor", "short plan", "plan beyond", "codec", "wrong carry", "short payload"],
)
def test_a_task_that_cannot_be_is_refused_with_the_reason(net, fields, why):
    world = World(net)
    if fields == {"segment": 1}:
        fields = {**fields, "tensors": codecs.pack((torch.zeros(1, 3),))[0], "payload": bytes(12)}
    world.task(rows(1), **fields)
    world.run()
    refusal = from_payload(world.of(Kind.REFUSED)[0].frame, Refused)
    assert refusal.code in ("invalid", "failed")
    assert re.search(why, refusal.reason), refusal.reason
    assert world.node.queue_length == 0


def test_a_slower_machine_is_busy_longer_but_still_decides(net):
    world = World(net, slowdown=1000.0)
    started, ticks = world.now, iter(range(1, 10_000_000))
    world.node._clock = lambda: started + 1000 * next(ticks)  # every look at the clock takes a microsecond
    world.task(rows(1), flags=Flag.EXITS_OFF)
    while not world.node._busy:
        world.node.step(longest=0)
    until = world.node._busy[0]
    assert until - started > 1_000_000  # a few looks, a thousand times over
    world.task(rows(1), number=2, route=bytes([1, 1, 1]))
    world.node.step(longest=0)
    assert len(world.of(Kind.TASK)) == 1 and world.node._busy


def test_the_oldest_task_is_finished_first(net):
    world = World(net)
    for i in range(4):
        world.task(rows(1), number=i, flags=Flag.EXITS_OFF)
    world.task(rows(1), number=4, time_left=10**9)
    world.run()
    order = [out.frame.task for out in world.of(Kind.ANSWER)]
    assert order[1:] == sorted(order[1:]) if order[0] == 4 else order[0] == 0
    assert order.index(4) <= 1 and [n for n in order if n != 4] == [0, 1, 2, 3]


def test_codec_and_deadline_of_a_task_without_them(net):
    world = World(net, index=1)
    world.task(rows(1), codec=FREE, time_left=NO_DEADLINE, route=bytes([2, FREE, FREE]))
    world.run()
    (task,) = world.of(Kind.TASK)
    assert task.deadline == NO_DEADLINE and task.frame.tensors[0].packing == codecs.INT8.id  # fewer bytes, and codecs are free here


def test_an_exit_is_told_to_the_scheduler_once(net):
    # Asked again for want of credit, it must not count the exit twice: its exit probabilities would drift.
    hard = rows(64)[local_answers(net, rows(64))["exit"] == 2][:3]
    world, told = World(net, credit=1), []
    slow = {k: getattr(world.node.profile, k) for k in world.node.profile.__dataclass_fields__}
    slow["mean"] = [[[0.0001]] + [[9.0]] * 2] + [[[5.0], [0.001], [0.002]]] * 2
    world.node.profile = Profile(**slow)
    make = world.node._scheduler

    def watched(frame):
        scheduler = make(frame)
        if "watched" not in vars(scheduler):
            ask = scheduler.decide
            scheduler.decide = lambda task, exit, confidence, now: told.append((task, exit)) or ask(task, exit, confidence, now)
            scheduler.watched = True
        return scheduler

    world.node._scheduler = watched
    for i in range(3):
        world.task(hard[i : i + 1], number=i)
    world.run()
    at_exit = [t for t in told if t[1] == 0]
    assert len(world.of(Kind.TASK)) == 2 and len(at_exit) == len(set(at_exit)) == 3 and len(told) > 6


def test_answers_go_on_when_the_callers_node_is_dead(net):
    world, x = World(net, index=1), rows(3)
    world.node.post("up", 0, False)
    for i in range(3):
        world.task(x[i : i + 1], number=i)
    world.run()
    assert len(world.of(Kind.ANSWER)) == 3 and not world.of(Kind.REFUSED)


class Radio(World):
    """Node 0, far too slow itself, sends to nodes 1 and 2 over links on which a task takes 0.1 s, and 5 ms to get there."""

    def __init__(self, net, media, credit):
        super().__init__(net, credit=credit, bandwidth=(2048 + 136) * 8 / 0.1)
        slow = {k: getattr(self.node.profile, k) for k in self.node.profile.__dataclass_fields__}
        slow["mean"] = [[[5.0], [0.001], [0.002]]] * net.num_segments
        self.node.profile, self.node.settings.media = Profile(**slow), media

    def sent_after(self, number, milliseconds):
        """Where tasks have been sent once this one, which has so much time, has come."""
        self.task(rows(1), number=number, time_left=milliseconds * 1_000_000)
        self.run()
        return [out.target for out in self.of(Kind.TASK)]

    def arrive(self, number):
        target = next(out.target for out in self.of(Kind.TASK) if out.frame.task == number)
        self.node.post("link", target, 2184, 105_000_000, self.now, (number, 9, 1))


@pytest.mark.parametrize(("media", "targets"), [([], [1, 2]), ([[1, 2]], [1])])
def test_a_task_waits_for_another_on_the_same_radio(net, media, targets):
    world = Radio(net, media, credit=1)
    assert world.sent_after(1, 160) == [1]
    assert world.sent_after(2, 160) == targets  # over the radio it would take 0.2 s


@pytest.mark.parametrize("arrived", [False, True])
def test_a_radio_that_has_faded_is_known_by_what_has_not_arrived(net, arrived):
    world = Radio(net, [[1, 2]], credit=4)
    world.sent_after(0, 160)
    world.now += 105_000_000
    world.arrive(0)  # who tells of one arrival is believed to tell of all
    assert len(world.sent_after(1, 160)) == 2 and len(world.sent_after(2, 260)) == 3
    for number, later in ((1, 150_000_000), (2, 100_000_000)):
        world.now += later
        if arrived:
            world.arrive(number)
    assert len(world.sent_after(3, 160)) == 3 + arrived  # behind task 2 it would take 0.2 s


def test_only_the_sender_of_a_message_is_told_that_it_arrived(net):
    world = World(net)
    for number, flags in ((1, Flag.NONE), (2, Flag.EXITS_OFF)):
        world.task(rows(1), number=number, flags=flags, route=bytes([1] * net.num_segments))
    world.run()
    heard = {}
    for which, scheduler in enumerate(world.node._schedulers.values()):
        scheduler.observe_link = lambda *told, which=which: heard.update({which: told})
    world.node.post("link", 1, 2048, 6_000_000, world.now, (2, 9, 1))
    world.run()
    assert heard == {0: (0, 1, 2048, 6_000_000, None), 1: (0, 1, 2048, 6_000_000, world.now)}

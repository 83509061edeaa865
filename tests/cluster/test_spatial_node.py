"""Nodes of a spatial split exchanging frames in one process: the answer, who sends what, orders of arrival, attempts."""

import random

import pytest
import torch
from spatial_nets import network

from fastee.cluster import codec as codecs
from fastee.cluster import spatial_node
from fastee.cluster.frame import Frame, Kind
from fastee.cluster.spatial_node import CLIENT, Schedule, SpatialNode, common
from fastee.errors import FrameError
from fastee.planning.spatial import vgg16
from fastee.planning.spatial.extract import extract

FAMILIES = ("vgg", "resnet", "mobilenet")


def plan(rng, net, providers, overlap=True):
    volumes = (0, *(p for p in net.cut_points[1:-1] if rng.random() < 0.5), len(net.layers))
    cuts = lambda h: (0, *sorted(rng.randint(0, h) for _ in range(providers - 1)), h)
    return Schedule(net, volumes, tuple(cuts(net.height(b)) for b in volumes[1:]), rng.randrange(providers), overlap)


def inputs(schedule, x, task=1, attempt=0):
    for d in range(schedule.providers):
        lo, hi = schedule.reads(0, d)
        tensors, payload = codecs.pack((x[:, :, lo:hi], torch.tensor([lo, hi]), schedule.pack(0)))
        yield d, Frame(Kind.TASK, task=task, hops=attempt << 8, tensors=tensors, payload=bytes(payload))


def play(nodes, mail, rng):
    """Deliver and compute in random order until nothing moves; returns the answer's frames and all others as (source, target, frame)."""
    answers, sent = [], []
    while mail or any(nodes):
        choices = [*range(len(mail)), *(-1 - d for d, n in enumerate(nodes) if n)]
        pick = rng.choice(choices)
        if pick >= 0:
            source, target, frame = mail.pop(pick)
            frame = frame.with_(payload=bytes(frame.payload))
            (answers if target == CLIENT else sent).append((source, target, frame))
            if target != CLIENT:
                nodes[target].take(frame)
        elif not nodes[-1 - pick].step():
            nodes[-1 - pick].idle = True
    return answers, sent


class Playing(SpatialNode):
    """A node that knows whether it is worth asking again."""

    def __init__(self, module, index, providers, mail):
        super().__init__(module, index, providers, lambda target, frame: mail.append((index, target, frame)))
        self.idle = True

    def take(self, frame):
        self.idle = False
        super().take(frame)

    def __bool__(self):
        return not self.idle


def world(module, providers):
    mail = []
    return [Playing(module, d, providers, mail) for d in range(providers)], mail


@pytest.mark.parametrize("family", FAMILIES)
def test_answer_is_the_unsplit_networks_whatever_plan_and_order(family):
    net, x = network(family)
    module, rng = extract(net, x), random.Random(family)
    with torch.no_grad():
        want = net(x)
    for case in range(12):
        providers = rng.randint(1, 5)
        schedule = plan(rng, module.net, providers, overlap=case % 2 == 0)
        nodes, mail = world(module, providers)
        mail += [(CLIENT, d, frame) for d, frame in inputs(schedule, x)]
        answers, sent = play(nodes, mail, rng)
        assert len(answers) == 1
        torch.testing.assert_close(codecs.unpack(answers[0][2])[0], want, rtol=1e-5, atol=1e-5)
        assert not any(work.todo for n in nodes for work in n._works.values())
        # Between nodes exactly the rows that a reader lacks travel, each once.
        for j in range(1, schedule.last + 1):
            for d in range(providers):
                rows = [r for s, t, f in sent if t == d and f.segment == j and s != CLIENT for r in range(*map(int, codecs.unpack(f)[1]))]
                own, need = schedule.holds(j, d), range(*schedule.reads(j, d))
                assert sorted(rows) == [r for r in need if not own[0] <= r < own[1]]


@pytest.mark.parametrize(("size", "pieces"), [(128, ((63, 64), (0, 63))), (32, ((0, 16),))])
def test_a_border_apart_from_its_middle_must_be_worth_the_second_pass_over_the_weights(size, pieces):
    # Reading the weights of the first convolution takes as long as 50 / 128 or 50 / 32 rows: 0.6 % of 64 rows, 10 % of 16.
    half = size // 2
    schedule = Schedule(vgg16(size), (0, 1, 2, 18), ((0, half, size), (0, half, size), (0, 1, size // 32)), 0)
    assert schedule.pieces(0, 0) == pieces


def test_a_middle_is_computed_before_the_neighbours_rows_are_there(monkeypatch):
    monkeypatch.setattr(spatial_node, "WEIGHT_MACS", 0)  # in so small a network no border is worth a second pass over the weights
    net, x = network("vgg")
    module = extract(net, x)
    last = len(module.net.layers)
    # The second provider reads rows 5..7 of the second convolution, of which row 7 waits for that provider's row 8; rows 0..4 wait for nobody.
    schedule = Schedule(module.net, (0, 2, 3, last), ((0, 8, 16), (0, 8, 16), (0, 2, 4)), 0)
    nodes, mail = world(module, 2)
    frames = dict(inputs(schedule, x))
    nodes[0].take(frames[0])
    while nodes[0].step():
        pass
    done = [rows for rows, _ in nodes[0]._works[0, 1].have[2]]
    assert schedule.pieces(1, 0) == ((5, 8), (0, 5)) and done == [(0, 5)]
    assert {(f.segment, t) for _, t, f in mail} == {(1, 1)}


def test_a_new_attempt_replaces_the_old_one_and_its_late_rows():
    net, x = network("resnet")
    module, rng = extract(net, x), random.Random(0)
    first, second = plan(rng, module.net, 3), plan(rng, module.net, 3)
    nodes, mail = world(module, 3)
    mail += [(CLIENT, d, f) for d, f in inputs(first, x) if d != 2]  # the third never starts
    answers, sent = play(nodes, mail, rng)
    assert not answers
    mail += [(CLIENT, d, f) for d, f in inputs(second, x, attempt=1)] + sent
    answers, _ = play(nodes, mail, rng)
    assert [f.hops for _, _, f in answers] == [1 << 8]
    with torch.no_grad():
        torch.testing.assert_close(codecs.unpack(answers[0][2])[0], net(x), rtol=1e-5, atol=1e-5)


def test_schedule_survives_the_wire_and_refuses_what_is_no_plan():
    net = extract(*network("mobilenet")).net
    schedule = plan(random.Random(3), net, 4)
    assert Schedule.unpack(net, schedule.pack(7), 4) == (schedule, 7)
    good = schedule.pack(7)
    for bad in (good[:-1], good[:2], good.float(), good.view(1, -1), good * 2, torch.full_like(good, -1)):
        with pytest.raises(FrameError, match="no plan"):
            Schedule.unpack(net, bad, 4)
    with pytest.raises(FrameError, match="no plan"):
        Schedule.unpack(net, good, 3)
    with pytest.raises(ValueError, match="root: got 4"):
        Schedule(net, schedule.volumes, schedule.splits, 4)


def test_malformed_rows_are_refused():
    net, x = network("vgg")
    node = SpatialNode(extract(net, x), 0, 1, lambda target, frame: None)
    for carry in ((x,), (x, torch.tensor([0, 31])), (x, torch.tensor([-1, 31])), (x[0], torch.tensor([0, 32])), (x, torch.tensor([0]))):
        tensors, payload = codecs.pack(carry)
        with pytest.raises(FrameError, match=r"expected rows|cannot be rows"):
            node.take(Frame(Kind.TASK, task=1, tensors=tensors, payload=bytes(payload)))


def test_common_rows():
    assert common((0, 5), (3, 9)) == (3, 5) and common((0, 3), (3, 9)) == (0, 0)

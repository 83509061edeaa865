"""The native way of a task that comes alone, held to the Node that it stands in for: same frames out, same books."""

import time

import pytest
import torch
from answers import rows
from test_endpoint import BUILT, CLIENT, MODEL, Ends

from fastee.cluster import codec as codecs
from fastee.cluster.endpoint import Arrival
from fastee.cluster.frame import Flag, Frame, Kind
from fastee.cluster.messages import Refused, client_peer, from_payload, node_peer
from fastee.cluster.node import Node, Settings
from fastee.nn.result import judge
from fastee.scheduling import Profile

pytestmark = pytest.mark.skipif(not BUILT, reason="the C++ I/O thread was not built")
NAMES = ("mobile", "edge", "cloud")


class Served:
    """Node 1 of three on a native endpoint, with or without the shortcut; what it says to the client and to node 2 is kept."""

    def __init__(self, net, fast, mean=1e-4):
        self.ends, self.sent, self.by_node = Ends("native", "native"), [], 0
        segments = net.num_segments
        profile = Profile(
            nodes=NAMES, batch_sizes=(1,), mean=[[[10.0], [mean], [10.0]]] * segments, spread=[[[0.0]] * 3] * segments, codecs=("raw", "int8"),
            wire_bytes=[[2048.0, 516.0]] * segments, codec_seconds=[[0.0, 0.0]] * segments, bandwidth=[[1e9] * 3] * 3, delay=[[0.001] * 3] * 3,
        )  # fmt: skip
        settings = Settings(1, NAMES, MODEL, thresholds=tuple(net.thresholds))
        self.node = Node(net, settings, profile, self._emit, arm=lambda out: self.ends.node.arm(CLIENT, 0, out.frame, out.deadline))
        if fast:
            self.node.shortcut = self.ends.node.shortcut(self.node, judge)
        for other in (0, 2):
            self.node.post("up", other, True)
        self.node.step(longest=0)

    def _emit(self, out):
        if out.target < 0:
            self.ends.node.put(client_peer(out.frame.origin), 0, out.frame, out.deadline, keyed=out.keyed)
        else:
            self.sent.append(out)

    def ask(self, x, number, **fields):
        """Send one task and return (kind, exit, flags, tensors or code, reason) of every frame that came for it until it was settled."""
        codec = fields.pop("packing", "raw")
        table, payload = codecs.pack((x,), codec)
        deadline = fields.pop("deadline", None)
        frame = Frame(Kind.TASK, **{"task": number, "origin": 9, "codec": 0, "tensors": table, "payload": payload, **fields})
        self.ends.client.put("n1", 1, frame, *([time.monotonic_ns() + deadline] if deadline else []))
        found, stop, moved = [], time.monotonic() + 10, len(self.sent)
        with torch.inference_mode():
            while time.monotonic() < stop and not any(f.kind in (Kind.ANSWER, Kind.REFUSED) for f in found) and len(self.sent) == moved:
                for item in self.ends.node.receive(0.002, shortcut=self.node.shortcut if self.node.idle else None):
                    if isinstance(item, Arrival) and item.frame.kind is Kind.TASK:
                        self.by_node += 1
                        self.node.post("task", item.frame, -1)
                self.node.step(longest=0)
                found += [i.frame for i in self.ends.client.receive(0.002) if isinstance(i, Arrival) and i.frame.task == number]
            found += [out.frame for out in self.sent[moved:]]
        return [self._read(f) for f in found if f.kind is not Kind.MOVED]  # it may still be on its way

    @staticmethod
    def _read(f):
        if f.kind is Kind.REFUSED:
            refused = from_payload(f, Refused)
            return f.kind, refused.code, refused.reason.splitlines()[0]
        tensors = [t.clone() for t in codecs.unpack(f)] if f.tensors else []
        return f.kind, f.segment, f.exit, int(f.flags), f.hops, [t.tolist() for t in tensors]

    def close(self):
        self.ends.close()


CASES = {
    "plain": {},
    "exits off": {"flags": Flag.EXITS_OFF},
    "a plan that stays": {"route": bytes([1, 1, 1])},
    "a plan that goes on": {"route": bytes([1, 2, 2])},
    "in time": {"deadline": 5_000_000_000},
    "packed": {"packing": "int8"},
    "half-way": {"segment": 1},
    "no such segment": {"segment": 3},
    "wrong carry": {"segment": 1, "wrong": True},
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_shortcut_says_what_the_node_says(net, case):
    fields = dict(CASES[case])
    wrong, outcomes, books = fields.pop("wrong", False), [], []
    for fast in (False, True):
        served = Served(net, fast)
        try:
            said = []
            for i, x in enumerate(rows(6).split(1)):
                x = torch.zeros(1, 3) if wrong else net.run_segment(0, (x,))[0] if fields.get("segment") == 1 else x
                said.append(served.ask(x, i + 1, **fields))
                assert said[-1], f"task {i} was not settled"
            outcomes.append(said)
            node = served.node
            books.append((node.handled, node.exits, node.forced, node.late, node.queue_length, node.service > 0))
            # The first task of a kind tells the shortcut its scheduler; what is packed or cannot be is the node's.
            assert served.by_node == (1 if fast and case not in ("packed", "no such segment") else 6)
        finally:
            served.close()
    assert outcomes[0] == outcomes[1]
    assert books[0] == books[1]


def test_the_shortcut_rejects_what_cannot_be_in_time(net):
    for fast in (False, True):
        served = Served(net, fast, mean=10.0)
        try:
            for number in (1, 2, 3):
                ((kind, code, _),) = served.ask(rows(1), number, deadline=2_000_000_000)
                assert kind is Kind.REFUSED and code == "rejected"
            assert served.node.queue_length == 0 and served.node.handled == 3
        finally:
            served.close()


def test_credit_comes_back_to_a_node_that_sent(net):
    """A node's tasks are those of a peer named n<index>; the shortcut renews its credit as soon as a segment was computed."""
    from fastee.cluster.endpoint import Identity
    from fastee.cluster.native_endpoint import NativeEndpoint

    served = Served(net, True)
    peer = NativeEndpoint(Identity("n0:0000000000000005", 0, 5, MODEL, b'{"name":"mobile","index":0,"pid":1}', {}, node=True))
    try:
        served.ask(rows(1), 1)  # the shortcut knows the scheduler now
        ports = peer.bind()
        peer.set_beat(b'{"queue":0,"service":0,"handled":0}')
        peer.connect(node_peer(1), 1, "127.0.0.1", served.ends.ports)
        served.ends.node.connect(node_peer(0), 0, "127.0.0.1", ports)
        table, payload = codecs.pack((rows(1),))
        credits, sent, up, stop = [], False, set(), time.monotonic() + 10
        with torch.inference_mode():
            while not credits and time.monotonic() < stop:
                for item in served.ends.node.receive(0.002, shortcut=served.node.shortcut if served.node.idle else None):
                    if isinstance(item, Arrival) and item.frame.kind is Kind.TASK:
                        served.node.post("task", item.frame, 0)
                    elif getattr(item, "up", False) and item.peer == node_peer(0):
                        up.add("back")
                served.node.step(longest=0)
                items = peer.receive(0.002)
                credits += [i.frame for i in items if isinstance(i, Arrival) and i.frame.kind is Kind.CREDIT]
                up |= {"there" for i in items if getattr(i, "up", False)}
                if not sent and len(up) == 2:
                    sent = peer.put(node_peer(1), 1, Frame(Kind.TASK, task=7, origin=9, hops=1, codec=0, tensors=table, payload=payload))
        assert [c.task for c in credits] == [7] and credits[0].hops == 1, (sent, up, [(o.frame.kind, o.target) for o in served.sent])
    finally:
        peer.close()
        served.close()

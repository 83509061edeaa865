import time

import pytest

from fastee.cluster.transport import BULK_WINDOW, Message, PeerEvent, ZmqTransport
from fastee.errors import ClusterError, PeerLost


@pytest.fixture
def pair():
    there, here = ZmqTransport("n1:1"), ZmqTransport("c:1")
    here.connect("n1", "127.0.0.1", *there.bind())
    assert gather(here, lambda items: PeerEvent("n1", True) in items)
    yield here, there
    here.close()
    there.close()


def gather(transport, enough, seconds=5.0):
    items, end = [], time.monotonic() + seconds
    while not enough(items) and time.monotonic() < end:
        items += transport.receive(0.02)
    assert enough(items), items
    return items


def test_messages_go_both_ways_on_both_connections(pair):
    here, there = pair
    for bulk in (False, True):
        assert here.try_send("n1", [b"head", b"body"], bulk=bulk)
        (message,) = [m for m in gather(there, bool) if isinstance(m, Message)]
        assert message.peer == "c:1" and [bytes(p) for p in message.parts] == [b"head", b"body"]
        assert there.try_send("c:1", [b"back"], bulk=bulk)
        (message,) = gather(here, bool)
        assert message.peer == "n1" and bytes(message.parts[0]) == b"back"


def test_a_full_peer_says_no_and_loses_nothing(pair):
    here, there = pair
    block, sent = bytes(4 << 20), 0
    quiet = time.monotonic() + 0.3
    while sent < 100 and time.monotonic() < quiet:
        if here.try_send("n1", [sent.to_bytes(4, "little"), block], bulk=True):
            sent, quiet = sent + 1, time.monotonic() + 0.3
    # Two queues of the window and what the kernel holds; by far not everything.
    assert BULK_WINDOW <= sent < 60
    with pytest.raises(PeerLost, match="did not take"):
        here.send("n1", [b"x", block], bulk=True, timeout=0.05)
    assert here.try_send("n1", [b"small"], bulk=False)  # control is not behind it
    items = gather(there, lambda items: len(items) == sent + 1)
    numbers = [int.from_bytes(m.parts[0], "little") for m in items if len(m.parts) == 2]
    assert numbers == list(range(sent))


def test_an_unknown_peer_takes_nothing(pair):
    here, there = pair
    assert not here.try_send("n7", [b"x"], bulk=True)
    assert not there.try_send("c:99", [b"x"], bulk=False)


def test_a_vanished_peer_is_an_event_and_a_new_one_another(pair):
    here, there = pair
    there.close()
    began = time.monotonic()
    assert PeerEvent("n1", False) in gather(here, lambda items: PeerEvent("n1", False) in items)
    assert time.monotonic() - began < 1.0
    assert not here.try_send("n1", [b"x"], bulk=True)


def test_waiting_ends_by_wake_and_by_time(pair):
    here, _ = pair
    began = time.monotonic()
    assert here.receive(0.05) == []
    assert 0.045 < time.monotonic() - began < 1.0
    here.wake()
    began = time.monotonic()
    here.receive(5.0)
    assert time.monotonic() - began < 1.0


def test_only_loopback_addresses_are_used():
    transport = ZmqTransport("c:1")
    try:
        for host in ("0.0.0.0", "10.0.0.1", "example.org", "*"):
            with pytest.raises(ClusterError, match="loopback"):
                transport.bind(host)
            with pytest.raises(ClusterError, match="loopback"):
                transport.connect("n1", host, 1, 2)
    finally:
        transport.close()
        transport.close()

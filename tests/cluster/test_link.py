import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastee.cluster.courier import Courier
from fastee.cluster.frame import Frame, Kind, decode
from fastee.cluster.link import Link, LinkShaper, link_table
from fastee.cluster.transport import Message, ZmqTransport


def test_an_idle_link_takes_bytes_over_rate_plus_delay():
    shaper = LinkShaper(Link.parse("20mbit 10ms"))
    assert shaper.reserve(65536, now=1000) == 1000 + round(65536 * 8 / 20e6 * 1e9) + 10_000_000


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 100_000), st.integers(0, 50_000_000)), min_size=1, max_size=20))
def test_messages_leave_one_after_the_other(messages):
    link, now, free = Link(1e7, 0.003), 0, 0
    shaper = LinkShaper(link)
    for size, gap in messages:
        now += gap
        free = max(free, now) + size * 800
        assert abs(shaper.reserve(size, now) - free - 3_000_000) <= len(messages)
        assert shaper.backlog(now) == shaper._free - now


def test_control_messages_do_not_queue_behind_bulk():
    shaper = LinkShaper(Link(1e6, 0.001))
    shaper.reserve(1_000_000, now=0)
    assert shaper.reserve(125, now=0, urgent=True) == 2_000_000


def test_link_specs():
    assert link_table("8mbit 1ms", 2) == {(0, 1): Link(8e6, 0.001), (1, 0): Link(8e6, 0.001)}
    table = link_table({(0, 1): "8mbit 1ms"}, 3)
    assert table[0, 1] == Link(8e6, 0.001) and table[1, 0] == Link() and len(table) == 6
    assert not Link.parse("0mbit 1ms").up
    with pytest.raises(ValueError, match="not a pair"):
        link_table({(0, 3): "8mbit 1ms"}, 3)
    with pytest.raises(TypeError, match="expected"):
        link_table(5, 3)


@pytest.mark.parametrize(("text", "size"), [("20mbit 10ms", 65536), ("8mbit 5ms", 20000)])
def test_a_frame_is_on_the_wire_as_long_as_the_link_says(text, size):
    links = {(0, 1): Link.parse(text)}
    there, here = ZmqTransport("n1:1"), ZmqTransport("c:1")
    try:
        here.connect("n1", "127.0.0.1", *there.bind())
        up, end = False, time.monotonic() + 10
        while not up and time.monotonic() < end:
            up = any(getattr(item, "up", False) for item in here.receive(0.05))
            there.receive(0)
        assert up
        courier, spent = Courier(here, 0, links, 1, bytes(16), lambda peer: True), []
        for number in range(15):
            frame = Frame(Kind.TASK, task=number, payload=bytes(size))
            began = time.monotonic()
            assert courier.put("n1", 1, frame)
            while courier.pause() < float("inf"):
                here.receive(courier.pause())
                assert courier.flush() == []
            got = [item for item in there.receive(5.0) if isinstance(item, Message)]
            spent.append(time.monotonic() - began)
            assert decode(got[0].parts).task == number
        # Never early; the least late one, because a busy machine adds milliseconds to single wake-ups.
        assert links[0, 1].seconds(frame.nbytes) <= min(spent) <= 1.05 * links[0, 1].seconds(frame.nbytes)
        assert courier.bytes_to == {1: 15 * frame.nbytes}
    finally:
        here.close()
        there.close()

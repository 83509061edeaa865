"""Both ends of the network, native and Python, held to one behaviour; the native one's frames held to the Python codec."""

import contextlib
import random
import socket
import struct
import threading
import time

import google_crc32c
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_frame import FIELDS, sealed, valid_bytes

from fastee import native
from fastee.cluster import codec as codecs
from fastee.cluster.endpoint import Answered, Arrival, Complaint, Identity, Lost, PythonEndpoint, Sent, open_endpoint
from fastee.cluster.frame import HEADER_BYTES, MAX_PAYLOAD, Flag, Frame, Kind, decode, encode
from fastee.cluster.link import Link
from fastee.cluster.messages import Ports, Refused, from_payload
from fastee.cluster.transport import PeerEvent, ZmqTransport
from fastee.errors import ClusterError, FrameError

BUILT = hasattr(native.core, "IoThread")
needs_native = pytest.mark.skipif(not BUILT, reason="the C++ I/O thread was not built")
CLIENT, MODEL = "c:0000000000000009", b"m" * 16


def make(kind, identity):
    if kind == "python":
        return PythonEndpoint(identity)
    from fastee.cluster.native_endpoint import NativeEndpoint

    return NativeEndpoint(identity)


@pytest.fixture(params=["python", pytest.param("native", marks=needs_native)])
def kind(request):
    return request.param


def equal(expected):
    return lambda item: item == expected


class Ends:
    """A node and a client of it; both are looked after in this thread."""

    def __init__(self, node, client, links=(), **more):
        links = {(0, 1): Link(), (1, 0): Link(), **dict(links)}
        self.node = make(node, Identity("n1:0000000000000001", 1, 1, MODEL, b'{"name":"edge","index":1,"pid":1}', links, node=True, **more))
        self.client = make(client, Identity(CLIENT, 0, 9, MODEL, b'{"name":"client","index":-1,"pid":1}', links))
        self.ports = self.node.bind()
        self.node.set_beat(b'{"queue":0,"service":0,"handled":0}')
        self.client.connect("n1", 1, "127.0.0.1", self.ports)
        self.seen = {self.node: [], self.client: []}
        assert self.until(self.client, equal(PeerEvent("n1", True)))

    def until(self, end, wanted, seconds=5.0):
        stop = time.monotonic() + seconds
        while True:
            for item in self.seen[end]:
                if wanted(item):
                    return item
            if time.monotonic() > stop:
                return None
            for e in self.seen:
                self.seen[e] += e.receive(0.002)

    def frame(self, end, kind, task, seconds=5.0):
        item = self.until(end, lambda i: isinstance(i, Arrival) and i.frame.kind is kind and i.frame.task == task, seconds)
        return item and item.frame

    def close(self):
        self.client.close()
        self.node.close()


@pytest.fixture
def ends(kind):
    made = Ends(kind, kind)
    yield made
    made.close()


@pytest.mark.parametrize("pair", [("native", "python"), ("python", "native"), ("native", "native"), ("python", "python")], ids="-".join)
def test_frames_cross_between_any_two(pair):
    if "native" in pair and not BUILT:
        pytest.skip("the C++ I/O thread was not built")
    ends = Ends(*pair)
    try:
        for number, count in enumerate((0, 5, 4000, 16_000), 1):
            x = torch.randn(count)
            table, payload = codecs.pack((x,))
            assert ends.client.put("n1", 1, Frame(Kind.TASK, task=number, origin=9, tensors=table, payload=payload))
            frame = ends.frame(ends.node, Kind.TASK, number)
            assert torch.equal(codecs.unpack(frame)[0], x) and frame.sender == 9 and frame.fingerprint == MODEL
            assert ends.node.put(CLIENT, 0, Frame(Kind.ANSWER, task=number, tensors=table, payload=payload))
            assert torch.equal(codecs.unpack(ends.frame(ends.client, Kind.ANSWER, number))[0], x)
    finally:
        ends.close()


@needs_native
def test_a_large_frame_crosses_in_pieces_into_aligned_memory():
    ends = Ends("native", "native")
    try:
        x = torch.randn(1_000_001)
        table, payload = codecs.pack((x,))
        ends.client.put("n1", 1, Frame(Kind.TASK, task=5, tensors=table, payload=payload))
        frame = ends.frame(ends.node, Kind.TASK, 5)
        (back,) = codecs.unpack(frame)
        assert torch.equal(back, x) and back.data_ptr() % 64 == 0
        assert ends.client.counters()["chunks_out"] >= 16 and ends.node.counters()["bad"] == 0
        # The tensor lies in the received buffer and keeps it when the frame is gone.
        del frame
        ends.seen[ends.node].clear()
        for number in range(6, 12):
            ends.client.put("n1", 1, Frame(Kind.TASK, task=number, tensors=table, payload=payload))
            assert ends.frame(ends.node, Kind.TASK, number)
        assert torch.equal(back, x)
    finally:
        ends.close()


def test_lost_tasks_are_reported_and_a_vanished_peer_is_an_event(ends):
    began = time.monotonic()
    ends.node.close()
    ends.seen.pop(ends.node)
    assert ends.until(ends.client, equal(PeerEvent("n1", False))) and time.monotonic() - began < 1.0
    ends.client.put("n1", 1, Frame(Kind.TASK, task=4, origin=9, hops=257))
    assert ends.until(ends.client, equal(Lost((4, 9, 257))))


def test_an_armed_answer_leaves_at_its_deadline_and_only_once(ends):
    ends.client.put("n1", 1, Frame(Kind.TASK, task=1, origin=9))  # whoever speaks to a client must know it
    assert ends.frame(ends.node, Kind.TASK, 1)
    deadline = time.monotonic_ns() + 80_000_000
    for number in (1, 2):
        ends.node.arm(CLIENT, 0, Frame(Kind.ANSWER, task=number, origin=9, flags=Flag.FORCED), deadline)
    ends.node.put(CLIENT, 0, Frame(Kind.ANSWER, task=2, origin=9, exit=3), keyed=True)
    early = ends.frame(ends.client, Kind.ANSWER, 2)
    assert early.exit == 3 and time.monotonic_ns() < deadline
    assert ends.frame(ends.client, Kind.ANSWER, 1).flags == Flag.FORCED
    assert deadline - 20_000_000 < time.monotonic_ns() < deadline + 500_000_000
    assert ends.until(ends.node, equal(Answered((1, 9, 0))))
    ends.node.put(CLIENT, 0, Frame(Kind.ANSWER, task=1, origin=9, exit=3), keyed=True)
    ends.node.put(CLIENT, 0, Frame(Kind.TASK, task=1, origin=9), keyed=True)
    assert ends.until(ends.node, equal(Lost((1, 9, 0))))
    ends.seen[ends.client].clear()
    assert ends.frame(ends.client, Kind.ANSWER, 1, 0.1) is None and ends.frame(ends.client, Kind.ANSWER, 2, 0.01) is None


@needs_native
def test_a_task_that_comes_too_late_is_refused_while_nobody_reads():
    ends = Ends("native", "native")
    try:
        ends.client.put("n1", 1, Frame(Kind.TASK, task=3, origin=9), deadline=time.monotonic_ns() - 1)
        stop, found = time.monotonic() + 5, None
        while found is None and time.monotonic() < stop:  # the node's side is never asked
            found = next((i.frame for i in ends.client.receive(0.05) if isinstance(i, Arrival) and i.frame.kind is Kind.REFUSED), None)
        assert from_payload(found, Refused).code == "late" and found.task == 3
        # With exits off a deadline only counts late answers.
        ends.client.put("n1", 1, Frame(Kind.TASK, task=4, origin=9, flags=Flag.EXITS_OFF), deadline=time.monotonic_ns() - 1)
        assert ends.frame(ends.node, Kind.TASK, 4)
    finally:
        ends.close()


@needs_native
def test_heartbeats_go_on_while_the_interpreter_is_busy():
    ends = Ends("native", "native")
    try:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:  # holds the lock, reads nothing: with sockets in Python both sides would call each other down
            sum(range(1000))
        ends.seen[ends.client] += ends.client.receive(0)
        assert PeerEvent("n1", False) not in ends.seen[ends.client]
        assert ends.node.counters()["beats"] >= 12
    finally:
        ends.close()


@needs_native
def test_a_peer_beyond_any_credit_is_refused_and_an_honest_one_is_not():
    ends = Ends("native", "native", peer_tasks=4)
    try:
        for number in range(1, 8):
            ends.client.put("n1", 1, Frame(Kind.TASK, task=number, origin=9, payload=b"x"))
        for number in (5, 6, 7):
            assert from_payload(ends.frame(ends.client, Kind.REFUSED, number), Refused).code == "rejected"
        assert ends.frame(ends.node, Kind.TASK, 4) and not ends.frame(ends.node, Kind.TASK, 5, 0.05)
        ends.seen[ends.node].clear()  # its tasks are done: their buffers are released
        ends.client.put("n1", 1, Frame(Kind.TASK, task=8, origin=9, payload=b"x"))
        assert ends.frame(ends.node, Kind.TASK, 8)
    finally:
        ends.close()


def test_garbage_and_another_model_do_not_hurt(ends):
    raw = ZmqTransport("c:0000000000000007")
    try:
        raw.connect("n1", "127.0.0.1", ends.ports.ctl, ends.ports.bulk)
        stop, up = time.monotonic() + 5, False
        while not up and time.monotonic() < stop:
            up = any(isinstance(i, PeerEvent) and i.up for i in raw.receive(0.05))
            ends.node.receive(0)
        header, payload = encode(Frame(Kind.TASK, task=1, payload=bytes(100), fingerprint=MODEL))
        piece = b"FSTC" + bytes(4) + struct.pack("<Q", 50)
        messages = [[b""], [b"a", b"b", b"c"], [header[:50]], [header, payload[:-1] + b"x"], [b"\x80" * 92], [piece, b"x"], [header, b""]]
        expected = len(messages)
        if type(ends.node).__name__ == "NativeEndpoint":
            messages += [[header, payload[:50]], [piece, b"x" * 51], [header, payload[:50]], [piece, b"x" * 50]]
            expected += 2
        for parts in [*messages, encode(Frame(Kind.TASK, task=3, fingerprint=b"o" * 16))]:
            stop = time.monotonic() + 5
            while not raw.try_send("n1", parts, bulk=True) and time.monotonic() < stop:  # eight messages are a full queue
                ends.seen[ends.node] += ends.node.receive(0.005)
        reply, stop = None, time.monotonic() + 5
        while reply is None and time.monotonic() < stop:
            ends.seen[ends.node] += ends.node.receive(0.01)
            reply = next((decode(i.parts) for i in raw.receive(0.01) if not isinstance(i, PeerEvent)), None)
        assert reply.kind is Kind.REFUSED and reply.task == 3 and from_payload(reply, Refused).code == "fingerprint"
        ends.seen[ends.node] += ends.node.receive(0)
        complaints = [i for i in ends.seen[ends.node] if isinstance(i, Complaint)]
        assert len(complaints) == expected, [c.reason for c in complaints]
        assert all(c.peer == "c:0000000000000007" and c.reason.startswith("frame: ") for c in complaints)
        ends.client.put("n1", 1, Frame(Kind.TASK, task=1, origin=9))
        assert ends.frame(ends.node, Kind.TASK, 1)
    finally:
        raw.close()


@pytest.mark.parametrize(("text", "size"), [("20mbit 10ms", 65536), ("8mbit 5ms", 20000)])
def test_a_frame_is_on_the_link_as_long_as_the_link_says(kind, text, size):
    link = Link.parse(text)
    ends, spent, told = Ends(kind, kind, {(0, 1): link}), [], []
    try:
        for number in range(1, 101):
            frame = Frame(Kind.TASK, task=number, payload=bytes(size))
            began = time.monotonic()
            ends.client.put("n1", 1, frame)
            while not ends.seen[ends.node] or getattr(ends.seen[ends.node][-1], "frame", frame).task != number:
                told += ends.client.receive(0) if kind == "native" else ends.client.receive(0.0005)
                ends.seen[ends.node] += ends.node.receive(0.0005)
            spent.append(time.monotonic() - began)
            if number > 10 and min(spent) <= 1.05 * link.seconds(frame.nbytes):
                break
        # Never early; the least late one, because a busy machine adds milliseconds to single wake-ups, on some of them to ten in a row.
        assert link.seconds(frame.nbytes) <= min(spent) <= 1.05 * link.seconds(frame.nbytes)
        assert ends.client.bytes_to == {1: number * frame.nbytes}
        told += ends.client.receive(0)
        crossed = [item for item in told if isinstance(item, Sent)]
        assert [item.key for item in crossed] == [(n, 0, 0) for n in range(1, number + 1)]
        assert all(item.machine == 1 and item.duration >= round(link.seconds(frame.nbytes) * 1e9) for item in crossed)
    finally:
        ends.close()


@needs_native
def test_a_proxy_before_a_dead_machine_is_no_matter_of_keys():
    """It takes the connection and hangs up, again and again: nothing that a process without keys need be told as a refusal."""
    hung_up, end = [], make("native", Identity(CLIENT, 0, 9, MODEL, b"{}"))

    def hang_up(server):
        with contextlib.suppress(OSError):
            while True:
                server.accept()[0].close()
                hung_up.append(time.monotonic())

    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            threading.Thread(target=hang_up, args=(server,), daemon=True).start()
            port = server.getsockname()[1]
            end.connect("n1", 1, "127.0.0.1", Ports(port, port))
            seen, stop = [], time.monotonic() + 5
            while len(hung_up) < 4 and time.monotonic() < stop:
                seen += end.receive(0.05)
        assert len(hung_up) >= 4 and not [item for item in seen if isinstance(item, Complaint)]
    finally:
        end.close()


def test_waiting_ends_by_wake_and_by_time(ends):
    ends.client.receive(0.2)
    began = time.monotonic()
    while time.monotonic() - began < 0.3:  # heartbeats come ten times a second
        if not ends.client.receive(0.05):
            break
    ends.client.wake()
    began = time.monotonic()
    ends.client.receive(5.0)
    assert time.monotonic() - began < 1.0


def test_the_transport_is_chosen_by_name(monkeypatch):
    identity = Identity("c:1", 0, 1, bytes(16), b"{}")
    monkeypatch.setenv("FASTEE_TRANSPORT", "carrier pigeon")
    with pytest.raises(ValueError, match="FASTEE_TRANSPORT: got 'carrier pigeon', expected 'native' or 'python'"):
        open_endpoint(identity)
    monkeypatch.setenv("FASTEE_TRANSPORT", "python")
    end = open_endpoint(identity)
    assert isinstance(end, PythonEndpoint)
    end.close()
    monkeypatch.setattr(native, "core", None)
    monkeypatch.setenv("FASTEE_TRANSPORT", "native")
    with pytest.raises(ClusterError, match="was not built"):
        open_endpoint(identity)
    monkeypatch.delenv("FASTEE_TRANSPORT")
    end = open_endpoint(identity)
    assert isinstance(end, PythonEndpoint)
    end.close()


# The frame in C++ beside its twin in Python.


def outcome(decoder, parts):
    try:
        return decoder(parts)
    except FrameError as error:
        return type(error), str(error)


def both(parts, fingerprint=None):
    ours = outcome(lambda p: native.core.decode_frame(p, fingerprint, MAX_PAYLOAD), parts)
    twin = outcome(lambda p: decode(p, fingerprint), parts)
    if isinstance(twin, Frame):
        twin = twin.with_(payload=bytes(twin.payload))
    assert ours == twin
    return twin


@needs_native
@settings(deadline=None, max_examples=100)
@given(fields=FIELDS, payload=st.binary(max_size=300))
def test_both_codecs_write_the_same_bytes(fields, payload):
    frame = Frame(payload=payload, **fields)
    header, body = encode(frame)
    assert native.core.encode_frame(frame) == header
    assert both([header, body]) == frame and both([header + body]) == frame


@needs_native
def test_both_codecs_say_the_same_of_damaged_frames():
    good, rng, seen = valid_bytes(), random.Random(3), set()
    for _ in range(20_000):
        data = bytearray(good[: rng.randrange(len(good))] if rng.random() < 0.1 else good)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data)) if data and rng.random() < 0.2 else rng.choice(range(min(len(data), HEADER_BYTES + 60))) if data else 0
            if data:
                data[at] = rng.choice((0, 1, 2, 9, 0x22, 0x27, 0x5C, 0x7F, 255, rng.randrange(256)))
        data = sealed(data) if len(data) >= HEADER_BYTES and rng.random() < 0.8 else bytes(data)
        cut = rng.randrange(len(data) + 1)
        found = both([data] if rng.random() < 0.5 else [data[:cut], data[cut:]], rng.choice((None, bytes(16), b"z" * 16)))
        seen.add(found[1].split(":")[1][:12] if isinstance(found, tuple) else "frame")
    assert len(seen) > 12 and "frame" in seen  # the damage reached most of the checks


@needs_native
def test_both_codecs_refuse_the_same_frames_for_sending():
    from fastee.cluster.frame import TensorEntry

    for frame in (
        Frame(Kind.TASK, route=bytes(65)),
        Frame(Kind.TASK, task=-1),
        Frame(Kind.TASK, hops=1 << 16),
        Frame(Kind.TASK, tensors=(TensorEntry(torch.complex64, (1,), 0, 8),), payload=bytes(8)),
        Frame(Kind.TASK, tensors=(TensorEntry(torch.float32, (1,) * 9, 0, 4),), payload=bytes(4)),
        Frame(Kind.TASK, tensors=(TensorEntry(torch.float32, (1 << 32,), 0, 4),), payload=bytes(4)),
    ):
        for encoder in (encode, native.core.encode_frame):
            with pytest.raises(FrameError):
                encoder(frame)


@needs_native
def test_the_checksum_is_the_librarys():
    for size in (1, 100, 4096, 100_000):
        payload = random.Random(size).randbytes(size)
        header, _ = encode(Frame(Kind.TASK, payload=payload))
        assert native.core.encode_frame(Frame(Kind.TASK, payload=payload)) == header
        assert struct.unpack_from("<I", header, HEADER_BYTES - 4)[0] == google_crc32c.value(header[: HEADER_BYTES - 4] + header[HEADER_BYTES:] + payload)

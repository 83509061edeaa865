"""A process's end of the cluster's network, as the node and the client use it: frames in, frames out, who is there.

Two of them do the same: :class:`~fastee.cluster.native_endpoint.NativeEndpoint` (the C++ I/O thread, the default) and
:class:`PythonEndpoint` (pyzmq, the fallback and the tests' oracle). ``FASTEE_TRANSPORT`` = ``native`` or ``python`` chooses.
"""

from __future__ import annotations

import heapq
import ipaddress
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from fastee import native
from fastee.cluster.courier import Courier
from fastee.cluster.frame import NO_DEADLINE, Frame, Kind, decode
from fastee.cluster.keys import Keys
from fastee.cluster.link import Link
from fastee.cluster.messages import Ports, Refused, node_of, node_peer, to_payload
from fastee.cluster.transport import Message, PeerEvent, ZmqTransport
from fastee.errors import ClusterError, FingerprintMismatch, FrameError

HEARTBEAT_SECONDS = 0.1
DOWN_SECONDS = 0.8
_LISTENER_GONE_SECONDS = 5.0

TaskKey = tuple[int, int, int]


def task_key(frame: Frame) -> TaskKey:
    """Return what names one hop of one attempt of a task: (task, origin, hops)."""
    return frame.task, frame.origin, frame.hops


def attempt_key(frame: Frame) -> TaskKey:
    """Return what names one attempt of a task, whose high byte of hops counts them: (task, origin, attempt)."""
    return frame.task, frame.origin, frame.hops >> 8


class Arrival(NamedTuple):
    """A whole, checked frame of this model (or a REFUSED one of any) from a peer."""

    peer: str
    frame: Frame


@dataclass(frozen=True)
class Lost:
    """A task (task, origin, hops) that could not be delivered: its peer is down or stayed full for a second."""

    key: TaskKey


@dataclass(frozen=True)
class Sent:
    """A task (task, origin, hops) has crossed an emulated link to `machine`: bytes, nanoseconds, and when it was there (monotonic ns)."""

    machine: int
    nbytes: int
    duration: int
    at: int
    key: TaskKey


@dataclass(frozen=True)
class Answered:
    """An armed answer left because the deadline of its task (task, origin, attempt) came first."""

    key: TaskKey


@dataclass(frozen=True)
class Complaint:
    """Bytes that were ignored, or a handshake that failed (``keys``), with the reason."""

    peer: str
    reason: str
    keys: bool = False


Item = Arrival | PeerEvent | Lost | Sent | Answered | Complaint


@dataclass
class Identity:
    """Who this process is on the network. ``hello``: JSON said on every connection; a ``node`` greets and heartbeats who said HELLO.

    ``machine``: index of the machine it runs on; ``links``: emulated links by (source, target) machine; ``peer_tasks``: tasks of one peer
    that may wait here (more are refused); ``keys`` and ``allowed`` (public key -> name): CURVE, required beyond loopback.
    """

    name: str
    machine: int
    incarnation: int
    fingerprint: bytes
    hello: bytes
    links: Mapping[tuple[int, int], Link] = field(default_factory=dict)
    node: bool = False
    peer_tasks: int = 256
    keys: Keys | None = None
    allowed: Mapping[str, str] = field(default_factory=dict)


class Endpoint(Protocol):
    """What the node and the client need of the network. ``concurrent``: `put` and `arm` may be called from any thread."""

    concurrent: bool
    bytes_to: dict[int, int]

    def bind(self, host: str = "127.0.0.1", ctl: int = 0, bulk: int = 0) -> Ports:
        """Listen on two ports of an address (0: any free one); once, before anything else. ``ClusterError`` when one is taken."""

    def connect(self, peer: str, machine: int, host: str, ports: Ports, key: str = "") -> None:
        """Start connecting; ``PeerEvent(peer, True)`` when the peer's heartbeats or HELLO come, False within 0.8 s of silence."""

    def put(self, peer: str, machine: int, frame: Frame, deadline: int = NO_DEADLINE, *, keyed: bool = False) -> bool:
        """Put a frame on the way to a peer on a machine; False when the link is down (rate 0). ``keyed``: dropped if the task's armed
        answer has left, else the end of that answer. ``deadline``: monotonic ns, from which a TASK's time left is stamped."""

    def arm(self, peer: str, machine: int, frame: Frame, deadline: int) -> None:
        """Keep an answer that is sent if the task is not settled (a keyed `put`) when waiting longer would bring it too late."""

    def set_beat(self, payload: bytes) -> None:
        """Set what the heartbeats say; they go out every 0.1 s by themselves."""

    def receive(self, timeout: float, file: int = -1, spin: float = 0.0) -> list[Item]:
        """Return what has happened, waiting up to `timeout` seconds for the first item or for `file` to be readable; the first `spin`
        seconds of it without sleeping, where that is cheap."""

    def wake(self) -> None:
        """Make a waiting `receive` return; callable from any thread."""

    def close(self) -> None:
        """Close all connections without lingering."""


def check_address(host: str, keys: Keys | None) -> str:
    """Return `host` when it may be used: a loopback address, or any one IP address when there are keys. Else raises ``ClusterError``."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise ClusterError(f"cluster: host must be an IP address, got {host!r}") from None
    if address.is_unspecified:
        raise ClusterError(f"cluster: {host!r} stands for every address of this machine; name the one to use, as in '192.168.1.5'")
    if not address.is_loopback and keys is None:
        raise ClusterError(
            f"cluster: address {host!r} is not a loopback address, and without keys nothing is encrypted or authenticated; "
            "make some with `fastee keys`"
        )
    return host


def open_endpoint(identity: Identity) -> Endpoint:
    """Return the endpoint that ``FASTEE_TRANSPORT`` asks for, by default the native one where it was built.

    Raises ``ValueError`` for another value of it and ``ClusterError`` when the one asked for cannot serve.
    """
    choice = os.environ.get("FASTEE_TRANSPORT", "")
    if choice not in ("", "native", "python"):
        raise ValueError(f"FASTEE_TRANSPORT: got {choice!r}, expected 'native' or 'python'")
    built = hasattr(native.core, "IoThread")
    if choice == "native" and not built:
        raise ClusterError(f"cluster: FASTEE_TRANSPORT=native, but the I/O thread was not built: {native.reason.get('_C', 'not on this system')}")
    if built and choice != "python":
        from fastee.cluster.native_endpoint import NativeEndpoint

        return NativeEndpoint(identity)
    return PythonEndpoint(identity)


class PythonEndpoint:
    """pyzmq: everything in the thread that made it, so a busy interpreter delays heartbeats too. No CURVE: loopback only."""

    concurrent = False

    def __init__(self, identity: Identity):
        if identity.keys is not None:
            raise ClusterError("cluster: FASTEE_TRANSPORT=python has no CURVE; use the native transport")
        self._me = identity
        self._transport = ZmqTransport(identity.name)
        self._courier = Courier(self._transport, identity.machine, identity.links, identity.incarnation, identity.fingerprint, self._is_up)
        self.bytes_to = self._courier.bytes_to
        self._connected: dict[str, bool] = {}
        self._seen: dict[str, float] = {}
        self._up: dict[str, bool] = {}
        self._listeners: dict[str, float] = {}
        self._beat, self._next_beat, self._tick = b"", 0.0, 0.0
        self._armed: dict[TaskKey, tuple[int, str, int, Frame]] = {}
        self._alarms: list[tuple[int, TaskKey]] = []
        self._answered: dict[TaskKey, None] = {}
        self._dropped: list[Item] = []
        self._file = -1

    def bind(self, host: str = "127.0.0.1", ctl: int = 0, bulk: int = 0) -> Ports:
        return Ports(*self._transport.bind(host, ctl, bulk), host)

    def connect(self, peer: str, machine: int, host: str, ports: Ports, key: str = "") -> None:
        self._connected[peer] = False
        self._transport.connect(peer, host, ports.ctl, ports.bulk)

    def _is_up(self, peer: str) -> bool:
        return self._up.get(peer, False) if peer in self._connected else True

    def put(self, peer: str, machine: int, frame: Frame, deadline: int = NO_DEADLINE, *, keyed: bool = False) -> bool:
        if keyed:
            if attempt_key(frame) in self._answered:
                if frame.kind is Kind.TASK:
                    self._dropped.append(Lost(task_key(frame)))  # its credit with the peer is free again
                return True
            self._armed.pop(attempt_key(frame), None)
        return self._courier.put(peer, machine, frame, deadline)

    def arm(self, peer: str, machine: int, frame: Frame, deadline: int) -> None:
        link = self._me.links.get((self._me.machine, machine), Link())
        due = deadline - round(link.seconds(frame.nbytes) * 1e9) - 500_000
        self._armed[attempt_key(frame)] = (due, peer, machine, frame)
        heapq.heappush(self._alarms, (due, attempt_key(frame)))

    def set_beat(self, payload: bytes) -> None:
        self._beat = payload

    def wake(self) -> None:
        self._transport.wake()

    def close(self) -> None:
        self._transport.close()

    def receive(self, timeout: float, file: int = -1, spin: float = 0.0) -> list[Item]:
        if file != self._file:
            self._transport.watch_file(file)
            self._file = file
        out: list[Item] = []
        self._work(out)
        soonest = min(timeout, max(0.0, self._next_beat - time.monotonic()), self._courier.pause())
        if self._alarms:
            soonest = min(soonest, max(0.0, (self._alarms[0][0] - time.monotonic_ns()) * 1e-9))
        for item in self._transport.receive(0 if out else soonest):
            self._handle(item, out)
        self._work(out)
        return out

    def _work(self, out: list[Item]) -> None:
        now = time.monotonic()
        if self._tick and now - self._tick > DOWN_SECONDS / 2:
            # This process itself stood still (stopped, starved): silence of the others proves nothing.
            self._seen = dict.fromkeys(self._seen, now)
        self._tick = now
        for peer, connected in self._connected.items():
            up = connected and now - self._seen.get(peer, -DOWN_SECONDS) < DOWN_SECONDS
            if up != self._up.get(peer, False):
                self._up[peer] = up
                out.append(PeerEvent(peer, up))
        while self._alarms and self._alarms[0][0] <= time.monotonic_ns():
            due, key = heapq.heappop(self._alarms)
            if (armed := self._armed.get(key)) is not None and armed[0] == due:
                del self._armed[key]
                self._answered[key] = None
                if len(self._answered) > 4096:
                    del self._answered[next(iter(self._answered))]
                self._courier.put(*armed[1:])
                out.append(Answered(key))
        out += [Lost(task_key(parcel.frame)) for parcel in self._courier.flush() if parcel.frame.kind is Kind.TASK]
        out += self._dropped
        self._dropped.clear()
        out += [Sent(*transfer) for transfer in self._courier.transfers]
        self._courier.transfers.clear()
        if now >= self._next_beat:
            self._next_beat = now + HEARTBEAT_SECONDS
            self._say(now)

    def _say(self, now: float) -> None:
        if not self._beat:
            return
        beat = Frame(Kind.HEARTBEAT, payload=self._beat)
        for peer, connected in self._connected.items():
            if connected:
                self._courier.direct(peer, beat)
        for peer, last in list(self._listeners.items()):
            if self._courier.direct(peer, beat):
                self._listeners[peer] = now
            elif now - last > _LISTENER_GONE_SECONDS:
                del self._listeners[peer]

    def _handle(self, item: Message | PeerEvent, out: list[Item]) -> None:
        if isinstance(item, PeerEvent):
            self._connected[item.peer] = item.up
            if not item.up:
                self._seen.pop(item.peer, None)
            elif self._me.hello:
                self._courier.direct(item.peer, Frame(Kind.HELLO, payload=self._me.hello))
            return
        peer = item.peer
        try:
            frame = decode(item.parts)
            if frame.fingerprint != self._me.fingerprint and frame.kind is not Kind.REFUSED:
                decode(item.parts, self._me.fingerprint)  # raises with the reason
        except FingerprintMismatch as error:
            if self._me.node:
                refusal = to_payload(Refused("fingerprint", str(error)))
                self._courier.direct(peer, Frame(Kind.REFUSED, task=frame.task, origin=frame.origin, hops=frame.hops, payload=refusal))
            else:
                out.append(Complaint(peer, str(error)))
            return
        except FrameError as error:
            out.append(Complaint(peer, str(error)))
            return
        node = node_of(peer)
        if frame.kind in (Kind.HELLO, Kind.HEARTBEAT):
            own = peer if peer in self._connected else node_peer(node)
            if own in self._connected and (peer == own or frame.kind is Kind.HEARTBEAT):
                self._seen[own] = time.monotonic()
        if self._me.node and frame.kind is Kind.HELLO and node < 0:
            self._listeners[peer] = time.monotonic()
            self._courier.direct(peer, Frame(Kind.HELLO, payload=self._me.hello))
        out.append(Arrival(peer, frame))

"""Moving message parts between processes: the small interface, and ZeroMQ behind it.

An instance belongs to the one thread that made it (sockets of libzmq are not shared); only :meth:`Transport.wake` may be called
from elsewhere. A message is a list of byte buffers; what they mean is the business of ``frame.py``.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import zmq
from zmq.utils.monitor import recv_monitor_message

from fastee.cluster.frame import MAX_HEADER, MAX_PAYLOAD
from fastee.errors import ClusterError, PeerLost

HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 200, 1000
BULK_WINDOW = 8


@dataclass(frozen=True)
class Message:
    """Parts received from a peer."""

    peer: str
    parts: list[Any]


@dataclass(frozen=True)
class PeerEvent:
    """A connection that this side opened came up or went down."""

    peer: str
    up: bool


class Transport(Protocol):
    """What the node and the client need of a network: replaceable by any engine that can say "full" instead of queueing."""

    def try_send(self, peer: str, parts: Sequence[Any], *, bulk: bool) -> bool:
        """Hand over a message; False when the peer's bounded queue is full or the peer is not connected. Never waits."""

    def send(self, peer: str, parts: Sequence[Any], *, bulk: bool, timeout: float) -> None:
        """Hand over a message, waiting up to `timeout` seconds; raises ``PeerLost`` when it did not fit."""

    def receive(self, timeout: float) -> list[Message | PeerEvent]:
        """Return what has arrived, waiting up to `timeout` seconds for the first item."""

    def wake(self) -> None:
        """Make a waiting :meth:`receive` return; callable from any thread."""

    def close(self) -> None:
        """Close all connections without lingering."""


def check_loopback(host: str) -> str:
    """Return `host` when it is a loopback address, else raise ``ClusterError``: this version has no authentication."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ClusterError(
            f"cluster: address {host!r} is not a loopback address; this version neither encrypts nor authenticates, so nodes "
            "bind and connect to 127.0.0.1 only. Tunnel (ssh -L, WireGuard) to reach another machine."
        )
    return host


@dataclass
class _Peer:
    """The two connections that this side opened towards a peer."""

    host: str
    ctl_port: int
    bulk_port: int
    ctl: zmq.Socket
    ctl_monitor: zmq.Socket
    bulk: zmq.Socket | None = None
    bulk_monitor: zmq.Socket | None = None
    up: bool = False


class ZmqTransport:
    """ZeroMQ: per process two ROUTERs (if it binds) and per peer two DEALERs (if it connects), control apart from bulk.

    Control carries small messages and ZMTP heartbeats, so a hung or vanished host is noticed. Bulk has bounded queues of ``BULK_WINDOW``
    messages and no heartbeats (a 4 MB message on a slow link would make them time out); it is opened when control comes up and
    closed when it goes down, so nothing stale is sent after a heal.
    """

    def __init__(self, name: str, *, max_payload: int = MAX_PAYLOAD):
        self.name = name
        self._max = max_payload
        self._context = zmq.Context(io_threads=1)
        self._context.set(zmq.MAX_SOCKETS, 4096)
        self._poller = zmq.Poller()
        self._routers: dict[bool, zmq.Socket] = {}
        self._peers: dict[str, _Peer] = {}
        self._source: dict[Any, tuple[str, str]] = {}
        self._pending: list[Message | PeerEvent] = []
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._poller.register(self._wake_read, zmq.POLLIN)
        self._closed = False

    def _socket(self, kind: int, bulk: bool) -> zmq.Socket:
        s = self._context.socket(kind)
        s.setsockopt(zmq.LINGER, 0)
        s.setsockopt(zmq.MAXMSGSIZE, max(self._max, MAX_HEADER) if bulk else 1 << 20)
        if bulk:
            s.setsockopt(zmq.SNDHWM, BULK_WINDOW)
            s.setsockopt(zmq.RCVHWM, BULK_WINDOW)
        else:
            s.setsockopt(zmq.SNDHWM, 1000)
            s.setsockopt(zmq.RCVHWM, 1000)
            s.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
            s.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        if kind == zmq.ROUTER:
            s.setsockopt(zmq.ROUTER_MANDATORY, 1)
            # A peer that was stopped meets its old connection and the new one at once when it runs again. Without handover the
            # ROUTER may keep the old one for that id and ignore the new one silently, for good (seen in 2 of 4 runs).
            s.setsockopt(zmq.ROUTER_HANDOVER, 1)
        else:
            s.setsockopt(zmq.ROUTING_ID, self.name.encode())
            s.setsockopt(zmq.IMMEDIATE, 1)
            s.setsockopt(zmq.CONNECT_TIMEOUT, 1000)
            s.setsockopt(zmq.RECONNECT_IVL, 100)
            s.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        return s

    def bind(self, host: str = "127.0.0.1", ctl: int = 0, bulk: int = 0) -> tuple[int, int]:
        """Bind control and bulk to ports of a loopback address (0: any free one) and return the ports."""
        check_loopback(host)
        ports = []
        for is_bulk, port in ((False, ctl), (True, bulk)):
            s = self._routers[is_bulk] = self._socket(zmq.ROUTER, is_bulk)
            try:
                s.bind(f"tcp://{host}:{port or '*'}")
            except zmq.ZMQError as error:
                raise ClusterError(f"cluster: bind to tcp://{host}:{port}: {error}") from None
            ports.append(int(s.get(zmq.LAST_ENDPOINT).rpartition(b":")[2].rstrip(b"\0")))
            self._poller.register(s, zmq.POLLIN)
        return ports[0], ports[1]

    def connect(self, peer: str, host: str, ctl_port: int, bulk_port: int) -> None:
        """Start connecting to a peer; :meth:`receive` reports ``PeerEvent(peer, True)`` when it is there."""
        check_loopback(host)
        ctl = self._socket(zmq.DEALER, False)
        monitor = ctl.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._peers[peer] = _Peer(host, ctl_port, bulk_port, ctl, monitor)
        self._watch(ctl, peer, "ctl")
        self._watch(monitor, peer, "ctl monitor")
        ctl.connect(f"tcp://{host}:{ctl_port}")

    def _watch(self, s: zmq.Socket, peer: str, what: str) -> None:
        self._source[s] = (peer, what)
        self._poller.register(s, zmq.POLLIN)

    def _drop(self, *sockets: zmq.Socket | None) -> None:
        for s in sockets:
            if s is not None:
                self._poller.unregister(s)
                self._source.pop(s, None)

    def _open_bulk(self, name: str, peer: _Peer) -> None:
        peer.bulk = self._socket(zmq.DEALER, True)
        peer.bulk_monitor = peer.bulk.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._watch(peer.bulk, name, "bulk")
        self._watch(peer.bulk_monitor, name, "bulk monitor")
        peer.bulk.connect(f"tcp://{peer.host}:{peer.bulk_port}")

    def _close_bulk(self, peer: _Peer) -> None:
        if peer.bulk is not None:
            self._drop(peer.bulk, peer.bulk_monitor)
            peer.bulk.disable_monitor()
            peer.bulk.close()
            peer.bulk = peer.bulk_monitor = None

    def _monitor(self, name: str, what: str, s: zmq.Socket) -> None:
        peer = self._peers[name]
        event = recv_monitor_message(s, zmq.DONTWAIT)["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            if what == "ctl monitor":
                self._close_bulk(peer)
                self._open_bulk(name, peer)
            elif not peer.up:
                peer.up = True
                self._pending.append(PeerEvent(name, True))
        elif event == zmq.EVENT_DISCONNECTED:
            # A lost bulk connection takes its queued messages with it, so it counts as the peer going down even when control lives.
            self._close_bulk(peer)
            if peer.up:
                peer.up = False
                self._pending.append(PeerEvent(name, False))
            if what == "bulk monitor":
                self._open_bulk(name, peer)

    def try_send(self, peer: str, parts: Sequence[Any], *, bulk: bool) -> bool:
        own = self._peers.get(peer)
        try:
            if own is not None:
                s = own.bulk if bulk else own.ctl
                if s is None or not own.up:
                    return False
                s.send_multipart(parts, zmq.DONTWAIT)
            else:
                s = self._routers.get(bulk)
                if s is None:
                    return False
                s.send_multipart([peer.encode(), *parts], zmq.DONTWAIT)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return False
            raise
        return True

    def send(self, peer: str, parts: Sequence[Any], *, bulk: bool, timeout: float) -> None:
        end = time.monotonic() + timeout
        while not self.try_send(peer, parts, bulk=bulk):
            left = end - time.monotonic()
            if left <= 0:
                raise PeerLost(f"cluster: peer {peer!r} did not take a message within {timeout} s")
            self._pending += self._poll(min(left, 0.005))

    def receive(self, timeout: float) -> list[Message | PeerEvent]:
        if self._pending:
            timeout = 0.0
        found = self._poll(timeout)
        out, self._pending = self._pending, []
        return out + found

    def _poll(self, timeout: float) -> list[Message | PeerEvent]:
        found: list[Message | PeerEvent] = []
        end = time.monotonic() + timeout
        ready = self._poller.poll(max(0, int(timeout * 1000)))
        if not ready and 0 < (rest := end - time.monotonic()) < 0.002:
            # poll() counts whole milliseconds; an emulated link of 1 ms needs the rest exactly.
            time.sleep(rest)
            ready = self._poller.poll(0)
        for s, _ in ready:
            if s == self._wake_read.fileno():
                with contextlib.suppress(BlockingIOError):
                    self._wake_read.recv(4096)
                continue
            if not isinstance(s, zmq.Socket):
                continue
            peer, what = self._source.get(s, ("", "router"))
            if what == "router" and s not in self._routers.values():
                continue  # closed by an event handled earlier in this round
            # A bounded number per socket, so that a flood on one connection cannot starve the others.
            for _ in range(64):
                try:
                    if what.endswith("monitor"):
                        self._monitor(peer, what, s)
                        if s not in self._source:
                            break
                        continue
                    parts = [f.buffer for f in s.recv_multipart(zmq.DONTWAIT, copy=False)]
                except zmq.Again:
                    break
                if what == "router":
                    try:
                        found.append(Message(bytes(parts[0]).decode(), parts[1:]))
                    except UnicodeDecodeError:  # an id that no fastee process has: a stranger's connection
                        found.append(Message("", parts[1:]))
                else:
                    found.append(Message(peer, parts))
        return found

    def watch_file(self, fd: int) -> None:
        """Let a readable file descriptor end the wait of :meth:`receive` (the worker's pipe to its parent)."""
        self._poller.register(fd, zmq.POLLIN)

    def unwatch_file(self, fd: int) -> None:
        """Undo :meth:`watch_file`."""
        self._poller.unregister(fd)

    def disconnect(self, peer: str) -> None:
        """Forget a peer that this side had connected to."""
        own = self._peers.pop(peer, None)
        if own is not None:
            self._close_bulk(own)
            self._drop(own.ctl, own.ctl_monitor)
            own.ctl.disable_monitor()
            own.ctl.close()

    def wake(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._wake_write.fileno(), b"x")

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for name in list(self._peers):
            self.disconnect(name)
        for s in self._routers.values():
            s.close()
        self._context.destroy(linger=0)
        self._wake_read.close()
        self._wake_write.close()

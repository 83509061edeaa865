"""A node's process (``python -m fastee.cluster.worker``): one thread owns the sockets, one computes.

The network arrives once, over the private pipe that is this process's stdin, as a cloudpickle. That is safe there and only
there: the writer is the parent that started this very process with the same rights and could run anything anyway. Nothing that
comes over a socket is ever unpickled. The pipe stays open for life: when it closes, the parent is gone and the node exits.
"""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
import select
import signal
import sys
import threading
import time
import traceback
from collections import deque
from typing import Any

import cloudpickle
import msgspec
import torch

from fastee.cluster.courier import Courier
from fastee.cluster.frame import Frame, Kind, decode
from fastee.cluster.messages import (
    Heartbeat,
    Hello,
    Intro,
    Peers,
    Ports,
    Refused,
    client_peer,
    from_payload,
    node_of,
    node_peer,
    to_payload,
)
from fastee.cluster.node import Node, Outgoing, Settings
from fastee.cluster.transport import Message, PeerEvent, ZmqTransport
from fastee.errors import FingerprintMismatch, FrameError
from fastee.scheduling import Profile

HEARTBEAT_SECONDS = 0.1
DOWN_SECONDS = 1.0
_CLIENT_GONE_SECONDS = 5.0


class Worker:
    """The I/O thread of a node: sockets, emulated links, heartbeats; hands tasks to the compute thread and sends what it emits."""

    def __init__(self, net: Any, settings: Settings, profile: Profile, links: dict, stdin_fd: int):
        self.settings = settings
        self.index = settings.index
        self.incarnation = secrets.randbits(63)
        self._stdin = stdin_fd
        self._parent = os.getppid()
        self._outbox: deque[Outgoing] = deque()
        self._transport = ZmqTransport(f"n{self.index}:{self.incarnation:016x}")
        self._courier = Courier(self._transport, self.index, links, self.incarnation, settings.fingerprint, self._is_up)
        self._connected: dict[int, bool] = {}
        self._seen: dict[int, float] = {}
        self._up: dict[int, bool] = {}
        self._clients: dict[str, float] = {}
        self._unconfirmed: dict[int, dict[tuple[int, int, int], Frame]] = {}
        self._bad_frames = 0
        self._failed = False
        self._tick = self._beat = 0.0
        self.node = Node(net, settings, profile, self._emit)

    def bind(self) -> Ports:
        return Ports(*self._transport.bind())

    def connect(self, ports: list[Ports]) -> None:
        for index, at in enumerate(ports):
            if index != self.index:
                self._transport.connect(node_peer(index), "127.0.0.1", at.ctl, at.bulk)

    def _emit(self, outgoing: Outgoing) -> None:
        self._outbox.append(outgoing)
        self._transport.wake()

    def _is_up(self, peer: str) -> bool:
        node = node_of(peer)
        return node < 0 or self._up.get(node, False)

    def serve(self) -> int:
        """Run until the parent is gone; returns the exit status."""
        compute = threading.Thread(target=self._compute, name="compute", daemon=True)
        compute.start()
        self._transport.watch_file(self._stdin)
        try:
            while not self._failed and self._parent_lives():
                wait = max(0.0, self._beat - time.monotonic())
                for item in self._transport.receive(min(wait, self._courier.pause())):
                    self._handle(item)
                self._send()
                self._watch()
        finally:
            self.node.post("stop")
            self._transport.close()
        return int(self._failed)

    def _compute(self) -> None:
        try:
            self.node.run()
        except BaseException:
            traceback.print_exc()
            self._failed = True
            self._transport.wake()

    def _parent_lives(self) -> bool:
        if os.getppid() != self._parent:
            return False
        readable, _, _ = select.select([self._stdin], [], [], 0)
        return not readable or bool(os.read(self._stdin, 4096))

    # in

    def _handle(self, item: Message | PeerEvent) -> None:

        if isinstance(item, PeerEvent):
            node = node_of(item.peer)
            self._connected[node] = item.up
            if not item.up:
                self._set_up(node, False)
            return
        try:
            self._act(item.peer, decode(item.parts, self.settings.fingerprint))
        except FingerprintMismatch as error:
            stranger = decode(item.parts)
            refusal = Refused("fingerprint", str(error))
            self._courier.direct(
                item.peer, Frame(Kind.REFUSED, task=stranger.task, origin=stranger.origin, hops=stranger.hops, payload=to_payload(refusal))
            )
        except FrameError as error:
            self._bad_frames += 1
            if self._bad_frames <= 5:
                print(f"node {self.index}: ignored bytes from {item.peer!r}: {error}", file=sys.stderr, flush=True)

    def _act(self, peer: str, frame: Frame) -> None:

        node = node_of(peer)
        known = 0 <= node < len(self.settings.names)
        if frame.kind is Kind.TASK:
            self.node.post("task", frame, node if known else -1)
        elif frame.kind is Kind.HELLO:
            from_payload(frame, Hello)
            if not known:
                self._clients[peer] = time.monotonic()
                self._courier.direct(
                    peer, Frame(Kind.HELLO, payload=to_payload(Hello(self.settings.names[self.index], self.index, os.getpid())))
                )
        elif known and frame.kind in (Kind.HEARTBEAT, Kind.CREDIT):
            beat = from_payload(frame, Heartbeat)
            if frame.kind is Kind.HEARTBEAT:
                self._seen[node] = time.monotonic()
            elif self._unconfirmed.get(node, {}).pop((frame.task, frame.origin, frame.hops), None) is not None:
                self.node.post("credit", node)
            self.node.post("queue", node, min(max(beat.queue, 0), 1 << 30))

    # out

    def _send(self) -> None:

        while self._outbox:
            out = self._outbox.popleft()
            if out.target < 0:
                self._courier.put(client_peer(out.frame.origin), 0, out.frame, out.deadline)
                continue
            if out.frame.kind is Kind.TASK:
                if not self._up.get(out.target, False):
                    self._undeliverable(out.frame, out.target)
                    continue
                self._unconfirmed.setdefault(out.target, {})[self._key(out.frame)] = out.frame.with_(tensors=(), payload=b"")
            self._courier.put(node_peer(out.target), out.target, out.frame, out.deadline)
        for parcel in self._courier.flush():
            node = node_of(parcel.peer)
            if parcel.frame.kind is Kind.TASK and self._unconfirmed.get(node, {}).pop(self._key(parcel.frame), None) is not None:
                self._undeliverable(parcel.frame, node)
                self.node.post("credit", node)
        for machine, nbytes, spent in self._courier.transfers:
            self.node.post("link", machine, nbytes, spent)
        self._courier.transfers.clear()

    @staticmethod
    def _key(frame: Frame) -> tuple[int, int, int]:
        return frame.task, frame.origin, frame.hops

    def _undeliverable(self, frame: Frame, node: int) -> None:

        reason = f"node {self.settings.names[node]!r} is lost to {self.settings.names[self.index]!r}"
        refusal = frame.with_(kind=Kind.REFUSED, route=b"", tensors=(), payload=to_payload(Refused("undeliverable", reason)))
        self._courier.put(client_peer(frame.origin), 0, refusal)

    def _set_up(self, node: int, up: bool) -> None:
        if self._up.get(node, False) == up:
            return
        self._up[node] = up
        self.node.post("up", node, up)
        if not up:
            # Sent but never confirmed: it may be lost with the connection. The client starts those over.
            for frame in self._unconfirmed.pop(node, {}).values():
                self._undeliverable(frame, node)

    def _watch(self) -> None:

        now = time.monotonic()
        if self._tick and now - self._tick > DOWN_SECONDS / 2:
            # This process itself stood still (stopped, starved): silence of the others proves nothing.
            self._seen = dict.fromkeys(self._seen, now)
        self._tick = now
        for node, connected in self._connected.items():
            self._set_up(node, connected and now - self._seen.get(node, -DOWN_SECONDS) < DOWN_SECONDS)
        if now < self._beat:
            return
        self._beat = now + HEARTBEAT_SECONDS
        sent = [self._courier.bytes_to.get(n, 0) for n in range(len(self.settings.names))]
        reach = [n for n, up in self._up.items() if up]
        payload = to_payload(Heartbeat(self.node.queue_length, self.node.service, self.node.handled, sent, reach))
        for node, connected in self._connected.items():
            if connected:
                self._courier.direct(node_peer(node), Frame(Kind.HEARTBEAT, payload=payload))
        for client, last in list(self._clients.items()):
            if self._courier.direct(client, Frame(Kind.HEARTBEAT, payload=payload)):
                self._clients[client] = now
            elif now - last > _CLIENT_GONE_SECONDS:
                del self._clients[client]


def main() -> int:
    """Entry point: read the network from stdin, announce the ports on stdout, serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches the whole group; the parent decides
    announce = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the network prints must not look like the announcement
    stdin = os.fdopen(0, "rb", buffering=0)
    try:
        intro = msgspec.json.decode(_line(stdin), type=Intro)
        torch.set_num_threads(1)
        with contextlib.suppress(RuntimeError):
            torch.set_num_interop_threads(1)
        sys.setswitchinterval(0.001)
        net, settings, profile, links = cloudpickle.loads(_exactly(stdin, intro.pickled))
        if hasattr(net, "eval"):
            net.eval()
        worker = Worker(net, settings, profile, links, stdin.fileno())
        announce.write(msgspec.json.encode(worker.bind()) + b"\n")
        announce.close()
        worker.connect(msgspec.json.decode(_line(stdin), type=Peers).ports)
    except EOFError as error:
        print(f"node: {error}", file=sys.stderr)
        return 1
    gc.collect()
    gc.freeze()
    return worker.serve()


def _line(stream: Any) -> bytes:
    out = bytearray()
    while not out.endswith(b"\n"):
        byte = stream.read(1)
        if not byte:
            raise EOFError("the parent closed the pipe during start-up")
        out += byte
    return bytes(out)


def _exactly(stream: Any, size: int) -> bytearray:
    out = bytearray(size)
    view, at = memoryview(out), 0
    while at < size:
        got = stream.readinto(view[at:])
        if not got:
            raise EOFError("the parent closed the pipe before the network was through")
        at += got
    return out


def run() -> None:
    """Run :func:`main` and end at once: neither a compute thread inside torch nor the interpreter's clean-up may delay it."""
    status = 1
    try:
        status = main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    run()

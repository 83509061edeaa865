"""A node's process (``python -m fastee.cluster.worker``).

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
from collections.abc import Callable
from typing import Any

import cloudpickle
import msgspec
import torch

from fastee.cluster.endpoint import Answered, Arrival, Identity, Item, Lost, Sent, TaskKey, open_endpoint, task_key
from fastee.cluster.frame import Frame, Kind
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
from fastee.cluster.transport import PeerEvent
from fastee.errors import FrameError
from fastee.nn.result import judge
from fastee.scheduling import Profile

_REPORT_SECONDS = 0.05
_PARENT_SECONDS = 0.1
_PEER_TASKS = 256


class Child:
    """What every worker process is: somebody's child, with an end of the network."""

    def __init__(self, stdin_fd: int, identity: Identity):
        self._stdin = stdin_fd
        self._parent = os.getppid()
        self._parent_at = 0.0
        self._complaints = 0
        self._index = identity.machine
        self._endpoint = open_endpoint(identity)

    def bind(self) -> Ports:
        return self._endpoint.bind()

    def _stays(self) -> bool:
        """Say whether to go on: here until the parent is gone."""
        now = time.monotonic()
        if now < self._parent_at:
            return True
        self._parent_at = now + _PARENT_SECONDS
        if os.getppid() != self._parent:
            return False
        readable, _, _ = select.select([self._stdin], [], [], 0)
        return not readable or bool(os.read(self._stdin, 4096))

    def _complain(self, peer: str, reason: str) -> None:
        self._complaints += 1
        if self._complaints <= 5:
            print(f"node {self._index}: ignored bytes from {peer!r}: {reason}", file=sys.stderr, flush=True)


class Worker(Child):
    """A node on the network: hands arriving tasks to its `Node` and sends what that emits, reports how it is, notes who is there.

    With a concurrent endpoint one Python thread receives and computes (the sockets, heartbeats and deadlines are the I/O thread's);
    with the Python endpoint this thread owns the sockets and a second one computes.
    """

    def __init__(self, net: Any, settings: Settings, profile: Profile, links: dict, stdin_fd: int = -1):
        self.settings = settings
        self.index = settings.index
        self._outbox: deque[tuple[Outgoing, bool]] = deque()
        incarnation = secrets.randbits(63)
        super().__init__(
            stdin_fd,
            Identity(
                f"n{self.index}:{incarnation:016x}",
                self.index,
                incarnation,
                settings.fingerprint,
                to_payload(self._hello(profile)),
                links,
                node=True,
                peer_tasks=max(_PEER_TASKS, 2 * settings.credit),
                keys=settings.keys,
                allowed=settings.allowed,
            ),
        )
        self._up: dict[int, bool] = {}
        self._leaving: set[int] = set()
        self._unconfirmed: dict[int, dict[TaskKey, Frame]] = {}
        self._failed = False
        self._reported: Heartbeat | None = None
        self._report_at = 0.0
        self.node = Node(net, settings, profile, self._emit, arm=self._arm)
        if self._endpoint.concurrent and settings.slowdown == 1:
            self.node.shortcut = self._endpoint.shortcut(self.node, judge)

    def connect(self, ports: list[Ports]) -> None:
        self._report(force=True)
        for index, at in enumerate(ports):
            if index != self.index:
                key = self.settings.public[index] if self.settings.public else ""
                self._endpoint.connect(node_peer(index), index, at.host, at, key)

    def _emit(self, outgoing: Outgoing) -> None:
        if self._endpoint.concurrent:
            self._send(outgoing, False)
        else:
            self._outbox.append((outgoing, False))
            self._endpoint.wake()

    def _arm(self, outgoing: Outgoing) -> None:
        if self._endpoint.concurrent:
            self._send(outgoing, True)
        else:
            self._outbox.append((outgoing, True))
            self._endpoint.wake()

    def serve(self) -> int:
        """Run until :meth:`_stays` says no, here until the parent is gone; returns the exit status."""
        concurrent = self._endpoint.concurrent
        if not concurrent:
            threading.Thread(target=self._compute, name="compute", daemon=True).start()
        try:
            with torch.inference_mode():
                while not self._failed and self._stays():
                    wait = max(0.0, min(self._report_at - time.monotonic(), self.node.pause() if concurrent else 1.0))
                    if concurrent:
                        for item in self._endpoint.receive(wait, self._stdin, shortcut=self._shortcut()):
                            self._handle(item)
                        self.node.step(longest=0)
                    else:
                        for item in self._endpoint.receive(wait, self._stdin):
                            self._handle(item)
                    while self._outbox:
                        self._send(*self._outbox.popleft())
                    self._report()
        finally:
            self.node.post("stop")
            self._endpoint.close()
        return int(self._failed)

    def _shortcut(self) -> Any:
        """What may run the next task without asking: nothing while there is something to choose from."""
        return self.node.shortcut if self.node.idle else None

    def _compute(self) -> None:
        try:
            self.node.run()
        except BaseException:
            traceback.print_exc()
            self._failed = True
            self._endpoint.wake()

    # in

    def _handle(self, item: Item) -> None:
        if isinstance(item, Arrival):
            try:
                self._act(item.peer, item.frame)
            except FrameError as error:
                self._complain(item.peer, str(error))
        elif isinstance(item, PeerEvent):
            self._set_up(node_of(item.peer), item.up)
        elif isinstance(item, Sent):
            self.node.post("link", item.machine, item.nbytes, item.duration, item.at, item.key)
        elif isinstance(item, Answered):
            self.node.post("answered", item.key)
        elif isinstance(item, Lost):
            for node, waiting in self._unconfirmed.items():
                if (frame := waiting.pop(item.key, None)) is not None:
                    self._undeliverable(frame, node)
                    self.node.post("credit", node)
                    break
        else:
            self._complain(item.peer, item.reason)

    def _act(self, peer: str, frame: Frame) -> None:
        node = node_of(peer)
        known = 0 <= node < len(self.settings.names)
        if frame.kind is Kind.TASK:
            self._take(frame, node if known else -1)
        elif frame.kind is Kind.HELLO:
            hello = from_payload(frame, Hello)
            if known and hello.seconds:
                self.node.post("speed", node, hello.seconds, hello.spread)
        elif known and frame.kind in (Kind.HEARTBEAT, Kind.CREDIT):
            beat = from_payload(frame, Heartbeat)
            if frame.kind is Kind.CREDIT and self._unconfirmed.get(node, {}).pop(task_key(frame), None) is not None:
                self.node.post("credit", node)
            self.node.post("queue", node, min(max(beat.queue, 0), 1 << 30))
            if frame.kind is Kind.HEARTBEAT and beat.leaving != (node in self._leaving):
                (self._leaving.add if beat.leaving else self._leaving.discard)(node)
                self.node.post("up", node, self._up.get(node, False) and not beat.leaving)

    def _take(self, frame: Frame, sender: int) -> None:
        self.node.post("task", frame, sender)

    # out

    def _send(self, out: Outgoing, armed: bool) -> None:
        if out.target < 0:
            client = client_peer(out.frame.origin)
            if armed:
                self._endpoint.arm(client, 0, out.frame, out.deadline)
            else:
                self._endpoint.put(client, 0, out.frame, out.deadline, keyed=out.keyed)
            return
        if out.frame.kind is Kind.TASK:
            if not self._up.get(out.target, False):
                self._undeliverable(out.frame, out.target)
                return
            self._unconfirmed.setdefault(out.target, {})[task_key(out.frame)] = out.frame.with_(tensors=(), payload=b"")
        self._endpoint.put(node_peer(out.target), out.target, out.frame, out.deadline, keyed=out.keyed)

    def _undeliverable(self, frame: Frame, node: int) -> None:
        reason = f"node {self.settings.names[node]!r} is lost to {self.settings.names[self.index]!r}"
        refusal = frame.with_(kind=Kind.REFUSED, route=b"", tensors=(), payload=to_payload(Refused("undeliverable", reason)))
        self._endpoint.put(client_peer(frame.origin), 0, refusal)

    def _set_up(self, node: int, up: bool) -> None:
        self._up[node] = up
        self._leaving.discard(node)
        self.node.post("up", node, up)
        self._report(force=True)
        if not up:
            # Sent but never confirmed: it may be lost with the connection. The client starts those over.
            for frame in self._unconfirmed.pop(node, {}).values():
                self._undeliverable(frame, node)

    def _report(self, force: bool = False) -> None:
        """Tell the endpoint what its next heartbeats say; formatting them for every task would cost more than it tells."""
        now = time.monotonic()
        if now < self._report_at and not force:
            return
        self._report_at = now + _REPORT_SECONDS
        node, count = self.node, len(self.settings.names)
        bytes_to = self._endpoint.bytes_to
        sent, reach = [bytes_to.get(n, 0) for n in range(count)], [n for n, up in self._up.items() if up]
        beat = self._beat(Heartbeat(node.queue_length, node.service, node.handled, sent, reach, False, list(node.exits), node.late, node.forced, segments=list(node.segments)))
        if beat != self._reported:
            self._reported = beat
            self._endpoint.set_beat(to_payload(beat))

    def _beat(self, beat: Heartbeat) -> Heartbeat:
        return beat

    def _hello(self, profile: Profile) -> Hello:
        return Hello(self.settings.names[self.index], self.index, os.getpid())


def main(serve: Callable[..., Any] = Worker) -> int:
    """Entry point: read the network from stdin, announce the ports on stdout, serve; `serve` makes the worker of what was read."""
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
        net, *rest = cloudpickle.loads(_exactly(stdin, intro.pickled))
        if hasattr(net, "eval"):
            net.eval()
        worker = serve(net, *rest, stdin.fileno())
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


def run(serve: Callable[..., Any] = Worker) -> None:
    """Run :func:`main` and end at once: neither a compute thread inside torch nor the interpreter's clean-up may delay it."""
    status = 1
    try:
        status = main(serve)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    run()

"""The endpoint whose sockets, heartbeats, links and deadlines are C++ (csrc/net): Python only hands frames over."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastee import native
from fastee.cluster.endpoint import Answered, Arrival, Complaint, Identity, Item, Lost, Sent, check_address
from fastee.cluster.frame import MAX_PAYLOAD, NO_DEADLINE, Flag, Frame
from fastee.cluster.keys import raw_key
from fastee.cluster.link import media
from fastee.cluster.messages import Ports
from fastee.cluster.transport import PeerEvent
from fastee.errors import ClusterError

_FRAME, _UP, _DOWN, _LOST, _SENT, _ANSWERED, _BAD, _KEY_REFUSED, _FAILED = range(9)  # Event::Type of csrc/net/io_thread.h


def libraries() -> list[str]:
    """Return where the pyzmq wheel keeps its libzmq, without importing it; empty when pyzmq is missing or was built from source."""
    spec = importlib.util.find_spec("zmq")
    if spec is None or spec.origin is None:
        return []
    package = Path(spec.origin).parent
    return [str(p) for p in sorted((package.parent / "pyzmq.libs").glob("libzmq*.so*"))]


class NativeEndpoint:
    """The default endpoint. `put` and `arm` are safe from any thread; `receive` belongs to one thread at a time.

    A payload of 1 KB or more goes out without a copy and is kept until the kernel has it: do not write to it before the answer.
    Received payloads are writable, aligned to 64 bytes and exclusively the frame's.
    """

    concurrent = True

    def __init__(self, identity: Identity):
        keys = identity.keys
        shared = {b: group[0] for group in media(identity.links, identity.machine) for b in group}
        self._me = identity
        try:
            self._io = native.core.IoThread(
                libraries(),
                {
                    "name": identity.name,
                    "fingerprint": identity.fingerprint,
                    "incarnation": identity.incarnation,
                    "machine": identity.machine,
                    "node": identity.node,
                    "hello": identity.hello,
                    "peer_tasks": identity.peer_tasks,
                    "max_payload": MAX_PAYLOAD,
                    "peer_bytes": 2 * MAX_PAYLOAD,
                    "down": [b for (a, b), link in identity.links.items() if a == identity.machine != b and not link.up],
                    "links": {
                        b: (link.rate, link.delay, shared.get(b, b)) for (a, b), link in identity.links.items() if a == identity.machine and (link.shaped or b in shared)
                    },
                    "public_key": keys.public if keys else "",
                    "secret_key": keys.secret if keys else "",
                    "allowed": {raw_key(key): name for key, name in identity.allowed.items()},
                },
            )
        except RuntimeError as error:
            raise ClusterError(str(error)) from None
        self._started = False

    @property
    def bytes_to(self) -> dict[int, int]:
        """Bytes put on the link to each other machine."""
        return self._io.bytes_to

    def bind(self, host: str = "127.0.0.1", ctl: int = 0, bulk: int = 0) -> Ports:
        check_address(host, self._me.keys)
        try:
            return Ports(*self._io.bind(host, ctl, bulk), host)
        except RuntimeError as error:
            raise ClusterError(str(error)) from None

    def _start(self) -> None:
        if not self._started:
            self._started = True
            self._io.start()

    def connect(self, peer: str, machine: int, host: str, ports: Ports, key: str = "") -> None:
        check_address(host, self._me.keys)
        if self._me.keys is not None and not key:
            raise ClusterError(f"cluster: no public key of {peer!r}; with CURVE a client must know whom it talks to")
        self._start()
        self._io.connect(peer, machine, host, ports.ctl, ports.bulk, key)

    def put(self, peer: str, machine: int, frame: Frame, deadline: int = NO_DEADLINE, *, keyed: bool = False) -> bool:
        return self._io.send(peer, machine, frame, deadline, keyed)

    def submit(
        self, peer: str, machine: int, task: int, hops: int, codec: int, flags: Flag, route: bytes, values: tuple[torch.Tensor, ...], deadline: int
    ) -> bool | None:
        """Put a new task of this process on the way with its tensors as they are: as `put` of the raw frame, without making one.

        None, and nothing is sent, for tensors that do not lie in this machine's memory one value after the other (or with an old torch).
        """
        return self._io.submit(peer, machine, task, hops, codec, int(flags), route, values, deadline)

    def shortcut(self, node: Any, judge: Callable[..., Any]) -> Any:
        """Return what runs a task that comes alone from arrival to answer without `node`, see csrc/bindings/net_shortcut.h."""
        return native.core.Shortcut(node, node.net, judge, node.index, len(node.settings.names))

    def arm(self, peer: str, machine: int, frame: Frame, deadline: int) -> None:
        self._io.arm(peer, machine, frame, deadline)

    def set_beat(self, payload: bytes) -> None:
        self._io.set_beat(payload)

    def receive(self, timeout: float, file: int = -1, spin: float = 0.0, shortcut: Any = None) -> list[Item]:
        self._start()
        out: list[Item] = []
        for event in self._io.receive(round(max(0.0, min(timeout, 1e6)) * 1e9), file, round(spin * 1e9), shortcut):
            code = event[0]
            if code == _FRAME:
                out.append(Arrival(event[1], event[2]))
            elif code in (_UP, _DOWN):
                out.append(PeerEvent(event[1], code == _UP))
            elif code == _SENT:
                out.append(Sent(*event[1:]))
            elif code == _LOST:
                out.append(Lost(event[1]))
            elif code == _ANSWERED:
                out.append(Answered(event[1]))
            elif code == _FAILED:
                raise ClusterError(f"cluster: the I/O thread ended: {event[2]}")
            else:
                out.append(Complaint(event[1], event[2], code == _KEY_REFUSED))
        return out

    def counters(self) -> dict[str, int]:
        """Return what the I/O thread counts: frames and chunks, ignored bytes, tasks refused on arrival, answers sent at a deadline."""
        return self._io.counters()

    def wake(self) -> None:
        self._io.wake()

    def close(self) -> None:
        self._io.stop()

"""The small typed payloads of control frames and start-up lines, as JSON checked by msgspec, and the names of peers."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from fastee.cluster.frame import Frame
from fastee.errors import FrameError

T = TypeVar("T", bound=msgspec.Struct)


class Hello(msgspec.Struct, forbid_unknown_fields=True):
    """Who I am; ``index`` is -1 for a client. A node that measured itself tells ``seconds`` and ``spread`` of each segment for one row."""

    name: str
    index: int
    pid: int
    seconds: list[float] = []
    spread: list[float] = []


class Heartbeat(msgspec.Struct, forbid_unknown_fields=True):
    """How I am: tasks waiting here, mean seconds one segment took lately, tasks finished or passed on so far, the
    bytes put on the link to each node, the nodes that this one can reach; whether it takes no new tasks because it is leaving;
    answers given here by exit, those after their deadline, those at an exit that the deadline forced; share of one processor that the
    process used lately, degrees Celsius of the machine (0: it does not tell); mean seconds of every segment lately (0: not run yet)."""

    queue: int
    service: float
    handled: int
    sent: list[int] = []
    up: list[int] = []
    leaving: bool = False
    exits: list[int] = []
    late: int = 0
    forced: int = 0
    cpu: float = 0.0
    celsius: float = 0.0
    segments: list[float] = []


class Moved(msgspec.Struct, forbid_unknown_fields=True):
    """The task of this frame now belongs to node ``node``."""

    node: int


class Refused(msgspec.Struct, forbid_unknown_fields=True):
    """Why a task is not answered: ``undeliverable`` and ``leaving`` may be tried elsewhere, the other codes are final."""

    code: str
    reason: str


class Intro(msgspec.Struct):
    """First line of the parent on a worker's stdin, followed by ``pickled`` bytes."""

    pickled: int


class Ports(msgspec.Struct):
    """Where a node listens; a worker writes it to stdout as its one line."""

    ctl: int
    bulk: int
    host: str = "127.0.0.1"


class Peers(msgspec.Struct):
    """Second line on a worker's stdin: the ports of all nodes, by index."""

    ports: list[Ports]


def client_peer(origin: int) -> str:
    """Return the transport's name of the client with that incarnation."""
    return f"c:{origin:016x}"


def node_peer(index: int) -> str:
    """Return the name under which a process knows its own connection to a node."""
    return f"n{index}"


def node_of(peer: str) -> int:
    """Return the node index in a peer's name, -1 for a client or a stranger."""
    head = peer.partition(":")[0]
    return int(head[1:]) if head[:1] == "n" and head[1:].isdecimal() and head.isascii() and len(head) < 6 else -1


def to_payload(message: msgspec.Struct) -> bytes:
    """Return the JSON of a control message."""
    return msgspec.json.encode(message)


def from_payload(frame: Frame, kind: type[T]) -> T:
    """Return the control message in a frame; raises ``FrameError`` when the payload is not one."""
    try:
        return msgspec.json.decode(bytes(frame.payload), type=kind)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise FrameError(f"frame: the payload is no {kind.__name__}: {error}") from None

"""The way out of a process: emulated links, time left stamped at departure, retries while a peer's queue is full."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fastee.cluster.frame import NO_DEADLINE, Frame, Kind, encode
from fastee.cluster.link import Link, LinkShaper
from fastee.cluster.transport import Transport

GIVE_UP_NS = 1_000_000_000
CONTROL_BYTES = 4096
_RETRY_NS = 1_000_000


@dataclass
class Parcel:
    """A frame on its way: ``peer`` for the transport, ``machine`` index where that peer runs, deadline and latest departure in ns."""

    peer: str
    machine: int
    frame: Frame
    deadline: int
    give_up: int


class Courier:
    """Sends frames from machine `machine` over shaped links; used by one thread, the one that owns the transport.

    A frame becomes visible to its receiver only when the emulated link would have delivered it: the sender holds it back.
    """

    def __init__(
        self,
        transport: Transport,
        machine: int,
        links: Mapping[tuple[int, int], Link],
        sender: int,
        fingerprint: bytes,
        is_up: Callable[[str], bool],
        clock: Callable[[], int] = time.monotonic_ns,
    ):
        self.transport = transport
        self.machine = machine
        self.bytes_to: dict[int, int] = {}
        self.transfers: list[tuple[int, int, int, int, tuple[int, int, int]]] = []  # the fields of a Sent
        self._shapers = {b: LinkShaper(link) for (a, b), link in links.items() if a == machine}
        self._sender, self._fingerprint, self._is_up, self._clock = sender, fingerprint, is_up, clock
        self._held: list[tuple[int, int, Parcel]] = []
        self._order = itertools.count()

    def put(self, peer: str, machine: int, frame: Frame, deadline: int = NO_DEADLINE) -> bool:
        """Take a frame for a peer on a machine; False when the link to it is down (rate 0)."""
        now, due = self._clock(), 0
        if machine != self.machine:
            shaper, size = self._shapers[machine], frame.nbytes
            if not shaper.link.up:
                return False
            frame = frame.with_(wire_bytes=frame.wire_bytes + size)
            due = shaper.reserve(size, now, urgent=size < CONTROL_BYTES and frame.kind is not Kind.TASK)
            self.bytes_to[machine] = self.bytes_to.get(machine, 0) + size
        heapq.heappush(self._held, (due, next(self._order), Parcel(peer, machine, frame, deadline, max(now, due) + GIVE_UP_NS)))
        return True

    def direct(self, peer: str, frame: Frame) -> bool:
        """Send a control frame now, outside the emulated link (heartbeats must not depend on it)."""
        frame = frame.with_(sender=self._sender, fingerprint=self._fingerprint)
        return self.transport.try_send(peer, encode(frame), bulk=False)

    def pause(self) -> float:
        """Seconds until the next frame is due; infinite when none is held."""
        return max(0.0, (self._held[0][0] - self._clock()) * 1e-9) if self._held else float("inf")

    def flush(self) -> list[Parcel]:
        """Send what is due and return what could not be delivered: its peer is down or stayed full for a second."""
        lost: list[Parcel] = []
        full: list[tuple[int, int, Parcel]] = []
        blocked: set[tuple[str, bool]] = set()
        now = self._clock()
        while self._held and self._held[0][0] <= now:
            due, order, parcel = heapq.heappop(self._held)
            frame = parcel.frame
            bulk = frame.kind is Kind.TASK or frame.nbytes >= CONTROL_BYTES
            if not self._is_up(parcel.peer):
                lost.append(parcel)
                continue
            if (parcel.peer, bulk) not in blocked:
                left = frame.time_left
                if frame.kind is Kind.TASK:
                    left = NO_DEADLINE if parcel.deadline == NO_DEADLINE else parcel.deadline - now
                frame = frame.with_(sender=self._sender, fingerprint=self._fingerprint, time_left=left)
                if self.transport.try_send(parcel.peer, encode(frame), bulk=bulk):
                    if frame.kind is Kind.TASK and parcel.machine != self.machine:
                        link = self._shapers[parcel.machine].link
                        at = self._clock()
                        key = frame.task, frame.origin, frame.hops
                        self.transfers.append((parcel.machine, frame.nbytes, round(link.seconds(frame.nbytes) * 1e9) + at - due, at, key))
                    continue
                # What follows to the same full peer must not overtake it.
                blocked.add((parcel.peer, bulk))
            if now > parcel.give_up:
                lost.append(parcel)
            else:
                full.append((due, order, parcel))
        for due, order, parcel in full:
            heapq.heappush(self._held, (due if due > now else now + _RETRY_NS, order, parcel))
        return lost

"""What the processes of a spatial split and of a team of students share: one thread that takes frames and runs work piece by piece."""

from __future__ import annotations

import os
import secrets
import traceback
from abc import ABC, abstractmethod
from typing import Any

from fastee.cluster.endpoint import Arrival, Complaint, Identity, Item, Lost, TaskKey
from fastee.cluster.frame import Frame, Kind
from fastee.cluster.messages import Heartbeat, Hello, Ports, Refused, client_peer, node_of, node_peer, to_payload
from fastee.cluster.transport import PeerEvent
from fastee.cluster.worker import Child
from fastee.errors import FrameError

_IDLE_SECONDS = 0.05


class Stepper(Child, ABC):
    """A node's process; a subclass says what a frame means (`take`) and what is done next (`step`). `handled`: tasks done here."""

    handled = 0

    def __init__(self, settings: Any, links: dict, stdin_fd: int, **identity: Any):
        self.settings, self.index = settings, settings.index
        incarnation = secrets.randbits(63)
        hello = to_payload(Hello(settings.names[self.index], self.index, os.getpid()))
        name = f"n{self.index}:{incarnation:016x}"
        super().__init__(stdin_fd, Identity(name, self.index, incarnation, settings.fingerprint, hello, links, node=True, **identity))
        self._up: dict[int, bool] = {}

    @abstractmethod
    def take(self, frame: Frame) -> None:
        """Note what came. Raises `FrameError` for what cannot be; it is told and ignored."""

    @abstractmethod
    def step(self) -> bool:
        """Run one piece of work; False when there is none."""

    def lost(self, item: Lost) -> None:
        """Answer for a frame that did not arrive; nothing to do where the other side asks again."""
        return

    def connect(self, ports: list[Ports]) -> None:
        self.report()
        for index, at in enumerate(ports):
            if index != self.index:
                self._endpoint.connect(node_peer(index), index, "127.0.0.1", at)

    def serve(self) -> int:
        """Run until the parent is gone; returns the exit status."""
        busy = False
        try:
            while self._stays():
                for item in self._endpoint.receive(0.0 if busy else _IDLE_SECONDS, self._stdin):
                    self._handle(item)
                busy = self.step()
        finally:
            self._endpoint.close()
        return 0

    def tell(self, frame: Frame) -> None:
        """Send `frame` to the client whose task it is about."""
        self._endpoint.put(client_peer(frame.origin), len(self.settings.names), frame)

    def refuse(self, key: TaskKey, code: str, reason: str) -> None:
        """Tell the client that its task (task, origin, hops) fails here, and why."""
        task, origin, hops = key
        name = f"node {self.settings.names[self.index]!r}"
        self.tell(Frame(Kind.REFUSED, task=task, origin=origin, hops=hops, payload=to_payload(Refused(code, f"{name}: {reason}"))))

    def refuse_raised(self, key: TaskKey) -> None:
        """Tell the client that the user's module raised at its task; called where that exception is handled."""
        self.refuse(key, "failed", traceback.format_exc()[-2000:])

    def report(self) -> None:
        """Put who is there and what was done into the next heartbeats."""
        self._endpoint.set_beat(to_payload(Heartbeat(0, 0.0, self.handled, up=[n for n, up in self._up.items() if up and n >= 0])))

    def _handle(self, item: Item) -> None:
        if isinstance(item, Arrival):
            try:
                self.take(item.frame)
            except FrameError as error:
                self._complain(item.peer, str(error))
        elif isinstance(item, PeerEvent):
            self._up[node_of(item.peer)] = item.up
            self.report()
        elif isinstance(item, Complaint):
            self._complain(item.peer, item.reason)
        elif isinstance(item, Lost):
            self.lost(item)

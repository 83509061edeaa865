"""The process of one student (``python -m fastee.cluster.students_worker``); how it gets its network is in ``worker.py``."""

from __future__ import annotations

import os
import secrets
import time
import traceback
from dataclasses import dataclass

import torch
from torch import nn

from fastee.cluster import codec as codecs
from fastee.cluster.endpoint import Arrival, Complaint, Identity, Item
from fastee.cluster.frame import Frame, Kind
from fastee.cluster.messages import Heartbeat, Hello, Ports, Refused, client_peer, node_of, node_peer, to_payload
from fastee.cluster.transport import PeerEvent
from fastee.cluster.worker import Child, run
from fastee.errors import FrameError
from fastee.nn import EarlyExit

_IDLE_SECONDS = 0.05


@dataclass(frozen=True)
class StudentSettings:
    """What a student's node is told at start: who it is, the declared slowness. The caller's machine is number ``len(names)``."""

    index: int
    names: tuple[str, ...]
    fingerprint: bytes
    slowdown: float = 1.0


@dataclass
class _Work:
    """A task here: its carry, the segment that runs next, how many segments may run (the aggregator raises it)."""

    hops: int
    carry: codecs.Carry
    allowed: int
    segment: int = 0


class StudentWorker(Child):
    """Runs its student's segments, oldest task first, and tells after each what its branch shows; never further than it is `allowed`."""

    def __init__(self, student: EarlyExit, branches: nn.ModuleList, settings: StudentSettings, links: dict, stdin_fd: int):
        self.settings, self.index = settings, settings.index
        incarnation = secrets.randbits(63)
        hello = to_payload(Hello(settings.names[self.index], self.index, os.getpid()))
        super().__init__(stdin_fd, Identity(f"n{self.index}:{incarnation:016x}", self.index, incarnation, settings.fingerprint, hello, links, node=True))
        self._student, self._branches = student.eval(), branches.eval()
        self._up: dict[int, bool] = {}
        self._works: dict[tuple[int, int], _Work] = {}
        self._handled = 0

    def connect(self, ports: list[Ports]) -> None:
        self._report()
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
                busy = self._step()
        finally:
            self._endpoint.close()
        return 0

    def _handle(self, item: Item) -> None:
        if isinstance(item, Arrival):
            try:
                self._take(item.frame)
            except FrameError as error:
                self._complain(item.peer, str(error))
        elif isinstance(item, PeerEvent):
            self._up[node_of(item.peer)] = item.up
            self._report()
        elif isinstance(item, Complaint):
            self._complain(item.peer, item.reason)

    def _take(self, frame: Frame) -> None:
        """TASK: inputs and the caller's oldest open task, `segment` of them may run; CREDIT: now so many; REFUSED: the task is settled."""
        key = frame.origin, frame.task
        if frame.kind is Kind.TASK:
            *carry, floor = codecs.unpack(frame)
            if not carry or floor.numel() != 1 or any(v.shape[:1] != (1,) for v in carry):
                raise FrameError(f"frame: expected inputs of one row and a number, got shapes {[list(v.shape) for v in (*carry, floor)]}")
            for old in [k for k in self._works if k[0] == frame.origin and k[1] < int(floor)]:
                del self._works[old]
            self._works[key] = _Work(frame.hops, tuple(carry), frame.segment)
        elif frame.kind is Kind.CREDIT and key in self._works:
            self._works[key].allowed = max(self._works[key].allowed, frame.segment)
        elif frame.kind is Kind.REFUSED:
            self._works.pop(key, None)

    def _step(self) -> bool:
        """Run one segment that may run; False when there is none."""
        for key, work in self._works.items():
            if work.segment < min(work.allowed, self._student.num_exits):
                try:
                    self._run(key, work)
                except Exception:  # the user's module, at one task: tell its caller and go on
                    del self._works[key]
                    text = traceback.format_exc()[-2000:]
                    refusal = to_payload(Refused("failed", f"student {self.settings.names[self.index]!r}: {text}"))
                    self._tell(Frame(Kind.REFUSED, task=key[1], origin=key[0], hops=work.hops, payload=refusal))
                return True
        return False

    def _run(self, key: tuple[int, int], work: _Work) -> None:
        began, spent = time.monotonic(), time.thread_time()
        work.carry = tuple(self._student.run_segment(work.segment, work.carry))
        shown = self._branches[work.segment](work.carry[0])
        spent = (time.thread_time() - spent) * self.settings.slowdown
        if self.settings.slowdown > 1 and (rest := began + spent - time.monotonic()) > 0:
            time.sleep(rest)
        tensors, payload = codecs.pack((shown,))
        self._tell(Frame(Kind.ANSWER, task=key[1], origin=key[0], hops=work.hops, segment=work.segment, exit=work.segment, tensors=tensors, payload=payload))
        work.segment += 1
        self._handled += 1
        if work.segment == self._student.num_exits:
            del self._works[key]

    def _tell(self, frame: Frame) -> None:
        self._endpoint.put(client_peer(frame.origin), len(self.settings.names), frame)

    def _report(self) -> None:
        self._endpoint.set_beat(to_payload(Heartbeat(0, 0.0, self._handled, up=[n for n, up in self._up.items() if up and n >= 0])))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run(StudentWorker)

"""The process of one student (``python -m fastee.cluster.students_worker``); how it gets its network is in ``worker.py``."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from fastee.cluster import codec as codecs
from fastee.cluster.frame import Frame, Kind
from fastee.cluster.stepper import Stepper
from fastee.cluster.worker import run
from fastee.errors import FrameError
from fastee.nn import EarlyExit


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


class StudentWorker(Stepper):
    """Runs its student's segments, oldest task first, and tells after each what its branch shows; never further than it is `allowed`."""

    def __init__(self, student: EarlyExit, branches: nn.ModuleList, settings: StudentSettings, links: dict, stdin_fd: int):
        super().__init__(settings, links, stdin_fd)
        self._student, self._branches = student.eval(), branches.eval()
        self._works: dict[tuple[int, int], _Work] = {}

    def take(self, frame: Frame) -> None:
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

    def step(self) -> bool:
        """Run one segment that may run; False when there is none."""
        for key, work in self._works.items():
            if work.segment < min(work.allowed, self._student.num_exits):
                try:
                    self._run(key, work)
                except Exception:  # the user's module, at one task: tell its caller and go on
                    del self._works[key]
                    self.refuse_raised((key[1], key[0], work.hops))
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
        self.tell(Frame(Kind.ANSWER, task=key[1], origin=key[0], hops=work.hops, segment=work.segment, exit=work.segment, tensors=tensors, payload=payload))
        work.segment += 1
        self.handled += 1
        if work.segment == self._student.num_exits:
            del self._works[key]


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run(StudentWorker)

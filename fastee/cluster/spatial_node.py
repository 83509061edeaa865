"""One node's share of a network split by rows, independent of sockets: rows in, parts run, the rows that others lack out.

A task is identified by (client, number); each attempt brings its plan with the input rows, so nodes keep no plan of their own and a
re-plan needs no agreement. Bound j is the tensor between volume j - 1 and volume j; bound 0 is the input, the last one what the tail reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from fastee.cluster import codec as codecs
from fastee.cluster.frame import Frame, Kind
from fastee.errors import FrameError
from fastee.planning.spatial.extract import SpatialModule
from fastee.planning.spatial.geometry import Net, check_plan, vsl

CLIENT = -1
OVERLAP_COST = 1 / 16
"""Work, as a share of a part, that computing its borders apart from its middle may add."""
WEIGHT_MACS = 50
"""Multiply-adds per weight that another pass over a layer's weights costs: 38 at 14 rows of 14, 56 at 112 (VGG-16, one Zen 4 core, 2026-11). Counting
multiply-adds alone, overlap made VGG-16 on four nodes 1.19 times slower, for a border of one row of 14 costs as much as four."""

Rows = tuple[int, int]


def common(a: Rows, b: Rows) -> Rows:
    """Return the rows in both ranges; (0, 0) when there are none.

    >>> common((0, 5), (3, 9))
    (3, 5)
    """
    lo, hi = max(a[0], b[0]), min(a[1], b[1])
    return (lo, hi) if lo < hi else (0, 0)


@dataclass(frozen=True)
class Schedule:
    """Who computes, sends and reads which rows: a plan's `volumes`, `splits` and `root` unfolded by the Vertical-Splitting Law.

    `ValueError` (from `check_plan`) for what is no plan of `net`. With `overlap` a part's borders that others read are pieces of their own.

    >>> from fastee.planning.spatial import vgg16
    >>> s = Schedule(vgg16(32), (0, 3, 18), ((0, 8, 16), (0, 1, 1)), 0)
    >>> s.reads(0, 1), s.sends(1, 1)                      # the second provider's input rows; what it sends to the first
    ((14, 32), ((0, (8, 16)),))
    """

    net: Net
    volumes: tuple[int, ...]
    splits: tuple[tuple[int, ...], ...]
    root: int
    overlap: bool = True

    def __post_init__(self):
        providers = len(self.splits[0]) - 1 if self.splits else 0
        check_plan(self.net, providers, self.volumes, self.splits)
        if not 0 <= self.root < providers:
            raise ValueError(f"root: got {self.root}, expected a provider in 0..{providers - 1}")

    @property
    def providers(self) -> int:
        return len(self.splits[0]) - 1

    @property
    def last(self) -> int:
        """The bound whose rows the root gathers."""
        return len(self.splits)

    def holds(self, bound: int, provider: int) -> Rows:
        """Rows of bound > 0 that a provider computes."""
        return self.splits[bound - 1][provider], self.splits[bound - 1][provider + 1]

    @cached_property
    def _reads(self) -> list[list[Rows]]:
        per = [[self.source(j, self.holds(j + 1, d)) for d in range(self.providers)] for j in range(self.last)]
        return [*per, [(0, self.splits[-1][-1]) if d == self.root else (0, 0) for d in range(self.providers)]]

    def reads(self, bound: int, provider: int) -> Rows:
        """Rows of a bound that a provider needs."""
        return self._reads[bound][provider]

    def source(self, volume: int, rows: Rows) -> Rows:
        """Rows of bound `volume` that output rows [lo, hi) of that volume need."""
        return vsl(self.net, self.volumes[volume], self.volumes[volume + 1], rows)[1]

    def sends(self, bound: int, provider: int) -> tuple[tuple[int, Rows], ...]:
        """(receiver, rows) of a bound > 0 that a provider has and others lack."""
        mine = self.holds(bound, provider)
        wanted = ((d, common(mine, self.reads(bound, d))) for d in range(self.providers) if d != provider)
        return tuple((d, rows) for d, rows in wanted if rows[0] < rows[1])

    def work(self, volume: int, rows: Rows) -> float:
        """What output rows [lo, hi) of a volume cost as one piece, in multiply-adds: those, and one pass over every layer's weights."""
        need, _ = vsl(self.net, self.volumes[volume], self.volumes[volume + 1], rows)
        spent = ((hi - lo, self.net.layers[i]) for i, (lo, hi) in need.items())
        return sum((count + WEIGHT_MACS * 4 * layer.channels / layer.row_bytes) * layer.row_macs for count, layer in spent if count)

    def pieces(self, volume: int, provider: int) -> tuple[Rows, ...]:
        """The provider's rows of a volume in the order of computing: the borders that others read, then the middle; one piece where that costs too much."""
        lo, hi = whole = self.holds(volume + 1, provider)
        if lo >= hi:
            return ()
        if not self.overlap:
            return (whole,)
        sent = [rows for _, rows in self.sends(volume + 1, provider)]
        top = max((b for a, b in sent if a == lo and b < hi), default=lo)
        bottom = min((a for a, b in sent if b == hi and a > lo), default=hi)
        apart = tuple(r for r in ((lo, top), (bottom, hi), (top, bottom)) if r[0] < r[1])
        if top >= bottom or sum(self.work(volume, r) for r in apart) > (1 + OVERLAP_COST) * self.work(volume, whole):
            return (whole,)
        return apart

    def pack(self, floor: int) -> torch.Tensor:
        """The schedule as an int64 tensor for the wire; `floor`: tasks below this number are settled."""
        return torch.tensor([floor, self.root, int(self.overlap), self.last, *self.volumes, *(e for cuts in self.splits for e in cuts)])

    @classmethod
    def unpack(cls, net: Net, packed: torch.Tensor, providers: int) -> tuple[Schedule, int]:
        """Return what `pack` was given; ``FrameError`` for anything else."""
        values = packed.tolist() if packed.ndim == 1 and packed.dtype == torch.int64 else []
        try:
            floor, root, overlap, last, *rest = values
            if last < 1 or len(rest) != last + 1 + last * (providers + 1):
                raise ValueError(f"{len(values)} numbers are no plan of {last} volumes for {providers} providers")
            cuts = np.reshape(rest[last + 1 :], (last, providers + 1)).tolist()
            return cls(net, tuple(rest[: last + 1]), tuple(map(tuple, cuts)), root, bool(overlap)), floor
        except ValueError as why:
            raise FrameError(f"frame: no plan: {why}") from None


@dataclass
class _Work:
    """One attempt of one task here: the input's batch and dtype (`like`), rows had per bound, pieces still to run as (volume, rows)."""

    attempt: int
    schedule: Schedule | None = None
    like: torch.Tensor | None = None
    have: dict[int, list[tuple[Rows, torch.Tensor]]] = field(default_factory=dict)
    todo: list[tuple[int, Rows]] = field(default_factory=list)


class SpatialNode:
    """Computes its parts of every task as soon as their rows are there; `emit(target, frame)` gets what leaves, CLIENT for the answer.

    `slowdown` f: a piece that took t seconds of this thread leaves f * t after it began, so the factor is kept on a shared processor too.
    For one thread.
    """

    def __init__(self, module: SpatialModule, index: int, providers: int, emit: Callable[[int, Frame], None], slowdown: float = 1.0, codec: str = "raw"):
        self.module, self.index, self.providers = module, index, providers
        self.slowdown, self.codec = slowdown, codec
        self.handled, self.busy = 0, 0.0
        self._emit = emit
        self._running: tuple[tuple[int, int], _Work] | None = None
        self._works: dict[tuple[int, int], _Work] = {}
        self._floor: dict[int, int] = {}

    def take(self, frame: Frame) -> None:
        """Take rows of a bound (``frame.segment``): tensors (rows, [lo, hi]), from the client a packed schedule as third. ``FrameError`` when malformed."""
        key, attempt = (frame.origin, frame.task), frame.hops >> 8
        if frame.task < self._floor.get(frame.origin, 0):
            return
        work = self._works.get(key)
        if work is not None and attempt < work.attempt:
            return  # rows of an attempt that was given up
        carry = codecs.unpack(frame)
        if len(carry) < 2 or carry[0].ndim != 4 or carry[1].shape != (2,):
            raise FrameError(f"frame: expected rows [B, C, H, W] and their bounds, got shapes {[list(t.shape) for t in carry]}")
        lo, hi = map(int, carry[1])
        if hi - lo != carry[0].shape[2] or lo < 0:
            raise FrameError(f"frame: {carry[0].shape[2]} rows cannot be rows [{lo}, {hi})")
        if work is None or attempt > work.attempt:
            work = self._works[key] = _Work(attempt)
        work.have.setdefault(frame.segment, []).append(((lo, hi), carry[0]))
        if len(carry) > 2:
            work.schedule, floor = Schedule.unpack(self.module.net, carry[2], self.providers)
            work.like = carry[0][:, :, :0]
            self._floor[frame.origin] = floor
            for old in [k for k in self._works if k[0] == frame.origin and k[1] < floor]:
                del self._works[old]
            work.todo = [(j, rows) for j in range(work.schedule.last) for rows in work.schedule.pieces(j, self.index)]
            if self.index == work.schedule.root:
                work.todo.append((work.schedule.last, work.schedule.reads(work.schedule.last, self.index)))

    def step(self) -> bool:
        """Run one piece whose rows are all here, the oldest task's first; False when there is none."""
        for key, work in self._works.items():
            for at, (volume, rows) in enumerate(work.todo):
                x = self._gather(work, volume, rows)
                if x is not None:
                    del work.todo[at]
                    self._running = key, work
                    self._run(key, work, volume, rows, x)
                    return True
        return False

    def abandon(self) -> tuple[tuple[int, int], int]:
        """Forget the rows of the task whose piece failed and return its (client, number) and attempt."""
        key, work = self._running
        work.todo.clear()
        work.have.clear()
        return key, work.attempt

    def _gather(self, work: _Work, volume: int, rows: Rows) -> torch.Tensor | None:
        """The input rows of a piece, or None while some are missing."""
        schedule, found = work.schedule, []
        need = rows if volume == schedule.last else schedule.source(volume, rows)
        have = sorted(work.have.get(volume, ()), key=lambda item: item[0])
        if need[0] >= need[1]:  # rows made of padding alone: nobody sends any
            layer = schedule.volumes[volume] - 1
            channels = self.module.net.layers[layer].channels if layer >= 0 else work.like.shape[1]
            return work.like.new_zeros(work.like.shape[0], channels, 0, self.module.width(layer, work.like))
        at = need[0]
        for (lo, hi), x in have:
            if lo <= at < hi:
                end = min(hi, need[1])
                found.append(x[:, :, at - lo : end - lo])
                at = end
        return None if at < need[1] else found[0] if len(found) == 1 else torch.cat(found, dim=2)

    def _run(self, key: tuple[int, int], work: _Work, volume: int, rows: Rows, x: torch.Tensor) -> None:
        schedule, began, spent = work.schedule, time.monotonic(), time.thread_time()
        answers = volume == schedule.last
        out = self.module.tail(x) if answers else self.module.part(schedule.volumes[volume], schedule.volumes[volume + 1], rows, x)
        spent = (time.thread_time() - spent) * self.slowdown
        self.busy += spent
        self.handled += 1
        if self.slowdown > 1 and (rest := began + spent - time.monotonic()) > 0:
            time.sleep(rest)
        if answers:
            self._put(key, work, CLIENT, volume, (out,))
        else:
            work.have.setdefault(volume + 1, []).append((rows, out))
            for target, wanted in schedule.sends(volume + 1, self.index):
                lo, hi = common(rows, wanted)
                if lo < hi:
                    self._put(key, work, target, volume + 1, (out[:, :, lo - rows[0] : hi - rows[0]], torch.tensor([lo, hi])))
        if not any(j == volume for j, _ in work.todo):
            work.have.pop(volume, None)

    def _put(self, key: tuple[int, int], work: _Work, target: int, bound: int, carry: Sequence[torch.Tensor]) -> None:
        tensors, payload = codecs.pack(carry, self.codec)
        kind = Kind.ANSWER if target == CLIENT else Kind.TASK
        self._emit(target, Frame(kind, task=key[1], origin=key[0], segment=bound, hops=work.attempt << 8, tensors=tensors, payload=payload))

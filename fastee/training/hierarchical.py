"""Hierarchical training (arXiv 2303.02384): an early exit gives the edge a loss of its own, so no gradient travels back and both sides
of the cut learn at the same time."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import queue as queues
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastee import ops
from fastee.nn import EarlyExit
from fastee.nn.batches import labelled, loader_of
from fastee.scheduling.links import parse_link
from fastee.training.loop import TrainingDiverged

CODECS = ("raw", "int8")
LABEL_BYTES = 8


@dataclasses.dataclass
class HierarchicalReport:
    """What `train_hierarchical` did: mean loss per epoch of each side (NaN where a side saw no batch), batches each side learned from and
    the link lost (``dropped``), bytes sent, median seconds of each part of a step, and the wall time."""

    edge_loss: list[float]
    cloud_loss: list[float]
    edge_steps: int
    cloud_steps: int
    dropped: int
    bytes_sent: int
    edge_forward: float
    edge_exit_and_backward: float
    cloud_forward_and_backward: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class CutTimes:
    """Seconds of one training step's parts when the network is cut after one exit, and ``bytes`` that cross the cut per step.

    ``edge_forward``, ``edge_exit`` (head, loss and its backward), ``edge_backward`` (the rest), ``cloud_forward``, ``cloud_backward``.
    """

    edge_forward: float
    edge_exit: float
    edge_backward: float
    cloud_forward: float
    cloud_backward: float
    bytes: float

    def step(self, rate: float, delay: float = 0.0) -> float:
        """Return T = te_fwd + max(te_exit + te_bwd, delay + 8 bytes / rate + tc_fwd + tc_bwd), one step without overlap of batches."""
        upload = delay + _wire(self.bytes, rate)
        return self.edge_forward + max(self.edge_exit + self.edge_backward, upload + self.cloud_forward + self.cloud_backward)

    def pipelined(self, rate: float) -> float:
        """Return the seconds per step once batches follow each other: the slowest of edge, link and cloud."""
        edge = self.edge_forward + self.edge_exit + self.edge_backward
        return max(edge, _wire(self.bytes, rate), self.cloud_forward + self.cloud_backward)

    def returned_gradients(self, rate: float, delay: float = 0.0) -> float:
        """Return the step of split learning, which waits for the gradient of the cut (as many bytes back)."""
        there_and_back = 2 * delay + _wire(self.bytes, rate) + _wire(self.bytes, rate)
        return self.edge_forward + there_and_back + self.cloud_forward + self.cloud_backward + self.edge_backward


def _wire(nbytes: float, rate: float) -> float:
    return 0.0 if nbytes == 0 or rate == math.inf else 8 * nbytes / rate if rate > 0 else math.inf


def choose_cut(
    times: Sequence[CutTimes], accuracy: Sequence[float], rate: float, delay: float = 0.0, tol: float = 0.01, pipelined: bool = True
) -> int:
    """Return the cut with the shortest step whose accuracy is at least the best one's minus `tol`; ties to the earlier cut.

    >>> a, b = CutTimes(1, 1, 1, 4, 4, 1e6), CutTimes(3, 1, 3, 1, 1, 1e3)
    >>> choose_cut([a, b], [0.9, 0.9], rate=1e9), choose_cut([a, b], [0.9, 0.9], rate=1e5)
    (1, 1)
    """
    if len(times) != len(accuracy) or not times:
        raise ValueError(f"accuracy: expected {len(times)} numbers, one per cut, at least one, got {len(accuracy)}")
    cost = [t.pipelined(rate) if pipelined else t.step(rate, delay) for t in times]
    legal = [i for i, a in enumerate(accuracy) if a >= max(accuracy) - tol]
    return min(legal, key=lambda i: (cost[i], i))


def train_hierarchical(
    net: EarlyExit,
    loader: Any,
    cut: int = 0,
    epochs: int = 1,
    lr: float = 0.001,
    *,
    codec: str = "raw",
    link: str | None = None,
    queue: int = 2,
    on_full: str = "wait",
    batch_size: int = 128,
    seed: int | None = None,
) -> HierarchicalReport:
    """Train `net` divided after exit `cut` (0..K-1): segments up to it and its head on the edge, the rest on the cloud, and leave it in eval mode.

    The edge's loss is cross-entropy at its exit; it sends the carry without its graph, and the cloud's loss is cross-entropy at the end. Each side
    has an AdamW optimizer of its own and a thread of its own; heads after the cut are not trained (`fit` does that).

    Args:
        codec: ``raw`` or ``int8`` (one scale per row) for what crosses the cut.
        link: emulated uplink, e.g. ``"10mbit 20ms"``; None: none. At rate 0 nothing arrives and the cloud stands still.
        queue: batches that may wait for the link or the cloud; `on_full` ``"drop"`` then loses the oldest (real time), ``"wait"`` blocks the edge.
        seed: of the loader's shuffling; dropout draws from one generator for both sides, so its masks are not repeatable.

    A loss that is not finite stops its side alone; when the other has finished, `TrainingDiverged` names the side and carries ``.report``.
    """
    if not isinstance(net, EarlyExit):
        raise TypeError(f"net: expected an EarlyExit from fastee.attach, got {type(net).__name__}")
    if isinstance(cut, bool) or not isinstance(cut, int) or not 0 <= cut < net.num_exits:
        raise ValueError(f"cut: expected an exit in 0..{net.num_exits - 1}, got {cut!r}")
    for name, value, low in (("epochs", epochs, 1), ("queue", queue, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}")
    if codec not in CODECS:
        raise ValueError(f"codec: expected one of {list(CODECS)}, got {codec!r}")
    if on_full not in ("wait", "drop"):
        raise ValueError(f"on_full: expected 'wait' or 'drop', got {on_full!r}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr: expected a positive number, got {lr}")
    rate, delay = (math.inf, 0.0) if link is None else parse_link(link)
    loader = loader_of(loader, batch_size=batch_size)
    with torch.random.fork_rng() if seed is not None else contextlib.nullcontext():
        if seed is not None:
            torch.manual_seed(seed)
        return _Division(net, loader, cut, lr, codec, rate, delay, queue, on_full).run(epochs)


class _Division:
    def __init__(self, net: EarlyExit, loader: Any, cut: int, lr: float, codec: str, rate: float, delay: float, room: int, on_full: str):
        self.net, self.loader, self.cut, self.codec, self.rate, self.delay, self.on_full = net, loader, cut, codec, rate, delay, on_full
        parts = [net.segment(i) for i in range(net.num_segments)]
        edge = {p: None for part in (*parts[: cut + 1], net.heads[cut]) for p in part.parameters() if p.requires_grad}
        cloud = {p: None for part in parts[cut + 1 :] for p in part.parameters() if p.requires_grad}
        shared = edge.keys() & cloud.keys()
        if shared:
            raise ValueError(f"cut: {len(shared)} weights are used on both sides of exit {net.exit_names[cut]!r}; such a network cannot be divided there")
        if not cloud:
            raise ValueError(f"cut: nothing is left to train after exit {net.exit_names[cut]!r}")
        self.edge, self.cloud = (torch.optim.AdamW(p, lr=lr, weight_decay=1e-4) for p in (edge, cloud))
        self.waiting: queues.Queue = queues.Queue(room)
        self.sent = self.dropped = 0
        self.times: dict[str, list[float]] = {"forward": [], "exit": [], "cloud": []}
        self.cloud_losses: list[list[float]] = []
        self.failed: dict[str, BaseException] = {}
        self.clear = 0.0  # when the link is free again

    def run(self, epochs: int) -> HierarchicalReport:
        began = time.perf_counter()
        self.cloud_losses = [[] for _ in range(epochs)]
        edge_losses: list[list[float]] = [[] for _ in range(epochs)]
        self.net.train()
        worker = threading.Thread(target=self._cloud, name="fastee-cloud", daemon=True)
        worker.start()
        try:
            for epoch, losses in enumerate(edge_losses):
                for x, y in labelled(self.loader, self.net.num_classes, next(self.net.heads.parameters()).device):
                    if len(y) > 1 and not self._edge(epoch, x, y, losses):
                        break
        finally:
            self.waiting.put(None)
            worker.join()
            self.net.eval()
        if not any(edge_losses) and "edge" not in self.failed:
            raise ValueError("loader: it gave no batch")
        mean = lambda v: sum(v) / len(v) if v else math.nan  # noqa: E731
        median = lambda v: sorted(v)[len(v) // 2] if v else math.nan  # noqa: E731
        report = HierarchicalReport(
            [mean(v) for v in edge_losses], [mean(v) for v in self.cloud_losses], sum(map(len, edge_losses)), sum(map(len, self.cloud_losses)),
            self.dropped, self.sent, *(median(self.times[k]) for k in ("forward", "exit", "cloud")), time.perf_counter() - began,
        )  # fmt: skip
        for error in self.failed.values():
            if not isinstance(error, TrainingDiverged):
                raise error
            error.report = report
            raise error
        return report

    # the edge, in the caller's thread

    def _edge(self, epoch: int, x: Any, y: Tensor, losses: list[float]) -> bool:
        start = time.perf_counter()
        with torch.enable_grad():
            carry = self.net.inputs.flat(x)
            for i in range(self.cut + 1):
                carry = self.net.run_segment(i, carry)
            forward = time.perf_counter()
            self._send(epoch, tuple(t.detach() for t in carry), y)
            place = self.net._mask_places[self.cut]
            loss = F.cross_entropy(self.net.heads[self.cut](carry[0], None if place is None else carry[place]).float(), y)
            if not torch.isfinite(loss):
                self.failed["edge"] = _diverged("edge", loss, len(losses))
                return False
            self.edge.zero_grad(set_to_none=True)
            loss.backward()
            self.edge.step()
        self.times["forward"].append(forward - start)
        self.times["exit"].append(time.perf_counter() - forward)
        losses.append(float(loss.detach()))
        return True

    def _send(self, epoch: int, carry: tuple[Tensor, ...], y: Tensor) -> None:
        packed = tuple(_pack(t, self.codec) for t in carry)
        nbytes = sum(p.nbytes for p in packed) + LABEL_BYTES * len(y)
        self.sent += nbytes
        if self.rate <= 0:
            self.dropped += 1
            return
        self.clear = max(time.perf_counter(), self.clear) + _wire(nbytes, self.rate)
        item = (epoch, self.clear + self.delay, packed, y)
        if self.on_full == "wait":
            self.waiting.put(item)
            return
        while True:
            with contextlib.suppress(queues.Full):
                self.waiting.put_nowait(item)
                return
            with contextlib.suppress(queues.Empty):
                self.waiting.get_nowait()
                self.dropped += 1

    # the cloud, in a thread of its own

    def _cloud(self) -> None:
        torch.set_grad_enabled(True)
        for step in itertools.count():
            item = self.waiting.get()
            if item is None:
                return
            if self.failed.get("cloud") is not None:
                continue  # keeps taking, so that the edge never blocks
            epoch, due, packed, y = item
            time.sleep(max(0.0, due - time.perf_counter()))
            try:
                self._learn(epoch, tuple(_unpack(p) for p in packed), y, step)
            except BaseException as error:  # noqa: BLE001 - told to the caller's thread
                self.failed["cloud"] = error

    def _learn(self, epoch: int, carry: tuple[Tensor, ...], y: Tensor, step: int) -> None:
        start = time.perf_counter()
        for i in range(self.cut + 1, self.net.num_segments):
            carry = self.net.run_segment(i, carry)
        loss = F.cross_entropy(carry[0].float(), y)
        if not torch.isfinite(loss):
            raise _diverged("cloud", loss, step)
        self.cloud.zero_grad(set_to_none=True)
        loss.backward()
        self.cloud.step()
        self.times["cloud"].append(time.perf_counter() - start)
        self.cloud_losses[epoch].append(float(loss.detach()))


def _diverged(side: str, loss: Tensor, step: int) -> TrainingDiverged:
    return TrainingDiverged(f"train_hierarchical: the {side}'s loss is {float(loss.detach())} in its step {step}; the other side has gone on. Lower lr or look for NaN.")


@dataclasses.dataclass(frozen=True)
class _Packed:
    value: Any
    shape: tuple[int, ...]
    nbytes: int


def _pack(t: Tensor, codec: str) -> _Packed:
    if codec == "raw" or not t.is_floating_point() or t.ndim < 2:
        return _Packed(t, tuple(t.shape), t.numel() * t.element_size())
    rows = ops.quantize_rows(t.reshape(len(t), -1).float(), "int8")
    return _Packed(rows, tuple(t.shape), rows.data.numel() + 4 * rows.scale.numel())


def _unpack(p: _Packed) -> Tensor:
    return p.value if isinstance(p.value, Tensor) else ops.dequantize_rows(p.value).reshape(p.shape)


def cut_times(net: EarlyExit, x: Any, y: Tensor, cut: int, repeats: int = 5, codec: str = "raw") -> CutTimes:
    """Measure the parts of one training step of `net` cut after exit `cut` on this machine (medians, one batch, weights untouched)."""
    net.train()
    rows: list[list[float]] = []
    buffers = {k: v.clone() for k, v in net.named_buffers()}
    try:
        for _ in range(repeats + 1):
            rows.append(list(_timed(net, x, y, cut)))
    finally:
        net.eval()
        net.zero_grad(set_to_none=True)
        with torch.no_grad():
            for k, v in net.named_buffers():
                v.copy_(buffers[k])
    middle = [sorted(column)[repeats // 2] for column in zip(*rows[1:], strict=True)]  # the first run warms up
    with torch.no_grad():
        carry = net.inputs.flat(x)
        for i in range(cut + 1):
            carry = net.run_segment(i, carry)
    return CutTimes(*middle, sum(_pack(t, codec).nbytes for t in carry) + LABEL_BYTES * len(y))


def _timed(net: EarlyExit, x: Any, y: Tensor, cut: int) -> Iterator[float]:
    clock = time.perf_counter
    with torch.enable_grad():
        t0 = clock()
        carry = net.inputs.flat(x)
        for i in range(cut + 1):
            carry = net.run_segment(i, carry)
        t1 = clock()
        leaves = tuple(t.detach().requires_grad_(t.is_floating_point()) for t in carry)
        place = net._mask_places[cut]
        F.cross_entropy(net.heads[cut](leaves[0], None if place is None else leaves[place]).float(), y).backward()
        t2 = clock()
        carry[0].backward(leaves[0].grad)
        t3 = clock()
        rest = tuple(t.detach() for t in carry)
        for i in range(cut + 1, net.num_segments):
            rest = net.run_segment(i, rest)
        loss = F.cross_entropy(rest[0].float(), y)
        t4 = clock()
        loss.backward()
        t5 = clock()
    yield from (t1 - t0, t2 - t1, t3 - t2, t4 - t3, t5 - t4)

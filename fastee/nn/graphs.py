"""The batch runner on CUDA graphs: segments captured per batch bucket; rows that left stay in the batch until it pays to move the rest.

A bucket holds as many rows as its graphs were captured for. Rows that left, and rows that fill a bucket up, are dead: they are computed
along and change nothing. After a segment the number of live rows goes to pinned memory; the host looks at it when it has arrived, or waits
for it where that pays. A number that came late is still safe: rows only leave.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import threading
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fastee import ops
from fastee.kernels import cuda
from fastee.nn.result import ExitResult, judge

WAITS = ("auto", "never", "always")
NEVER = "the exits' thresholds are all +inf: the backbone itself runs"


class CudaLayer:
    """Capture and replay on one CUDA device, on its current stream."""

    def __init__(self, device: torch.device):
        # One pool: a graph may overwrite what later ones keep, but what a batch still needs was there before the graphs that it still runs.
        self.device, self._pool, self._stream = device, torch.cuda.graph_pool_handle(), None

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Make the device current, and this stream wait for the stream of the batch before: batches share their memory."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self._stream is not None and stream != self._stream:
                stream.wait_stream(self._stream)
            self._stream = stream
            yield

    def capture(self, body: Callable[[], tuple[Tensor, ...]], join: bool = False) -> tuple[Any, tuple[Tensor, ...]]:
        """Return a graph whose ``replay()`` repeats `body`, and the tensors that it then fills; with `join` one that `join` takes."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(2):  # libraries choose algorithms and Triton compiles before the capture
                body()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph(keep_graph=True) if join else torch.cuda.CUDAGraph()
        # Other threads may go on allocating; a stream of this device, for torch's own capture stream is of the device that captured first.
        with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
            out = body()
        return graph, out

    def join(self, stages: list[tuple[dict[int, Any], Tensor | None]]) -> Any:
        """Return one graph of captured stages that skips on the device; see `fastee.kernels.cuda.ExitGraph`."""
        return cuda.ExitGraph(stages)

    def flags(self, count: int) -> Tensor:
        """Return pinned int64 [count]."""
        return torch.zeros(count, dtype=torch.int64, pin_memory=True)

    def event(self) -> Any:
        return torch.cuda.Event()

    def seconds(self, graph: Any) -> float:
        """Return how long one replay takes, the median of 7."""
        times = []
        for _ in range(7):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times)


class GraphRunner:
    """Runs a network with exits from captured graphs.

    `net` an `EarlyExit` in eval mode, `example` its input (tensor, tuple or dict) with at least one row on the device. `batch_sizes`: the
    buckets, by default powers of two up to the rows of `example`, and that number. `wait`: ``never`` reads the number of live rows only
    when it has come by itself, ``always`` waits for it after every exit, ``auto`` waits where the expected saving exceeds the pause.

    ``runner(x)`` answers like ``net(x)``: a row takes the exit that the network alone would choose. What it cannot run from graphs
    (another shape, dtype or device, more rows than the largest bucket, no live exit) goes to ``net(x)``; ``declines`` says why. A network
    that cannot be captured raises `RuntimeError` with the segment's number. A changed rule or changed heads are captured again; call
    `capture` when the backbone's weights have moved (changed in place they need nothing). Hooks do not fire in replays. Calls from
    several threads take turns, calls on several streams follow each other: a batch's memory is the next one's.

    >>> import fastee, torch
    >>> from fastee.nn.graphs import GraphRunner
    >>> body = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
    >>> net = fastee.attach(body, ["0"], num_classes=3, example=torch.zeros(1, 4))
    >>> GraphRunner(net.eval(), torch.zeros(8, 4)).declines((torch.zeros(8, 4),))
    'a tensor on cpu: graphs are captured on CUDA devices'
    """

    def __init__(self, net: Any, example: Any, *, batch_sizes: tuple[int, ...] | None = None, wait: str = "auto", layer: Any = None):
        if wait not in WAITS:
            raise ValueError(f"wait: expected one of {', '.join(WAITS)}, got {wait!r}")
        self.net, self.wait, self._layer, self._key = net, wait, layer, None
        self._example = tuple(t.detach().clone() for t in net._gather_inputs((example,), {}))
        largest = self._example[0].shape[0]
        if largest == 0:
            raise ValueError("example: expected at least one row, got an empty batch")
        sizes = batch_sizes or (*(1 << i for i in range(largest.bit_length()) if 1 << i < largest), largest)
        if any(not isinstance(b, int) or not 0 < b <= largest for b in sizes):
            raise ValueError(f"batch_sizes: expected numbers from 1 to {largest}, the rows of the example, got {batch_sizes!r}")
        self.buckets = tuple(sorted(set(sizes)))
        self.replays: list[tuple[int, int]] = []  # (segment, bucket) of the last batch, in order
        self._lock = threading.Lock()
        self._stays = [1.0] * net.num_exits  # share of the rows before an exit that stay behind it, a moving mean

    def declines(self, values: tuple[Tensor, ...]) -> str | None:
        """Say why these inputs (a tuple of tensors) do not run from graphs, None when they do."""
        for a, b in zip(values, self._example, strict=True):
            if a.device.type != "cuda" and self._layer is None:
                return f"a tensor on {a.device}: graphs are captured on CUDA devices"
            if a.device != b.device or a.dtype != b.dtype or a.shape[1:] != b.shape[1:]:
                return f"an input {a.dtype} {list(a.shape)} on {a.device}: captured for {b.dtype} {list(b.shape)} on {b.device}"
        rows = values[0].shape[0]
        if not 0 < rows <= self.buckets[-1]:
            return f"{rows} rows: captured for 1 to {self.buckets[-1]}"
        if self.net.training:
            return "the network trains"
        if torch.is_autocast_enabled(values[0].device.type):
            return "autocast is on: the weights that it keeps would die with it and live on in a graph; cast the network instead"
        return None if any(t != math.inf for t in self.net.thresholds) else NEVER

    @torch.no_grad()
    def __call__(self, *x: Any, **named: Tensor) -> ExitResult:
        values = self.net._gather_inputs(x, named)
        return self.net(*x, **named) if self.declines(values) is not None else self.run(values)

    @torch.no_grad()
    def run(self, values: tuple[Tensor, ...]) -> ExitResult:
        """Answer inputs (a tuple of tensors) that `declines` has nothing against."""
        with self._lock:
            if self._key != self._state():
                self.capture()
            with self._used.entered():
                return self._run(values)

    def _state(self) -> tuple:
        heads = self.net.heads  # a batch norm is folded into a copy of their weights
        return (
            self.net.measure,
            tuple(self.net.thresholds),
            tuple((t.data_ptr(), t._version) for t in (*heads.parameters(), *heads.buffers())),
        )

    # capture

    @torch.no_grad()
    def capture(self) -> GraphRunner:
        """Capture every segment for every bucket and measure them; done by the first call, and again when the rule changes."""
        device = self._example[0].device
        self._used, self._key = self._layer or CudaLayer(device), None
        with torch.inference_mode(False), torch.no_grad(), self._used.entered():  # what is made here outlives a block of the caller
            largest = self.buckets[-1]
            # The last row of an answer is nobody's: rows that must not write write there.
            self._label = torch.full((largest + 1,), -1, dtype=torch.int64, device=device)
            self._exit = torch.full_like(self._label, self.net.num_exits)
            self._confidence = torch.zeros(largest + 1, device=device)
            self._logits = torch.zeros(largest + 1, self.net.num_classes, device=device)
            self._live = [i for i, t in enumerate(self.net.thresholds) if t != math.inf]
            self._capture(self._used)
        self._key = self._state()
        return self

    def _captured(self, layer: Any, i: int, b: int, body: Callable[[], tuple[Tensor, ...]], **options: bool) -> tuple[Any, Any]:
        try:
            return layer.capture(body, **options)
        except RuntimeError as why:
            raise RuntimeError(f"segment {i} cannot be captured for {b} rows: {why}") from why

    def _capture(self, layer: Any) -> None:
        net, device = self.net, self._example[0].device
        self._inputs = {b: tuple(t[:b].clone() for t in self._example) for b in self.buckets}
        self._rows = {b: torch.arange(b, device=device) for b in self.buckets}
        self._alive = {b: torch.ones(b, dtype=torch.bool, device=device) for b in self.buckets}
        self._flags = layer.flags(net.num_exits)
        self._events = [layer.event() for _ in range(net.num_exits)]
        self._stages: dict[tuple[int, int], Any] = {}
        self._moves: dict[tuple[int, int, int], Any] = {}
        for b in self.buckets:
            carry = self._inputs[b]
            for i in range(net.num_segments):
                self._stages[i, b], carry = self._captured(layer, i, b, lambda i=i, b=b, carry=carry: self._stage(i, b, carry))
                self._stages[i, b].replay()  # the next one warms up on what this one makes
                self._inputs[i + 1, b] = carry
        for i in self._live:
            for large in self.buckets:
                for small in self.buckets:
                    if small < large:
                        self._moves[i, large, small], _ = layer.capture(lambda i=i, large=large, small=small: self._move(i, large, small))
        seconds = {k: layer.seconds(graph) for k, graph in self._stages.items()}
        self._rest = {(i, b): sum(seconds[j, b] for j in range(i, net.num_segments)) for i, b in seconds}
        self._move_seconds = {k: layer.seconds(graph) for k, graph in self._moves.items()}
        self._pause = self._measure_pause(layer)

    def _measure_pause(self, layer: Any) -> float:
        """Return how long the device idles when the host waits for a flag before it replays on."""
        if not self._moves:
            return 0.0
        graph, event, times = min(self._moves.items(), key=lambda kv: kv[0][1])[1], self._events[0], []
        for _ in range(7):
            graph.replay()
            event.record()
            event.synchronize()
            start = perf_counter()
            graph.replay()
            times.append(perf_counter() - start)
            event.record()
            event.synchronize()
        return statistics.median(times)

    def _stage(self, i: int, b: int, carry: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        net = self.net
        carry = net.run_segment(i, carry)
        alive = self._alive[b]
        if i == net.num_exits:
            label, confidence = judge(carry[0], net.measure)
            self._answer(alive, self._rows[b], label, confidence, i, carry[0])
        elif net.thresholds[i] != math.inf:
            step = net.exit_step(i, carry, logits=True)
            self._answer(alive & step.exits, self._rows[b], step.label, step.confidence, i, step.logits)
            alive &= ~step.exits
            self._flags[i : i + 1].copy_(alive.sum().reshape(1), non_blocking=True)
        return carry

    def _answer(self, take: Tensor, rows: Tensor, label: Tensor, confidence: Tensor, exit: int, logits: Tensor) -> None:
        target = torch.where(take, rows, self.buckets[-1])
        self._label.index_copy_(0, target, label)
        self._confidence.index_copy_(0, target, confidence)
        self._exit.index_fill_(0, target, exit)
        self._logits.index_copy_(0, target, logits.to(self._logits.dtype))

    def _move(self, i: int, large: int, small: int) -> tuple[Tensor, ...]:
        """Move the live rows behind segment i from one bucket to a smaller one; the caller knows that they fit."""
        index = ops.compact(self._alive[large]).index[:small]
        for source, target in zip(self._inputs[i + 1, large], self._inputs[i + 1, small], strict=True):
            torch.index_select(source, 0, index, out=target)
        torch.index_select(self._rows[large], 0, index, out=self._rows[small])
        torch.index_select(self._alive[large], 0, index, out=self._alive[small])
        return ()

    # running

    def _fit(self, rows: int) -> int:
        return next(b for b in self.buckets if b >= rows)

    def gain(self, i: int, large: int, small: int) -> float:
        """Return the seconds that moving to a smaller bucket behind segment `i` saves: the rest of the network, less the move."""
        return self._rest[i + 1, large] - self._rest[i + 1, small] - self._move_seconds[i, large, small] if small < large else 0.0

    def _worth_waiting(self, i: int, b: int, known: int) -> bool:
        if self.wait != "auto":
            return self.wait == "always"
        expected = known * self._stays[i]
        if expected < 0.5:
            return self._rest[i + 1, b] > self._pause
        return self.gain(i, b, self._fit(max(1, math.ceil(expected)))) > self._pause

    def _run(self, values: tuple[Tensor, ...]) -> ExitResult:
        rows = values[0].shape[0]
        b, known, self.replays, pending = self._fit(rows), rows, [], []
        for static, value in zip(self._inputs[b], values, strict=True):
            static[:rows].copy_(value)
        self._rows[b].copy_(torch.arange(b, device=self._rows[b].device))
        self._alive[b].copy_(self._rows[b] < rows)
        for i in range(self.net.num_segments):
            self._stages[i, b].replay()
            self.replays.append((i, b))
            if i not in self._live:
                continue
            self._events[i].record()
            pending.append((i, known))
            if self._worth_waiting(i, b, known):
                self._events[i].synchronize()
            known = self._collect(pending, known)
            if known == 0:
                break
            small = self._fit(known)
            if self.gain(i, b, small) > 0:
                self._moves[i, b, small].replay()
                b = small
        return self._result(rows)

    def _result(self, rows: int) -> ExitResult:
        return ExitResult(*(t[:rows].clone() for t in (self._logits, self._label, self._confidence, self._exit)))

    def _collect(self, pending: list[tuple[int, int]], known: int) -> int:
        """Take in the flags that have arrived, in order, and return how many rows are live at most."""
        while pending and self._events[pending[0][0]].query():
            i, before = pending.pop(0)
            now = int(self._flags[i])
            self._stays[i] += 0.1 * (now / max(1, min(known, before)) - self._stays[i])
            known = min(known, now)
        return known

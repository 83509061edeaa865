"""The batch runner as one CUDA graph per bucket that skips on the device: the host queues it and never looks.

Between two exits that are on lies a stage. It runs in the smallest bucket that holds the rows that are left, and ends by moving the rows
that stay to the front of what the next stage reads. Rows behind them are dead: they are computed along and change nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastee import ops
from fastee.kernels import cuda
from fastee.nn.graphs import CudaLayer, GraphRunner
from fastee.nn.result import ExitResult, judge


class ExitGraphRunner(GraphRunner):
    """A `GraphRunner` whose buckets the device chooses: one graph with conditional nodes, replayed once per batch.

    Arguments, answers and fallback as there; no exit is waited for and no stage is queued from the host. A stage keeps only the buckets
    in which it was measured faster than in the next larger one: moving the rows that stay is part of every stage. `RuntimeError` at the
    first batch where `fastee.kernels.cuda.ExitGraph` cannot be had: libfastee_cuda is not built, or the driver is older than CUDA 12.8.

    >>> import fastee, torch
    >>> from fastee.nn.exit_graph import ExitGraphRunner
    >>> body = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
    >>> net = fastee.attach(body, ["0"], num_classes=3, example=torch.zeros(1, 4))
    >>> ExitGraphRunner(net.eval(), torch.zeros(8, 4)).buckets
    (1, 2, 4, 8)
    """

    def __init__(self, net: Any, example: Any, *, batch_sizes: tuple[int, ...] | None = None, layer: Any = None):
        super().__init__(net, example, batch_sizes=batch_sizes, layer=layer)
        self.wait = "device"

    def _capture(self, layer: Any) -> None:
        if isinstance(layer, CudaLayer) and cuda.missing():
            raise RuntimeError(f"wait='device' cannot run: {cuda.missing()}")
        net, device, largest = self.net, self._example[0].device, self.buckets[-1]
        ends = [*self._live, net.num_exits]  # stage s runs the segments behind end s - 1, up to this one
        self._spans = [range(first, end + 1) for first, end in zip([0, *(e + 1 for e in ends)], ends, strict=False)]
        self._rank = torch.arange(largest, device=device)
        self._counts = [torch.full((), largest, dtype=torch.int64, device=device) for _ in ends]  # rows that come to a stage
        self._where = [torch.arange(largest, device=device) for _ in ends]  # which rows of the batch they are
        self._carry = [tuple(t.clone() for t in self._example)]
        for span in self._spans[:-1]:
            carry = self._carry[-1]
            for i in span:
                carry = net.run_segment(i, carry)
            self._carry.append(tuple(t.clone() for t in carry))  # not empty: a warm-up may read indices there
        stages: list[dict[int, Any]] = []
        for s, span in enumerate(self._spans):
            capture = lambda b, s=s, i=span[-1]: self._captured(layer, i, b, lambda: self._stage_of(s, b), join=True)[0]
            stages.append({b: capture(b) for b in self.buckets})
            stages[s][largest].replay()  # the next one warms up on what this one makes
        self.worth = [self._cheaper({b: layer.seconds(g) for b, g in graphs.items()}) for graphs in stages]
        self._graphs = {
            b: layer.join(
                [
                    ({c: g for c, g in graphs.items() if c == b or (s and c < b and c in self.worth[s])}, after)
                    for s, (graphs, after) in enumerate(zip(stages, [*self._counts[1:], None], strict=True))
                ]
            )
            for b in self.buckets
        }

    def _cheaper(self, seconds: dict[int, float]) -> tuple[int, ...]:
        """Return the buckets that take less time than the next larger one that is kept; the largest always is."""
        kept = [self.buckets[-1]]
        for b in reversed(self.buckets[:-1]):
            if seconds[b] < seconds[kept[0]]:
                kept.insert(0, b)
        return tuple(kept)

    def _stage_of(self, s: int, b: int) -> tuple[Tensor, ...]:
        net, end = self.net, self._spans[s][-1]
        carry, rows, alive = tuple(t[:b] for t in self._carry[s]), self._where[s][:b], self._rank[:b] < self._counts[s]
        for i in self._spans[s]:
            carry = net.run_segment(i, carry)
        if end == net.num_exits:
            label, confidence = judge(carry[0], net.measure)
            self._answer(alive, rows, label, confidence, end, carry[0])
            return ()
        step = net.exit_step(end, carry, logits=True)
        self._answer(alive & step.exits, rows, step.label, step.confidence, end, step.logits)
        index, count = ops.compact(alive & ~step.exits)
        for source, target in zip((*carry, rows), (*self._carry[s + 1], self._where[s + 1]), strict=True):
            torch.index_select(source, 0, index, out=target[:b])
        self._counts[s + 1].fill_(count)
        return ()

    def _run(self, values: tuple[Tensor, ...]) -> ExitResult:
        rows = values[0].shape[0]
        for static, value in zip(self._carry[0], values, strict=True):
            static[:rows].copy_(value)
        self._counts[0].fill_(rows)
        self._graphs[self._fit(rows)].replay()
        return self._result(rows)

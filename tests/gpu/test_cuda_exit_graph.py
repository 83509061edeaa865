"""The exit graph on a device: it computes what the stages compute, skips what nobody needs, and costs little where nothing is skipped."""

import pytest
import torch

from fastee import ops
from fastee.kernels import cuda

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))]


def capture(f):
    f()  # warm-up: nothing is compiled or made inside a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        f()
    return graph


class Counting:
    """Stages that add one to a counter per bucket and write the count a test has put into `leaves`."""

    def __init__(self, buckets):
        self.ran = [{r: torch.zeros((), dtype=torch.int64, device="cuda") for r in rows} for rows in buckets]
        self.leaves = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in buckets]
        self.counts = [torch.full((), 99, dtype=torch.int64, device="cuda") for _ in buckets]
        stages = []
        for i, rows in enumerate(buckets):

            def stage(i, r):
                self.ran[i][r].add_(1)
                self.counts[i].copy_(self.leaves[i])

            graphs = {r: capture(lambda i=i, r=r: stage(i, r)) for r in rows}
            stages.append((graphs, self.counts[i] if i + 1 < len(buckets) else None))
        self.graph = cuda.ExitGraph(stages)

    def __call__(self, *leaves):
        for at, n in zip(self.leaves, leaves, strict=False):
            at.fill_(n)
        for counters in self.ran:
            for c in counters.values():
                c.zero_()
        self.graph.replay()
        torch.cuda.synchronize()
        return [(i, r) for i, counters in enumerate(self.ran) for r, c in counters.items() for _ in range(int(c))]


def test_stages_run_as_rows_are_left():
    run = Counting([(32,), (4, 16, 32), (32,), (8, 32)])
    assert run(0, 9, 9) == [(0, 32)]
    assert run(1, 0, 9) == [(0, 32), (1, 4)]
    assert run(4, 3, 0) == [(0, 32), (1, 4), (2, 32)]
    assert run(5, 5, 5) == [(0, 32), (1, 16), (2, 32), (3, 8)]
    assert run(32, 32, 32) == [(0, 32), (1, 32), (2, 32), (3, 32)]
    assert run(0, 9, 9) == [(0, 32)]


def test_a_network_with_exits_gives_what_eager_stages_give():
    torch.manual_seed(0)
    rows, width = 32, 256
    layers = [torch.nn.Linear(width, width).cuda().eval() for _ in range(4)]
    heads = [torch.randn(10, width, device="cuda") * 0.1 for _ in range(4)]
    x, thresholds = torch.randn(rows, width, device="cuda"), (0.25, 0.25, 0.25, -1.0)
    hidden, label = [torch.zeros(rows, width, device="cuda") for _ in range(4)], torch.zeros(rows, dtype=torch.int64, device="cuda")
    counts, where = (
        [torch.zeros((), dtype=torch.int64, device="cuda") for _ in range(4)],
        [torch.zeros(rows, dtype=torch.int64, device="cuda") for _ in range(4)],
    )

    @torch.no_grad()
    def stage(i, size):
        """Rows that stay, padded to the bucket: dead rows repeat what stands behind the survivors and write nothing that is read."""
        source, at = (x, torch.arange(rows, device="cuda")) if i == 0 else (hidden[i - 1], where[i - 1])
        alive = torch.ones(size, dtype=torch.bool, device="cuda") if i == 0 else torch.arange(size, device="cuda") < counts[i - 1]
        h = torch.relu(layers[i](source[:size]))
        step = ops.exit_step(h, heads[i], None, "none", threshold=thresholds[i], backend="cuda")
        keep = alive & ~step.exits
        order = ops.compact(keep, backend="cuda")
        label[at[:size]] = torch.where(alive & step.exits, step.label, label[at[:size]])
        hidden[i][:size] = h[order.index]
        where[i][:size] = at[:size][order.index]
        counts[i].copy_(order.count)

    stages = [({rows: capture(lambda: stage(0, rows))}, counts[0])]
    for i in (1, 2, 3):
        stages.append(({r: capture(lambda i=i, r=r: stage(i, r)) for r in (8, 16, 32)}, counts[i] if i < 3 else None))
    graph = cuda.ExitGraph(stages)
    for seed in range(3):
        x.copy_(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        torch.cuda.synchronize()
        wanted, h, left = torch.full((rows,), -9), x, torch.ones(rows, dtype=torch.bool)
        with torch.no_grad():
            for i in range(4):
                h = torch.relu(layers[i](h))
                step = ops.exit_step(h, heads[i], None, "none", threshold=thresholds[i], backend="cuda")
                leaves = left & step.exits.cpu()
                wanted[leaves] = step.label.cpu()[leaves]
                left &= ~leaves
        # cuBLAS may sum another batch in another order: labels may differ where the decision was close, nowhere else
        assert (label.cpu() == wanted).float().mean() >= 0.95


def test_stages_that_do_not_fit_are_refused():
    graph = capture(lambda: torch.zeros(1, device="cuda"))
    with pytest.raises(ValueError, match=r"stages\[1\].rows must reach the 8 rows"):
        cuda.ExitGraph([({8: graph}, torch.zeros((), dtype=torch.int64, device="cuda")), ({4: graph}, None)])

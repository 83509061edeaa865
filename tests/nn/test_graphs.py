"""The graph runners on a layer without graphs: the same answers as the network, whatever comes late, and moves only where they pay."""

import contextlib
import copy
import doctest
import itertools
import sys
import threading

import pytest
import torch

import fastee
from fastee.nn.exit_graph import ExitGraphRunner
from fastee.nn.graphs import GraphRunner


class Event:
    def __init__(self, layer):
        self.layer, self.left = layer, 0

    def record(self):
        self.left = self.layer.late

    def query(self):
        self.left -= 1
        return self.left < 0

    def synchronize(self):
        self.left, self.layer.waits = 0, self.layer.waits + 1


class Graph:
    def __init__(self, body):
        self.body, self.out = body, tuple(t.clone() for t in body())

    def replay(self):
        for static, value in zip(self.out, self.body(), strict=True):
            static.copy_(value)


class Joined:
    """What `fastee.kernels.cuda.ExitGraph` promises, by the host."""

    def __init__(self, stages, ran):
        self.stages, self.ran = stages, ran
        assert len(stages[0][0]) == 1 and stages[-1][1] is None and all(count is not None for _, count in stages[:-1])
        largest = [max(graphs) for graphs, _ in stages]
        assert largest == sorted(largest)  # every bucket that can come fits the next stage

    def replay(self):
        self.ran.clear()
        for i, (graphs, _) in enumerate(self.stages):
            left = max(self.stages[0][0]) if i == 0 else int(self.stages[i - 1][1])
            if left == 0:
                break
            rows = min(r for r in graphs if r >= left)
            graphs[rows].replay()
            self.ran.append((i, rows))


class Layer:
    """Replays by calling again, into the same tensors; a flag is `late` by so many looks; `cost` sets a stage's seconds."""

    def __init__(self, late=0, cost=None):
        self.late, self.waits, self.captures, self.ran = late, 0, 0, []
        self.costs = iter(cost) if cost else itertools.repeat(0.0)

    def entered(self):
        return contextlib.nullcontext()

    def capture(self, body, join=False):
        self.captures += 1
        graph = Graph(body)
        return graph, graph.out

    def join(self, stages):
        return Joined(stages, self.ran)

    def flags(self, count):
        return torch.zeros(count, dtype=torch.int64)

    def event(self):
        return Event(self)

    def seconds(self, graph):
        return next(self.costs)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    body = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh()) for _ in range(4)], torch.nn.Linear(6, 3))
    made = fastee.attach(body.eval(), exits=["0", "1", "2"], num_classes=3, example=torch.zeros(2, 6)).eval()
    for head in made.heads:
        torch.nn.init.normal_(head.linear.weight, std=2.0)
    return made.set_rule("max_prob", [0.8, 0.75, 0.7])


def same(a, b):
    assert torch.equal(a.label, b.label) and torch.equal(a.exit, b.exit)
    assert torch.allclose(a.confidence, b.confidence, atol=1e-6) and torch.allclose(a.logits, b.logits, atol=1e-6)


def by_size(runner):
    """Make the segments of a bucket cost its rows, a move one row."""
    runner._rest = {(i, b): (runner.net.num_segments - i) * float(b) for i, b in runner._rest}
    runner._move_seconds, runner._pause = dict.fromkeys(runner._move_seconds, 1.0), 0.5


@pytest.mark.parametrize("wait", ["auto", "never", "always"])
@pytest.mark.parametrize("late", [0, 1, 2, 100])
def test_answers_are_those_of_the_network(net, wait, late):
    runner = GraphRunner(net, torch.zeros(16, 6), wait=wait, layer=Layer(late))
    assert runner.buckets == (1, 2, 4, 8, 16)
    runner.capture()
    by_size(runner)
    left = set()
    for rows in (16, 1, 7, 16, 3):
        x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(rows))
        out = runner(x)
        same(out, net(x))
        left |= set(out.exit.tolist())
    assert left == {0, 1, 2, 3}


def test_live_rows_move_to_the_bucket_they_fit(net):
    runner = GraphRunner(net, torch.zeros(16, 6), wait="always", layer=Layer()).capture()
    by_size(runner)
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(3))
    out = runner(x)
    live, expected = 16, []
    for i in range(4):
        bucket = next(b for b in runner.buckets if b >= live) if live else None
        if bucket is None:
            break
        expected.append((i, bucket))
        live -= int((out.exit == i).sum())
    assert runner.replays == expected and expected[-1][1] < 16
    runner.gain = lambda i, large, small: -1.0  # no move pays
    same(runner(x), net(x))
    assert {b for _, b in runner.replays} == {16}


def test_the_host_never_waits_unless_it_pays(net):
    layer = Layer(late=100)
    runner = GraphRunner(net, torch.zeros(16, 6), wait="auto", layer=layer).capture()
    runner._rest, runner._pause, layer.waits = dict.fromkeys(runner._rest, 1.0), 5.0, 0
    x = torch.randn(16, 6)
    for _ in range(3):
        same(runner(x), net(x))
    assert layer.waits == 0 and len(runner.replays) == 4
    by_size(runner)
    runner._stays = [0.5, 0.5, 0.5]
    same(runner(x), net(x))
    assert layer.waits > 0


def test_when_everybody_left_nothing_more_runs(net):
    runner = GraphRunner(net.set_rule(thresholds=[0.0, 0.75, 0.7]), torch.zeros(4, 6), wait="always", layer=Layer())
    out = runner(torch.randn(4, 6))
    assert out.exit.tolist() == [0] * 4 and runner.replays == [(0, 4)]
    net.set_rule(thresholds=[0.8, 0.75, 0.7])


def test_a_new_rule_is_captured_again(net):
    layer = Layer()
    runner = GraphRunner(net, torch.zeros(2, 6), layer=layer)
    x = torch.randn(2, 6)
    same(runner(x), net(x))
    before = layer.captures
    same(runner(x), net(x))
    assert layer.captures == before
    net.set_rule(thresholds=[float("inf"), 0.75, 0.0])
    same(runner(x), net(x))
    assert layer.captures > before and all(i in (1, 2) for i, *_ in runner._moves)
    net.set_rule(thresholds=[0.8, 0.75, 0.7])


def test_nan_rows_run_to_the_end(net):
    x = torch.randn(4, 6)
    x[2] = float("nan")
    out = GraphRunner(net, torch.zeros(4, 6), wait="always", layer=Layer())(x)
    assert out.exit[2] == 3 and out.label[2] == -1 and torch.equal(out.exit, net(x).exit)


def test_what_graphs_cannot_run_goes_to_the_network(net):
    runner = GraphRunner(net, torch.zeros(4, 6), layer=Layer())
    for x, why in (
        (torch.randn(5, 6), "5 rows: captured for 1 to 4"),
        (torch.randn(0, 6), "0 rows"),
        (torch.randn(2, 6).double(), "torch.float64"),
    ):
        assert why in runner.declines((x,))
    big = torch.randn(9, 6)
    same(runner(big), net(big))
    assert GraphRunner(net, torch.zeros(4, 6)).declines((big[:4],)) == "a tensor on cpu: graphs are captured on CUDA devices"
    same(GraphRunner(net, torch.zeros(4, 6))(big[:4]), net(big[:4]))
    net.set_rule(thresholds=[float("inf")] * 3)
    assert "+inf" in runner.declines((big[:4],)) and torch.equal(runner(big[:4]).logits, net.full(big[:4]))
    net.set_rule(thresholds=[0.8, 0.75, 0.7])


def test_a_segment_that_cannot_be_captured_is_named(net):
    class Broken(Layer):
        def capture(self, body, join=False):
            if self.captures == 2:
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().capture(body)

    for runner in (GraphRunner(net, torch.zeros(4, 6), layer=Broken()), ExitGraphRunner(net, torch.zeros(4, 6), layer=Broken())):
        rows = 1 if type(runner) is GraphRunner else 4
        for _ in range(2):  # the second call captures anew: nothing of the first is taken for whole
            runner._layer.captures = 0
            segment = 2 if rows == 1 else 0
            with pytest.raises(RuntimeError, match=f"segment {segment} cannot be captured for {rows} rows: operation not permitted"):
                runner(torch.zeros(4, 6))


@pytest.mark.parametrize(
    "options,text",
    [
        ({"wait": "late"}, "wait: expected one of auto, never, always, got 'late'"),
        ({"batch_sizes": (1, 9)}, "batch_sizes: expected numbers from 1 to 4"),
    ],
)
def test_bad_arguments(net, options, text):
    with pytest.raises(ValueError, match=text):
        GraphRunner(net, torch.zeros(4, 6), **options)
    with pytest.raises(ValueError, match="example: expected at least one row"):
        GraphRunner(net, torch.zeros(0, 6))


# The exit graph: the device chooses


OFF = float("inf")


@pytest.mark.parametrize("thresholds", [(0.8, 0.75, 0.7), (OFF, 0.75, OFF), (0.8, 0.75, OFF), (9.0, 9.0, 9.0), (0.0, 0.8, 0.7)])
def test_an_exit_graph_answers_like_the_network(net, thresholds):
    net.set_rule(thresholds=thresholds)
    layer = Layer(cost=itertools.count(start=-1.0, step=1.0))  # a larger bucket costs more: all are kept
    runner = ExitGraphRunner(net, torch.zeros(16, 6), layer=layer)
    ends = [i for i, t in enumerate(thresholds) if t != OFF] + [3]
    for rows in (16, 1, 7, 16, 3, 16):
        x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(rows))
        out = runner(x)
        same(out, net(x))
        live, expected = rows, []
        for s, end in enumerate(ends):
            if live:
                expected.append((s, next(b for b in runner.buckets if b >= live)))
                live -= int((out.exit == end).sum())
        assert layer.ran == expected
    assert runner.worth == [runner.buckets] * len(ends)
    net.set_rule(thresholds=[0.8, 0.75, 0.7])


def test_an_exit_graph_has_only_buckets_that_pay(net):
    seconds = {1: 5.0, 2: 3.0, 4: 4.0, 8: 4.0, 16: 6.0}  # 1 and 4 gain nothing over 2 and 8
    layer = Layer(cost=list(seconds.values()) * 4)
    runner = ExitGraphRunner(net, torch.zeros(16, 6), layer=layer).capture()
    assert runner.worth == [(2, 8, 16)] * 4
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(3))
    same(runner(x), net(x))
    assert {b for _, b in layer.ran[1:]} <= {2, 8, 16}
    same(runner(x[:4]), net(x[:4]))
    assert layer.ran[0] == (0, 4)  # where a batch comes in, its own bucket runs the first stage


@pytest.mark.parametrize("make", [GraphRunner, ExitGraphRunner])
@pytest.mark.parametrize("measure", ["margin", "entropy", "energy", "patience", "gate"])
def test_every_measure_runs_from_graphs(net, make, measure):
    made = copy.deepcopy(net)
    for head in made.heads:
        torch.nn.init.normal_(head.add_gate().weight, std=2.0)
    made.set_rule(measure, [{"patience": 1.0, "gate": 0.0, "margin": 0.6, "entropy": -0.5, "energy": 1.5}[measure]] * 3)
    runner = make(made, torch.zeros(16, 6), layer=Layer(cost=itertools.count(start=0.0, step=1.0)))
    left = set()
    for rows in (16, 5):  # the second batch finds what the first has left in the buffers
        x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(rows))
        out = runner(x)
        same(out, made(x))
        left |= set(out.exit.tolist())
    assert len(left) > 1


def test_nan_rows_run_to_the_end_of_an_exit_graph(net):
    x = torch.randn(4, 6)
    x[2] = float("nan")
    out = ExitGraphRunner(net, torch.zeros(4, 6), layer=Layer())(x)
    assert out.exit[2] == 3 and out.label[2] == -1 and torch.equal(out.exit, net(x).exit)


# The network itself


@pytest.mark.parametrize("module", ["graphs", "exit_graph", "early_exit"])
def test_the_examples_run(module):
    result = doctest.testmod(sys.modules[f"fastee.nn.{module}"])
    assert result.failed == 0 and result.attempted >= 4


@pytest.mark.parametrize("wait", ["auto", "device"])
def test_a_network_runs_from_its_graphs(net, wait):
    made, layer = copy.deepcopy(net), Layer()
    assert made.graphs is None and made.capture_segments(torch.zeros(8, 6), wait=wait, layer=layer) is made
    x = torch.randn(8, 6)
    same(made(x), net(x))
    before = layer.captures
    assert before > 0
    replays = lambda: list(layer.ran) if wait == "device" else list(made.graphs.replays)
    assert replays()
    for what in (x[:3], (x[:3],)):
        same(made(what), net(x[:3]))
    seen = replays()
    same(made(torch.cat([x, x])), net(torch.cat([x, x])))  # more rows than were captured: eagerly
    assert isinstance(made.train()(x), list) and made.eval()(x[:0]).label.shape == (0,)
    assert made(x, deadline=10.0).label.shape == (8,)
    with torch.autocast("cpu", torch.bfloat16):
        same(made(x), net(x))
    assert replays() == seen and layer.captures == before
    assert copy.deepcopy(made).graphs is None
    made.set_rule(thresholds=[float("inf")] * 3)
    assert torch.equal(made(x).logits, net.full(x)) and replays() == seen
    made.set_rule(thresholds=net.thresholds).capture_segments(None)
    assert made.graphs is None
    same(made(x), net(x))
    made.capture_segments(torch.zeros(8, 6), layer=layer).double()
    assert made.graphs is None and made(x.double()).label.shape == (8,)


@pytest.mark.parametrize("make", [GraphRunner, ExitGraphRunner])
def test_graphs_made_in_inference_mode_serve_outside_of_it(net, make):
    with torch.inference_mode():
        runner = make(net, torch.zeros(4, 6), layer=Layer())
        runner(torch.randn(4, 6))
    x = torch.randn(4, 6)
    same(runner(x), net(x))


@pytest.mark.parametrize("make", [GraphRunner, ExitGraphRunner])
def test_threads_take_turns(net, make):
    """One batch's memory is the next one's: a thread that came in between would get rows of another."""
    runner = make(net, torch.zeros(16, 6), layer=Layer()).capture()
    inside, entered = [], runner._used.entered

    @contextlib.contextmanager
    def watched():
        inside.append(1)
        assert len(inside) == 1
        with entered():
            yield
        inside.pop()

    runner._used.entered = watched
    xs = [torch.randn(16, 6, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    wanted, failed = [net(x) for x in xs], []

    def work(x, want):
        try:
            for _ in range(20):
                same(runner(x), want)
        except AssertionError as why:
            failed.append(why)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(xs, wanted, strict=True)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed


def test_an_exit_graph_without_its_library_says_so(net):
    from fastee.kernels import cuda
    from fastee.nn.graphs import CudaLayer

    if cuda.missing() is None:
        pytest.skip("libfastee_cuda and a device are here: tests/gpu")
    layer = CudaLayer.__new__(CudaLayer)  # needs a device to be made
    layer.entered = contextlib.nullcontext
    with pytest.raises(RuntimeError, match="wait='device' cannot run: "):
        ExitGraphRunner(net, torch.zeros(4, 6), layer=layer)(torch.zeros(4, 6))
    with pytest.raises(ValueError, match="wait: expected one of auto, never, always, device, got 'late'"):
        net.capture_segments(torch.zeros(4, 6), wait="late")
    assert net.graphs is None

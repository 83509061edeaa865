"""The graph runner on a layer without graphs: the same answers as the network, whatever comes late, and moves only where they pay."""

import itertools

import pytest
import torch

import fastee
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


class Layer:
    """Replays by calling again, into the same tensors; a flag is `late` by so many looks; `cost` sets a stage's seconds."""

    def __init__(self, late=0, cost=None):
        self.late, self.waits, self.captures = late, 0, 0
        self.costs = iter(cost) if cost else itertools.repeat(0.0)

    def capture(self, body):
        self.captures += 1
        out = tuple(t.clone() for t in body())

        def replay():
            for static, value in zip(out, body(), strict=True):
                static.copy_(value)

        return replay, out

    def flags(self, count):
        return torch.zeros(count, dtype=torch.int64)

    def event(self):
        return Event(self)

    def seconds(self, replay):
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
        def capture(self, body):
            if self.captures == 2:
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().capture(body)

    with pytest.raises(RuntimeError, match="segment 2 cannot be captured for 1 rows: operation not permitted"):
        GraphRunner(net, torch.zeros(4, 6), layer=Broken()).capture()


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

"""The Vertical-Splitting Law against real torch convolutions: concatenated parts are the unsplit output."""

import itertools
import random

import pytest
import torch
from torch import nn

from fastee.errors import CannotCut
from fastee.planning.spatial import (
    NETS,
    Layer,
    Net,
    NetBuilder,
    SpatialPlanner,
    input_rows,
    part_padding,
    plan_spatial,
    resnet18,
    vgg16,
    vsl,
)
from fastee.planning.spatial.extract import extract
from fastee.planning.spatial.geometry import check_plan, out_rows


def random_stack(rng):
    """Convolutions and poolings with every stride, padding, dilation and rounding, and an input that leaves rows for all of them."""
    while True:
        h, w, channels, layers = rng.randint(5, 26), rng.randint(6, 14), 2, []
        rows, columns = h, w
        for _ in range(rng.randint(1, 4)):
            kind, k, s = rng.choice(["conv", "conv", "max", "avg"]), rng.randint(1, 4), rng.randint(1, 3)
            p = rng.randint(0, k // 2) if kind != "conv" else rng.randint(0, 3)
            q = rng.randint(1, 2) if kind != "avg" else 1
            ceil = kind != "conv" and rng.random() < 0.5
            rows, columns = (out_rows(n, k, s, p, q, ceil) for n in (rows, columns))
            if min(rows, columns) < 1:
                break
            if kind == "conv":
                out = rng.randint(1, 3)
                layers += [nn.Conv2d(channels, out, k, s, p, q), rng.choice([nn.ReLU(), nn.BatchNorm2d(out), nn.Tanh()])]
                channels = out
            elif kind == "max":
                layers.append(nn.MaxPool2d(k, s, p, q, ceil_mode=ceil))
            else:
                layers.append(nn.AvgPool2d(k, s, p, ceil_mode=ceil, count_include_pad=rng.random() < 0.5))
        else:
            return nn.Sequential(*layers), torch.randn(1, 2, h, w, dtype=torch.float64)


def random_cuts(rng, height, parts):
    return [0, *sorted(rng.randint(0, height) for _ in range(parts - 1)), height]


def test_concatenated_parts_of_300_random_stacks_equal_the_whole():
    rng, empty, worst = random.Random(7), 0, 0.0
    torch.manual_seed(7)
    for _ in range(300):
        stack, x = random_stack(rng)
        m = extract(stack.double(), x)
        begin, end, value = 0, 0, x
        layers = len(m.net.layers)
        while end < layers:  # random volumes, each split among 1 to 5
            begin, end = end, rng.randint(end + 1, layers)
            cuts = random_cuts(rng, m.net.height(end), rng.randint(1, 5))
            parts = []
            for lo, hi in zip(cuts, cuts[1:], strict=False):
                source = vsl(m.net, begin, end, (lo, hi))[1]
                parts.append(m.part(begin, end, (lo, hi), value[:, :, source[0] : source[1]]))
                empty += lo == hi
            value = torch.cat(parts, dim=2)
        whole = m.full(x)
        assert value.shape == whole.shape
        worst = max(worst, float((value - whole).abs().max()))
    assert worst <= 1e-12
    assert empty >= 100


class Forks(nn.Module):
    """A residual block with a stride, a pre-activation that forks, and branches of different reach that are concatenated."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a1, self.a2, self.skip = nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1, 2)
        self.bn = nn.BatchNorm2d(4)
        self.wide, self.dilated = nn.Conv2d(4, 2, 5, padding=2), nn.Conv2d(4, 3, 3, padding=2, dilation=2)
        self.pool = nn.AvgPool2d(3, 1, 1)
        self.last = nn.Conv2d(9, 4, 3, padding="same", dilation=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = self.a2(self.bn(self.a1(x)).relu()) + self.skip(x)
        y = torch.relu(x)
        y = torch.cat([self.wide(y), self.dilated(x), self.pool(y)], dim=1)
        return self.head(self.last(y).mean((2, 3)))


def test_residual_and_branching_blocks_are_exact_under_any_cut():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 23, 17, dtype=torch.float64)
    m = extract(Forks().double(), x)
    net, rng = m.net, random.Random(3)
    assert [layer.kind for layer in net.layers].count("cat") == 1 and net.tail_macs == 20
    assert any(net.cut_points[k + 1] - net.cut_points[k] > 1 for k in range(len(net.cut_points) - 1)), "some blocks cannot be cut inside"
    for parts in (1, 2, 3, 5):
        for _ in range(12):
            inner = [p for p in net.cut_points[1:-1] if rng.random() < 0.5]
            volumes = [0, *inner, len(net.layers)]
            splits = [random_cuts(rng, net.height(b), parts) for b in volumes[1:]]
            volumes, splits = check_plan(net, parts, volumes, splits)
            value = x
            for begin, end, cuts in zip(volumes, volumes[1:], splits, strict=False):
                sources = [vsl(net, begin, end, (lo, hi))[1] for lo, hi in zip(cuts, cuts[1:], strict=False)]
                value = torch.cat([m.part(begin, end, (lo, hi), value[:, :, a:b]) for lo, hi, (a, b) in zip(cuts, cuts[1:], sources, strict=False)], dim=2)
            assert (m.tail(value) - m.full(x)).abs().max() <= 1e-12


def test_a_plan_runs_on_the_real_module_and_gives_its_answer():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 4))
    m = extract(net.double(), torch.zeros(1, 3, 16, 16, dtype=torch.float64))
    plan = plan_spatial(m.net, ["pi", "pi", "pi"], 1e8, effort=20_000)
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    assert (m.run(plan, x) - net.eval()(x)).abs().max() <= 1e-12
    with pytest.raises(ValueError, match="the plan is for another net"):
        m.run(SpatialPlanner(vgg16(32), ["pi"], 1e8).plan("offload"), x)


def test_a_part_computes_from_the_rows_it_is_given_alone():
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    m = extract(nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)).double(), x)
    assert vsl(m.net, 0, 2, (5, 8)) == ({1: (5, 8), 0: (4, 9)}, (3, 10))
    with pytest.raises(ValueError, match=r"part: x must hold input rows \[3, 10\), got 16 rows"):
        m.part(0, 2, (5, 8), x)


@pytest.mark.parametrize("name", NETS)
def test_ranges_cover_overlap_by_the_halo_and_never_leave_the_input(name):
    net = NETS[name](64)
    for begin, end in itertools.pairwise(net.cut_points):
        h_in, h_out = net.height(begin), net.height(end)
        whole_in = vsl(net, begin, end, (0, h_out))[1]
        assert 0 <= whole_in[0] <= whole_in[1] <= h_in
        ranges = [vsl(net, begin, end, (h, h + 1))[1] for h in range(h_out)]
        assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in itertools.pairwise(ranges))
        assert min(r[0] for r in ranges) == whole_in[0] and max(r[1] for r in ranges) == whole_in[1]
        if end - begin == 1:
            layer = net.layers[begin]
            halo = layer.dilation * (layer.kernel - 1) + 1 - layer.stride
            assert all(a[1] - b[0] <= max(0, halo) for a, b in itertools.pairwise(ranges))


@pytest.mark.parametrize(("name", "layers", "gmacs"), [("vgg16", 18, 15.35), ("resnet18", 29, 1.81), ("resnet50", 70, 4.09), ("mobilenet_v2", 62, 0.30)])
def test_known_networks_have_their_published_size(name, layers, gmacs):
    net = NETS[name]()
    assert len(net.layers) == layers and round(net.macs / 1e9, 2) == gmacs
    assert net.height(layers) == 7


def test_vgg16_tail_and_known_cut_points():
    assert round(vgg16().tail_macs / 1e9, 3) == 0.124
    # ResNet-18: after the stem, its pooling, and each of the eight blocks
    assert resnet18().cut_points == (0, 1, 2, 5, 8, 12, 15, 19, 22, 26, 29)


def test_split_macs_are_at_least_the_unsplit_ones_and_equal_layer_by_layer():
    net, rng = vgg16(64), random.Random(0)
    macs = lambda need: sum(net.layers[i].row_macs * (hi - lo) for i, (lo, hi) in need.items())
    for _ in range(20):
        cuts = random_cuts(rng, net.height(18), 4)
        assert sum(macs(vsl(net, 0, 18, rows)[0]) for rows in itertools.pairwise(cuts)) >= net.macs * (1 - 1e-12)
    for i in range(18):
        cuts = random_cuts(rng, net.height(i + 1), 4)
        assert sum(macs(vsl(net, i, i + 1, rows)[0]) for rows in itertools.pairwise(cuts)) == pytest.approx(net.layers[i].row_macs * net.layers[i].out_h)


def test_padding_of_parts_at_and_inside_the_borders():
    layer = Layer("c", "conv", 3, 1, 1, 1, 8, 8, 1, 4.0, 1.0, (-1,))
    assert [part_padding(layer, r) for r in ((0, 8), (0, 3), (3, 5), (7, 8), (4, 4))] == [(1, 1), (1, 0), (0, 0), (0, 1), (0, 0)]
    assert input_rows(layer, (4, 4)) == (0, 0)
    far = Layer("c", "conv", 2, 1, 3, 1, 4, 9, 1, 4.0, 1.0, (-1,))  # the first rows lie wholly in the padding
    assert input_rows(far, (0, 2)) == (0, 0) and part_padding(far, (0, 2)) == (3, 0)
    assert input_rows(far, (7, 9)) == (0, 0) and part_padding(far, (7, 9)) == (0, 3)


def test_ceil_mode_follows_torch():
    for n, k, s, p in itertools.product(range(3, 12), (2, 3), (1, 2, 3), (0, 1)):
        x = torch.zeros(1, 1, n, n)
        assert out_rows(n, k, s, p, 1, True) == nn.MaxPool2d(k, s, p, ceil_mode=True)(x).shape[2]


def test_a_global_operation_ends_the_prefix():
    class Squeeze(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.gate = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1)

        def forward(self, x):
            x = self.a(x)
            return self.b(x * self.gate(x))

    m = extract(Squeeze().double(), torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    assert [layer.name for layer in m.net.layers] == ["a"] and m.net.tail_layers == 1
    with pytest.raises(CannotCut, match="no layer can be split by rows before call_module 0"):
        extract(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.zeros(1, 3, 2, 2))


def test_bad_nets_and_modules_are_named():
    layer = lambda **k: Layer(**{**dict(name="c", kind="conv", kernel=3, stride=1, padding=1, dilation=1, in_h=8, out_h=8, channels=1, row_bytes=4.0,
                                        row_macs=1.0, inputs=(-1,)), **k})  # fmt: skip
    for change, text in [({"kind": "fft"}, "layer 'c' is of kind 'fft', expected one of conv"), ({"stride": 0}, "stride of layer 'c' must be >= 1, got 0"),
                         ({"inputs": (0,)}, r"inputs of layer 'c' must be among -1..-1, got \(0,\)"), ({"in_h": 9}, "layer 'c' expects 9 rows, its input has 8"),
                         ({"row_bytes": 0.0}, "needs padding >= 0, row_bytes > 0")]:  # fmt: skip
        with pytest.raises(ValueError, match=text):
            Net("n", (layer(**change),), 8, 4.0)
    with pytest.raises(ValueError, match="Net 'n': layers must not be empty"):
        Net("n", (), 8, 4.0)
    with pytest.raises(ValueError, match=r"example must be a tensor \[B, C, H, W\], got \[3, 8\]"):
        extract(nn.Conv2d(3, 3, 1), torch.zeros(3, 8))
    with pytest.raises(ValueError, match="size must be an integer >= 1, got 0"):
        NetBuilder("n", 0, 3)
    with pytest.raises(ValueError, match="the input size is too small"):
        vgg16(16)

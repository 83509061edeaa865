"""The latency recursion and LC-PSS: hand-made numbers, invariants, and the C++ model equal to its Python twin bit for bit."""

import math
import random

import numpy as np
import pytest
from spatial_worlds import random_net, random_plan

from fastee.planning.spatial import Device, Links, NetBuilder, SpatialPlanner, vgg16

KINDS = ("xavier", "tx2", "nano", "pi")


def two_layers():
    """Two 3 x 3 convolutions on 8 rows of 8; a row of input is 32 bytes, of output 64."""
    b = NetBuilder("two", 8, 1)
    b.conv(2, 3, padding=1)
    b.conv(2, 3, padding=1)
    return b.build()


def test_the_recursion_by_hand(native):
    # 1 ms per row and layer; 64 bytes per ms
    devices = [Device(n, measured={f"conv{i}": [(r, r * 1e-3) for r in range(1, 9)] for i in (0, 1)}, tail_seconds=0.5e-3) for n in "ab"]
    p = SpatialPlanner(two_layers(), devices, Links([512e3, 512e3], latency=1e-3), native=native)
    assert p.model.root == 0
    # Layer by layer, 4 rows each: scatter 5 rows = 2.5 ms after 1 ms latency, 4 ms of work; then one row of 64 bytes, 1 ms, from each other;
    # 4 ms of work; 4 rows home take 4 ms; the tail 0.5 ms.
    assert p.latency((0, 1, 2), [[0, 4, 8], [0, 4, 8]]) == pytest.approx((1 + 2.5 + 4 + 1 + 4 + 4 + 0.5) * 1e-3, rel=1e-12)
    # Fused: 6 rows of input, 5 + 4 rows of work, no exchange
    assert p.latency((0, 2), [[0, 4, 8]]) == pytest.approx((1 + 3 + 9 + 4 + 0.5) * 1e-3, rel=1e-12)
    # All on the root: scatter 8 rows, 16 rows of work, nothing to gather
    assert p.latency((0, 1, 2), [[0, 8, 8], [0, 8, 8]]) == pytest.approx((1 + 4 + 16 + 0.5) * 1e-3, rel=1e-12)
    # The requester is slower than the providers: half the rate, twice the scatter
    p.set_links(Links([512e3, 512e3], requester=256e3, latency=1e-3))
    assert p.latency((0, 2), [[0, 4, 8]]) == pytest.approx((1 + 6 + 9 + 4 + 0.5) * 1e-3, rel=1e-12)
    # Contention: the second scatter starts after the first
    p.set_links(Links([512e3, 512e3], latency=1e-3, contention=True))
    assert p.latency((0, 2), [[0, 4, 8]]) == pytest.approx((1 + 3 + 3 + 9 + 4 + 0.5) * 1e-3, rel=1e-12)


def test_all_rows_on_one_provider_cost_scatter_and_layers_whatever_the_partition(native):
    net, rng = vgg16(32), random.Random(0)
    p = SpatialPlanner(net, ["tx2", "xavier"], 50e6, native=native)
    expected = 8 * net.row_bytes(0) * net.input_h / 50e6 + p.whole[1]
    for _ in range(20):
        volumes, _ = random_plan(rng, net, 2)
        splits = [[0, 0, net.height(b)] for b in volumes[1:]]
        assert p.latency(volumes, splits) == pytest.approx(expected, rel=1e-12)


def test_more_bandwidth_never_hurts_in_2000_random_plans(compiled):
    rng = random.Random(5)
    for _ in range(200):
        net, n = random_net(rng), rng.randint(2, 5)
        rates = [rng.uniform(1e5, 1e8) for _ in range(n)]
        p = SpatialPlanner(net, [rng.choice(KINDS) for _ in range(n)], rates, native=True)
        contention = rng.random() < 0.5
        plans = [random_plan(rng, net, n) for _ in range(10)]
        p.set_links(Links(rates, contention=contention))
        before = [p.latency(*plan) for plan in plans]
        rates[rng.randrange(n)] *= rng.uniform(1, 20)
        p.set_links(Links(rates, contention=contention))
        assert all(b <= a * (1 + 1e-12) for a, b in zip(before, map(lambda plan: p.latency(*plan), plans), strict=True))


def test_core_and_twin_agree_to_the_bit_on_200_random_worlds(compiled):
    rng = random.Random(11)
    for _ in range(200):
        net, n = random_net(rng), rng.randint(1, 5)
        devices = [rng.choice(KINDS) for _ in range(n)]
        links = Links([rng.choice([0.0, -1.0, math.inf, rng.uniform(1e5, 1e9)]) if rng.random() < 0.15 else rng.uniform(1e5, 1e9) for _ in range(n)],
                      rng.choice([None, 1e7]), rng.choice([0.0, 1e-3]), rng.random() < 0.5)  # fmt: skip
        a, b = (SpatialPlanner(net, devices, links, vectors=5, native=x) for x in (True, False))
        down = rng.random() < 0.2
        for p in (a, b):
            p.up[0] = not down
            p._tell()
        assert a.model.root == b.model.root and list(a.model.cut_points) == b.model.cut_points == list(net.cut_points)
        for _ in range(3):
            volumes, splits = random_plan(rng, net, n)
            flat = [e for c in splits for e in c]
            assert a.model.finish_times(volumes, flat) == b.model.finish_times(volumes, flat)
        if n > 1:
            x, y = (p.model.volume_cost(net.cut_points[0], net.cut_points[-1], a._vectors) for p in (a, b))
            assert x == pytest.approx(y, rel=1e-12)
            assert a.lcpss() == b.lcpss()


def test_lcpss_reproduces_the_reference_volumes_of_vgg16(compiled):
    expected = {0.25: (0, 6, 8, 10, 12, 14, 15, 16, 18), 0.5: (0, 6, 10, 14, 15, 16, 18), 0.75: (0, 10, 14, 18), 0.9: (0, 14, 18), 1.0: (0, 18)}
    for alpha, volumes in expected.items():
        assert SpatialPlanner(vgg16(), ["nano"] * 4, 50e6, alpha=alpha).lcpss() == volumes


def test_lcpss_falls_with_every_cut_is_deterministic_and_needs_two_providers(native):
    for alpha in (0.25, 0.75):
        p = SpatialPlanner(vgg16(32), ["nano"] * 3, 50e6, alpha=alpha, vectors=10, native=native)
        bounds, scores = p.model.lcpss(p._vectors, alpha)
        assert len(scores) == len(bounds) - 1 and all(b < a for a, b in zip(scores, scores[1:], strict=False))
        assert (bounds, scores) == p.model.lcpss(p._vectors, alpha)
    assert SpatialPlanner(vgg16(32), ["nano"], 50e6, native=native).lcpss() == (0, 18)


def test_moved_bytes_and_macs_of_lcpss_by_hand(native):
    p = SpatialPlanner(two_layers(), ["nano", "nano"], 1e6, native=native)
    half = np.array([[0.5]])
    assert p.model.volume_cost(0, 1, half) == (10 * 32, 8 * p.net.layers[0].row_macs)  # 5 rows each of 32 bytes
    assert p.model.volume_cost(1, 2, half) == (2 * 64, 8 * p.net.layers[1].row_macs)  # one row of 64 bytes from each other
    assert p.model.volume_cost(0, 2, half) == (12 * 32, 10 * p.net.layers[0].row_macs + 8 * p.net.layers[1].row_macs)


def test_measured_points_are_interpolated_upward():
    net = two_layers()
    d = Device("d", measured={"conv0": [(8, 8e-3), (2, 1e-3), (4, 0.5e-3)], "conv1": [(1, 1e-3), (4, 2e-3)]}, tail_seconds=0)
    assert d.table(net).tolist() == [0, 1e-3, 1e-3, 1e-3, 1e-3, 8e-3, 8e-3, 8e-3, 8e-3, 0, 1e-3, 2e-3, 2e-3, 2e-3, 2.5e-3, 3e-3, 3.5e-3, 4e-3]
    with pytest.raises(ValueError, match="no measured points for layer 'conv1' of 'two', and no rate to estimate it from"):
        Device("d", measured={"conv0": [(1, 1.0)]}).table(net)


def test_synthetic_devices_follow_their_formula():
    t = Device.synthetic("nano").table(two_layers())
    row = two_layers().layers[0].row_macs
    assert t[0] == 0 and t[1] == t[4] == pytest.approx(3e-4 + 4 * row / 120e9) and t[5] == pytest.approx(3e-4 + 8 * row / 120e9)


def test_a_used_link_without_rate_is_infeasible_and_an_unused_one_is_not(native):
    p = SpatialPlanner(two_layers(), ["nano", "nano", "nano"], [1e6, 0.0, -5.0], native=native)
    assert p.latency((0, 2), [[0, 4, 8, 8]]) == math.inf
    assert p.latency((0, 2), [[0, 4, 4, 8]]) == math.inf
    assert p.latency((0, 2), [[0, 8, 8, 8]]) < math.inf


def test_wrong_plans_are_named(native):
    p = SpatialPlanner(two_layers(), ["nano", "nano"], 1e6, native=native)
    for volumes, splits, text in [((0, 2), [[0, 9, 8]], "must not fall, got 8 after 9"), ((0, 2), [[0, 4, 9]], r"must go from 0 to 8, got 0..9"),
                                  ((0, 2), [[-1, 4, 8]], "must go from 0 to 8"), ((0, 1), [[0, 4, 8]], "volumes must go from 0 to 2"),
                                  ((0, 2, 2), [[0, 4, 8]] * 2, "volumes must rise, got 2 after 2")]:  # fmt: skip
        with pytest.raises(ValueError, match=text):
            p.latency(volumes, splits)

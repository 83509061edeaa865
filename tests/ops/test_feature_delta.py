import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastee import ops


def truth(a, b):
    a, b = a.double().flatten(1), b.double().flatten(1)
    return (a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)).norm(dim=1)


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 7), (5, 16), (4, 130), (2, 3, 5, 5), (6, 1023)])
def test_feature_delta_equals_float64(way, shape):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(*shape, generator=g), torch.randn(*shape, generator=g)
    got = ops.feature_delta(a, b, backend=way)
    assert got.dtype == torch.float32 and torch.allclose(got.double(), truth(a, b), atol=1e-6)
    assert torch.equal(ops.feature_delta(a, b, backend=way), got)


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4])
def test_small_deltas_do_not_cancel(way, distance):
    g = torch.Generator().manual_seed(1)
    a = torch.rand(50, 128, generator=g)
    b = a + distance * torch.randn(50, 128, generator=g) * a.norm(dim=1, keepdim=True) / 128**0.5
    want = truth(a, b)
    assert ((ops.feature_delta(a, b, backend=way).double() - want).abs() <= 2e-6 + 1e-3 * want).all()


def test_feature_delta_edge_rows(way):
    a, b = torch.ones(6, 20), torch.ones(6, 20)
    a[0] = 0
    b[1] = 0
    a[2, 3], b[3, 4] = math.nan, math.inf
    b[4] = -1
    a[5] = 1e30  # the sum of squares is beyond fp32
    got = ops.feature_delta(a, b, backend=way)
    assert got[:2].tolist() == [math.inf, math.inf] and got[2:4].isnan().all()
    assert got[4].item() == pytest.approx(2.0) and got[5].isnan()


@given(st.floats(1e-3, 1e3), st.integers(1, 60), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_scaling_changes_nothing_and_relu_features_stay_below_sqrt_two(scale, features, seed):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.rand(3, features, generator=g) + 1e-3, torch.rand(3, features, generator=g) + 1e-3
    d = ops.feature_delta(a, b)
    assert torch.allclose(ops.feature_delta(a * scale, b), d, atol=2e-6) and ((d >= 0) & (d <= math.sqrt(2) + 1e-6)).all()


def test_every_instruction_set_gives_the_same_delta(every_isa):
    a = torch.randn(40, 77)
    b = torch.cat([a[:20] + 0.01, torch.randn(20, 77)])
    results = every_isa(lambda: ops.feature_delta(a, b, backend="cpu"))
    assert all(torch.equal(got, results[0][1]) for _, got in results)


def test_row_strides(way):
    wide = torch.randn(10, 24)
    assert torch.equal(ops.feature_delta(wide[::2, :20], wide[1::2, :20], backend=way), ops.feature_delta(wide[::2, :20].contiguous(), wide[1::2, :20].contiguous(), backend=way))

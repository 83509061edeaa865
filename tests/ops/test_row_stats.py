import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastee import ops
from fastee.testing.inputs import edge_logits
from fastee.testing.tolerances import assert_stats_close

EDGES = edge_logits()


@pytest.mark.parametrize("name,logits", EDGES, ids=[n for n, _ in EDGES])
def test_row_stats_equals_float64(way, name, logits):
    assert_stats_close(ops.row_stats(logits, backend=way), logits)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_temperature_divides_the_logits(way, temperature):
    logits = 4 * torch.randn(9, 33, generator=torch.Generator().manual_seed(1))
    assert_stats_close(ops.row_stats(logits, temperature=temperature, backend=way), logits, temperature=temperature)


@pytest.mark.parametrize("classes", [1, 2, 17, 1000, 1024, 1025, 3000])
def test_second_moment_is_the_entropy_of_the_squared_distribution(way, classes):
    logits = 3 * torch.randn(4, classes, generator=torch.Generator().manual_seed(classes))
    p = logits.double().softmax(1).square()
    q = p / p.sum(1, keepdim=True)
    want = -(q * q.clamp_min(1e-300).log()).sum(1)
    got = ops.row_stats(logits, second_moment=True, backend=way).entropy_p2
    assert torch.allclose(got.double(), want, atol=3e-6 * max(1.0, math.log(classes)))


def test_state_is_not_a_function_of_five_numbers(way):
    # Two rows that agree in the five numbers to 1e-7 and differ in the entropy of p^2 (algorithms: 0.55862 and 0.55944).
    rows = torch.tensor([[0.0, -1.0, -1.5, -2.5, -4.0], [0.0, -1.0, -1.454627, -2.8, -3.532448]])
    s = ops.row_stats(rows, second_moment=True, backend=way)
    assert torch.allclose(s.entropy[0], s.entropy[1], atol=1e-5)
    assert s.entropy_p2.tolist() == pytest.approx([0.55862, 0.55944], abs=1e-5)


def test_large_vocabulary_merges_tiles(way):
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(3, 128_256, generator=g)
    logits[1, 100_000] = 20.0
    logits[2, :50_000] = -math.inf
    assert_stats_close(ops.row_stats(logits, backend=way), logits)


def test_a_whole_tile_at_minus_infinity_is_the_identity(way):
    logits = torch.full((1, 3000), -math.inf)
    logits[0, 2999] = -7.0
    s = ops.row_stats(logits, backend=way)
    assert s.label.item() == 2999 and s.max_prob.item() == 1.0 and s.entropy.item() == 0.0 and s.lse.item() == -7.0


@given(st.lists(st.floats(-200, 200, width=32) | st.just(-math.inf), min_size=1, max_size=70), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_any_row(values, repeat):
    logits = torch.tensor([values] * (repeat + 1), dtype=torch.float32)
    assert_stats_close(ops.row_stats(logits), logits)


def test_every_instruction_set_gives_the_same_bits(every_isa):
    logits = torch.cat([z if z.shape[1] == 17 else torch.randn(4, 17) for _, z in EDGES])
    wide = 5 * torch.randn(7, 2500)
    for z in (logits, wide):
        results = every_isa(lambda z=z: ops.row_stats(z, second_moment=True, backend="cpu"))
        for isa, got in results[1:]:
            for field, a, b in zip(got._fields, got, results[0][1], strict=True):
                assert torch.equal(a.nan_to_num(-9.0), b.nan_to_num(-9.0)), (isa, field)


def test_exp_error_is_below_three_units_in_the_last_place(every_isa):
    # Two classes at 0 and u: p(second) / p(first) = e^u. A million values of u cover [-87, 0].
    u = -torch.linspace(0, 87, 1_000_000)
    want = u.double().exp()
    for isa, stats in every_isa(lambda: ops.row_stats(torch.stack([torch.zeros_like(u), u], 1), backend="cpu")):
        s = 1.0 / stats.max_prob.double()  # 1 + e^u in fp32: looks at e^u where it matters to a confidence
        assert ((s - 1 - want).abs() <= 3 * 2.0**-23 * s).all(), isa


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_go_to_the_reference(dtype):
    logits = torch.randn(5, 10).to(dtype)
    s = ops.row_stats(logits)
    assert s.max_prob.dtype == torch.float32
    assert_stats_close(s, logits.float())

import pytest
import torch

from fastee.testing import (
    assert_compacted,
    assert_decisions_match,
    assert_quantized,
    assert_stats_close,
    edge_logits,
    edge_masks,
    edge_rows,
    float64_stats,
    stats_in,
)

LOGITS = edge_logits(0)


@pytest.mark.parametrize("name, z", LOGITS, ids=[n for n, _ in LOGITS])
def test_plain_torch_passes_its_own_bound(name, z):
    assert_stats_close(stats_in(z), z)


@pytest.mark.parametrize("name, z", LOGITS, ids=[n for n, _ in LOGITS])
def test_float64_stats_agree_with_formulas_written_out_in_python(name, z):
    import math

    got = float64_stats(z)
    for i, row in enumerate(z.double().tolist()):
        if any(math.isnan(v) or v == math.inf for v in row) or all(v == -math.inf for v in row):
            assert got["label"][i] == -1 and all(math.isnan(got[k][i]) for k in ("max_prob", "margin", "entropy", "lse"))
            continue
        top = max(row)
        s = math.fsum(math.exp(v - top) for v in row)
        p = sorted((math.exp(v - top) / s for v in row), reverse=True)
        assert got["label"][i] == row.index(top)
        assert got["max_prob"][i].item() == pytest.approx(p[0], rel=1e-12)
        assert got["margin"][i].item() == pytest.approx(p[0] - (p[1] if len(p) > 1 else 0.0), abs=1e-12)
        assert got["entropy"][i].item() == pytest.approx(-math.fsum(q * math.log(q) for q in p if q > 0), abs=1e-12)
        assert got["lse"][i].item() == pytest.approx(top + math.log(s), rel=1e-12)


def test_edge_logits_hold_the_cases_the_design_names():
    names = {n for n, _ in LOGITS}
    assert {"empty", "ties", "minus_inf", "half_dominant", "strided_rows", "strided_columns", "all_exit", "uniform_nobody_exits"} <= names
    assert all(z.dtype == torch.float32 and z.dim() == 2 and z.stride(1) == 1 for _, z in LOGITS)
    assert not dict(LOGITS)["strided_columns"].is_contiguous()
    labels = torch.cat([float64_stats(z)["label"] for _, z in LOGITS])
    assert (labels == -1).sum() >= 10 and (labels >= 0).sum() > 100


def test_edge_logits_are_the_same_for_the_same_seed():
    for (n, a), (m, b) in zip(edge_logits(3), edge_logits(3), strict=True):
        assert n == m and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    assert any(a.shape == b.shape and not torch.equal(a, b) for (_, a), (_, b) in zip(edge_logits(3), edge_logits(4), strict=True))


@pytest.mark.parametrize("B", [0, 1, 33, 1025])
def test_edge_masks_and_compaction_of_plain_torch(B):
    for _, mask in edge_masks(B):
        assert mask.shape == (B,) and mask.dtype == torch.bool
        index = torch.cat([mask.nonzero().flatten(), (~mask).nonzero().flatten().flip(0)])
        assert_compacted(index, int(mask.sum()), mask)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda s: s["label"].__setitem__(2, 5), "label: row 2"),
        (lambda s: s["label"].__setitem__(1, 0), "label: row 1"),
        (lambda s: s["max_prob"].__setitem__(0, float("nan")), "max_prob: row 0 is nan"),
        (lambda s: s["entropy"].__setitem__(1, 0.0), "entropy: row 1 is 0.0, expected NaN"),
        (lambda s: s["margin"].add_(1e-5), "margin: max error"),
        (lambda s: s["lse"].sub_(1e-4), "lse: max error"),
    ],
)
def test_wrong_statistics_are_caught(spoil, message):
    z = torch.tensor([[1.0, 2.0, 0.5, 0.0, 0.1, 0.2], [float("nan")] * 6, [9.0, 9.0, 1.0, 1.0, 1.0, 8.9]])
    s = stats_in(z)
    assert_stats_close(s, z)
    spoil(s)
    with pytest.raises(AssertionError, match=message):
        assert_stats_close(s, z)


def test_a_product_may_swap_a_near_tie_but_nothing_else():
    truth = torch.tensor([[1.0, 1.0 + 1e-9, 0.0]], dtype=torch.float64)
    z = truth.float()
    assert_stats_close({**stats_in(z), "label": torch.tensor([0])}, z, truth=truth)
    with pytest.raises(AssertionError, match="label: row 0 has 2"):
        assert_stats_close({**stats_in(z), "label": torch.tensor([2])}, z, truth=truth)


def test_decisions_may_differ_only_near_the_threshold_and_nan_never_exits():
    conf = torch.tensor([0.2, 0.9, 0.9000001, float("nan")], dtype=torch.float64)
    assert_decisions_match(torch.tensor([False, True, True, False]), conf, 0.9)
    assert_decisions_match(torch.tensor([False, False, False, False]), conf, 0.9, tol=1e-6)
    just_below = torch.tensor([0.8999, 0.9], dtype=torch.float64)
    assert_decisions_match(torch.tensor([False, True]), just_below, 0.9)
    for wrong in ([True, True], [False, False]):
        with pytest.raises(AssertionError, match="exits: row"):
            assert_decisions_match(torch.tensor(wrong), just_below, 0.9)
    for wrong in ([True, True, True, False], [False, True, True, True], [False, False, True, False]):
        with pytest.raises(AssertionError, match="exits: row"):
            assert_decisions_match(torch.tensor(wrong), conf, 0.9)
    with pytest.raises(AssertionError, match="exits: row 3"):
        assert_decisions_match(torch.tensor([False, True, True, True]), conf, 0.9, tol=1e-6)


def test_compaction_must_be_in_order():
    mask = torch.tensor([True, False, True, False])
    assert_compacted(torch.tensor([0, 2, 3, 1]), 2, mask)
    with pytest.raises(AssertionError, match="index"):
        assert_compacted(torch.tensor([0, 2, 1, 3]), 2, mask)
    with pytest.raises(AssertionError, match="count"):
        assert_compacted(torch.tensor([0, 2, 3, 1]), 3, mask)


def test_quantised_rows_of_plain_torch_pass_and_broken_ones_do_not():
    for _, x in edge_rows(0):
        scale = (x.abs().amax(1) if x.shape[1] else x.sum(1)) / 127
        data = (x / torch.where(scale > 0, scale, torch.ones_like(scale))[:, None]).round().clamp(-127, 127).to(torch.int8)
        assert_quantized(data, scale, x)
    x = dict(edge_rows(0))["exact_halves"]
    scale = torch.ones(2)
    with pytest.raises(AssertionError, match="odd neighbour"):
        assert_quantized((x.abs() + 0.5).floor().mul(x.sign()).to(torch.int8), scale, x)
    with pytest.raises(AssertionError, match="scale: row 0"):
        assert_quantized(x.round().to(torch.int8), scale * 1.001, x)
    with pytest.raises(AssertionError, match="data: row"):
        assert_quantized(x.round().to(torch.int8) + 1, scale, x)

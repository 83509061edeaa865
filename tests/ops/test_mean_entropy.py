import math

import pytest
import torch

from fastee import ops


def truth(logits, mask=None, temperature=1.0):
    p = (logits.double() / temperature).log_softmax(-1)
    h = -(p.exp() * p).sum(-1)
    return h.mean(1) if mask is None else torch.stack([row[keep].mean() for row, keep in zip(h, mask.bool(), strict=True)])


@pytest.mark.parametrize("shape", [(0, 3, 4), (1, 1, 1), (2, 7, 5), (3, 4, 1000), (2, 3, 2500)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_mean_entropy_equals_float64(way, shape, temperature):
    logits = 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    got = ops.mean_entropy(logits, temperature=temperature, backend=way)
    assert got.dtype == torch.float32 and torch.allclose(got.double(), truth(logits, None, temperature), atol=3e-6)


def test_padding_frames_may_hold_anything(way):
    logits = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1], [0] * 6], dtype=torch.bool)
    want = ops.mean_entropy(logits, mask, backend=way)
    changed = torch.where(mask[..., None], logits, math.nan)
    got = ops.mean_entropy(changed, mask, backend=way)
    assert torch.equal(got[:3], want[:3]) and torch.allclose(got[:3].double(), truth(logits[:3], mask[:3]), atol=1e-6)
    assert got[3].isnan()  # no real frame


def test_a_broken_frame_breaks_its_row_only(way):
    logits = torch.zeros(4, 3, 8)
    logits[0, 1, 2], logits[1, 0, 0], logits[2, 2] = math.nan, math.inf, -math.inf
    got = ops.mean_entropy(logits, backend=way)
    assert got[:3].isnan().all() and got[3].item() == pytest.approx(math.log(8))


def test_underflow_is_not_nan(way):
    logits = torch.full((1, 2, 50), -1e4)
    logits[..., 0] = 0.0  # p log p of the others underflows
    assert ops.mean_entropy(logits, backend=way).item() == 0.0


def test_every_instruction_set_gives_the_same_entropy(every_isa):
    logits = 2 * torch.randn(5, 6, 1500)
    results = every_isa(lambda: ops.mean_entropy(logits, backend="cpu"))
    assert all(torch.equal(got, results[0][1]) for _, got in results)

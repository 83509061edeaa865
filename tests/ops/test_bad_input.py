"""Every wrong argument gets one clear error: the argument's name, what was got, what was expected. Never a crash, never a fallback."""

import re

import pytest
import torch

from fastee import ops
from fastee.errors import BackendUnavailable

x, w, b = torch.zeros(2, 8, 4, 4), torch.zeros(3, 8), torch.zeros(3)
tokens = torch.zeros(2, 5, 8)
head = ops.exit_head

BAD = [
    (lambda: head([1.0], w), TypeError, "exit_head: x must be a float32 or bfloat16 or float16 or float64 tensor [B, D, ...], got list [1.0]"),
    (lambda: head(x.int(), w), TypeError, "exit_head: x must be float32 or bfloat16 or float16 or float64 [B, D, ...], got int32 [2, 8, 4, 4]"),
    (lambda: head(x[0, 0, 0], w), ValueError, "exit_head: x must be float32 or bfloat16 or float16 or float64 [B, D, ...], got float32 [4]"),
    (lambda: head(x, torch.zeros(3, 9)), ValueError, "exit_head: weight must be [C, 8] to match x float32 [2, 8, 4, 4] with pool='mean', got float32 [3, 9]"),
    (lambda: head(x, torch.zeros(0, 8)), ValueError, "exit_head: weight must have at least one class and one feature, got float32 [0, 8]"),
    (lambda: head(x, w, torch.zeros(4)), ValueError, "exit_head: bias must have 3 elements (C), got float32 [4]"),
    (lambda: head(x, w, b, "avg"), ValueError, "exit_head: pool must be one of mean, mean_tokens, cls, last, none, got 'avg'"),
    (lambda: head(x, w, b, "cls"), ValueError, "exit_head: x must be [B, T, D] for pool='cls', got float32 [2, 8, 4, 4]"),
    (lambda: head(x, w, b, "none"), ValueError, "exit_head: x must be [B, D] for pool='none', got float32 [2, 8, 4, 4]"),
    (lambda: head(x, w, b, measure="maxprob"), ValueError, "exit_head: measure must be one of max_prob, margin, entropy, energy, got 'maxprob', did you mean 'max_prob'?"),
    (lambda: head(x, w, b, measure=3), TypeError, "exit_head: measure must be one of max_prob, margin, entropy, energy, got int 3"),
    (lambda: head(x, w, b, threshold=float("nan")), ValueError, "exit_head: threshold must not be NaN"),
    (lambda: head(x, w, b, threshold="high"), TypeError, "exit_head: threshold must be a number, got str 'high'"),
    (lambda: head(x, w, b, temperature=0), ValueError, "exit_head: temperature must be positive and finite, got 0.0"),
    (lambda: head(x, w, b, norm="layer"), TypeError, "exit_head: norm must be None or fastee.ops.Norm(kind, weight, bias, eps), got str 'layer'"),
    (lambda: head(x, w, b, norm=ops.Norm("batch")), ValueError, "exit_head: norm.kind must be one of layer, rms, affine, got 'batch'"),
    (lambda: head(x, w, b, norm=ops.Norm("rms", torch.zeros(7))), ValueError, "exit_head: norm.weight must have 8 elements (D), got float32 [7]"),
    (lambda: head(x, w, b, norm=ops.Norm("rms", eps=-1.0)), ValueError, "exit_head: norm.eps must not be negative, got -1.0"),
    (lambda: head(x, w, b, mask=torch.ones(2, 5)), ValueError, "exit_head: mask goes with pool='mean_tokens', got pool='mean'"),
    (lambda: head(tokens, w, b, "mean_tokens", mask=torch.ones(2, 4, dtype=torch.bool)), ValueError, "exit_head: mask must be [2, 5] like x, got bool [2, 4]"),
    (lambda: head(tokens, w, b, "mean_tokens", mask=torch.ones(2, 5)), TypeError, "exit_head: mask must be bool or uint8 or int64 [B, T], got float32 [2, 5]"),
    (lambda: head(x, w.to("meta")), ValueError, "exit_head: weight must be on cpu like x, got meta"),
    (lambda: head(x, w, b, backend="gpu"), ValueError, "backend must be one of cuda, triton, cpu, numba, reference, got 'gpu'"),
    (lambda: head(torch.zeros(2, 8, 0), w), ValueError, "exit_head: x must not be empty but for its batch, got float32 [2, 8, 0]"),
    (lambda: head(x.to_sparse(), w), TypeError, "exit_head: x must be a dense tensor, got layout torch.sparse_coo"),
    (lambda: ops.exit_step(x, w[0]), ValueError, "exit_step: weight must be float32 or bfloat16 or float16 or float64 [C, D], got float32 [8]"),
    (lambda: ops.row_stats(torch.zeros(3, 0)), ValueError, "row_stats: logits must have at least one class, got float32 [3, 0]"),
    (lambda: ops.row_stats(torch.zeros(3)), ValueError, "row_stats: logits must be float32 or bfloat16 or float16 or float64 [B, C], got float32 [3]"),
    (lambda: ops.row_stats(torch.zeros(3, 2), temperature=-1), ValueError, "row_stats: temperature must be positive and finite, got -1.0"),
    (lambda: ops.linear_stats(torch.zeros(2, 3), torch.zeros(4, 5)), ValueError, "linear_stats: weight must be [C, 3] to match x float32 [2, 3] with pool='none', got float32 [4, 5]"),
    (lambda: ops.compact(torch.zeros(4, 7)), TypeError, "compact: mask must be bool or uint8 [B], got float32 [4, 7]"),
    (lambda: ops.compact(torch.zeros(4, 7, dtype=torch.bool)), ValueError, "compact: mask must be bool or uint8 [B], got bool [4, 7]"),
    (lambda: ops.pool(x, "mean_token"), ValueError, "pool: kind must be one of mean, mean_tokens, cls, last, none, got 'mean_token', did you mean 'mean_tokens'?"),
    (lambda: ops.gather_rows(x, torch.zeros(2)), TypeError, "gather_rows: index must be int64 [N], got float32 [2]"),
    (lambda: ops.scatter_rows(x, torch.tensor([0]), torch.zeros(1, 9)), ValueError, "scatter_rows: rows must be float32 [1, 8, 4, 4], got float32 [1, 9]"),
    (lambda: ops.quantize_rows(x, "int7"), ValueError, "quantize_rows: format must be one of int8, int4, fp8_e4m3, bf16, got 'int7', did you mean 'int8'?"),
    (lambda: ops.quantize_rows(x, group=7), ValueError, "quantize_rows: group must divide the 128 elements of a row, got 7"),
    (lambda: ops.quantize_rows(x, group=2.5), TypeError, "quantize_rows: group must be None or an int, got float 2.5"),
    (lambda: ops.quantize_rows(x, "bf16", 4), ValueError, "quantize_rows: group must be None for bf16, which has no scales, got 4"),
    (lambda: ops.dequantize_rows(ops.QuantizedRows(torch.zeros(2, 4, dtype=torch.uint8), torch.zeros(2), "int4")), ValueError, "dequantize_rows: q.shape must be the shape of the rows for int4, got None"),
    (lambda: ops.dequantize_rows(ops.QuantizedRows(torch.zeros(2, 4, dtype=torch.uint8), torch.zeros(2), "int4", None, (2, 9))), ValueError, "dequantize_rows: data must be that of int4 rows of shape [2, 9], got uint8 [2, 4]"),
    (lambda: ops.dequantize_rows(ops.QuantizedRows(torch.zeros(2, 4, dtype=torch.int8), torch.zeros(2), "fp8_e4m3")), TypeError, "dequantize_rows: data must be float8_e4m3fn [B, ...], got int8 [2, 4]"),
    (lambda: ops.dequantize_rows(x), TypeError, "dequantize_rows: q must be a QuantizedRows, got float32 [2, 8, 4, 4]"),
    (lambda: ops.dequantize_rows(ops.QuantizedRows(torch.zeros(2, 4, dtype=torch.int8), torch.zeros(3))), ValueError, "dequantize_rows: scale must be [2] for data int8 [2, 4] and group None, got float32 [3]"),
]  # fmt: skip


@pytest.mark.parametrize("call,error,message", BAD, ids=[m.split(",")[0][:60] for _, _, m in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        call()


def test_explicit_backend_that_cannot_run_raises_with_the_reason():
    with pytest.raises(BackendUnavailable, match="exit_head: backend='cpu' cannot run: dtype float64"):
        head(x.double(), w.double(), backend="cpu")
    with pytest.raises(BackendUnavailable, match=r"x is neither contiguous nor channels-last within its rows .*call .contiguous\(\)"):
        head(x.transpose(2, 3)[:, :, ::2], w, backend="cpu")
    with pytest.raises(BackendUnavailable, match="backend='triton' cannot run"):
        head(x, w, backend="triton")


def test_automatic_choice_steps_down_for_a_layout_but_answers():
    odd = torch.randn(2, 8, 4, 4).transpose(2, 3)[:, :, ::2]
    assert torch.allclose(head(odd, torch.eye(8)).confidence, head(odd.contiguous(), torch.eye(8)).confidence, atol=1e-6)

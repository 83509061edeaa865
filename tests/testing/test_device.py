import torch

from fastee import ops
from fastee.testing.device import move, on_device


def test_a_moved_tensor_keeps_strides_offset_and_company():
    wide = torch.arange(40.0).view(8, 5)
    a, b = move((wide[::2, 1:4], wide), "cpu")
    assert torch.equal(a, wide[::2, 1:4]) and a.stride() == (10, 1) and a.storage_offset() == 1
    assert a.data_ptr() != wide[::2, 1:4].data_ptr()
    b[0, 1] = 77
    assert a[0, 0] == 77 and wide[0, 1] == 1


def test_results_come_back_and_what_was_written_too():
    out = torch.zeros(4, 2)
    assert on_device(ops.scatter_rows, "cpu")(out, torch.tensor([2]), torch.ones(1, 2)) is out and out[2].tolist() == [1, 1]
    x, w = torch.randn(5, 3), torch.eye(3)
    got, want = on_device(ops.exit_pack, "cpu")(x, w, pool="none", threshold=0.5), ops.exit_pack(x, w, pool="none", threshold=0.5)
    assert got.count == want.count and torch.equal(got.wire, want.wire) and torch.equal(got.packed.data, want.packed.data)
    assert torch.equal(
        on_device(ops.dequantize_rows, "cpu")(ops.quantize_rows(x, backend="reference")), ops.dequantize_rows(ops.quantize_rows(x))
    )

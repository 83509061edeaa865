"""What libfastee_cuda promises beside the ops' bodies; on a device, or with FASTEE_TEST_DEVICE=emulated through its sources on the host."""

import os
import types

import pytest
import torch

from fastee import native, ops
from fastee.kernels import cuda

pytestmark = [
    pytest.mark.skipif(not os.environ.get("FASTEE_TEST_DEVICE"), reason="needs a CUDA device, or its emulation: test_cuda_emulated.py"),
    pytest.mark.skipif(native.hot is None, reason=f"native parts: {native.reason.get('_hot')}"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", ["int8", "int4", "fp8_e4m3", "bf16"])
@pytest.mark.parametrize(
    "shape,group", [((0, 8), None), ((3, 0), None), ((3, 8), None), ((2, 45), 5), ((5, 2, 3, 7), None), ((2, 128), 32)]
)
def test_quantised_rows_have_the_cpus_bytes(shape, group, format, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    if x.numel() > 20:
        x[0].view(-1)[3], x[1] = float("nan"), 0
    group = None if format == "bf16" else group
    here, there = (ops.quantize_rows(x, format, group, backend=b) for b in ("cpu", "cuda"))
    assert torch.equal(there.data.view(torch.uint8), here.data.view(torch.uint8))
    assert torch.equal(there.scale.nan_to_num(-1.0), here.scale.nan_to_num(-1.0))


def test_bad_stages_of_an_exit_graph_are_named():
    """The table of stages reaches the library as it was meant."""
    count, graph = torch.zeros((), dtype=torch.int64), types.SimpleNamespace(raw_cuda_graph=lambda: 1234)
    for stages, text in (
        ([({8: graph}, count), ({4: graph}, None)], r"stages\[1\].rows must reach the 8 rows of the stage before, got 4"),
        ([({8: graph}, count), ({8: graph}, None), ({8: graph}, None)], r"stages\[1\].count must not be NULL"),
        ([({8: graph, 4: graph}, count)], r"stages\[0\] must have one bucket with rows and graphs, got 2"),
        ([({8: graph}, count), ({n: graph for n in range(1, 18)}, None)], r"stages\[1\] must have 1 to 16 buckets .*, got 17"),
    ):
        with pytest.raises(ValueError, match=text):
            cuda.ExitGraph(stages)

"""What torch.compile and torch.export see: schemas, fakes, opcheck, and the same answers in one graph."""

import pytest
import torch

from fastee import ops

x, w, b = torch.randn(6, 8, 4, 4), torch.randn(3, 8), torch.randn(3)
tokens, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
rule = ("mean", None, None, None, 0.0, "max_prob", 0.5, 1.0, None)

CHECKS = {
    "exit_head": [(x, w, b, *rule), (x[:0], w, None, *rule), (tokens, w, b, "mean_tokens", "layer", torch.ones(8), None, 1e-5, "entropy", -0.5, 2.0, mask)],
    "exit_step": [(x, w, b, *rule), (x.to(memory_format=torch.channels_last), w, b, *rule)],
    "row_stats": [(torch.randn(4, 9), 1.0, False), (torch.randn(4, 9), 2.0, True)],
    "linear_stats": [(torch.randn(4, 8), w, b, 1.0, True)],
    "pool": [(x, "mean", None), (tokens, "mean_tokens", mask)],
    "compact": [(torch.tensor([True, False, True]),)],
    "gather_rows": [(x, torch.tensor([1, 0]))],
    "scatter_rows": [(torch.zeros(4, 2), torch.tensor([1, 0]), torch.ones(2, 2))],
    "quantize_rows": [(x, "int8", None), (x, "int8", 16), (x, "int4", 16), (x, "fp8_e4m3", None), (x, "bf16", None)],
    "dequantize_rows": [
        (torch.ones(2, 8, dtype=torch.int8), torch.ones(2, 2), 4),
        (torch.ones(2, 4, dtype=torch.uint8), torch.ones(2), None, "int4", (2, 7)),
    ],
    "unpack_planes": [(ops.pack_planes(x).data, list(x.shape), torch.float32)],
}


@pytest.mark.parametrize("name", CHECKS)
def test_opcheck(name):
    for args in CHECKS[name]:
        torch.library.opcheck(getattr(torch.ops.fastee, name).default, args)


def whole_pipeline(x, w, b):
    step = ops.exit_step(x, w, b, threshold=0.5, logits=True)
    kept = ops.gather_rows(x, step.index)
    back = ops.dequantize_rows(ops.quantize_rows(kept.flatten(1)))
    stats = ops.row_stats(step.logits * 2.0)
    out = ops.scatter_rows(torch.zeros_like(x), step.index, back.view_as(x))
    return step.label, step.confidence, step.exits, step.stats.margin, step.index, stats.entropy, out, ops.pool(x), ops.linear_stats(x.flatten(1)[:, :8], w, b).lse


def test_compiled_in_one_graph_equals_eager():
    torch._dynamo.reset()
    compiled = torch.compile(whole_pipeline, fullgraph=True)
    for eager, got in zip(whole_pipeline(x, w, b), compiled(x, w, b), strict=True):
        assert torch.allclose(eager.float(), got.float(), atol=1e-6, equal_nan=True)


def test_compiled_with_another_batch_size():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ops.exit_head(x, w, b).confidence, fullgraph=True, dynamic=True)
    for rows in (6, 3, 5):
        assert torch.equal(compiled(x[:rows]), ops.exit_head(x[:rows], w, b).confidence)


@pytest.mark.parametrize("name", ["exit_head", "exit_step"])
def test_the_op_itself_compiles_in_one_graph(name):
    torch._dynamo.reset()
    op = getattr(ops, name)
    assert torch.equal(torch.compile(op, fullgraph=True)(x, w, b, threshold=0.5).confidence, op(x, w, b, threshold=0.5).confidence)


def test_exports():
    class Head(torch.nn.Module):
        def forward(self, x):
            out = ops.exit_step(x, w, b, threshold=0.5)
            return out.label, out.index

    program = torch.export.export(Head(), (x,))
    assert any("fastee" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x)[1], ops.exit_step(x, w, b, threshold=0.5).index)


def test_pack_planes_has_as_many_bytes_as_it_needs_in_a_graph():
    """opcheck's autograd test compares fakes of unknown size, so the schema and the fake are checked here."""
    torch.library.opcheck(torch.ops.fastee.pack_planes.default, (x,), test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))

"""onnxruntime: the exit head as an ONNX graph (pool, Gemm, Softmax, TopK, compare), one thread."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

import fastee
from fastee.testing.bench import Case, Context, Group

from ..bench_exit_step import POOLS, THRESHOLD, check, eager_head
from ..shapes import Shape, select
from . import Peer

PEER = Peer("1.31.1", "MIT", (("onnxruntime==1.31.1", "onnx==1.23.2"),))


def session(shape: Shape, weight: torch.Tensor, bias: torch.Tensor):
    """Return an InferenceSession of the head: x -> confidence [B, 1], label [B, 1], exits [B, 1]."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    give = lambda name, value: numpy_helper.from_array(np.asarray(value), name)
    last = {"mean": [2, 3], "mean_tokens": [1]}.get(shape.pool)
    nodes, values = [], [give("w", weight.numpy()), give("b", bias.numpy()), give("k", np.array([1])), give("t", np.float32(THRESHOLD))]
    if last:
        values.append(give("axes", np.array(last)))
        nodes.append(helper.make_node("ReduceMean", ["x", "axes"], ["pooled"], keepdims=0))
    elif shape.pool in ("cls", "last"):
        values.append(give("at", np.array(0 if shape.pool == "cls" else -1)))
        nodes.append(helper.make_node("Gather", ["x", "at"], ["pooled"], axis=1))
    nodes += [
        helper.make_node("Gemm", ["pooled" if nodes else "x", "w", "b"], ["z"], transB=1),
        helper.make_node("Softmax", ["z"], ["p"], axis=-1),
        helper.make_node("TopK", ["p", "k"], ["confidence", "label"], axis=-1),
        helper.make_node("GreaterOrEqual", ["confidence", "t"], ["exits"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [shape.B, *shape.dims])
    out = [("label", TensorProto.INT64), ("confidence", TensorProto.FLOAT), ("exits", TensorProto.BOOL)]
    graph = helper.make_graph(nodes, "head", [x], [helper.make_tensor_value_info(n, t, [shape.B, 1]) for n, t in out], values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def cases(ctx: Context) -> Iterator[Group]:
    for shape in select(ctx.shapes):
        g = torch.Generator().manual_seed(ctx.seed)
        weight, bias = torch.randn(shape.C, shape.D, generator=g) / shape.D**0.5, torch.randn(shape.C, generator=g)
        base = torch.randn(shape.B, *shape.dims, generator=g)
        inputs = ctx.rotate(lambda i, x=base, w=weight, b=bias: (x + 0.01 * i, w, b), 4 * base.numel())
        made, names, kwargs = session(shape, weight, bias), ["label", "confidence", "exits"], {"pool": shape.pool, "threshold": THRESHOLD}
        arrays = [({"x": x.numpy()},) for x, _, _ in inputs]
        theirs = [torch.from_numpy(v[:, 0]) for v in made.run(names, *arrays[0])]
        check(shape, fastee.ops.exit_head(*inputs[0], **kwargs), theirs)
        yield Group(
            "exit_head",
            str(shape),
            "fp32",
            [
                Case("fastee", fastee.ops.exit_head, inputs, kwargs),
                Case("onnxruntime", lambda feed, run=made.run, names=names: run(names, feed), arrays, note="session.run on numpy arrays"),
                Case("torch", eager_head, [(*i, POOLS[shape.pool]) for i in inputs], note="eager"),
            ],
            baseline="onnxruntime",
            bytes=4 * (shape.read + weight.numel() + bias.numel()),
            flops=2 * shape.B * shape.D * shape.C + shape.read,
            working_set=4 * (len(inputs) * base.numel() + weight.numel()),
            bars=(">= 1x onnxruntime",),
        )


CASES = {"exit_step": cases}

"""What a binding adds to the exit check at batch 1: arrays, an onnxruntime custom op, a jax.ffi call inside jit, each beside ``fastee.ops``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import fastee
from fastee.testing.bench import Case, Context, Group

D, C, TIMES = 256, 10, 100


def onnx_session(threshold: float):
    """Return a session of one ExitStep node on one thread, or None where onnxruntime or the library is missing."""
    try:
        import onnxruntime
        from onnx import TensorProto, helper
    except ImportError:
        return None
    library = Path(fastee.__file__).parent / "libfastee_ort.so"
    if not library.exists():
        return None
    node = helper.make_node("ExitStep", ["x", "w", "b"], ["label", "confidence", "exits"], domain="fastee", pool="none", threshold=threshold)
    info = lambda n, t, s: helper.make_tensor_value_info(n, t, s)
    outs = [info("label", TensorProto.INT64, [1]), info("confidence", TensorProto.FLOAT, [1]), info("exits", TensorProto.BOOL, [1])]
    ins = [info("x", TensorProto.FLOAT, [1, D]), info("w", TensorProto.FLOAT, [C, D]), info("b", TensorProto.FLOAT, [C])]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("fastee", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(
        helper.make_model(helper.make_graph([node], "one", ins, outs), opset_imports=opsets, ir_version=10).SerializeToString(), options
    )


def identity_session():
    """The same session with nothing to do: what `run` itself costs."""
    import onnxruntime
    from onnx import TensorProto, helper

    info = lambda n: helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, D])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "one", [info("x")], [info("y")])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def feeds_of_nothing(arrays):
    return [({"x": a[0]},) for a in arrays]


def jax_loop():
    """Return a jitted function of TIMES checks in a row, each of which waits for the one before it; None without jax."""
    try:
        import jax

        from fastee.integrations import jax as fj

        fj._register()
    except ImportError:
        return None

    def many(x, w, b):
        return jax.lax.fori_loop(0, TIMES, lambda _, x: x + 1e-9 * fj.exit_head(x, w, b, "none").confidence[:, None], x)

    compiled = jax.jit(many)
    return lambda *a: compiled(*a).block_until_ready()


def cases(ctx: Context) -> Iterator[Group]:
    from fastee.integrations import arrays

    g = torch.Generator().manual_seed(ctx.seed)
    w, b = torch.randn(C, D, generator=g) / D**0.5, torch.randn(C, generator=g)
    inputs = ctx.rotate(lambda i: (torch.randn(1, D, generator=g), w, b), 4 * D)
    own = [tuple(t.numpy() for t in i) for i in inputs]
    kept = [(a[0], w, b) for a in own]
    rule = {"pool": "none", "threshold": 0.9}
    plain = Case("fastee", fastee.ops.exit_head, inputs, rule, note="tensors")
    size = {"bytes": 4 * (D + C * D + C), "flops": 2 * C * D, "working_set": 4 * C * D}
    found = [
        Case("numpy", arrays.exit_head, own, rule, note="all three arguments arrays"),
        Case("numpy_weights_kept", arrays.exit_head, kept, rule, note="weights as tensors"),
        plain,
    ]
    yield Group("exit_head", f"1x{D}->{C} by array", "fp32", found, baseline="fastee", bars=("<= 1.5 us over fastee",), **size)
    session = onnx_session(0.9)
    if session is not None:
        feeds = [({"x": a[0], "w": a[1], "b": a[2]},) for a in own]
        nothing = identity_session()
        found = [
            Case("onnxruntime_op", lambda feed: session.run(None, feed), feeds, note="session.run of one ExitStep node"),
            Case("onnxruntime_nothing", lambda feed: nothing.run(None, feed), feeds_of_nothing(own), note="session.run of one Identity node"),
            plain,
        ]
        yield Group("exit_head", f"1x{D}->{C} in onnxruntime", "fp32", found, baseline="fastee", bars=("<= 3 us over onnxruntime_nothing",), **size)
    loop = jax_loop()
    if loop is not None:
        start = [tuple(np.asarray(v) for v in a) for a in own]

        def eager(x, w, b):
            for _ in range(TIMES):
                fastee.ops.exit_head(x, w, b, "none")

        both = [Case("jax", loop, start, note=f"{TIMES} calls in one jit, in a loop"), Case("fastee", eager, inputs, note=f"{TIMES} eager calls")]
        bars = (f"<= {5 * TIMES} us over fastee",)
        yield Group("exit_head", f"{TIMES} times 1x{D}->{C}", "fp32", both, baseline="fastee", bars=bars, **{k: v * TIMES for k, v in size.items()})

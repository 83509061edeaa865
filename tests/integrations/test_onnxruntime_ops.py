"""The custom-op library: fastee's ops as nodes of an ONNX graph, bit for bit those of the op, optional inputs and outputs, errors by name."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import fastee

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'fastee[onnx]'")
helper = pytest.importorskip("onnx.helper", reason="needs onnx: pip install 'fastee[onnx]'")
LIBRARY = Path(fastee.__file__).parent / "libfastee_ort.so"
pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="native parts are not built")

F, I, B = 1, 7, 9  # onnx's numbers of float, int64, bool
OUTPUTS = {
    "ExitStep": [("label", I), ("confidence", F), ("exits", B), ("logits", F), ("index", I), ("count", I)],
    "RowStats": [("label", I), ("max_prob", F), ("margin", F), ("entropy", F), ("lse", F)],
    "Compact": [("index", I), ("count", I)],
}


def session(op, inputs, outputs=None, **attributes):
    """One node; `inputs`: name -> type, None for an optional one that is not given."""
    outs = OUTPUTS[op] if outputs is None else OUTPUTS[op][:outputs]
    node = helper.make_node(op, [n if t else "" for n, t in inputs], [n for n, _ in outs], domain="fastee", **attributes)
    given = [helper.make_tensor_value_info(n, t, None) for n, t in inputs if t]
    graph = helper.make_graph([node], "one", given, [helper.make_tensor_value_info(n, t, None) for n, t in outs])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("fastee", 1)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(LIBRARY))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("rows", [0, 1, 37])
@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy", "energy"])
def test_exit_step_is_the_op(rows, measure):
    x, w, b = torch.randn(rows, 8, 3, 3), torch.randn(5, 8), torch.randn(5)
    run = session("ExitStep", [("x", F), ("weight", F), ("bias", F)], pool="mean", measure=measure, threshold=0.4, temperature=2.0)
    got = run.run(None, {"x": x.numpy(), "weight": w.numpy(), "bias": b.numpy()})
    want = fastee.ops.exit_step(x, w, b, "mean", None, measure, 0.4, temperature=2.0, logits=True)
    for name, a in zip(["label", "confidence", "exits", "logits", "index"], got[:5], strict=True):
        assert np.array_equal(a, getattr(want, name).numpy()), name
    assert got[5].tolist() == [want.count]


def test_absent_inputs_norms_and_masks():
    x, w, gain = torch.randn(4, 6, 8), torch.randn(3, 8), torch.rand(8) + 0.5
    mask = torch.arange(6) < torch.tensor([[6], [3], [1], [2]])
    inputs = [("x", F), ("weight", F), ("bias", None), ("norm_weight", F), ("norm_bias", None), ("mask", B)]
    run = session("ExitStep", inputs, 3, pool="mean_tokens", norm="rms", eps=1e-6)
    label, confidence, exits = run.run(None, {"x": x.numpy(), "weight": w.numpy(), "norm_weight": gain.numpy(), "mask": mask.numpy()})
    want = fastee.ops.exit_step(x, w, None, "mean_tokens", fastee.ops.Norm("rms", gain, None, 1e-6), mask=mask)
    assert np.array_equal(label, want.label) and np.array_equal(confidence, want.confidence) and np.array_equal(exits, want.exits)


def test_row_stats_and_compact():
    z, mask = torch.randn(9, 30), torch.rand(70) < 0.5
    want = fastee.ops.row_stats(z)
    got = session("RowStats", [("z", F)]).run(None, {"z": z.numpy()})
    assert all(np.array_equal(a, getattr(want, n).numpy()) for a, (n, _) in zip(got, OUTPUTS["RowStats"], strict=True))
    index, count = session("Compact", [("mask", B)]).run(None, {"mask": mask.numpy()})
    assert np.array_equal(index, fastee.ops.compact(mask).index) and count.tolist() == [int(mask.sum())]


def test_wrong_shapes_and_words_are_named():
    run = session("ExitStep", [("x", F), ("weight", F)], 3, pool="none")
    with pytest.raises(Exception, match=r"exit_head: weight must be .*\[C, 8\].* got float32 \[3, 9\]"):
        run.run(None, {"x": np.zeros((2, 8), "f"), "weight": np.zeros((3, 9), "f")})
    with pytest.raises(Exception, match="attribute pool must be mean"):
        session("ExitStep", [("x", F), ("weight", F)], 3, pool="max")


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.parametrize("name, wanted", [("libfastee_ort.so", "RegisterCustomOps"), ("libfastee_jax.so", r"fastee_jax_\w+")])
def test_the_libraries_export_their_entries_alone(name, wanted):
    path = LIBRARY.with_name(name)
    if not path.exists():
        pytest.skip(f"{name} is not built")
    lines = subprocess.run(["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
    functions = [line.split()[-1] for line in lines if " T " in line]
    assert functions and all(re.fullmatch(wanted, f) for f in functions), functions

"""The onnxruntime session: equal to torch within 1e-4 with compaction, later segments really skipped, errors that name the place."""

import math
import warnings

import numpy as np
import pytest
import torch
from exported import FAMILIES, exported
from torch import nn

import fastee
from fastee.errors import CannotExport, CheckpointMismatch

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'fastee[onnx]'")
pytest.importorskip("onnxscript", reason="needs onnxscript: pip install 'fastee[onnx]'")

import onnx  # noqa: E402
from onnx.backend.test.loader import load_node_model_tests  # noqa: E402
from onnx.backend.test.runner import Runner  # noqa: E402

from fastee.integrations.onnxruntime import Session  # noqa: E402


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return exported(request.param, tmp_path_factory.mktemp("onnx"))


def feed(x):
    return {k: v.numpy() for k, v in x.items()} if isinstance(x, dict) else {"x": x.numpy()}


def test_a_session_answers_like_the_network(family):
    net, x, folder = family
    session = Session(folder, net.fingerprint)
    want, got = net(x), session(x)
    assert 0 < int((want.exit == 0).sum()) < 12
    assert got.exit.tolist() == want.exit.tolist() and got.label.tolist() == want.label.tolist()
    assert torch.allclose(got.logits, want.logits, atol=1e-4, rtol=0)
    logits, label, confidence, exit_ = session.run(None, feed(x))
    assert np.array_equal(logits, got.logits.numpy()) and np.array_equal(exit_, got.exit.numpy())
    assert [a.dtype for a in (logits, label, confidence)] == [np.float32, np.int64, np.float32]
    for rows in (1, 5):
        part = {k: v[:rows] for k, v in x.items()} if isinstance(x, dict) else x[:rows]
        assert torch.allclose(session(part).logits, want.logits[:rows], atol=1e-4, rtol=0)


def test_what_left_runs_no_further(family):
    net, x, folder = family
    session, rows = Session(folder), []
    for i, (run, names) in enumerate(session._sessions):
        session._sessions[i] = (lambda out, f, i=i, run=run: rows.append((i, len(next(iter(f.values()))))) or run(out, f), names)
    stay = int((net(x).exit > 0).sum())
    session(x)
    assert rows == [(0, 12), *((i, stay) for i in range(1, net.num_segments))]
    rows.clear()
    session.set_rule(thresholds=[0.0] + [math.inf] * (net.num_exits - 1))(x)
    assert rows == [(0, 12)]


def test_late_rows_leave_at_the_exit_they_reached(family):
    net, x, folder = family
    session, want = Session(folder), net(x)
    got = session(x, deadline=1000)
    assert session.runner.profile.fingerprint == net.fingerprint
    assert got.exit.tolist() == want.exit.tolist() and got.label.tolist() == want.label.tolist() and not got.forced.any()
    late = session(x, deadline=-1)
    assert not late.exit.any() and late.forced.tolist() == (want.exit > 0).tolist()
    assert session.set_rule(thresholds=[0.0] + [math.inf] * (net.num_exits - 1))(x, deadline=1000).exit.tolist() == [0] * 12
    for bad, error, text in (("1", TypeError, "expected seconds as a number, got str '1'"), (math.nan, ValueError, "expected seconds, got NaN")):
        with pytest.raises(error, match=text):
            session(x, deadline=bad)


def test_folders_of_another_network_or_kind_are_refused(family, tmp_path):
    net, _, folder = family
    with pytest.raises(CheckpointMismatch, match="exported from the network"):
        Session(folder, "f" * 32)
    with pytest.raises(CheckpointMismatch, match="kind 'onnx' does not run here"):
        fastee.load_exported(folder)
    with pytest.raises(ValueError, match=r"names: expected some of .* got \['probabilities'\]"):
        Session(folder).run(["probabilities"], {})


T = onnx.TensorProto
OPSET = 25  # the newest of those tests' that onnxruntime 1.31 loads; our exports are of 20
OURS = {T.FLOAT, T.DOUBLE, T.FLOAT16, T.INT64, T.INT32, T.INT16, T.INT8, T.UINT8, T.BOOL}  # what an export may carry and onnxruntime feeds from NumPy


@pytest.fixture(scope="module")
def node_tests():
    """ONNX's own backend tests, those of one node over tensors of our types, by operator."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they divide by zero while they are made
        cases = load_node_model_tests()
    for case in cases:
        graph, opset = case.model.graph, max(o.version for o in case.model.opset_import)
        if len(graph.node) == 1 and not graph.node[0].domain and opset <= OPSET and {p.type.tensor_type.elem_type for p in (*graph.input, *graph.output)} <= OURS:
            found.setdefault(graph.node[0].op_type, []).append(case)
    return found


def test_onnx_own_node_tests_pass_for_every_operator_we_export(family, node_tests):
    operators = {node.op_type for path in family[2].glob("*.onnx") for node in onnx.load(path).graph.node}
    assert len(operators) > 5 and operators <= node_tests.keys(), f"operators without a test: {operators - node_tests.keys()}"
    array = lambda v: onnx.numpy_helper.to_array(v) if isinstance(v, T) else np.asarray(v)
    for case in (case for name in sorted(operators) for case in node_tests[name]):
        session = onnxruntime.InferenceSession(case.model.SerializeToString(), providers=["CPUExecutionProvider"])
        for inputs, outputs in case.data_sets:
            got = session.run(None, {p.name: array(v) for p, v in zip(case.model.graph.input, inputs, strict=True)})
            Runner.assert_similar_outputs([array(v) for v in outputs], got, case.rtol, case.atol, case.name)


class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.stage, self.last = nn.Linear(4, 8), nn.Sequential(nn.ReLU(), Bessel()), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.stage(self.first(x)))


def test_an_unknown_operator_is_named_with_its_module(tmp_path):
    net = fastee.attach(Deep(), exits=["first"], example=torch.randn(2, 4)).eval()
    with pytest.raises(CannotExport, match=r"segment 1 \(after 'first' to the end\): no ONNX operator for node 'bessel_j0' \(.*\) of module 'stage\.1'"):
        fastee.export(net, tmp_path / "net", format="onnx")

"""A Triton model repository and its BLS model, run against a stand-in for the server (triton_stub.py): never in a real one."""

import importlib.util
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from exported import exported

import fastee
from fastee.errors import CannotExport, CheckpointMismatch
from fastee.integrations.kserve import OUTPUTS
from fastee.integrations.triton_server import write_repository

for module, package in (("onnxruntime", "fastee[onnx]"), ("onnxscript", "fastee[onnx]"), ("tritonclient", "tritonclient")):
    pytest.importorskip(module, reason=f"needs {module}: pip install '{package}'")

import triton_stub  # noqa: E402


@pytest.fixture(scope="module", params=["residual", "encoder"])
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton")
    net, x, files = exported(request.param, folder)
    return net, x, write_repository(files, folder / "models", "mine"), files


@pytest.fixture
def server(written, monkeypatch):
    """The stand-in, and the model as the Python backend loads it: model.py's TritonPythonModel."""
    _, _, repository, _ = written
    made = triton_stub.Server(repository)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", made.utils)
    spec = importlib.util.spec_from_file_location("model", repository / "mine" / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made.model = module.TritonPythonModel()
    made.model.initialize({"model_name": "mine", "model_repository": str(repository / "mine"), "model_version": "1"})
    return made


def request(server, x, outputs=tuple(OUTPUTS), **more):
    arrays = {k: v.numpy() for k, v in x.items()} if isinstance(x, dict) else {"x": x.numpy()}
    tensors = [triton_stub.Tensor(n, a) for n, a in arrays.items()]
    return server.utils.InferenceRequest(inputs=tensors, requested_output_names=outputs, model_name="mine", **more)


def arrays(response):
    assert not response.has_error(), response.error().message()
    return {t.name(): t.as_numpy() for t in response.output_tensors()}


def rows(x, n):
    return {k: v[:n] for k, v in x.items()} if isinstance(x, dict) else x[:n]


def test_the_model_answers_like_the_network_and_asks_no_segment_behind_the_exit(written, server):
    net, x, _, _ = written
    want = net(x)
    stay = int((want.exit > 0).sum())
    assert 0 < stay < 12
    whole, few, label = server.model.execute([request(server, x), request(server, rows(x, 3)), request(server, x, ["label"])])
    assert server.calls[: net.num_segments] == [("mine_segment0", 12), *((f"mine_segment{i}", stay) for i in range(1, net.num_segments))]
    got = arrays(whole)
    assert list(got) == list(OUTPUTS)
    assert got["exit"].tolist() == want.exit.tolist() and got["label"].tolist() == want.label.tolist()
    assert np.allclose(got["logits"], want.logits, atol=1e-4, rtol=0) and not got["forced"].any()
    assert np.allclose(arrays(few)["logits"], want.logits[:3], atol=1e-4, rtol=0) and list(arrays(label)) == ["label"]
    server.calls.clear()
    server.model.runner.set_rule(thresholds=[0.0] + [math.inf] * (net.num_exits - 1))
    arrays(server.model.execute([request(server, x)])[0])
    assert server.calls == [("mine_segment0", 12)]


def test_late_rows_leave_at_the_exit_they_reached(written, server):
    net, x, _, _ = written
    want = net(x)
    arrays(server.model.execute([request(server, x, parameters={"deadline": 1000})])[0])  # measures the segments
    for late in (0, "-1.5", 1e-9):
        server.calls.clear()
        got = arrays(server.model.execute([request(server, x, parameters={"deadline": late})])[0])
        assert not got["exit"].any() and got["forced"].tolist() == (want.exit > 0).tolist()
        assert server.calls == [("mine_segment0", 12)]
    got = arrays(server.model.execute([request(server, x, parameters={"deadline": 1000, "other": "x"})])[0])
    assert got["exit"].tolist() == want.exit.tolist() and not got["forced"].any()


def test_errors_are_the_requests_own_and_typed(written, server):
    net, x, _, _ = written
    wrong = {"input_ids": x["input_ids"]} if isinstance(x, dict) else x[:, :2].contiguous()
    requests = [
        request(server, wrong), request(server, x, parameters={"deadline": "soon"}), request(server, x, parameters={"deadline": True}),
        request(server, x, cancelled=True), request(server, x),
    ]  # fmt: skip
    *refused, good = server.model.execute(requests)
    E = triton_stub.TritonError
    assert [r.error().code() for r in refused] == [E.INVALID_ARG, E.INVALID_ARG, E.INVALID_ARG, E.CANCELLED]
    assert refused[0].error().message().startswith("x: ") and refused[1].error().message() == "parameters: deadline must be seconds, got 'soon'"
    assert arrays(good)["label"].tolist() == net(x).label.tolist()
    server.broken.add("mine_segment1")
    failed = server.model.execute([request(server, x)])[0].error()
    assert (failed.code(), failed.message()) == (E.UNAVAILABLE, "mine_segment1 is not ready")
    server.model.runner._heads = []
    failed = server.model.execute([request(server, x)])[0].error()
    assert failed.code() == E.INTERNAL and failed.message().startswith("IndexError: ")


def test_the_configs_say_what_the_models_take_and_give(written):
    net, x, repository, _ = written
    names = ["mine", *(f"mine_segment{i}" for i in range(net.num_segments))]
    assert sorted(p.name for p in repository.iterdir()) == sorted(names)
    for name in names:
        config, kinds = triton_stub.model_config(repository / name / "config.pbtxt")
        assert config.name == name and config.max_batch_size == 0
        assert config.backend == ("python" if name == "mine" else "onnxruntime")
    config, kinds = triton_stub.model_config(repository / "mine" / "config.pbtxt")
    flat, like = net.inputs.flat(x), net(x)
    for port, t in [*zip(config.input, flat, strict=True), *((o, getattr(like, o.name)) for o in config.output)]:
        triton_stub.check(port, t.numpy(), kinds)
    assert [i.name for i in config.input] == list(net.inputs.names) and [o.name for o in config.output] == list(OUTPUTS)


def test_what_would_not_serve_is_refused(written, tmp_path):
    net, _, repository, exported = written
    with pytest.raises(ValueError, match=r"repository: .* has the models \['mine', 'mine_segment0'"):
        write_repository(exported, repository, "mine")
    with pytest.raises(ValueError, match="name: expected letters"):
        write_repository(exported, tmp_path, "../mine")
    with pytest.raises(CheckpointMismatch, match="kind 'torch' does not run here"):
        write_repository(fastee.export(net, tmp_path / "torch"), tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_a_model_without_its_heads_does_not_load(written, server, tmp_path):
    _, _, repository, _ = written
    shutil.copytree(repository / "mine", tmp_path / "mine")
    (tmp_path / "mine" / "1" / "heads.safetensors").unlink()
    with pytest.raises(CheckpointMismatch, match="heads.safetensors: missing"):
        server.model.initialize({"model_name": "mine", "model_repository": str(tmp_path / "mine"), "model_version": "1"})


def test_bfloat16_is_refused_by_name(tmp_path):
    body = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)).bfloat16()
    net = fastee.attach(body, exits=["0"], num_classes=3, example=torch.zeros(1, 4, dtype=torch.bfloat16)).eval()
    with pytest.raises(CannotExport, match="bfloat16"):
        write_repository(fastee.export(net, tmp_path / "net", format="onnx"), tmp_path / "models")
    assert not (tmp_path / "models").exists()

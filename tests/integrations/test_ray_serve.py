"""The network behind Ray Serve: two real replicas answer like the network, with the endpoint's own errors."""

import http.client
import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import fastee
from fastee.integrations.ray_serve import application


def test_what_is_no_network_is_refused():
    pytest.importorskip("ray.serve", reason="needs Ray Serve: pip install --requirement requirements-ray.txt")
    with pytest.raises(TypeError, match="net: expected a network from fastee.attach or a function that gives one, got int"):
        application(3)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    return fastee.attach(body, exits=["1"], example=torch.randn(2, 4)).eval().set_rule(thresholds=[0.4])


@pytest.fixture(scope="module")
def ask(net):
    serve = pytest.importorskip("ray.serve", reason="needs Ray Serve: pip install --requirement requirements-ray.txt")
    pytest.importorskip("starlette", reason="needs starlette: pip install 'fastee[serve]'")
    import ray

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(application(net, deployment={"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.5}}, max_bytes=4096), route_prefix="/")

    def ask(method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), json.loads(response.read())
        finally:
            connection.close()

    yield ask
    serve.shutdown()
    ray.shutdown()


def body(x):
    return json.dumps({"inputs": [{"name": "input", "shape": list(x.shape), "datatype": "FP32", "data": x.reshape(-1).tolist()}]})


@pytest.mark.peer
@pytest.mark.timeout(240)
def test_replicas_answer_like_the_network_with_the_endpoints_errors(net, ask):
    x = torch.randn(24, 3, 4)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda rows: ask("POST", "/v2/models/net/infer", body(rows), **{"X-Deadline": "30"}), x))
    for rows, (status, _, got) in zip(x, answers, strict=True):
        arrays, want = {o["name"]: o["data"] for o in got["outputs"]}, net(rows)
        assert status == 200 and arrays["exit"] == want.exit.tolist() and arrays["label"] == want.label.tolist()
        assert torch.allclose(torch.tensor(arrays["logits"]).view(3, 3), want.logits, atol=1e-6)
    assert {e for _, _, got in answers for o in got["outputs"] if o["name"] == "exit" for e in o["data"]} == {0, 1}
    assert ask("GET", "/v2/models/net")[2]["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 4]}]
    for status, kind, path, text, headers in [
        (400, "ValueError", "net", body(torch.zeros(1, 5)), {}),
        (400, "ValueError", "net", body(x[0]), {"X-Deadline": "soon"}),
        (404, "NotFound", "other", body(x[0]), {}),
        (413, "ValueError", "net", " " * 5000, {}),
        (503, "DeadlineExceeded", "net", body(x[0]), {"X-Deadline": "1e-9"}),
    ]:  # fmt: skip
        got = ask("POST", f"/v2/models/{path}/infer", text, **headers)
        assert (got[0], got[2]["type"]) == (status, kind), got
        assert ("retry-after" in {h.lower() for h in got[1]}) == (status == 503)

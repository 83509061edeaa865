"""The HTTP endpoint: KServe V2 in and out, deadlines, typed errors, and under overload refusals at once, never a lost request."""

import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import fastee

pytest.importorskip("starlette", reason="needs starlette: pip install 'fastee[serve]'")
uvicorn = pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'fastee[serve]'")

from fastee.integrations.serve import Server  # noqa: E402


class Slow(nn.Module):
    """Half of the time before the exit, half behind it."""

    def __init__(self, seconds):
        super().__init__()
        self.a, self.b, self.last, self.seconds = Nap(seconds), Nap(seconds), nn.Linear(4, 3), seconds

    def forward(self, x):
        return self.last(self.b(self.a(x)))


class Nap(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        return nap(x, self.seconds)


@torch.fx.wrap
def nap(x, seconds):
    time.sleep(seconds)
    return x * 1.0


class Running:
    def __init__(self, seconds=0.0, **options):
        torch.manual_seed(0)
        self.net = fastee.attach(Slow(seconds), exits=["a"], example=torch.randn(1, 4)).eval()
        self.server = Server(self.net, **options)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.uvicorn = uvicorn.Server(uvicorn.Config(self.server.app, port=self.port, log_level="error"))
        self.thread = threading.Thread(target=self.uvicorn.run, daemon=True)
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)

    def ask(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), json.loads(response.read())
        finally:
            connection.close()

    def infer(self, x, deadline=None):
        body = json.dumps({"id": "7", "inputs": [{"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.reshape(-1).tolist()}]})
        return self.ask("POST", "/v2/models/net/infer", body, **({} if deadline is None else {"X-Deadline": str(deadline)}))

    def close(self):
        self.uvicorn.should_exit = True
        self.thread.join(10)


@pytest.fixture(scope="module")
def quick():
    running = Running()
    yield running
    running.close()


def test_an_answer_is_the_networks(quick):
    x = torch.randn(5, 4)
    quick.net.set_rule(thresholds=[0.4])
    want = quick.net(x)
    status, _, got = quick.infer(x)
    assert status == 200 and got["id"] == "7" and got["model_name"] == "net"
    arrays = {o["name"]: np.array(o["data"]).reshape(o["shape"]) for o in got["outputs"]}
    assert arrays["label"].tolist() == want.label.tolist() and arrays["exit"].tolist() == want.exit.tolist()
    assert np.allclose(arrays["logits"], want.logits, atol=1e-6) and not arrays["forced"].any()


def test_what_it_says_of_itself(quick):
    assert quick.ask("GET", "/v2/health/ready")[0] == quick.ask("GET", "/v2/health/live")[0] == 200
    meta = quick.ask("GET", "/v2/models/net")[2]
    assert meta["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    api = quick.ask("GET", "/openapi.json")[2]
    answers = api["paths"]["/v2/models/net/infer"]["post"]["responses"]
    assert {"200", "400", "404", "413", "429", "503"} == set(answers) and "Retry-After" in answers["429"]["headers"]
    names = set(api["components"]["schemas"])
    used = set(json.dumps(api).split('"#/components/schemas/')[1:])
    assert {u.split('"')[0] for u in used} <= names and {"InferRequest", "InferResponse", "Failure"} <= names


@pytest.mark.parametrize(
    "path, body, headers, status, says",
    [
        ("/v2/models/other/infer", "{}", {}, 404, "no model 'other' here"),
        ("/v2/models/net/infer", "{", {}, 400, "body:"),
        ("/v2/models/net/infer", '{"inputs": []}', {}, 400, "inputs: expected ['x'], got []"),
        ("/v2/models/net/infer", '{"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}', {}, 400, "must be torch.float32 [B, 4]"),
        ("/v2/models/net/infer", '{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1]}]}', {}, 400, "'x' is no FP32 [1, 4]"),
        ("/v2/models/net/infer", '{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "BYTES", "data": []}]}', {}, 400, "datatype 'BYTES'"),
        ("/v2/models/net/infer", "{}", {"X-Deadline": "soon"}, 400, "X-Deadline: expected positive seconds, got 'soon'"),
    ],
)
def test_errors_are_typed(quick, path, body, headers, status, says):
    got, _, answer = quick.ask("POST", path, body, **headers)
    assert got == status and says in answer["error"] and answer["type"]


def test_bodies_are_capped():
    running = Running(max_bytes=1000)
    try:
        assert running.infer(torch.zeros(500, 4))[0] == 413 and running.infer(torch.zeros(2, 4))[0] == 200
    finally:
        running.close()


@pytest.mark.timed
def test_a_short_deadline_leaves_at_the_exit():
    running = Running(0.1)
    try:
        outputs = {o["name"]: o["data"] for o in running.infer(torch.randn(2, 4), deadline=0.17)[2]["outputs"]}
        assert outputs["exit"] == [0, 0] and outputs["forced"] == [True, True]
        outputs = {o["name"]: o["data"] for o in running.infer(torch.randn(2, 4), deadline=20)[2]["outputs"]}
        assert outputs["exit"] == [1, 1] and outputs["forced"] == [False, False]
        status, headers, answer = running.infer(torch.randn(1, 4), deadline=0.001)
        assert status == 503 and answer["type"] == "DeadlineExceeded" and int(headers["retry-after"]) >= 1
    finally:
        running.close()


@pytest.mark.timed
def test_overload_is_refused_at_once_and_nothing_is_lost():
    running = Running(0.05, queue=4)

    def until_answered(_):
        """Return what was said to one client that asks again after every refusal."""
        said = []
        while not said or said[-1][0] == 429 and len(said) < 1000:
            time.sleep(0.01 * len(said) ** 0.5)
            said.append(running.infer(torch.randn(1, 4)))
        return said

    try:
        with ThreadPoolExecutor(16) as pool:
            clients = list(pool.map(until_answered, range(48)))
        assert [said[-1][0] for said in clients] == [200] * 48
        refusals = [headers for said in clients for status, headers, _ in said[:-1]]
        assert refusals and all(int(headers["retry-after"]) >= 1 for headers in refusals)
        assert running.server.waiting == 0
    finally:
        running.close()

"""The HTTP endpoint: KServe V2 in and out, deadlines, typed errors, and under overload refusals at once, never a lost request."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastee

pytest.importorskip("starlette", reason="needs starlette: pip install 'fastee[serve]'")
uvicorn = pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'fastee[serve]'")

from fastee.integrations.serve import Server, _protocol  # noqa: E402

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(fastee.__file__).parents[1])}


class Slow(nn.Module):
    """Half of the time before the exit, half behind it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = Nap(), Nap(), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.b(self.a(x)))


class Nap(nn.Module):
    def forward(self, x):
        return nap(x)


PAUSE = [0.0]


@torch.fx.wrap
def nap(x):
    time.sleep(PAUSE[0])
    return x * 1.0


def two_naps(seconds):
    """The profile of Slow when it is slow; measured, it would take a hundred naps."""
    cost = {"codecs": ("raw",), "wire_bytes": [[16], [16]], "codec_seconds": [[0], [0]], "bandwidth": [[0]], "delay": [[0]]}
    return fastee.Profile(nodes=("here",), batch_sizes=(1,), mean=[[[seconds]], [[seconds]]], spread=[[[0]], [[0]]], **cost)


class Running:
    def __init__(self, seconds=0.0, impatience=10.0, **options):
        torch.manual_seed(0)
        PAUSE[0] = 0.0
        self.net = fastee.attach(Slow(), exits=["a"], example=torch.randn(1, 4)).eval()
        if seconds:
            PAUSE[0], self.net.profile = seconds, two_naps(seconds)
        self.server = Server(self.net, **options)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        protocol = _protocol()
        protocol.SECONDS = impatience
        self.uvicorn = uvicorn.Server(uvicorn.Config(self.server.app, port=self.port, log_level="critical", http=protocol))
        self.thread = threading.Thread(target=self.uvicorn.run, daemon=True)
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)

    def ask(self, method, path, body=None, **headers):
        status, headers, body = self.raw(method, path, body, **headers)
        return status, headers, json.loads(body)

    def raw(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    @staticmethod
    def body(x):
        return json.dumps({"id": "7", "inputs": [{"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.reshape(-1).tolist()}]})

    def infer(self, x, deadline=None):
        return self.ask("POST", "/v2/models/net/infer", self.body(x), **({} if deadline is None else {"X-Deadline": str(deadline)}))

    def close(self):
        PAUSE[0] = 0.0
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


def binary(x, outputs, **more):
    data = x.numpy().tobytes()
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "parameters": {"binary_data_size": len(data)}}
    text = json.dumps({"inputs": [tensor], "outputs": outputs, **more}).encode()
    return text + data, {"Inference-Header-Content-Length": str(len(text))}


def test_tensors_travel_as_bytes_too(quick):
    x = torch.randn(3, 4)
    want = quick.net(x)
    body, header = binary(x, [{"name": "exit"}, {"name": "logits", "parameters": {"binary_data": True}}, {"name": "forced", "parameters": {"binary_data": True}}])
    status, headers, answer = quick.raw("POST", "/v2/models/net/versions/1/infer", body, **header)
    split = int(headers["inference-header-content-length"])
    exits, logits, forced = json.loads(answer[:split])["outputs"]
    assert status == 200 and exits["data"] == want.exit.tolist() and exits["shape"] == [3]
    assert logits["parameters"] == {"binary_data_size": 3 * 3 * 4} and "data" not in logits
    assert np.allclose(np.frombuffer(answer[split : split + 36], np.float32).reshape(3, 3), want.logits, atol=1e-6)
    assert answer[split + 36 :] == bytes(3) and forced["parameters"] == {"binary_data_size": 3}
    body, header = binary(x, None, parameters={"binary_data_output": True})
    assert quick.raw("POST", "/v2/models/net/infer", body, **header)[2].endswith(quick.net(x).logits.numpy().tobytes())


@pytest.mark.parametrize("cut, says", [(-1, "needs 48 bytes, got 48 of 47 that came"), (3, "3 bytes follow the last tensor")])
def test_bytes_that_do_not_add_up_are_refused(quick, cut, says):
    body, header = binary(torch.randn(3, 4), None)
    body = body[:cut] if cut < 0 else body + bytes(cut)
    status, _, answer = quick.ask("POST", "/v2/models/net/infer", body, **header)
    assert status == 400 and says in answer["error"]


def test_no_rows_give_an_empty_answer(quick):
    status, _, got = quick.infer(torch.empty(0, 4))
    assert status == 200 and {o["name"]: o["shape"] for o in got["outputs"]} == {"label": [0], "confidence": [0], "exit": [0], "forced": [0], "logits": [0, 3]}


def test_what_it_says_of_itself(quick):
    assert quick.ask("GET", "/v2/health/ready")[0] == quick.ask("GET", "/v2/health/live")[0] == 200
    assert quick.ask("GET", "/v2")[2] == {"name": "fastee", "version": fastee.__version__, "extensions": ["binary_tensor_data"]}
    meta = quick.ask("GET", "/v2/models/net")[2]
    assert meta["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}] and meta["versions"] == ["1"]
    assert {"name": "logits", "datatype": "FP32", "shape": [-1, 3]} in meta["outputs"]
    assert quick.ask("GET", "/v2/models/net/versions/1/ready")[2] == {"name": "net", "ready": True}


def test_every_answer_is_as_described(quick):
    """The OpenAPI text is valid, names every route, and what comes back fits its schemas."""
    api = quick.ask("GET", "/openapi.json")[2]
    pytest.importorskip("openapi_spec_validator").validate(api)
    from openapi_schema_validator import OAS31Validator

    routes = {r.path.replace("{name}", "net").replace("{version}", "1") for r in quick.server.app.routes}
    assert set(api["paths"]) == routes
    infer = api["paths"]["/v2/models/net/infer"]["post"]
    assert {"200", "400", "404", "408", "413", "429", "500", "503"} == set(infer["responses"])
    assert all("Retry-After" in infer["responses"][code]["headers"] for code in ("429", "503"))

    def fits(value, schema):
        OAS31Validator({**schema, "components": api["components"]}).validate(value)

    schema = lambda of: of["content"]["application/json"]["schema"]
    fits(json.loads(quick.body(torch.randn(2, 4))), schema(infer["requestBody"]))
    fits(quick.infer(torch.randn(2, 4))[2], schema(infer["responses"]["200"]))
    fits(quick.infer(torch.randn(2, 5))[2], schema(infer["responses"]["400"]))
    with pytest.raises(Exception, match="'error' is a required property"):
        fits({"type": "x"}, schema(infer["responses"]["400"]))


X = '{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1.5, 2, 3, 4]}'


def inputs(*tensors):
    return f'{{"inputs": [{", ".join(tensors)}]}}'


@pytest.mark.parametrize(
    "path, body, headers, status, says",
    [
        ("/v2/models/other/infer", "{}", {}, 404, "no model 'other' of version '1' here, only 'net'"),
        ("/v2/models/net/versions/2/infer", "{}", {}, 404, "no model 'net' of version '2' here"),
        ("/v2/models/net/inference", "{}", {}, 404, "POST /v2/models/net/inference: Not Found"),
        ("/v2/health/ready", "{}", {}, 405, "Method Not Allowed"),
        ("/v2/models/net/infer", "{", {}, 400, "body:"),
        ("/v2/models/net/infer", '{"inputs": []}', {}, 400, "inputs: expected ['x'], got []"),
        ("/v2/models/net/infer", '{"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}', {}, 400, "must be torch.float32 [B, 4]"),
        ("/v2/models/net/infer", '{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1]}]}', {}, 400, "'x' has 1 numbers, expected 4 for shape [1, 4]"),
        ("/v2/models/net/infer", '{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "BYTES", "data": []}]}', {}, 400, "datatype 'BYTES'"),
        ("/v2/models/net/infer", '{"inputs": [], "outputs": 3}', {}, 400, "body: Expected `array | null`, got `int`"),
        ("/v2/models/net/infer", inputs(X, X), {}, 400, "'x' is given twice"),
        ("/v2/models/net/infer", inputs(X)[:-1] + ', "outputs": [{"name": "lable"}]}', {}, 400, "outputs: expected some of ['label',"),
        ("/v2/models/net/infer", inputs(X.replace("[1, 4]", "[-1, 4]")), {}, 400, "expected sizes >= 0"),
        ("/v2/models/net/infer", inputs(X.replace("[1, 4]", "[99999999999, 99999999999]")), {}, 400, "has 4 numbers, expected 9"),
        ("/v2/models/net/infer", inputs(X.replace("[1, 4]", "[]")), {}, 400, "has 4 numbers, expected 1 for shape []"),
        ("/v2/models/net/infer", inputs(X.replace("1.5", '"1.5"')), {}, 400, "'x' is FP32, which its data is not"),
        ("/v2/models/net/infer", inputs(X.replace("1.5", "[1.5]")), {}, 400, "'x': its data is nested unevenly"),
        ("/v2/models/net/infer", inputs(X.replace("1.5", "null")), {}, 400, "which its data is not"),
        ("/v2/models/net/infer", inputs(X.replace("1.5", "NaN")), {}, 400, "body: JSON is malformed"),
        ("/v2/models/net/infer", inputs(X.replace("FP32", "INT64")), {}, 400, "'x' is INT64, which its data is not"),
        ("/v2/models/net/infer", inputs(X.replace("FP32", "INT8").replace("1.5", "300")), {}, 400, "numbers that INT8 does not hold"),
        ("/v2/models/net/infer", b"\xff\xfe{}", {}, 400, "body:"),
        ("/v2/models/net/infer", '{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": ' + "[" * 100_000, {}, 400, "body:"),
        ("/v2/models/net/infer", X, {"Inference-Header-Content-Length": "7000"}, 400, "Inference-Header-Content-Length: expected 0 to"),
        ("/v2/models/net/infer", "{}", {"X-Deadline": "-1"}, 400, "X-Deadline: expected positive seconds, got '-1'"),
        ("/v2/models/net/infer", "{}", {"X-Deadline": "nan"}, 400, "X-Deadline: expected positive seconds, got 'nan'"),
        ("/v2/models/net/infer", "{}", {"X-Deadline": "soon"}, 400, "X-Deadline: expected positive seconds, got 'soon'"),
    ],
)
def test_errors_are_typed(quick, path, body, headers, status, says):
    got, _, answer = quick.ask("POST", path, body, **headers)
    assert got == status and says in answer["error"] and answer["type"]


@pytest.fixture(scope="module")
def strict():
    """A server of small bodies and little patience."""
    running = Running(max_bytes=1000, body_seconds=0.3, impatience=0.5)
    yield running
    running.close()


def talk(running, *parts, wait=0.0):
    """Send bytes, some of them late, and return all that comes back until the server hangs up or 20 s pass."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as s:
        for part in parts:
            s.sendall(part)
            time.sleep(wait)
        got = b""
        while chunk := s.recv(65536):
            got += chunk
        return got


HEAD = b"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\n"


def test_bodies_are_capped(strict):
    assert strict.infer(torch.zeros(500, 4))[0] == 413 and strict.infer(torch.zeros(2, 4))[0] == 200
    # said to be too long: refused before a byte of it is here; chunks without a length: refused as soon as they are too many
    assert b" 413 " in talk(strict, HEAD + b"Content-Length: 99999999999\r\n\r\n").split(b"\r\n")[0]
    chunk = b"fff\r\n" + bytes(0xFFF) + b"\r\n"
    assert b" 413 " in talk(strict, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunk).split(b"\r\n")[0]
    assert strict.server._held == 0


@pytest.mark.timed
def test_slow_clients_hold_nothing(strict):
    """A body that does not come is answered 408; a header that does not come, or trickles, ends the connection; others are served meanwhile."""
    with ThreadPoolExecutor(8) as pool:
        bodies = [pool.submit(talk, strict, HEAD + b"Content-Length: 50\r\n\r\n{") for _ in range(3)]
        headers = [pool.submit(talk, strict, HEAD), pool.submit(talk, strict, b""), pool.submit(talk, strict, HEAD, *[b"X: y\r\n"] * 4, wait=0.1)]
        assert strict.infer(torch.zeros(2, 4))[0] == 200
        for answer in bodies:
            assert b" 408 " in answer.result().split(b"\r\n")[0] and b'"type":"Timeout"' in answer.result()
        assert [h.result() for h in headers] == [b"", b"", b""]
    late = talk(strict, HEAD + b"X-Deadline: 0.1\r\nContent-Length: 50\r\n\r\n{")
    assert b" 503 " in late.split(b"\r\n")[0] and b"retry-after" in late.lower()
    assert strict.server._held == strict.server.waiting == 0 and strict.infer(torch.zeros(2, 4))[0] == 200


@pytest.mark.parametrize("text", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"GET\r\n\r\n", HEAD + b"Content-Length: -5\r\n\r\n", HEAD + b"X: " + b"y" * 100_000])
def test_what_is_no_http_is_refused(strict, text):
    assert b" 400 " in talk(strict, text).split(b"\r\n")[0]
    assert strict.ask("GET", "/v2/health/ready")[0] == 200


def test_who_hangs_up_before_its_turn_costs_nothing():
    running, ran, go_on = Running(), [], threading.Event()
    forward = running.net.forward

    def wait(*a, **k):
        ran.append(1)
        go_on.wait(60)
        return forward(*a, **k)

    running.net.forward = wait
    try:
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(running.infer, torch.zeros(1, 4))
            until(lambda: ran)
            body = running.body(torch.zeros(1, 4)).encode()
            with socket.create_connection(("127.0.0.1", running.port)) as s:
                s.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                until(lambda: running.server.waiting == 2)
            until(lambda: running.server.waiting == 1)
            go_on.set()
            assert first.result()[0] == 200
        assert len(ran) == 1 and not running.server._line
    finally:
        go_on.set()
        running.close()


def test_nobody_runs_on_while_others_would_be_late(quick, monkeypatch):
    """Alone a request may run until it is due; with another behind it, only so long that this one reaches its first exit in time."""
    allowed, forward, server = [], quick.net.forward, quick.server
    monkeypatch.setattr(quick.net, "forward", lambda x, deadline: allowed.append(deadline) or forward(x))
    ask, values = server._read(bytearray(quick.body(torch.zeros(1, 4)).encode()), None)
    for line in ({}, {2: (100.0, 30.0)}):
        now = time.perf_counter()
        monkeypatch.setattr(server, "_line", {1: (now + 1000, 0.1), **{k: (now + due, need) for k, (due, need) in line.items()}})
        server._run(ask, values, now + 1000, 1, now)
    assert 700 < allowed[0] <= 1000 and 10 < allowed[1] <= 70


def until(what, seconds=20):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_network_that_fails_is_our_error(quick, monkeypatch):
    def fail(*a, **k):
        raise RuntimeError("no such layer")

    monkeypatch.setattr(quick.net, "forward", fail)
    status, _, answer = quick.infer(torch.zeros(1, 4))
    assert status == 500 and answer == {"type": "RuntimeError", "error": "no such layer"}
    monkeypatch.undo()
    assert quick.infer(torch.zeros(1, 4))[0] == 200


@pytest.mark.parametrize("options, says", [({"queue": 0}, "queue: expected an integer >= 1, got 0"), ({"max_bytes": 1.5}, "max_bytes: expected"), ({"body_seconds": 0}, "body_seconds: expected"), ({"name": "a/b"}, "name: expected a text without '/'")])
def test_wrong_options_are_named(quick, options, says):
    with pytest.raises(ValueError, match=says):
        Server(quick.net, **options)
    with pytest.raises(TypeError, match="net: expected a network from fastee.attach, got Linear"):
        Server(nn.Linear(2, 2))


@pytest.mark.timed
def test_a_short_deadline_leaves_at_the_exit():
    running = Running(0.4)
    try:
        outputs = {o["name"]: o["data"] for o in running.infer(torch.randn(2, 4), deadline=0.78)[2]["outputs"]}
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


def test_the_command_serves_until_it_is_told_to_stop(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import fastee, torch\n"
        "def net():\n"
        "    body = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))\n"
        "    return fastee.attach(body, exits=['1'], example=torch.zeros(1, 4))\n"
    )
    command = [sys.executable, "-m", "fastee", "serve", "mine:net", "--port", "0", "--name", "mine"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=ENVIRONMENT) as process:
        try:
            port = int(process.stdout.readline().rsplit(":", 1)[1])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", "/v2/models/mine/ready")
            assert connection.getresponse().status == 200
        finally:
            process.send_signal(signal.SIGTERM)
    assert process.returncode in (0, -signal.SIGTERM)

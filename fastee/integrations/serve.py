"""An HTTP endpoint of one network, in KServe's V2 protocol, that holds deadlines and says at once when it cannot.

``GET /v2``, ``/v2/health/live``, ``/v2/health/ready``, ``/v2/models/NAME[/versions/1][/ready]``, ``/openapi.json``;
``POST /v2/models/NAME[/versions/1]/infer``, tensors as JSON or, by the binary tensor extension, as bytes. The header ``X-Deadline`` gives
seconds from the arrival: a request that would be late leaves at the exit that it has reached. Every error is JSON with ``type`` and
``error``: 400 a wrong request, 404 another model, 405 another method, 408 a body that does not come, 413 too many bytes, 429 no room, 500 the
network failed, 503 the deadline cannot be met; 429 and 503 carry ``Retry-After``. Nothing waits without an end: what comes in is answered.
"""

from __future__ import annotations

import asyncio
import gc
import math
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

try:
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError:
    raise ImportError("fastee.integrations.serve needs starlette and uvicorn: pip install 'fastee[serve]'") from None

import fastee
from fastee.integrations.kserve import DATATYPES, NAMES, OUTPUTS
from fastee.nn import EarlyExit

_FITS = {"f": "iuf", "i": "iu", "u": "iu", "b": "b"}  # kinds of numbers in JSON that a datatype's kind takes
_JSON_LENGTH = "inference-header-content-length"


class TensorIn(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: list[Any] | None = None  # flat, or nested as the shape; none with parameters.binary_data_size
    parameters: dict[str, Any] = {}


class OutputAsked(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}  # binary_data


class InferRequest(msgspec.Struct):
    inputs: list[TensorIn]
    outputs: list[OutputAsked] | None = None  # none: all of them
    id: str | None = None
    parameters: dict[str, Any] = {}  # binary_data_output


class TensorOut(msgspec.Struct, omit_defaults=True):
    name: str
    shape: list[int]
    datatype: str
    data: list[Any] | None = None
    parameters: dict[str, Any] = {}


class InferResponse(msgspec.Struct, omit_defaults=True):
    model_name: str
    outputs: list[TensorOut]
    id: str | None = None
    model_version: str | None = None


class Failure(msgspec.Struct):
    type: str
    error: str


class _Refused(Exception):
    def __init__(self, status: int, kind: str, text: str, retry: float | None = None):
        super().__init__(text)
        self.status, self.kind, self.retry = status, kind, retry


# Handlers and routes are coroutines even where they wait for nothing: starlette hands plain functions to a pool of threads.
async def _on_refused(request: Request, refused: Any) -> Response:
    headers = {} if refused.retry is None else {"Retry-After": str(max(1, math.ceil(refused.retry)))}
    if refused.status in (408, 413):
        headers["Connection"] = "close"  # the rest of the body is not waited for
    return JSONResponse({"type": refused.kind, "error": str(refused)}, refused.status, headers)


async def _on_http(request: Request, error: Any) -> Response:
    return JSONResponse({"type": "HTTPError", "error": f"{request.method} {request.url.path}: {error.detail}"}, error.status_code, error.headers)


async def _on_failure(request: Request, error: Exception) -> Response:
    return JSONResponse({"type": type(error).__name__, "error": str(error)}, 500)


def _says(make: Callable[[], dict[str, Any]]) -> Callable:
    async def answer(request: Request) -> Response:
        return JSONResponse(make())

    return answer


class _Running:
    """A running mean and mean deviation of seconds."""

    def __init__(self):
        self.mean = self.spread = 0.0

    def add(self, seconds: float) -> None:
        self.spread += 0.05 * (abs(seconds - self.mean) - self.spread)
        self.mean += 0.05 * (seconds - self.mean)

    @property
    def high(self) -> float:
        return max(0.0, self.mean + 3 * self.spread)


class Server:
    """One network behind a queue: one request runs at a time, `queue` may wait. ``.app`` is the ASGI application; see the module.

    Args:
        net: what ``fastee.attach`` made; it is put into eval mode and, unless it has a profile, measured here.
        name: of the model, in the URL.
        queue: requests that may wait for the network or run; one more is answered 429.
        max_bytes: the largest body. All bodies together may hold four times as much; beyond that 429.
        body_seconds: how long a body may take to come in; then 408.

    The profile's time to the first exit and a running mean of the service times say what can still be on time.

    >>> import fastee, torch
    >>> from fastee.integrations.serve import Server
    >>> body = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> net = fastee.attach(body, exits=["1"], num_classes=3, example=torch.zeros(1, 4)).eval()
    >>> sorted(Server(net).openapi()["paths"])[-1]
    '/v2/models/net/versions/1/ready'
    """

    def __init__(self, net: EarlyExit, name: str = "net", *, queue: int = 64, max_bytes: int = 16 << 20, body_seconds: float = 10.0):
        if not isinstance(net, EarlyExit):
            raise TypeError(f"net: expected a network from fastee.attach, got {type(net).__name__}")
        for what, value in (("queue", queue), ("max_bytes", max_bytes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{what}: expected an integer >= 1, got {value!r}")
        if not 0 < body_seconds < math.inf:
            raise ValueError(f"body_seconds: expected positive seconds, got {body_seconds!r}")
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError(f"name: expected a text without '/', got {name!r}")
        self.net, self.name, self.queue, self.max_bytes, self.body_seconds = net.eval(), name, queue, max_bytes, body_seconds
        self.pool = ThreadPoolExecutor(1, "fastee-serve")
        inputs = net.inputs
        self._wrap: Callable[[tuple[Tensor, ...]], Any] = {"single": lambda v: v[0], "tuple": lambda v: v}.get(
            inputs.kind, lambda v: dict(zip(inputs.names, v, strict=True))
        )
        profile = net.ensure_profile(self._wrap(inputs.batch(8)))
        seconds = np.array([profile.mean[0, 0], profile.mean[:, 0].sum(0)])  # to the first exit, to the end; per batch size
        sizes = np.array(profile.batch_sizes, float)
        self._row = (seconds[:, -1] - seconds[:, 0]).clip(0) / max(1.0, sizes[-1] - sizes[0])
        self._call = (seconds[:, 0] - self._row * sizes[0]).clip(0)
        self._drift = [1.0, 1.0]  # time taken over the profile's, running means: of those that left at the first exit, and of all
        self._tail, self._slip = _Running(), _Running()  # from the network's answer to the response; how much longer than allowed a request ran
        self._line: dict[int, tuple[float, float]] = {}  # who waits, in order: when it is due, seconds to its first exit
        self._free = self._ticket = 0  # when the network is free again, as far as is known
        self.waiting = 0
        self._held = 0  # bytes of bodies in memory
        routes = [
            Route("/v2", _says(lambda: {"name": "fastee", "version": fastee.__version__, "extensions": ["binary_tensor_data"]})),
            Route("/v2/health/live", _says(lambda: {"live": True})),
            Route("/v2/health/ready", _says(lambda: {"ready": True})),
            Route("/openapi.json", _says(self.openapi)),
        ]
        for model in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
            routes += [
                Route(model, self._metadata), Route(f"{model}/ready", self._ready),
                Route(f"{model}/infer", self._infer, methods=["POST"]),
            ]  # fmt: skip
        self.app = Starlette(routes=routes, exception_handlers={_Refused: _on_refused, HTTPException: _on_http, Exception: _on_failure})

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI 3.1 description of every path."""
        types = [InferRequest, InferResponse, Failure]
        (request, response, failure), parts = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
        body = lambda schema, text: {"description": text, "content": {"application/json": {"schema": schema}}}
        retry = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "description": "seconds"}}
        errors = {
            "400": "wrong request", "404": "no such model", "408": "the body did not come", "413": "too many bytes", "429": "no room",
            "500": "the network failed", "503": "the deadline cannot be met",
        }  # fmt: skip
        answers = {code: body(failure, text) | ({"headers": retry} if code in ("429", "503") else {}) for code, text in errors.items()}
        header = lambda name, kind, text: {"name": name, "in": "header", "schema": kind, "description": text}
        infer = {
            "parameters": [
                header("X-Deadline", {"type": "number", "exclusiveMinimum": 0}, "seconds from the arrival"),
                header("Inference-Header-Content-Length", {"type": "integer"}, "bytes of JSON; the tensors' bytes follow"),
            ],
            "requestBody": {"required": True, **body(request, "the inputs")},
            "responses": {"200": body(response, "the answer"), **answers},
        }
        get = lambda text, *codes: {"get": {"responses": {"200": body({"type": "object"}, text), **{c: answers[c] for c in codes}}}}
        paths = {
            "/v2": get("the server"), "/v2/health/live": get("it runs"), "/v2/health/ready": get("it answers"), "/openapi.json": get("this description"),
        }  # fmt: skip
        for model in (f"/v2/models/{self.name}", f"/v2/models/{self.name}/versions/1"):
            paths |= {model: get("the model", "404"), f"{model}/ready": get("it answers", "404"), f"{model}/infer": {"post": infer}}
        return {
            "openapi": "3.1.0", "info": {"title": f"fastee: {self.name}", "version": fastee.__version__},
            "paths": paths, "components": {"schemas": parts},
        }  # fmt: skip

    async def _metadata(self, request: Request) -> Response:
        self._known(request)
        inputs = [
            {"name": n, "datatype": NAMES[np.dtype(str(v.dtype).removeprefix("torch."))], "shape": [-1, *v.shape[1:]]}
            for n, v in zip(self.net.inputs.names, self.net.inputs.example, strict=True)
        ]
        width = {"logits": [self.net.num_classes]}
        outputs = [{"name": n, "datatype": d, "shape": [-1, *width.get(n, [])]} for n, d in OUTPUTS.items()]
        return JSONResponse({"name": self.name, "platform": "fastee", "versions": ["1"], "inputs": inputs, "outputs": outputs})

    async def _ready(self, request: Request) -> Response:
        self._known(request)
        return JSONResponse({"name": self.name, "ready": True})

    def _known(self, request: Request) -> None:
        name, version = request.path_params["name"], request.path_params.get("version", "1")
        if name != self.name or version != "1":
            raise _Refused(404, "NotFound", f"no model {name!r} of version {version!r} here, only {self.name!r} of version '1'")

    async def _infer(self, request: Request) -> Response:
        arrived = perf_counter()
        self._known(request)
        due = arrived + _deadline(request)
        self._admit(due, 1)  # before the body: a refusal should cost nothing
        length = request.headers.get("content-length", "")
        self._fits(int(length) if length.isdecimal() else 0)
        body, until = bytearray(), min(due, arrived + self.body_seconds)
        try:
            try:
                await asyncio.wait_for(self._body(request, body), max(0.0, until - perf_counter()))
            except asyncio.TimeoutError:
                text = f"body: {len(body)} bytes came in {perf_counter() - arrived:.2f} s, not all"
                raise (_Refused(503, "DeadlineExceeded", text, 1.0) if until == due else _Refused(408, "Timeout", text)) from None
            ask, values = self._read(body, request.headers.get(_JSON_LENGTH))
        finally:
            self._held -= len(body)
        return await self._answer(request, ask, values, due)

    async def _body(self, request: Request, body: bytearray) -> None:
        async for chunk in request.stream():
            body += chunk
            self._held += len(chunk)
            self._fits(len(body))
            if self._held > 4 * self.max_bytes:
                raise _Refused(429, "Rejected", f"the bodies that are here hold {self._held} bytes, at most {4 * self.max_bytes} may be", 1.0)

    def _fits(self, size: int) -> None:
        if size > self.max_bytes:
            raise _Refused(413, "ValueError", f"body: more than {self.max_bytes} bytes")

    async def _answer(self, request: Request, ask: InferRequest, values: tuple[Tensor, ...], due: float) -> Response:
        rows = values[0].shape[0]
        self._admit(due, rows)
        self._ticket += 1
        ticket, self._line[self._ticket] = self._ticket, (due, self._seconds(0, rows))
        self.waiting += 1
        try:
            job = self.pool.submit(self._run, ask, values, due, ticket, perf_counter())
            running, gone = asyncio.wrap_future(job), asyncio.ensure_future(request.receive())  # behind the body comes only the client's hanging up
            try:
                await asyncio.wait((running, gone), return_when=asyncio.FIRST_COMPLETED)
                if not running.done() and gone.result()["type"] == "http.disconnect":
                    job.cancel()  # what has not begun never runs
                await asyncio.wait((running,))
            finally:
                gone.cancel()
            if running.cancelled():
                return Response(status_code=499)
            response, computed = running.result()
        finally:
            self.waiting -= 1
            self._line.pop(ticket, None)
        self._tail.add(perf_counter() - computed)
        return response

    def _seconds(self, what: int, rows: int) -> float:
        return (self._call[what] + self._row[what] * rows) * self._drift[what]

    def _admit(self, due: float, rows: int) -> None:
        now = perf_counter()
        wait = max(0.0, self._free - now) + sum(need for _, need in self._line.values())
        if self.waiting >= self.queue:
            raise _Refused(429, "Rejected", f"{self.waiting} requests wait, at most {self.queue} may", wait)
        if now + wait + self._seconds(0, rows) + self._way_back(due - now) > due:
            raise _Refused(503, "DeadlineExceeded", f"work of at least {wait:.4f} s is before this request; it cannot be on time", wait)

    def _way_back(self, left: float) -> float:
        """Seconds kept for the response and, as much again, for the request, whose wait in the socket is not seen here.

        At most a quarter of what is left, so that one bad moment does not refuse everything after it.
        """
        return min(2 * self._tail.high, 0.25 * left)

    def _read(self, body: bytearray, json_length: str | None) -> tuple[InferRequest, tuple[Tensor, ...]]:
        try:
            end = len(body) if json_length is None else int(json_length)
            if not 0 <= end <= len(body):
                raise ValueError(f"Inference-Header-Content-Length: expected 0 to {len(body)}, the body's bytes, got {json_length}")
            view = memoryview(body)
            ask = msgspec.json.decode(view[:end], type=InferRequest)
            rest, given = view[end:], {}
            for t in ask.inputs:
                if t.name in given:
                    raise ValueError(f"inputs: {t.name!r} is given twice")
                given[t.name], rest = _tensor(t, rest)
            if len(rest):
                raise ValueError(f"body: {len(rest)} bytes follow the last tensor")
            names = self.net.inputs.names
            if sorted(given) != sorted(names):
                raise ValueError(f"inputs: expected {list(names)}, got {sorted(given)}")
            for n, like in zip(names, self.net.inputs.example, strict=True):
                v = given[n]
                if v.dtype != like.dtype or v.shape[1:] != like.shape[1:] or v.ndim == 0:
                    shape = ", ".join(map(str, ["B", *like.shape[1:]]))
                    raise ValueError(f"inputs: {n!r} must be {like.dtype} [{shape}], got {v.dtype} {list(v.shape)}")
                if v.shape[0] != given[names[0]].shape[0]:
                    raise ValueError(f"inputs: {n!r} must have {given[names[0]].shape[0]} rows like {names[0]!r}, got {v.shape[0]}")
            for o in ask.outputs or ():
                if o.name not in OUTPUTS:
                    raise ValueError(f"outputs: expected some of {list(OUTPUTS)}, got {o.name!r}")
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise _Refused(400, "ValueError", f"body: {error}") from None
        except (TypeError, ValueError, OverflowError) as error:
            raise _Refused(400, type(error).__name__, str(error)) from None
        return ask, tuple(given[n].to(like.device) for n, like in zip(names, self.net.inputs.example, strict=True))

    def _run(self, ask: InferRequest, values: tuple[Tensor, ...], due: float, ticket: int, came: float) -> tuple[Response, float]:
        """In the network's thread: return the response and when the network had answered.

        A request may run until it is due, and only as long as everybody behind it can still reach a first exit in time.
        """
        start, rows = perf_counter(), values[0].shape[0]
        del self._line[ticket]
        end = due - self._way_back(due - start)
        if start + self._seconds(0, rows) > end:
            raise _Refused(503, "DeadlineExceeded", "those before this request took longer than expected; it cannot be on time", self._seconds(1, rows))
        before = 0.0
        for other, need in list(self._line.values()):
            before += need
            left = other - start
            end = min(end, other - before - self._way_back(left) - min(self._slip.high, 0.25 * left))
        began, self._free = max(came, self._free), start + min(end - start, self._seconds(1, rows))
        out = self.net(self._wrap(values), deadline=None if end == math.inf else end - start)
        arrays = {n: getattr(out, n) for n in OUTPUTS}
        computed = perf_counter()
        response = self._encode(ask, arrays)
        self._free = done = perf_counter()
        if end < math.inf:
            self._slip.add(max(0.0, computed - max(end, start + self._seconds(0, rows))))
        for what in (0, 1) if rows and not arrays["exit"].any() else (1,) if rows else ():
            ratio = (done - began) / (self._call[what] + self._row[what] * rows)
            self._drift[what] += 0.05 * (min(ratio, 10 * self._drift[what]) - self._drift[what])  # a suspended machine is no slow network
        return response, computed

    def _encode(self, ask: InferRequest, arrays: dict[str, Tensor]) -> Response:
        every = ask.parameters.get("binary_data_output", False)
        asked = ask.outputs or [OutputAsked(n) for n in OUTPUTS]
        outputs, blobs = [], []
        for o in asked:
            a = arrays[o.name].detach().cpu().numpy()
            made = TensorOut(o.name, list(a.shape), NAMES[a.dtype])
            if o.parameters.get("binary_data", every):
                blobs.append(a.tobytes())
                made.parameters = {"binary_data_size": len(blobs[-1])}
            else:
                made.data = a.reshape(-1).tolist()
            outputs.append(made)
        text = msgspec.json.encode(InferResponse(self.name, outputs, ask.id, "1"))
        if not blobs:
            return Response(text, media_type="application/json")
        return Response(b"".join([text, *blobs]), headers={_JSON_LENGTH: str(len(text))}, media_type="application/octet-stream")


def _deadline(request: Request) -> float:
    text = request.headers.get("x-deadline")
    try:
        deadline = math.inf if text is None else float(text)
    except ValueError:
        deadline = math.nan
    if not deadline > 0:
        raise _Refused(400, "ValueError", f"X-Deadline: expected positive seconds, got {text!r}")
    return deadline


def _tensor(t: TensorIn, rest: memoryview) -> tuple[Tensor, memoryview]:
    """Return a tensor of the request, and the bytes behind it."""
    if t.datatype not in DATATYPES:
        raise ValueError(f"inputs: {t.name!r} has datatype {t.datatype!r}, expected one of {list(DATATYPES)}")
    dtype, count = np.dtype(DATATYPES[t.datatype]), math.prod(t.shape)
    if any(d < 0 for d in t.shape):
        raise ValueError(f"inputs: {t.name!r} has shape {t.shape}, expected sizes >= 0")
    if (size := t.parameters.get("binary_data_size")) is not None:
        if t.data is not None:
            raise ValueError(f"inputs: {t.name!r} has data and binary_data_size, expected one of them")
        if size != count * dtype.itemsize or size > len(rest):
            raise ValueError(f"inputs: {t.name!r} of {t.datatype} {t.shape} needs {count * dtype.itemsize} bytes, got {size!r} of {len(rest)} that came")
        array = np.frombuffer(rest[:size], np.uint8 if dtype.kind == "b" else dtype).astype(dtype)  # a copy: the bytes may lie at an odd address
        rest = rest[size:]
    else:
        try:
            array = np.array(t.data if t.data is not None else [])
        except ValueError:
            raise ValueError(f"inputs: {t.name!r}: its data is nested unevenly") from None
        if array.size and array.dtype.kind not in _FITS[dtype.kind]:
            raise ValueError(f"inputs: {t.name!r} is {t.datatype}, which its data is not")
        given, array = array, array.astype(dtype)
        if dtype.kind in "iu" and (given != array).any():
            raise ValueError(f"inputs: {t.name!r} has numbers that {t.datatype} does not hold")
    if array.size != count:
        raise ValueError(f"inputs: {t.name!r} has {array.size} numbers, expected {count} for shape {t.shape}")
    return torch.from_numpy(array.reshape(t.shape)), rest


def _protocol():
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Impatient(H11Protocol):
        """Closes a connection whose request does not arrive in `SECONDS`: uvicorn's own timer runs only between two requests."""

        SECONDS = 10.0
        _since: float | None = None

        def connection_made(self, transport):
            super().connection_made(transport)
            # asyncio does it only for sockets that it made itself; without it an answer's body waits 40 ms for the other side's delayed ACK
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._since = self.loop.time()
            self._arm()

        def data_received(self, data):
            super().data_received(data)  # stops the timer
            answered = self.cycle is None or self.cycle.response_complete
            if answered and not self.transport.is_closing() and self.conn.their_state is not h11.MIGHT_SWITCH_PROTOCOL:
                self._since = self._since or self.loop.time()
                self._arm()
            else:
                self._since = None

        def _arm(self):
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_at(self._since + self.SECONDS, self.timeout_keep_alive_handler)

    return Impatient


def serve(net: EarlyExit, host: str = "127.0.0.1", port: int = 8000, *, threads: int | None = None, **options: Any) -> None:
    """Serve a network over HTTP until SIGINT or SIGTERM; what is admitted by then is answered.

    `port` 0 takes a free one; the address is printed when requests are taken. `threads`: of torch; None: all cores but one, which reads and
    writes. `options` are those of `Server`.
    """
    import os

    import uvicorn

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores - 1))
    # The network's thread keeps the interpreter to itself for 5 ms at a time by default, which every request would wait to be read.
    sys.setswitchinterval(0.0005)
    app = Server(net, **options).app
    gc.collect()
    gc.freeze()  # a full collection walks all of torch: 0.2 s in which nobody is answered
    with socket.create_server((host, port), backlog=2048) as listening:
        # 75 s between two requests: a connection closed after uvicorn's 5 s can meet a client that is just about to use it. 32 of 18,000 requests were
        # lost with 5 s and a load client that kept such connections, none with 75 s and one that drops those it sees closed; not tried apart.
        config = uvicorn.Config(app, http=_protocol(), log_level="warning", access_log=False, lifespan="off", timeout_keep_alive=75)
        server = uvicorn.Server(config)
        print(f"fastee serves on http://{host}:{listening.getsockname()[1]}", flush=True)
        server.run([listening])

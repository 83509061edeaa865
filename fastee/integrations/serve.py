"""An HTTP endpoint of one network, in KServe's V2 protocol, that holds deadlines and says at once when it cannot.

``GET /v2/health/live``, ``/v2/health/ready``, ``/v2``, ``/v2/models/NAME``, ``/openapi.json``; ``POST /v2/models/NAME/infer``. The header
``X-Deadline`` gives seconds from the arrival: a request that would be late leaves at the exit that it has reached. An error is JSON with
``type`` and ``error``: 400 a wrong request, 404 another model, 413 too many bytes, 429 the queue is full, 503 the deadline cannot be met;
the last two carry ``Retry-After``. Nothing waits without an end: what is admitted is answered.
"""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any

import msgspec
import numpy as np
import torch

try:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError:
    raise ImportError("fastee.integrations.serve needs starlette and uvicorn: pip install 'fastee[serve]'") from None

import fastee
from fastee.nn import EarlyExit

DATATYPES = {
    "FP32": np.float32, "FP64": np.float64, "FP16": np.float16, "INT64": np.int64, "INT32": np.int32, "INT16": np.int16, "INT8": np.int8,
    "UINT8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_NAMES = {np.dtype(v): k for k, v in DATATYPES.items()}


class TensorIn(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: list[Any]  # flat, or nested as the shape


class TensorOut(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: list[Any]


class InferRequest(msgspec.Struct):
    inputs: list[TensorIn]
    id: str | None = None


class InferResponse(msgspec.Struct):
    model_name: str
    outputs: list[TensorOut]  # label, confidence, exit, forced, logits
    id: str | None = None


class Failure(msgspec.Struct):
    type: str
    error: str


class _Refused(Exception):
    def __init__(self, status: int, kind: str, text: str, retry: float | None = None):
        super().__init__(text)
        self.status, self.kind, self.retry = status, kind, retry

    def response(self) -> Response:
        headers = {} if self.retry is None else {"Retry-After": str(max(1, math.ceil(self.retry)))}
        return JSONResponse({"type": self.kind, "error": str(self)}, self.status, headers)


class Server:
    """One network behind a queue: one request runs at a time, `queue` may wait. ``.app`` is the ASGI application; see the module.

    `max_bytes`: the largest body. The first exit's measured time and a running mean of the service time say what can still be on time.

    >>> import fastee, torch
    >>> from fastee.integrations.serve import Server
    >>> body = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> net = fastee.attach(body, exits=["1"], num_classes=3, example=torch.zeros(1, 4)).eval()
    >>> [r.path for r in Server(net).app.routes][-1]
    '/v2/models/{name}/infer'
    """

    def __init__(self, net: EarlyExit, name: str = "net", *, queue: int = 64, max_bytes: int = 64 << 20):
        if not isinstance(net, EarlyExit):
            raise TypeError(f"net: expected a network from fastee.attach, got {type(net).__name__}")
        if queue < 1 or max_bytes < 1:
            raise ValueError(f"queue, max_bytes: expected at least 1, got {queue}, {max_bytes}")
        self.net, self.name, self.queue, self.max_bytes = net.eval(), name, queue, max_bytes
        self.pool = ThreadPoolExecutor(1, "fastee-serve")
        profile = net.ensure_profile()
        self.first = float(profile.mean[0, 0, 0])  # seconds to the first exit, batch 1: nothing can be faster
        self.seconds = float(profile.mean[:, 0, 0].sum())
        self.waiting = 0
        get = lambda path, make: Route(path, lambda request: JSONResponse(make(request)))
        self.app = Starlette(
            routes=[
                get("/v2/health/live", lambda r: {"live": True}),
                get("/v2/health/ready", lambda r: {"ready": True}),
                get("/v2", lambda r: {"name": "fastee", "version": fastee.__version__, "extensions": []}),
                get("/openapi.json", lambda r: self.openapi()),
                Route("/v2/models/{name}", self._metadata),
                Route("/v2/models/{name}/ready", self._metadata),
                Route("/v2/models/{name}/infer", self._infer, methods=["POST"]),
            ]
        )

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI 3.1 description."""
        (request, response, failure), parts = msgspec.json.schema_components([InferRequest, InferResponse, Failure], ref_template="#/components/schemas/{name}")
        body = lambda schema, text: {"description": text, "content": {"application/json": {"schema": schema}}}
        retry = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}
        errors = {"400": "wrong request", "404": "no such model", "413": "too many bytes", "429": "the queue is full", "503": "the deadline cannot be met"}
        answers = {code: body(failure, text) | ({"headers": retry} if code in ("429", "503") else {}) for code, text in errors.items()}
        deadline = {"name": "X-Deadline", "in": "header", "schema": {"type": "number"}, "description": "seconds from the arrival"}
        infer = {"parameters": [deadline], "requestBody": {"required": True, **body(request, "")}, "responses": {"200": body(response, "the answer"), **answers}}
        return {
            "openapi": "3.1.0", "info": {"title": f"fastee: {self.name}", "version": fastee.__version__},
            "paths": {f"/v2/models/{self.name}/infer": {"post": infer}}, "components": {"schemas": parts},
        }  # fmt: skip

    async def _metadata(self, request: Request) -> Response:
        try:
            self._known(request)
        except _Refused as refused:
            return refused.response()
        inputs = [
            {"name": n, "datatype": _NAMES[np.dtype(str(v.dtype).removeprefix("torch."))], "shape": [-1, *v.shape[1:]]}
            for n, v in zip(self.net.inputs.names, self.net.inputs.example, strict=True)
        ]
        outputs = [{"name": n, "datatype": d, "shape": [-1]} for n, d in (("label", "INT64"), ("confidence", "FP32"), ("exit", "INT64"), ("forced", "BOOL"))]
        outputs.append({"name": "logits", "datatype": "FP32", "shape": [-1, self.net.num_classes]})
        return JSONResponse({"name": self.name, "platform": "fastee", "versions": ["1"], "inputs": inputs, "outputs": outputs})

    def _known(self, request: Request) -> None:
        if request.path_params["name"] != self.name:
            raise _Refused(404, "NotFound", f"no model {request.path_params['name']!r} here, only {self.name!r}")

    async def _infer(self, request: Request) -> Response:
        arrived = perf_counter()
        try:
            self._known(request)
            deadline = self._deadline(request)
            self._admit(deadline)
            self.waiting += 1
            try:
                ask, values = self._read(await self._body(request))
                loop = asyncio.get_running_loop()
                answer = await loop.run_in_executor(self.pool, self._run, ask, values, arrived, deadline)
            finally:
                self.waiting -= 1
        except _Refused as refused:
            return refused.response()
        except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: torch on a shape that the backbone does not take
            return _Refused(400, type(error).__name__, str(error)).response()
        return Response(msgspec.json.encode(answer), media_type="application/json")

    @staticmethod
    def _deadline(request: Request) -> float:
        text = request.headers.get("x-deadline")
        try:
            deadline = math.inf if text is None else float(text)
        except ValueError:
            deadline = math.nan
        if not deadline > 0:
            raise _Refused(400, "ValueError", f"X-Deadline: expected positive seconds, got {text!r}")
        return deadline

    def _admit(self, deadline: float) -> None:
        wait = self.waiting * self.seconds
        if self.waiting >= self.queue:
            raise _Refused(429, "Rejected", f"{self.waiting} requests wait, at most {self.queue} may", wait)
        if wait + self.first > deadline:
            raise _Refused(503, "DeadlineExceeded", f"{self.waiting} requests of {self.seconds:.4f} s are before this one; its deadline is {deadline} s", wait)

    async def _body(self, request: Request) -> bytes:
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > self.max_bytes:
                raise _Refused(413, "ValueError", f"body: more than {self.max_bytes} bytes")
            chunks.append(chunk)
        return b"".join(chunks)

    def _read(self, body: bytes) -> tuple[InferRequest, dict[str, torch.Tensor]]:
        try:
            ask = msgspec.json.decode(body, type=InferRequest)
        except msgspec.DecodeError as error:
            raise _Refused(400, "ValueError", f"body: {error}") from None
        values = {}
        for t in ask.inputs:
            if t.datatype not in DATATYPES:
                raise ValueError(f"inputs: {t.name!r} has datatype {t.datatype!r}, expected one of {list(DATATYPES)}")
            try:
                values[t.name] = torch.from_numpy(np.array(t.data, DATATYPES[t.datatype]).reshape(t.shape))
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"inputs: {t.name!r} is no {t.datatype} {t.shape}: {error}") from None
        names = list(self.net.inputs.names)
        if sorted(values) != sorted(names):
            raise ValueError(f"inputs: expected {names}, got {sorted(values)}")
        for n, like in zip(names, self.net.inputs.example, strict=True):
            if values[n].dtype != like.dtype or values[n].shape[1:] != like.shape[1:]:
                raise ValueError(f"inputs: {n!r} must be {like.dtype} [B, {', '.join(map(str, like.shape[1:]))}], got {values[n].dtype} {list(values[n].shape)}")
        return ask, values

    def _run(self, ask: InferRequest, values: dict[str, torch.Tensor], arrived: float, deadline: float) -> InferResponse:
        start = perf_counter()
        given = tuple(values[n] for n in self.net.inputs.names)
        left = None if deadline == math.inf else deadline - (start - arrived)
        out = self.net(given[0] if self.net.inputs.kind == "single" else dict(zip(self.net.inputs.names, given, strict=True)) if self.net.inputs.kind == "dict" else given, deadline=left)
        arrays = {n: getattr(out, n).detach().numpy() for n in ("label", "confidence", "exit", "forced", "logits")}
        outputs = [TensorOut(n, list(a.shape), _NAMES[a.dtype], a.reshape(-1).tolist()) for n, a in arrays.items()]
        self.seconds += 0.1 * (perf_counter() - start - self.seconds)
        return InferResponse(self.name, outputs, ask.id)


def serve(net: EarlyExit, host: str = "127.0.0.1", port: int = 8000, **options: Any) -> None:
    """Serve a network over HTTP until interrupted; `options` are those of `Server`."""
    import uvicorn

    uvicorn.run(Server(net, **options).app, host=host, port=port, log_level="warning", access_log=False)

"""A stand-in for ``triton_python_backend_utils``, which exists only inside the Triton Inference Server.

Written after the interface that Triton's Python backend documents: names, arguments and errors are its own. What stands behind
``InferenceRequest.exec`` is no server: it reads the model's config.pbtxt, holds inputs and outputs against it as the server does, and runs
the model's ONNX file in onnxruntime.
"""

import importlib.util
import json
import types
from pathlib import Path

import numpy as np
import onnxruntime
from google.protobuf import text_format


def model_config(path):
    """Parse a config.pbtxt by Triton's own schema, which tritonclient carries; its package would also import gRPC."""
    folder = Path(importlib.util.find_spec("tritonclient").origin).parent
    spec = importlib.util.spec_from_file_location("triton_model_config_pb2", folder / "grpc" / "model_config_pb2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return text_format.Parse(Path(path).read_text(), module.ModelConfig()), module.DataType


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message, code=INTERNAL):
        self._message, self._code = message, code

    def message(self):
        return self._message

    def code(self):
        return self._code


class Tensor:
    def __init__(self, name, numpy_array):
        if not isinstance(numpy_array, np.ndarray) or not numpy_array.flags.c_contiguous:
            raise TypeError("Tensor: a contiguous NumPy array is expected")
        self._name, self._array = name, numpy_array.copy()  # shared memory: nothing of the caller's
        self._array.flags.writeable = False  # the server's memory may lie read-only

    def name(self):
        return self._name

    def as_numpy(self):
        return self._array


class InferenceResponse:
    def __init__(self, output_tensors=(), error=None):
        self._output_tensors, self._error = list(output_tensors), error

    def output_tensors(self):
        return self._output_tensors

    def has_error(self):
        return self._error is not None

    def error(self):
        return self._error


class PreferredMemory:
    def __init__(self, preferred_memory_type, preferred_device_id=0):
        self.kind = preferred_memory_type


def get_output_tensor_by_name(response, name):
    return next((t for t in response.output_tensors() if t.name() == name), None)


class Server:
    """The models of a repository; ``calls`` says what was asked: (model, rows)."""

    def __init__(self, repository):
        self.repository, self.calls, self.broken, self.models = Path(repository), [], set(), {}
        server = self

        class InferenceRequest:
            def __init__(self, *, inputs, requested_output_names, model_name, preferred_memory=None, parameters=None, cancelled=False):
                self._inputs, self._names, self._model = inputs, requested_output_names, model_name
                self._memory, self._parameters, self._cancelled = preferred_memory, parameters, cancelled

            def inputs(self):
                return self._inputs

            def requested_output_names(self):
                return set(self._names)

            def parameters(self):
                return "" if self._parameters is None else json.dumps(self._parameters)

            def is_cancelled(self):
                return self._cancelled

            def exec(self):
                assert self._memory.kind == "CPU", "an answer on a GPU has no as_numpy"
                return server.run(self._model, self._inputs, self._names)

        self.utils = types.ModuleType("triton_python_backend_utils")
        vars(self.utils).update(
            InferenceRequest=InferenceRequest, InferenceResponse=InferenceResponse, PreferredMemory=PreferredMemory,
            Tensor=Tensor, TritonError=TritonError,
            TRITONSERVER_MEMORY_CPU="CPU", TRITONSERVER_MEMORY_GPU="GPU", get_output_tensor_by_name=get_output_tensor_by_name,
        )  # fmt: skip

    def run(self, model, inputs, names):
        self.calls.append((model, inputs[0].as_numpy().shape[0]))
        if model in self.broken:
            return InferenceResponse(error=TritonError(f"{model} is not ready", TritonError.UNAVAILABLE))
        if model not in self.models:
            config, kinds = model_config(self.repository / model / "config.pbtxt")
            self.models[model] = config, kinds, onnxruntime.InferenceSession(self.repository / model / "1" / "model.onnx")
        config, kinds, session = self.models[model]
        feed = {t.name(): t.as_numpy() for t in inputs}
        assert sorted(feed) == sorted(i.name for i in config.input)
        outputs = dict(zip(names, session.run(names, feed), strict=True))
        for port, array in [*((i, feed[i.name]) for i in config.input), *((o, outputs[o.name]) for o in config.output)]:
            check(port, array, kinds)
        return InferenceResponse([Tensor(n, a) for n, a in outputs.items()])


TYPES = {"TYPE_FP32": np.float32, "TYPE_FP64": np.float64, "TYPE_INT64": np.int64, "TYPE_INT32": np.int32, "TYPE_BOOL": np.bool_}


def check(port, array, kinds):
    assert array.dtype == TYPES[kinds.Name(port.data_type)], (port, array.dtype)
    assert len(port.dims) == array.ndim and all(d in (-1, n) for d, n in zip(port.dims, array.shape, strict=True)), (port, array.shape)

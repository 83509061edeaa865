"""What each binding adds to the C ABI's exit check at batch 1: arrays, onnxruntime's custom op, jax inside jit, the C++ runner.

A call of every case is TIMES checks, so that a bar of us a check is TIMES as many us over ``c_abi``: the same checks in a compiled loop.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numba
import numpy as np
import torch

import fastee
from fastee import native
from fastee.testing.bench import Case, Context, Group

D, C, TIMES, THRESHOLD = 256, 10, 100, 0.9
ROOT = Path(__file__).resolve().parents[1]


class DLTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device", ctypes.c_int32 * 2), ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
                ("lanes", ctypes.c_uint16), ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64)]  # fmt: skip


class Head(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int) for n in ("pool", "norm", "measure")] + [(n, ctypes.c_float) for n in ("eps", "temperature", "threshold")] \
        + [(n, ctypes.c_void_p) for n in ("weight", "bias", "norm_weight", "norm_bias", "mask", "weight_scale")]  # fmt: skip


def c_abi(inputs: list[tuple[np.ndarray, ...]]) -> Case:
    """Return the case of TIMES calls of fastee_exit_head in a compiled loop, on arrays x, weight, bias that are described once."""
    function = ctypes.CDLL(str(Path(native.hot.__file__).with_name("libfastee.so"))).fastee_exit_head
    function.argtypes, function.restype = [ctypes.c_size_t] * 4, ctypes.c_int
    held = []

    def described(a: np.ndarray) -> int:
        shape = np.array(a.shape)
        tensor = DLTensor(a.ctypes.data, (1, 0), a.ndim, 2, 32, 1, shape.ctypes.data, None, 0)
        held.append((a, shape, tensor))
        return ctypes.addressof(tensor)

    results = np.zeros(64, np.uint8)  # label, then max_prob, margin, entropy, lse and confidence, then exits: what a call from Python asks for
    at = results.ctypes.data
    out = np.array([at, at + 8, at + 12, at + 16, at + 20, 0, at + 24, at + 28, 0, 0, 0], np.uint64)  # fastee_head_out
    calls = []
    for x, weight, bias in inputs:
        head = Head(4, 0, 0, 0.0, 1.0, THRESHOLD, described(weight), described(bias))
        held.append(head)
        calls.append((described(x), ctypes.addressof(head), out.ctypes.data))

    @numba.njit
    def loop(x, head, out):
        failed = 0
        for _ in range(TIMES):
            failed += function(x, head, out, 0)
        return failed

    for (x, weight, bias), call in zip(inputs, calls, strict=True):
        want = fastee.ops.exit_head(*map(torch.from_numpy, (x, weight, bias)), "none").label_at(0)
        if loop(*call) or (got := int(results[:8].view(np.int64)[0])) != want:
            raise RuntimeError(f"the loop over the C ABI answers {got}, expected {want}")
    loop.holds = held, results, out  # what the addresses stand for
    return Case("c_abi", loop, calls, note=f"fastee_exit_head, {TIMES} calls in a compiled loop")


def again(fn: Callable, **kwargs) -> Callable:
    """Return `fn` called TIMES times in a Python loop, with keywords as a user writes them."""
    names = ", ".join(f"{k}={v!r}" for k, v in kwargs.items())
    scope = {"fn": fn, "times": range(TIMES)}
    exec(f"def run(x, w, b):\n for _ in times: fn(x, w, b, {names})", scope)
    return scope["run"]


def labels(x, w, b):
    from fastee.integrations import arrays

    return [arrays.exit_head(x, w, b, pool="none", threshold=THRESHOLD).label for _ in range(TIMES)]


def onnx_session(nodes: list, outputs: list[tuple[str, int, list[int]]], inputs: list[tuple[str, list[int]]]):
    """Return an onnxruntime session of one thread with fastee's op library; ImportError or OSError where one of them is missing."""
    import onnxruntime
    from onnx import TensorProto, helper

    library = Path(fastee.__file__).parent / "libfastee_ort.so"
    if not library.exists():
        raise OSError("libfastee_ort.so is not built")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.register_custom_ops_library(str(library))
    graph = helper.make_graph(
        nodes, "checks", [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs], [helper.make_tensor_value_info(*o) for o in outputs]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("fastee", 1)], ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def in_onnxruntime(own: list[tuple[np.ndarray, ...]]) -> Iterator[Group]:
    """TIMES nodes in one session, so that what `session.run` itself costs is a hundredth of it; then one node beside an op of onnxruntime's own."""
    from onnx import TensorProto as T
    from onnx import helper

    def checks(count: int):
        nodes, outs = [], []
        for i in range(count):  # thresholds differ, else onnxruntime would run equal nodes once
            names = [f"label{i}", f"confidence{i}", f"exits{i}"]
            nodes.append(helper.make_node("ExitStep", ["x", "w", "b"], names, domain="fastee", pool="none", threshold=THRESHOLD + i * 1e-5))
            outs += [(n, t, [1]) for n, t in zip(names, (T.INT64, T.FLOAT, T.BOOL), strict=True)]
        return onnx_session(nodes, outs, [("x", [1, D]), ("w", [C, D]), ("b", [C])])

    feeds = [(dict(zip("xwb", a, strict=True)),) for a in own]
    many, last = checks(TIMES), [f"{n}{TIMES - 1}" for n in ("label", "confidence", "exits")]
    found = [Case("onnxruntime_op", lambda feed: many.run(last, feed), feeds, note=f"one session.run of {TIMES} ExitStep nodes, onnxruntime's own cost per node included"), c_abi(own)]
    yield Group("exit_head", f"{TIMES} times 1x{D}->{C} in onnxruntime", "fp32", found, baseline="c_abi", bars=(f"<= {3 * TIMES} us over c_abi",))
    one = checks(1)
    norm = onnx_session(
        [helper.make_node("LayerNormalization", ["x", "w", "b"], ["y", "mean", "spread"])],
        [("y", T.FLOAT, [1, C]), ("mean", T.FLOAT, [1, 1]), ("spread", T.FLOAT, [1, 1])], [("x", [1, C]), ("w", [C]), ("b", [C])],
    )  # fmt: skip
    small = [(dict(zip("xwb", (x[:, :C].copy(), w[0, :C].copy(), b), strict=True)),) for x, w, b in own]
    found = [
        Case("onnxruntime_op", lambda feed: one.run(None, feed), feeds, note="session.run of one ExitStep node: three arrays in, three out"),
        Case("onnxruntime_norm", lambda feed: norm.run(None, feed), small, note=f"session.run of onnxruntime's own LayerNormalization of {C} numbers: three in, three out"),
    ]
    yield Group("exit_head", f"1x{D}->{C}, one session.run", "fp32", found, baseline="onnxruntime_norm", bars=("<= 3 us over onnxruntime_norm",))


def in_jax(own: list[tuple[np.ndarray, ...]]) -> Group:
    """TIMES checks in one jit, each of which waits for the one before it."""
    import jax

    from fastee.integrations import jax as fj

    fj._register()
    compiled = jax.jit(lambda x, w, b: jax.lax.fori_loop(0, TIMES, lambda _, x: x + 1e-9 * fj.exit_head(x, w, b, "none").confidence[:, None], x))
    found = [Case("jax", lambda *a: compiled(*a).block_until_ready(), own, note=f"{TIMES} calls in one jit, in a loop"), c_abi(own)]
    return Group("exit_head", f"{TIMES} times 1x{D}->{C} in jax", "fp32", found, baseline="c_abi", bars=(f"<= {5 * TIMES} us over c_abi",))


def in_the_runner(own: list[tuple[np.ndarray, ...]]) -> Group:
    """fastee::Runner's check on an exported network, beside the C ABI with the same outputs (logits and order among them), both in compiled loops."""
    x, weight, bias = own[0]
    at = ROOT / "build" / "checks"

    def must(*command: object) -> None:
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{command[0]} {command[1]}: {(done.stderr or done.stdout).strip()[-300:]}")

    must("cmake", "--install", ROOT / "build", "--component", "dev", "--prefix", at / "prefix")
    must("cmake", "-S", Path(__file__).parent / "native", "-B", at, "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_PREFIX_PATH={at / 'prefix'};{torch.utils.cmake_prefix_path}")
    must("cmake", "--build", at)
    body = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(D, C))
    net = fastee.attach(body, ["0"], C, torch.zeros(1, D), norm=None).eval().set_rule(thresholds=[THRESHOLD])
    with torch.no_grad():
        net.heads[0].linear.weight.copy_(torch.from_numpy(weight))
        net.heads[0].linear.bias.copy_(torch.from_numpy(bias))
    lib = ctypes.CDLL(str(at / "libchecks.so"))
    lib.checks_open.restype, lib.checks_runner.restype, lib.checks_c_abi.restype = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64
    runner = ctypes.c_void_p(lib.checks_open(str(fastee.export(net, at / "net", format="aoti")).encode()))
    if not runner:
        raise OSError("the C++ runner does not take the export: it printed why")
    p = lambda a: ctypes.c_void_p(a.ctypes.data)
    size = [ctypes.c_int64(v) for v in (D, C, TIMES)]
    theirs, plain = [(runner, p(x), size[0], size[2])], [(p(x), p(weight), p(bias), *size)]
    if lib.checks_runner(*theirs[0]) != lib.checks_c_abi(*plain[0]):
        raise RuntimeError("the runner and the C ABI disagree")
    found = [
        Case("runner", lib.checks_runner, theirs, note="fastee::Runner::exit_step in a C++ loop"),
        Case("c_abi", lib.checks_c_abi, plain, note="fastee_exit_head in a C++ loop, the same outputs"),
    ]
    return Group("exit_head", f"{TIMES} times 1x{D}->{C} in the C++ runner", "fp32", found, baseline="c_abi", bars=(f"<= {TIMES * 3 // 10} us over c_abi",))


def cases(ctx: Context) -> Iterator[Group]:
    from fastee.integrations import arrays

    if native.hot is None:
        raise RuntimeError(f"native parts: {native.reason.get('_hot')}")
    g = torch.Generator().manual_seed(ctx.seed)
    w, b = torch.randn(C, D, generator=g) / D**0.5, torch.randn(C, generator=g)
    inputs = ctx.rotate(lambda i: (torch.randn(1, D, generator=g), w, b), 4 * D)
    own = [tuple(t.numpy() for t in i) for i in inputs]
    rule = {"pool": "none", "threshold": THRESHOLD}
    found = [
        Case("numpy", again(arrays.exit_head, **rule), own, note="all three arguments arrays"),
        Case("numpy_labels", labels, own, note="and the label read as an array"),
        Case("fastee", again(fastee.ops.exit_head, **rule), inputs, note="tensors"),
        c_abi(own),
    ]
    yield Group("exit_head", f"{TIMES} times 1x{D}->{C} by array", "fp32", found, baseline="c_abi", bars=(f"<= {TIMES * 3 // 2} us over c_abi",))
    for name, groups in (("onnxruntime", in_onnxruntime), ("jax", lambda own: [in_jax(own)]), ("the C++ runner", lambda own: [in_the_runner(own)])):
        try:
            yield from groups(own)
        except (ImportError, OSError) as error:
            reason = f"{type(error).__name__}: {error}"
            skipped = [c_abi(own), Case(name.split()[-1], None, note=reason)]
            yield Group("exit_head", f"{TIMES} times 1x{D}->{C} in {name}", "fp32", skipped, baseline="c_abi")

"""The ops inside jax: XLA FFI calls into libfastee, some also into libfastee_cuda, with jit, vmap and, for `linear_stats`, gradients.

Every function takes and gives jax arrays, under ``jit`` too; results are those of ``fastee.ops`` with jax's 32-bit integers. ``vmap``
over rows becomes more rows of one call; over weights it runs them in turn. A wrong argument raises at tracing where its shape
shows it (``TypeError``, ``ValueError``), else when the call runs (``ValueError`` or ``jax.errors.JaxRuntimeError``); both name it.

On CUDA there are `exit_head`, `exit_step`, `linear_stats`, `compact` and `quantize_rows`; the others raise ``BackendUnavailable`` when
they are lowered for it. There a threshold of NaN, which the host never sees, is not refused: no row leaves.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

try:
    import jax
    import jax.numpy as jnp
    from jax.custom_batching import custom_vmap
    from jax.extend.core import Primitive
    from jax.interpreters import ad, batching, mlir
except ImportError:
    raise ImportError("fastee.integrations.jax needs jax: pip install 'fastee[jax]'") from None

import fastee
from fastee.errors import BackendUnavailable, did_you_mean
from fastee.kernels import cuda

Array = jax.Array
POOLS = ("mean", "mean_tokens", "cls", "last", "none")
NORMS = ("none", "layer", "rms", "affine")
MEASURES = ("max_prob", "margin", "entropy", "energy")
FORMATS = ("int8", "int4", "fp8_e4m3", "bf16")
_FLOATS = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))
_TARGETS = ("exit_head", "row_stats", "pool", "compact", "gather_rows", "feature_delta", "mean_entropy", "quantize_rows", "dequantize_rows")


class RowStats(NamedTuple):
    label: Array  # int32 [B]; -1 for an invalid row
    max_prob: Array
    margin: Array
    entropy: Array
    lse: Array


class ExitHead(NamedTuple):
    label: Array  # int32 [B]
    confidence: Array
    exits: Array  # bool [B]
    stats: RowStats
    logits: Array | None


class ExitStep(NamedTuple):
    label: Array
    confidence: Array
    exits: Array
    stats: RowStats
    index: Array  # int32 [B]: rows that stay, in order, then the others reversed
    count: Array  # int32 []
    logits: Array | None


class Compact(NamedTuple):
    index: Array
    count: Array


class QuantizedRows(NamedTuple):
    data: Array
    scale: Array | None


class Norm(NamedTuple):
    kind: str  # layer, rms or affine
    weight: Array | None = None
    bias: Array | None = None
    eps: float = 1e-5


_LIBRARIES = {"cpu": ("libfastee_jax.so", fastee.native.REPAIR), "cuda": ("libfastee_jax_cuda.so", cuda.REPAIR)}


@lru_cache(None)
def _library(platform: str) -> ctypes.CDLL:
    name, repair = _LIBRARIES[platform]
    path = Path(fastee.__file__).parent / name
    if not path.exists():
        raise ImportError(f"{path.name} is not built: install jax first, then {repair}")
    library = ctypes.CDLL(str(path))
    for name in _targets(library):
        jax.ffi.register_ffi_target(f"fastee_{name}", jax.ffi.pycapsule(getattr(library, f"fastee_jax_{name}")), platform=platform)
    if platform == "cuda":
        for size, numbers in ((library.fastee_cuda_sync_bytes, 1), (library.fastee_cuda_scratch_bytes, 4)):
            size.restype, size.argtypes = ctypes.c_int64, [ctypes.c_int64] * numbers
    return library


def _targets(library: ctypes.CDLL) -> list[str]:
    return [name for name in _TARGETS if hasattr(library, f"fastee_jax_{name}")]


# One call of a target, lowered for each platform as its library has it.
_ffi_call = Primitive("fastee_ffi_call")
_ffi_call.multiple_results = True
_ffi_call.def_impl(jax.jit(_ffi_call.bind, static_argnames=("name", "out", "attributes")))
_ffi_call.def_abstract_eval(lambda *_, out, **__: [jax.core.ShapedArray(o.shape, o.dtype) for o in out])


def _in_turn(args: tuple, axes: tuple, **params: Any) -> tuple:
    size = next(a.shape[axis] for a, axis in zip(args, axes, strict=True) if axis is not None)
    take = lambda i: [a if axis is None else jax.lax.dynamic_index_in_dim(a, i, axis, False) for a, axis in zip(args, axes, strict=True)]
    out = jax.lax.map(lambda i: _ffi_call.bind(*take(i), **params), jnp.arange(size))
    return out, [0] * len(out)


def _no_gradient(*_: Any, name: str, **__: Any) -> None:
    raise ValueError(f"{name} has no gradient; linear_stats has one")


batching.primitive_batchers[_ffi_call] = _in_turn
ad.primitive_jvps[_ffi_call] = _no_gradient


def _on_cpu(*args: Array, name: str, out: tuple, attributes: tuple) -> tuple:
    _library("cpu")
    return jax.ffi.ffi_call(f"fastee_{name}", out)(*args, **dict(attributes))


def _on_cuda(*args: Array, name: str, out: tuple, attributes: tuple) -> tuple:
    library = _library("cuda")
    if name not in (known := _targets(library)):
        raise BackendUnavailable(f"{name} has no CUDA target, only {', '.join(known)} have: place its arguments on the CPU")
    if name == "exit_head":  # no number in device memory reaches a kernel's arguments: who exits is compared here
        *args, threshold = args
        *out, _ = out
    rows, sync, scratch = args[0].shape[0], library.fastee_cuda_sync_bytes, library.fastee_cuda_scratch_bytes
    memory = []
    if name == "exit_head":
        memory = [sync(rows), scratch(rows, *args[1].shape[::-1], 0)]
    elif name == "compact":
        memory = [sync(rows // 4096 + 1)]
    wide = [_shape(o.dtype, *o.shape, 2) if o.dtype == jnp.int32 else o for o in out]  # the C ABI's 64-bit integers, low word first
    call = jax.ffi.ffi_call(
        f"fastee_{name}", (*wide, *(_shape(jnp.uint8, n) for n in memory)), input_output_aliases={len(args): len(wide)} if memory else {}
    )
    got = call(*args, *(jnp.zeros(n, jnp.uint8) for n in memory[:1]), **dict(attributes))
    got = [g[..., 0] if o.dtype == jnp.int32 else g for g, o in zip(got, out, strict=False)]
    return (*got, (got[1] >= threshold) & (threshold != jnp.inf)) if name == "exit_head" else tuple(got)


for _platform, _rule in (("cpu", _on_cpu), ("cuda", _on_cuda)):
    mlir.register_lowering(_ffi_call, mlir.lower_fun(_rule, multiple_results=True), platform=_platform)


def _call(name: str, out: Any, *args: Array, **attributes: Any) -> Any:
    results = _ffi_call.bind(*args, name=name, out=tuple(jax.tree.leaves(out)), attributes=tuple(attributes.items()))
    return tuple(results) if isinstance(out, tuple) else results[0]


def _shape(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def _float(op: str, name: str, value: Any, ndim: tuple[int, ...], shape: str) -> Array:
    value = jnp.asarray(value)
    if value.dtype not in _FLOATS:
        raise TypeError(f"{op}: {name} must be float32, bfloat16 or float16 {shape}, got {value.dtype} {list(value.shape)}")
    if value.ndim not in ndim:
        raise ValueError(f"{op}: {name} must be float32, bfloat16 or float16 {shape}, got {value.dtype} {list(value.shape)}")
    return value


def _word(op: str, name: str, value: Any, known: tuple[str, ...]) -> int:
    if value not in known:
        raise ValueError(f"{op}: {name} must be one of {', '.join(known)}, got {value!r}{did_you_mean(str(value), known)}")
    return known.index(value)


def _absent() -> Array:
    return jnp.zeros((0,), jnp.float32)  # an array of no elements stands for None


def _by_rows(function: Callable, rows: tuple[bool, ...]) -> Callable:
    """Give a function whose results are row by row those of its `rows` arguments the rule that makes a vmap over rows one call."""
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def rule(size, batched, *args):
        if any(b and not r for b, r in zip(batched, rows, strict=True)):
            spread = [a if b else jnp.broadcast_to(a, (size, *a.shape)) for a, b in zip(args, batched, strict=True)]
            out = jax.lax.map(lambda xs: mapped(*xs), tuple(spread))
        else:
            flat = []
            for a, b, r in zip(args, batched, rows, strict=True):
                if r and a.shape != (0,):
                    a = a if b else jnp.broadcast_to(a, (size, *a.shape))
                    a = a.reshape(a.shape[0] * a.shape[1], *a.shape[2:])
                flat.append(a)
            out = jax.tree.map(lambda t: t.reshape(size, t.shape[0] // size, *t.shape[1:]), mapped(*flat))
        return out, jax.tree.map(lambda _: True, out)

    return mapped


def exit_head(
    x: Array, weight: Array, bias: Array | None = None, pool: str = "mean", norm: Norm | None = None, measure: str = "max_prob",
    threshold: Any = 0.9, *, temperature: float = 1.0, mask: Array | None = None, logits: bool = False,
) -> ExitHead:  # fmt: skip
    """Run an exit's head on an activation and say per row whether it may leave: ``fastee.ops.exit_head``, whose arguments these are.

    `threshold` may be a traced number; `pool`, `norm.kind`, `measure`, `temperature` and `logits` are static.

    >>> import jax, jax.numpy as jnp
    >>> from fastee.integrations.jax import exit_head
    >>> out = jax.jit(exit_head)(jnp.ones((2, 3, 4, 4)), jnp.eye(3) * 9, threshold=0.3)
    >>> out.label.tolist(), out.exits.tolist()
    ([0, 0], [True, True])
    """
    op = "exit_head"
    kind, score = _word(op, "pool", pool, POOLS), _word(op, "measure", measure, MEASURES)
    x = _float(op, "x", x, {"mean": (2, 3, 4, 5), "none": (2,)}.get(pool, (3,)), "[B, D, ...], [B, T, D] or [B, D] as pool says")
    weight = _float(op, "weight", weight, (2,), "[C, D]")
    features = x.shape[1] if pool in ("mean", "none") else x.shape[2]
    if weight.shape[1] != features:
        raise ValueError(f"{op}: weight must be [C, {features}] for x {list(x.shape)} with pool {pool!r}, got {list(weight.shape)}")
    norm = norm or Norm("none")
    attributes = dict(pool=np.int32(kind), norm=np.int32(_word(op, "norm", norm.kind, NORMS)), measure=np.int32(score),
                      eps=np.float32(norm.eps), temperature=np.float32(temperature))  # fmt: skip
    given = [_absent() if v is None else jnp.asarray(v, jnp.float32) for v in (bias, norm.weight, norm.bias)]
    tokens = _absent() if mask is None else jnp.asarray(mask).astype(bool).astype(jnp.uint8)

    def run(x, weight, bias, norm_weight, norm_bias, mask, threshold):
        rows, classes = x.shape[0], weight.shape[0]
        numbers = _shape(jnp.float32, rows)
        out = (_shape(jnp.int32, rows), *[numbers] * 5, _shape(jnp.float32, rows, classes if logits else 0), _shape(jnp.bool_, rows))
        return _call(op, out, x, weight, bias, norm_weight, norm_bias, mask, threshold, **attributes)

    label, confidence, max_prob, margin, entropy, lse, z, exits = _by_rows(run, (True, False, False, False, False, True, False))(
        x, weight, *given, tokens, jnp.asarray(threshold, jnp.float32)
    )
    return ExitHead(label, confidence, exits, RowStats(label, max_prob, margin, entropy, lse), z if logits else None)


def exit_step(x: Array, weight: Array, bias: Array | None = None, *args: Any, **named: Any) -> ExitStep:
    """Return `exit_head` plus who survives: ``index`` int32 [B] and ``count`` int32 [], as ``fastee.ops.exit_step``.

    >>> import jax.numpy as jnp
    >>> from fastee.integrations.jax import exit_step
    >>> out = exit_step(jnp.array([[9.0, 0.0], [1.0, 1.0], [0.0, 9.0]]), jnp.eye(2), pool="none")
    >>> int(out.count), out.index.tolist()
    (1, [1, 2, 0])
    """
    head = exit_head(x, weight, bias, *args, **named)
    return ExitStep(*head[:4], *compact(~head.exits), head.logits)


def row_stats(logits: Array, *, temperature: float = 1.0) -> RowStats:
    """Return label, max_prob, margin, entropy and lse of logits [B, C] in one pass: ``fastee.ops.row_stats``.

    >>> import jax.numpy as jnp
    >>> from fastee.integrations.jax import row_stats
    >>> row_stats(jnp.array([[0.0, 3.0, 1.0]])).label.tolist()
    [1]
    """
    z = _float("row_stats", "logits", logits, (2,), "[B, C]")

    def run(z):
        numbers = _shape(jnp.float32, z.shape[0])
        return _call("row_stats", (_shape(jnp.int32, z.shape[0]), *[numbers] * 4), z, temperature=np.float32(temperature))

    return RowStats(*_by_rows(run, (True,))(z))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear_stats(x, weight, bias, temperature):
    return exit_head(x, weight, bias, "none", temperature=temperature, threshold=jnp.inf).stats


def _definition(x, weight, bias, temperature):
    z = (x.astype(jnp.float32) @ weight.astype(jnp.float32).T + (0.0 if bias is None else bias)) / temperature
    lse, top = jax.nn.logsumexp(z, -1), jax.lax.top_k(z, min(2, z.shape[-1]))[0]
    p = jnp.exp(z - lse[:, None])
    entropy = -jnp.sum(p * (z - lse[:, None]), -1)
    best = jnp.exp(top[:, 0] - lse)
    return best, best - (jnp.exp(top[:, 1] - lse) if z.shape[-1] > 1 else 0.0), entropy, lse


def _linear_stats_forward(x, weight, bias, temperature):
    return _linear_stats(x, weight, bias, temperature), (x, weight, bias)


def _linear_stats_backward(temperature, saved, grads):
    _, pull = jax.vjp(lambda *a: _definition(*a, temperature), *saved)
    return pull(tuple(grads[1:]))


_linear_stats.defvjp(_linear_stats_forward, _linear_stats_backward)


def linear_stats(x: Array, weight: Array, bias: Array | None = None, *, temperature: float = 1.0) -> RowStats:
    """Return the statistics of ``x @ weight.T + bias`` without the logits: ``fastee.ops.linear_stats``; its four numbers have gradients.

    The gradient computes the logits again in jax. At equal largest logits it goes to the smaller index.

    >>> import jax, jax.numpy as jnp
    >>> from fastee.integrations.jax import linear_stats
    >>> jax.grad(lambda x: linear_stats(x, jnp.eye(2)).lse.sum())(jnp.zeros((1, 2))).tolist()
    [[0.5, 0.5]]
    """
    x = _float("linear_stats", "x", x, (2,), "[B, D]")
    return _linear_stats(x, jnp.asarray(weight), None if bias is None else jnp.asarray(bias, jnp.float32), float(temperature))


def pool(x: Array, kind: str = "mean", mask: Array | None = None) -> Array:
    """Return pooled features fp32 [B, D]: ``fastee.ops.pool``.

    >>> import jax.numpy as jnp
    >>> from fastee.integrations.jax import pool
    >>> pool(jnp.ones((2, 3, 4, 4))).shape
    (2, 3)
    """
    number = _word("pool", "kind", kind, POOLS)
    x = _float("pool", "x", x, {"mean": (2, 3, 4, 5), "none": (2,)}.get(kind, (3,)), "[B, D, ...], [B, T, D] or [B, D] as kind says")
    tokens = _absent() if mask is None else jnp.asarray(mask).astype(bool).astype(jnp.uint8)
    features = x.shape[1] if kind in ("mean", "none") else x.shape[2]
    return _by_rows(lambda x, m: _call("pool", _shape(jnp.float32, x.shape[0], features), x, m, kind=np.int32(number)), (True, True))(x, tokens)


def compact(mask: Array) -> Compact:
    """Return the order that puts the true rows of a bool mask [B] first and how many there are: ``fastee.ops.compact``.

    >>> import jax.numpy as jnp
    >>> from fastee.integrations.jax import compact
    >>> compact(jnp.array([False, True, False])).index.tolist()
    [1, 2, 0]
    """
    mask = jnp.asarray(mask)
    if mask.dtype not in (jnp.bool_, jnp.uint8) or mask.ndim != 1:
        raise TypeError(f"compact: mask must be bool or uint8 [B], got {mask.dtype} {list(mask.shape)}")
    return Compact(*_call("compact", (_shape(jnp.int32, mask.shape[0]), _shape(jnp.int32)), mask))


def gather_rows(x: Array, index: Array) -> Array:
    """Return ``x[index]`` for rows of any type; an index outside [0, B) is an error, not a clamp as in jax.

    >>> import jax.numpy as jnp
    >>> from fastee.integrations.jax import gather_rows
    >>> gather_rows(jnp.arange(6).reshape(3, 2), jnp.array([2, 0])).tolist()
    [[4, 5], [0, 1]]
    """
    x, index = jnp.asarray(x), jnp.asarray(index)
    if not jnp.issubdtype(index.dtype, jnp.integer) or index.ndim != 1:
        raise TypeError(f"gather_rows: index must be an integer array [N], got {index.dtype} {list(index.shape)}")
    return _call("gather_rows", _shape(x.dtype, index.shape[0], *x.shape[1:]), x, index.astype(jnp.int32))


def feature_delta(a: Array, b: Array) -> Array:
    """Return ``|a/|a| - b/|b||`` per row: ``fastee.ops.feature_delta``.

    >>> import jax.numpy as jnp
    >>> from fastee.integrations.jax import feature_delta
    >>> feature_delta(jnp.ones((1, 4)), 3 * jnp.ones((1, 4))).tolist()
    [0.0]
    """
    a, b = (_float("feature_delta", n, v, (2, 3, 4, 5), "[B, ...]") for n, v in (("a", a), ("b", b)))
    return _by_rows(lambda a, b: _call("feature_delta", _shape(jnp.float32, a.shape[0]), a, b), (True, True))(a, b)


def mean_entropy(logits: Array, mask: Array | None = None, *, temperature: float = 1.0) -> Array:
    """Return the mean entropy (nats) of the unmasked frames of logits [B, T, C]: ``fastee.ops.mean_entropy``.

    >>> import jax.numpy as jnp
    >>> from fastee.integrations.jax import mean_entropy
    >>> round(float(mean_entropy(jnp.zeros((1, 3, 4)))[0]), 4)
    1.3863
    """
    z = _float("mean_entropy", "logits", logits, (3,), "[B, T, C]")
    frames = _absent() if mask is None else jnp.asarray(mask).astype(bool).astype(jnp.uint8)
    run = lambda z, m: _call("mean_entropy", _shape(jnp.float32, z.shape[0]), z, m, temperature=np.float32(temperature))
    return _by_rows(run, (True, True))(z, frames)


def quantize_rows(x: Array, format: str = "int8", group: int | None = None) -> QuantizedRows:
    """Return rows [B, N] on a coarser grid with their scales: ``fastee.ops.quantize_rows``, the same bits.

    >>> import jax.numpy as jnp
    >>> from fastee.integrations.jax import dequantize_rows, quantize_rows
    >>> dequantize_rows(quantize_rows(jnp.array([[1.0, -2.0]])))[0, 1].item()
    -2.0
    """
    number = _word("quantize_rows", "format", format, FORMATS)
    x = _float("quantize_rows", "x", x, (2,), "[B, N]")
    size = x.shape[1]
    if group is not None and (group < 1 or size % group):
        raise ValueError(f"quantize_rows: group must divide the row of {size}, got {group}")
    scales = 0 if format == "bf16" else 1 if group is None else size // group
    dtype, width = {"int8": (jnp.int8, size), "int4": (jnp.uint8, -(-size // 2)), "fp8_e4m3": (jnp.uint8, size), "bf16": (jnp.bfloat16, size)}[format]

    def run(x):
        scale = _shape(jnp.float32, x.shape[0], scales) if scales else _shape(jnp.float32, 0)
        return _call("quantize_rows", (_shape(dtype, x.shape[0], width), scale), x, format=np.int32(number), group=np.int64(group or 0))

    data, scale = _by_rows(run, (True,))(x) if scales else run(x)
    return QuantizedRows(data, scale if scales else None)


def dequantize_rows(q: QuantizedRows, format: str = "int8", size: int | None = None) -> Array:
    """Return fp32 rows of `quantize_rows`; `size`: the row's length where int4 has an odd one."""
    number = _word("dequantize_rows", "format", format, FORMATS)
    size = size or q.data.shape[1] * (2 if format == "int4" else 1)
    group = 0 if q.scale is None or q.scale.shape[1] == 1 else size // q.scale.shape[1]
    scale = _absent() if q.scale is None else q.scale
    run = lambda d, s: _call("dequantize_rows", _shape(jnp.float32, d.shape[0], size), d, s, format=np.int32(number), group=np.int64(group))
    return _by_rows(run, (True, True))(q.data, scale)

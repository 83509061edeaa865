"""What exit_head and exit_step share: the check, the backends' conditions, the flat form that torch's dispatcher knows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastee import dispatch, native, reference
from fastee.reference import Norm, RowStats

from . import _check, _cpu, _cuda, _library, _numba, _triton
from .results import ROWS, ExitHeadResult, ExitStepResult, QuantizedRows

RULE = "str pool, str? norm, Tensor? norm_weight, Tensor? norm_bias, float eps, str measure, float threshold, float temperature, Tensor? mask"
OUTPUTS = (torch.int64, torch.float32, torch.bool, torch.float32, torch.float32, torch.float32, torch.float32)


def layout(x, weight, bias, pool, norm, *rule) -> str | None:
    parts = (norm.weight, norm.bias) if norm else ()
    return (
        _cpu.pooled(x, pool)
        or _cpu.contiguous_rows("weight", weight)
        or next((f"{n} is not contiguous" for n, t in zip(("bias", "norm.weight", "norm.bias"), (bias, *parts), strict=False)
                 if t is not None and not t.is_contiguous()), None)
    )  # fmt: skip


def cpu_declines(x, weight, bias, pool, norm, *rule) -> str | None:
    w = weight.data if isinstance(weight, ROWS) else weight
    return _cpu.floats(x, None if w is not weight else w, bias, *(norm or ())[1:3]) or layout(x, w, bias, pool, norm, *rule)


def numba_declines(x, weight, bias, pool, norm, *rule) -> str | None:
    quantized = isinstance(weight, ROWS)
    w = weight.data if quantized else weight
    return _numba.floats(x, None if quantized else w, bias, *(norm or ())[1:3]) or layout(x, w, bias, pool, norm, *rule)


def cuda_declines(x, weight, bias, pool, norm, *rule) -> str | None:
    quantized = isinstance(weight, ROWS)
    w = weight.data if quantized else weight
    floats = (x, None if quantized else w, bias, *(norm or ())[1:3])
    return _cuda.elsewhere(w) or _cuda.floats(*floats) or _cuda.wide(w.shape[1]) or layout(x, w, bias, pool, norm)


def triton_declines(x, weight, bias, pool, norm, *rule) -> str | None:
    quantized = isinstance(weight, ROWS)
    w = weight.data if quantized else weight
    return (_triton.elsewhere(w) if quantized else None) or _triton.floats(x, None if quantized else w, bias, *(norm or ())[1:3]) or layout(x, w, bias, pool, norm)


def dequantized(weight):
    return reference.dequantize_rows(weight.data, weight.scale) if isinstance(weight, ROWS) else weight


def make_op(name: str, step: bool, doc: str) -> tuple[dispatch.Op, Callable]:
    """Build the op's registry entry and its public function, whose docstring is `doc`: the signature stands here once for both ops."""

    def check(x, weight, bias=None, pool="mean", norm=None, measure="max_prob", threshold=0.9, *, temperature=1.0, mask=None, logits=False):
        return (*_check.head(name, x, weight, bias, pool, norm, measure, threshold, temperature, mask), bool(logits)), {}

    def run_cpu(x, weight, bias, pool, norm, measure, threshold, temperature, mask, logits):
        keep = None if mask is None else mask.to(torch.uint8).contiguous()
        bias = None if bias is None else bias.float()  # the C ABI takes small vectors in fp32 only
        if norm is not None:
            norm = norm._replace(weight=None if norm.weight is None else norm.weight.float(), bias=None if norm.bias is None else norm.bias.float())
        result = native.hot.exit_head(x, weight, bias, pool, norm, measure, threshold, temperature, keep, True, step)
        if result is None:
            raise RuntimeError(f"{name}: libfastee refused the call: {native.hot.last_error()}")
        return result

    @_numba.widening
    def run_numba(x, weight, bias, pool, norm, measure, threshold, temperature, mask, wanted):
        (rows, classes), kind = (x.shape[0], weight.shape[0]), norm or _numba.NO_NORM
        label, stats = _numba.stats_memory(rows)
        confidence, exits, logits = torch.empty(rows), torch.empty(rows, dtype=torch.bool), torch.empty(rows, classes)
        index = torch.empty(rows if step else 0, dtype=torch.int64)
        count = _numba.kernel("exit_head")(
            *_numba.activation(x, pool), _numba.flags(mask), _numba.NORMS[kind.kind], _numba.flat(kind.weight), _numba.flat(kind.bias), kind.eps,
            _numba.flat(weight), classes, weight.stride(0), _numba.flat(bias), _numba.MEASURES.index(measure), threshold, temperature,
            label.numpy(), confidence.numpy(), stats.numpy().reshape(-1), exits.numpy().view("u1"), logits.numpy().reshape(-1), index.numpy(),
        )  # fmt: skip
        head = (label, confidence, exits, RowStats(label, *stats))
        return ExitStepResult(*head, index, count, logits) if step else ExitHeadResult(*head, logits)

    def run_reference(x, weight, *rest):
        r = (reference.exit_step if step else reference.exit_head)(x, dequantized(weight), *rest[:-1])
        stats = RowStats(r.stats.label, *(s.float() for s in r.stats[1:5]))
        if not step:
            return ExitHeadResult(r.label, r.confidence.float(), r.exits, stats, r.logits)
        count = int(r.count) if r.count.device.type == "cpu" and not is_compiling() else r.count
        return ExitStepResult(r.label, r.confidence.float(), r.exits, stats, r.index, count, r.logits)

    backends = (
        dispatch.Backend("cuda", lambda *args: _cuda.head(*args, step), cuda_declines, lambda x, weight, *rest: _cuda.large(x, weight)),
        dispatch.Backend("triton", lambda *args: _triton.head(*args, step), triton_declines),
        dispatch.Backend("cpu", run_cpu, cpu_declines),
        dispatch.Backend("numba", run_numba, numba_declines, lambda x, w, *rest: _numba.not_ready("exit_head") or _numba.large(x, w)),
        dispatch.Backend("reference", run_reference),
    )
    op = dispatch.register(dispatch.Op(name, backends, check))

    def flat(x, weight, bias, pool, norm, norm_weight, norm_bias, eps, measure, threshold, temperature, mask):
        args = (x, weight, bias, pool, Norm(norm, norm_weight, norm_bias, eps) if norm else None, measure, threshold, temperature, mask, True)
        r = dispatch.choose(op, args, {}).run(*args)
        logits = r.logits.clone() if r.logits.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr() else r.logits
        out = (r.label.clone(), r.confidence.clone(), r.exits, *(s.clone() for s in tuple(r.stats)[1:5]), logits)
        return (*out, r.index, torch.as_tensor(r.count, device=x.device)) if step else out

    def fake(x, weight, *rest):
        rows = _library.rows_like(x, *OUTPUTS)
        logits = x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32)
        tail = [x.new_empty(x.shape[0], dtype=torch.int64), x.new_empty((), dtype=torch.int64)] if step else []
        return (*rows, logits, *tail)

    returns = ", ".join(["Tensor"] * (10 if step else 8))
    _library.define(f"{name}(Tensor x, Tensor weight, Tensor? bias, {RULE}) -> ({returns})", flat, fake)
    packet = getattr(torch.ops.fastee, name)

    def head(
        x: Tensor,
        weight: Tensor | QuantizedRows,
        bias: Tensor | None = None,
        pool: str = "mean",
        norm: Norm | None = None,
        measure: str = "max_prob",
        threshold: float = 0.9,
        *,
        temperature: float = 1.0,
        mask: Tensor | None = None,
        logits: bool = False,
        backend: str | None = None,
    ) -> ExitHeadResult | ExitStepResult:
        args, options = check(x, weight, bias, pool, norm, measure, threshold, temperature=temperature, mask=mask, logits=logits)
        return through_torch(packet, step, *args) if is_compiling() else dispatch.choose(op, args, options, backend).run(*args)

    head.__name__ = head.__qualname__ = name
    head.__module__, head.__doc__ = f"fastee.ops.{name}", doc
    head.__annotations__["return"] = "ExitStepResult" if step else "ExitHeadResult"
    return op, dispatch.native_first(name, head)


def through_torch(packet: Callable, step: bool, x, weight, bias, pool, norm, measure, threshold, temperature, mask, logits):
    """Call the registered op (under torch.compile and torch.export) and shape its outputs like the eager result."""
    kind, nw, nb, eps = norm or (None, None, None, 0.0)
    out = packet(x, dequantized(weight), bias, pool, kind, nw, nb, eps, measure, threshold, temperature, mask)
    stats = RowStats(out[0], *out[3:7])
    z = out[7] if logits else None
    return ExitStepResult(*out[:3], stats, out[8], out[9], z) if step else ExitHeadResult(*out[:3], stats, z)

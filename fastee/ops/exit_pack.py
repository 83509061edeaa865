from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from fastee import dispatch, native, reference
from fastee.reference import Norm, RowStats

from . import _check, _cpu, _cuda, _library, _numba, _triton
from ._head import RULE, cuda_declines, dequantized, layout, numba_declines, triton_declines
from .exit_step import _op as _step
from .quantize_rows import DTYPES, _check_quantize, _quantize
from .results import ROWS, ExitPackResult, QuantizedRows

_direct = dispatch.direct("exit_pack")


def _check_args(x, weight, bias=None, pool="mean", norm=None, measure="max_prob", threshold=0.9, format="int8", *, group=None, temperature=1.0, mask=None, logits=False):  # fmt: skip
    args = _check.head("exit_pack", x, weight, bias, pool, norm, measure, threshold, temperature, mask)
    try:
        _check_quantize(args[0], format, group)
    except (TypeError, ValueError) as why:
        raise type(why)(str(why).replace("quantize_rows:", "exit_pack:", 1)) from None
    return (*args, logits, format, group), {}


def _cpu_declines(x, weight, bias, pool, norm, measure, threshold, temperature, mask, logits, format, group):
    w = weight.data if isinstance(weight, ROWS) else weight
    return (
        _cpu.plain(bias, *(norm or ())[1:3]) or _cpu.floats(x, None if w is not weight else w) or _cpu.contiguous_rows("x", x)
        or layout(x, w, bias, pool, norm, measure, threshold, temperature, mask)
    )  # fmt: skip


def _run_cpu(*args):
    x, weight, bias, pool, norm, measure, threshold, temperature, mask, logits, format, group = args
    keep = None if mask is None else mask.to(torch.uint8).contiguous()
    result = native.hot.exit_pack(x, weight, bias, pool, norm, measure, threshold, temperature, keep, logits, format, group)
    if result is None:
        raise RuntimeError(f"exit_pack: libfastee refused the call: {native.hot.last_error()}")
    return result


def _run_numba(x, weight, *rest):
    *rule, logits, format, group = rest
    step = dispatch.choose(_step, (x, weight, *rule, logits), {}, "numba").run(x, weight, *rule, logits)
    rows = x.detach().index_select(0, step.index[: step.count])
    packed = dispatch.choose(_quantize, (rows, format, group), {}, "numba").run(rows, format, group)
    wire = torch.cat([part.reshape(-1).view(torch.uint8) for part in (packed.scale, packed.data)])
    return ExitPackResult(*step[:6], wire, packed, step.logits if logits else None)


def _numba_yields(x, weight, *rest):
    return _numba.not_ready("exit_head") or _numba.not_ready("quantize_rows") or _numba.large(x, weight)


def _run_reference(x, weight, *rest):
    *rule, logits, format, group = rest
    step, wire, data, scale = reference.exit_pack(x, dequantized(weight), *rule, format=format, group=group)
    stats, count = RowStats(step.stats.label, *(s.float() for s in step.stats[1:5])), int(step.count)
    packed = QuantizedRows(data, scale, format, group, (count, *x.shape[1:]))
    return ExitPackResult(step.label, step.confidence.float(), step.exits, stats, step.index, count, wire, packed, step.logits if logits else None)


_op = dispatch.register(
    dispatch.Op(
        "exit_pack",
        (
            dispatch.Backend(
                "cuda",
                lambda *args: _cuda.exit_pack(*args, DTYPES[args[-2]]),
                lambda *a: cuda_declines(*a[:9]) or _cpu.contiguous_rows("x", a[0]),
                lambda x, weight, *rest: _cuda.large(x, weight),
            ),
            dispatch.Backend(
                "triton", lambda *args: _triton.exit_pack(*args, DTYPES[args[-2]]), lambda *a: triton_declines(*a[:9]) or _cpu.contiguous_rows("x", a[0])
            ),
            dispatch.Backend("cpu", _run_cpu, _cpu_declines),
            dispatch.Backend("numba", _run_numba, lambda *args: numba_declines(*args[:9]), _numba_yields),
            dispatch.Backend("reference", _run_reference),
        ),
        _check_args,
    )
)


def _flat(x, weight, bias, pool, norm, norm_weight, norm_bias, eps, measure, threshold, temperature, mask, format, group):
    norm = Norm(norm, norm_weight, norm_bias, eps) if norm else None
    args = (x, weight, bias, pool, norm, measure, threshold, temperature, mask, True, format, group)
    r = dispatch.choose(_op, args, {}).run(*args)
    stats = [s.clone() for s in tuple(r.stats)[1:5]]
    return r.label.clone(), r.confidence.clone(), r.exits.clone(), *stats, r.logits.clone(), r.index.clone(), r.packed.data.clone(), r.packed.scale.clone()


def _fake(x, weight, *rest):
    format, group = rest[-2:]
    rows, count, row = x.shape[0], torch.library.get_ctx().new_dynamic_size(), x.shape[1:].numel()
    shape = ((row + 1) // 2,) if format == "int4" else x.shape[1:]
    scales = (0,) if format == "bf16" else (count,) if group is None else (count, row // group)
    head = _library.rows_like(x, torch.int64, torch.float32, torch.bool, *[torch.float32] * 4)
    logits, index = x.new_empty(rows, weight.shape[0], dtype=torch.float32), x.new_empty(rows, dtype=torch.int64)
    return *head, logits, index, x.new_empty((count, *shape), dtype=DTYPES[format]), x.new_empty(scales, dtype=torch.float32)


_returns = ", ".join(["Tensor"] * 11)
_library.define(f"exit_pack(Tensor x, Tensor weight, Tensor? bias, {RULE}, str format, int? group) -> ({_returns})", _flat, _fake)


def _through_torch(x, weight, bias, pool, norm, measure, threshold, temperature, mask, logits, format, group):
    kind, nw, nb, eps = norm or (None, None, None, 0.0)
    out = torch.ops.fastee.exit_pack(x, weight, bias, pool, kind, nw, nb, eps, measure, threshold, temperature, mask, format, group)
    data, scale = out[9:]
    packed = QuantizedRows(data, scale, format, group, (data.shape[0], *x.shape[1:]))
    wire = torch.cat([part.reshape(-1).view(torch.uint8) for part in (scale, data)])
    return ExitPackResult(*out[:3], RowStats(out[0], *out[3:7]), out[8], data.shape[0], wire, packed, out[7] if logits else None)


def exit_pack(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pool: str = "mean",
    norm: Norm | None = None,
    measure: str = "max_prob",
    threshold: float = 0.9,
    format: str = "int8",
    *,
    group: int | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    logits: bool = False,
    backend: str | None = None,
) -> ExitPackResult:
    """Run one exit and pack the rows that stay, in one pass over the activation: `exit_step` plus `quantize_rows` of the survivors.

    Arguments, errors and edge behaviour are those of `exit_step`, `format` and `group` those of `quantize_rows`. Each chunk of rows is
    pooled, judged and packed while it lies in the cache. The native form takes fp32, bf16 and fp16 with contiguous rows. Adds ``.wire``, uint8
    [nbytes]: the survivors' scales (fp32) and then their data, in order, in one piece; and ``.packed``, the same bytes as
    `QuantizedRows` (made on first access by the native form): equal to ``quantize_rows(gather_rows(x, index[:count]))``.

    >>> import torch, fastee
    >>> x = torch.tensor([[9.0, 0.0], [1.0, -1.0], [0.0, 9.0]])
    >>> out = fastee.ops.exit_pack(x, torch.eye(2), pool="none", threshold=0.9)
    >>> out.count, out.packed.data.tolist(), out.wire.numel()
    (1, [[127, -127]], 6)
    """
    if backend is None and mask is None and not is_dynamo_compiling():
        result = _direct(x, weight, bias, pool, norm, measure, threshold, temperature, None, logits, format, group)
        if result is not None:
            return result
    args, options = _check_args(x, weight, bias, pool, norm, measure, threshold, format, group=group, temperature=temperature, mask=mask, logits=logits)
    return _through_torch(*args) if is_compiling() else dispatch.choose(_op, args, options, backend).run(*args)

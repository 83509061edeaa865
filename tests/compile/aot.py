"""Compile every Triton kernel ahead of time, as the ops launch it, and read what the machine code needs. No GPU is wanted.

``python -m tests.compile.aot`` prints what `resources.json` holds under "triton"; ``--write`` puts it there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

RESOURCES = Path(__file__).with_name("resources.json")
TARGETS = (80, 90, 100)
TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16",
    torch.int8: "*i8", torch.uint8: "*u8",
}  # fmt: skip


def calls():
    """Yield (name, call): the ops at shapes of which each takes another way through a kernel."""
    from fastee import ops

    f32, bf16 = torch.float32, torch.bfloat16
    e = lambda *shape, dtype=f32: torch.zeros(shape, dtype=dtype)  # nothing is computed; zeros are valid indices
    on = {"backend": "triton"}
    norm = ops.Norm("layer", e(768), e(768))
    yield "exit_step small", lambda: ops.exit_step(e(8, 256, 8, 8), e(10, 256), e(10), **on)
    yield (
        "exit_step small bf16 tokens layer",
        lambda: ops.exit_step(
            e(8, 128, 768, dtype=bf16), e(16, 768, dtype=bf16), e(16), "mean_tokens", norm, mask=e(8, 128, dtype=torch.bool), **on
        ),
    )
    yield "exit_step tiles bf16", lambda: ops.exit_step(e(256, 2048, dtype=bf16), e(1000, 2048, dtype=bf16), e(1000), "none", **on)
    yield "exit_step tiles fp32 rms", lambda: ops.exit_step(e(256, 768), e(1000, 768), None, "none", ops.Norm("rms", e(768)), **on)
    yield "exit_step tiles pooled", lambda: ops.exit_step(
        e(8, 3, 40), e(100, 40), None, "mean_tokens", mask=e(8, 3, dtype=torch.bool), **on
    )  # fmt: skip
    yield "linear_stats vocabulary bf16", lambda: ops.linear_stats(e(64, 4096, dtype=bf16), e(128_256, 4096, dtype=bf16), **on)
    yield "linear_stats vocabulary fp32 two moments", lambda: ops.linear_stats(e(64, 1024), e(262_144, 1024), second_moment=True, **on)
    yield (
        "exit_step vocabulary int8",
        lambda: ops.exit_step(
            e(64, 4096, dtype=bf16), ops.QuantizedRows(e(262_144, 4096, dtype=torch.int8), e(262_144)), None, "none", **on
        ),
    )
    yield "row_stats", lambda: ops.row_stats(e(32, 1000), **on)
    yield "row_stats wide", lambda: ops.row_stats(e(32, 128_256, dtype=bf16), **on)
    yield "mean_entropy", lambda: ops.mean_entropy(e(4, 50, 1000), e(4, 50, dtype=torch.bool), **on)
    yield "feature_delta", lambda: ops.feature_delta(e(32, 4096), e(32, 4096), **on)
    yield "pool", lambda: ops.pool(e(32, 512, 7, 7), **on)
    yield "pool channels-last", lambda: ops.pool(e(32, 512, 7, 7).to(memory_format=torch.channels_last), **on)
    yield "compact", lambda: ops.compact(e(256, dtype=torch.bool), **on)
    yield "compact large", lambda: ops.compact(e(70_000, dtype=torch.bool), **on)
    yield "gather_rows", lambda: ops.gather_rows(e(32, 4096), e(16, dtype=torch.int64), **on)
    yield "scatter_rows", lambda: ops.scatter_rows(e(32, 4096), e(16, dtype=torch.int64), e(16, 4096), **on)
    for format in ("int8", "int4", "fp8_e4m3", "bf16"):
        yield f"quantize_rows {format}", lambda format=format: ops.quantize_rows(e(64, 4096, dtype=bf16), format, **on)
        yield f"dequantize_rows {format}", lambda format=format: ops.dequantize_rows(_quantized(e, format), **on)
    yield "quantize_rows int8 long", lambda: ops.quantize_rows(e(64, 64, 56, 56), **on)
    yield "quantize_rows int8 groups", lambda: ops.quantize_rows(e(64, 4096, dtype=bf16), group=128, **on)
    yield "quantize_rows int4 odd groups", lambda: ops.quantize_rows(e(64, 45), "int4", 5, **on)
    yield "exit_pack fp8_e4m3", lambda: ops.exit_pack(e(8, 256, 8, 8, dtype=bf16), e(10, 256, dtype=bf16), format="fp8_e4m3", **on)
    for dtype in (f32, bf16, torch.float16):
        yield f"pack_planes {str(dtype)[6:]}", lambda dtype=dtype: _planes(e, dtype)


def _quantized(e, format):
    from fastee import ops
    from fastee.ops.quantize_rows import DTYPES

    shape = (64, 2048) if format == "int4" else (64, 4096)
    return ops.QuantizedRows(e(*shape, dtype=DTYPES[format]), e(0 if format == "bf16" else 64), format, None, (64, 4096))


def _planes(e, dtype):
    from fastee.ops import _triton

    kind = (torch.float32, torch.bfloat16, torch.float16).index(dtype)
    launchers = _triton.kernel("pack_planes", "pack_planes"), _triton.kernel("pack_planes", "unpack_planes")
    bits = e(8192, dtype=torch.int32 if kind == 0 else torch.int16)
    data = torch.zeros(1 << 16, dtype=torch.uint8)
    offsets, number = data[16:64].view(torch.int32), e(dtype=torch.int64)
    launchers[0](bits, kind, data, offsets, data, offsets, number)
    launchers[1](data, 8192, kind, offsets, 0, bits, number)


def recorded(tuning=None):
    """Run `calls` with a launcher that launches nothing and return {name: `specimen`}, each kernel variant once; `tuning`: heuristics."""
    from fastee.kernels import triton as package
    from fastee.kernels.triton import KERNELS, _launch, load
    from fastee.kernels.triton._tuning import Tuning
    from fastee.ops import _triton

    seen: dict[str, tuple] = {}
    name = ""

    def record(kernel, grid, *args, **meta):
        what = specimen(kernel, args, meta)
        if what not in seen.values():
            seen[f"{name}: {kernel.fn.__name__}"] = what

    modules = [load(k) for k in KERNELS]
    before = [(m, m.launch) for m in [_launch, *modules] if hasattr(m, "launch")]
    kept = package.INTERPRETED, _triton.tuning
    try:
        for m, _ in before:
            m.launch = record
        package.INTERPRETED = True  # the ops then take CPU tensors; the kernels were decorated before
        _triton.tuning = lambda x: tuning or Tuning()
        for name, call in calls():  # noqa: B007
            call()
    finally:
        for m, launch in before:
            m.launch = launch
        package.INTERPRETED, _triton.tuning = kept
    return seen


def specimen(kernel, args, meta):
    """Return what identifies a compilation, as Triton's own launch would make it from these arguments."""
    signature, constants, attributes = {}, {}, {}
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **{k: v for k, v in meta.items() if k in kernel.arg_names}}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype][1:]}{list(value.block_shape)}>"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif type(value) is int:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    options = {k: v for k, v in meta.items() if k not in kernel.arg_names}
    return kernel.fn.__module__, kernel.fn.__name__, signature, constants, attributes, options


def build(job):
    """Compile one specimen for one target; return (registers, shared bytes, stack bytes of a thread, spilled)."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    (module, kernel, signature, constants, attributes, options), capability = job
    function = getattr(importlib.import_module(module), kernel)
    if "NATIVE" in function.arg_names:  # what the op asks the device for
        constants = {**constants, (function.arg_names.index("NATIVE"),): capability >= 89}
    source = ASTSource(function, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True, **options})
    usage = resource_usage(made.asm["cubin"])
    needs = {"registers": usage["REG"], "shared": made.metadata.shared, "stack": usage["STACK"], "local": usage["LOCAL"]}
    return {**needs, "engines": engines(made.asm["cubin"])} if kernel == "head_kernel" else needs


def cuobjdump(cubin: bytes, what: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Return REG, STACK, SHARED and LOCAL of the kernel in a cubin, as cuobjdump reports them."""
    return {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", cuobjdump(cubin, "--dump-resource-usage"))}


def engines(cubin: bytes) -> list[str]:
    """Return which of the chip's engines the machine code uses: tensor cores (HMMA a warp's, HGMMA a warp group's, UTC.MMA of Blackwell),
    asynchronous copies (LDGSTS) and bulk copies (UTMALDG)."""
    return sorted(set(re.findall(r"\b(HMMA|HGMMA|UTC\w*MMA|LDGSTS|UTMALDG)\b", cuobjdump(cubin, "-sass"))))


def fits(name: str) -> tuple[int, ...]:
    """Return the targets of a specimen: the bulk copy engine came with Hopper."""
    return tuple(t for t in TARGETS if t >= 90 or not name.startswith("bulk"))


def measure(targets=TARGETS, workers=2):
    """Return {"<call>: <kernel>": {"sm_80": {...}, ...}} of every kernel variant."""
    from fastee.kernels.triton._tuning import Tuning

    seen = recorded()
    seen |= {f"bulk {name}": what for name, what in recorded(Tuning(bulk_copies=True)).items() if what not in seen.values()}
    jobs = [(name, what, capability) for name, what in seen.items() for capability in targets if capability in fits(name)]
    with ProcessPoolExecutor(workers) as pool:
        made = list(pool.map(build, [(what, capability) for _, what, capability in jobs], chunksize=4))
    out: dict[str, dict] = {}
    for (name, _, capability), resources in zip(jobs, made, strict=True):
        out.setdefault(name, {})[f"sm_{capability}"] = resources
    return out


if __name__ == "__main__":
    import triton

    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
    made = {"version": triton.__version__, "kernels": measure()}
    if "--write" in sys.argv:
        whole = json.loads(RESOURCES.read_text()) if RESOURCES.exists() else {}
        RESOURCES.write_text(json.dumps({**whole, "triton": made}, indent=1, sort_keys=True) + "\n")
    else:
        print(json.dumps(made, indent=1, sort_keys=True))

"""Every device op once, at small shapes: ``compute-sanitizer --tool memcheck python tests/gpu/small.py triton``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from fastee import ops
from fastee.errors import BackendUnavailable


def calls(backend):
    """Yield (name, call) of the ops on the device."""
    g = torch.Generator(device="cuda").manual_seed(0)
    r = lambda *shape, dtype=torch.float32: torch.randn(shape, generator=g, device="cuda").to(dtype)
    on = {"backend": backend}
    x, w, bf16 = r(5, 24, 3, 3), r(7, 24), torch.bfloat16
    yield "exit_step rows", lambda: ops.exit_step(x, w, norm=ops.Norm("layer"), **on)
    yield "exit_step tiles", lambda: ops.exit_step(r(67, 40, dtype=bf16), r(130, 40, dtype=bf16), None, "none", **on)
    yield "exit_step vocabulary", lambda: ops.exit_step(r(67, 40), r(2500, 40), None, "none", **on)
    yield "linear_stats", lambda: ops.linear_stats(r(3, 40), r(2500, 40), second_moment=True, **on)
    yield "row_stats", lambda: ops.row_stats(r(3, 9001), **on)
    yield "mean_entropy", lambda: ops.mean_entropy(r(3, 5, 33), torch.ones(3, 5, dtype=torch.bool, device="cuda"), **on)
    yield "feature_delta", lambda: ops.feature_delta(r(3, 1023), r(3, 1023), **on)
    yield "pool", lambda: ops.pool(x, **on)
    yield "compact", lambda: ops.compact(r(1025) > 0, **on)
    yield "compact large", lambda: ops.compact(r(70_001) > 0, **on)
    yield "gather_rows", lambda: ops.gather_rows(r(5, 33), torch.tensor([4, 0], device="cuda"), **on)
    yield "scatter_rows", lambda: ops.scatter_rows(r(5, 33), torch.tensor([4, 0], device="cuda"), r(2, 33), **on)
    for format in ("int8", "int4", "fp8_e4m3", "bf16"):
        yield f"quantize_rows {format}", lambda format=format: ops.dequantize_rows(ops.quantize_rows(r(5, 1023), format, **on), **on)
        yield f"exit_pack {format}", lambda format=format: ops.exit_pack(x, w, threshold=0.3, format=format, **on).wire
    yield "quantize_rows odd groups", lambda: ops.quantize_rows(r(3, 45), "int4", 5, **on)
    for dtype in (torch.float32, bf16, torch.float16):
        yield f"pack_planes {dtype}", lambda dtype=dtype: ops.unpack_planes(ops.pack_planes(r(5001, dtype=dtype), **on), **on)


if __name__ == "__main__":
    ran = 0
    for name, call in calls(sys.argv[1]):
        try:
            call()
        except BackendUnavailable as why:
            print(f"{name}: skipped: {why}")
            continue
        torch.cuda.synchronize()
        ran += 1
    print(f"ran {ran}")
    sys.exit(ran == 0)

"""pack_planes and unpack_planes on activations of the demo network, beside a copy; the ratio beside zlib -1."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch

import fastee
from fastee.testing.bench import Case, Context, Group

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def activations(rows: int, seed: int) -> list[tuple[str, torch.Tensor]]:
    """Return what crosses the first cuts of the demo network for `rows` images of the embedded set."""
    images = fastee.data.load("fashion_mnist_sample", split="test").tensors[0]
    net = fastee.data.demo_network().eval()
    picked = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:rows]]
    found: list[tuple[str, torch.Tensor]] = []
    hooks = [m.register_forward_hook(lambda _, __, out, n=n: found.append((n, out.detach()))) for n, m in net.named_children()]
    with torch.no_grad():
        net(picked)
    for hook in hooks:
        hook.remove()
    return [(n, h.contiguous()) for n, h in found if h.dim() == 4]


def cases(ctx: Context) -> Iterator[Group]:
    for layer, h in activations(32, ctx.seed):
        for kind, dtype in DTYPES.items():
            x = h.to(dtype)
            p = fastee.ops.pack_planes(x)
            if not torch.equal(fastee.ops.unpack_planes(p).view(torch.uint8), x.view(torch.uint8)):
                raise RuntimeError(f"{layer} {kind}: not lossless")
            name, size, ratio = f"{layer} {'x'.join(map(str, x.shape))}", x.nbytes, p.nbytes / x.nbytes
            inputs = ctx.rotate(lambda i, b=x: (b.roll(i, 0),), size)
            squeezed = len(zlib.compress(x.view(torch.uint8).numpy().tobytes(), 1)) / size
            yield Group(
                "pack_planes", name, kind,
                [Case("fastee", fastee.ops.pack_planes, inputs, note=f"zlib -1 reaches {squeezed:.3f}", ratio=ratio),
                 Case("copy", torch.clone, inputs, note="torch.clone", bytes=2 * size)],
                baseline="copy", bytes=size, roof="copy", working_set=2 * size,
                bars=(f"<= {size / 3e3:.1f} us", *(("ratio <= 0.72",) if kind == "bf16" and layer != "pixels" else ())),  # 3 GB/s in
            )  # fmt: skip
            packed = [(fastee.ops.pack_planes(v),) for (v,) in inputs]
            yield Group(
                "unpack_planes", name, kind,
                [Case("fastee", fastee.ops.unpack_planes, packed, ratio=ratio),
                 Case("copy", torch.clone, inputs, note="torch.clone", bytes=2 * size)],
                baseline="copy", bytes=size, roof="copy", working_set=2 * size, bars=(f"<= {size / 4e3:.1f} us",),  # 4 GB/s out
            )  # fmt: skip

"""What the lossless codecs share: the demo network's activations, raw, beside fastee's pack_planes and a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

import fastee
from fastee.testing.bench import Case, Context, Group

from ..bench_pack_planes import DTYPES, activations

LAYERS = ("stem", "stage2", "stage4")  # 38, 38 and 68 % zeros, 1605, 802 and 401 KB as fp32
Coder = tuple[str, Callable[[np.ndarray], bytes], Callable[[bytes], object]]


def raw(x: torch.Tensor) -> np.ndarray:
    """Return the bytes of a tensor as a uint8 array, without a copy."""
    return x.view(torch.uint8).reshape(-1).numpy()


def cases(coders: Callable[[int], list[Coder]], op: str, ctx: Context) -> Iterator[Group]:
    """Yield the groups of `op`, pack_planes or unpack_planes; `coders` gives (provider, encode, decode) for values of so many bytes."""
    kinds = ("bf16",) if ctx.shapes == "headline" else ("bf16", "fp32")
    for layer, h in activations(32, ctx.seed):
        if layer not in LAYERS:
            continue
        for kind in kinds:
            x = h.to(DTYPES[kind])
            own, copy = fastee.ops.pack_planes(x), Case("copy", torch.clone, note="torch.clone", bytes=2 * x.nbytes)
            inputs = copy.inputs = ctx.rotate(lambda i, x=x: (x.roll(i, 0),), x.nbytes)
            providers = []
            for provider, encode, decode in coders(x.element_size()):
                coded = encode(raw(x))
                if bytes(decode(coded)) != raw(x).tobytes():
                    raise RuntimeError(f"{provider} {layer} {kind}: not lossless")
                fn, args = (
                    (encode, [(raw(v),) for (v,) in inputs]) if op == "pack_planes" else (decode, [(encode(raw(v)),) for (v,) in inputs])
                )
                providers.append(Case(provider, fn, args, ratio=len(coded) / x.nbytes))
            packing = op == "pack_planes"
            fn, args = (
                (fastee.ops.pack_planes, inputs)
                if packing
                else (fastee.ops.unpack_planes, [(fastee.ops.pack_planes(v),) for (v,) in inputs])
            )
            yield Group(
                op, f"{layer} {'x'.join(map(str, x.shape))}", kind,
                [Case("fastee", fn, args, ratio=own.nbytes / x.nbytes), *providers, copy],
                baseline=providers[0].provider, bytes=x.nbytes, roof="copy", working_set=2 * x.nbytes,
                bars=(f">= 1x {providers[0].provider}",),
            )  # fmt: skip


def both(coders: Callable[[int], list[Coder]]) -> dict[str, Callable[[Context], Iterator[Group]]]:
    """Return the ``CASES`` of a codec: what is packed and what is unpacked."""

    def run(ctx: Context) -> Iterator[Group]:
        for op in ("pack_planes", "unpack_planes"):
            yield from cases(coders, op, ctx)

    return {"pack_planes": run}

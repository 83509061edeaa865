"""exit_head at batch 1 over the small heads, 64 to 768 features and 2 to 100 classes: a call that reads little."""

from __future__ import annotations

from collections.abc import Iterator

from fastee.testing.bench import Context, Group

from .bench_exit_step import SMALL, group
from .shapes import Shape


def cases(ctx: Context) -> Iterator[Group]:
    for D in (256,) if ctx.shapes == "headline" else (64, 256, 768):
        for C in (2, 10, 100):
            yield group(ctx, "exit_head", Shape("none", 1, (D,), C), bars=SMALL, compiled=not ctx.quick)

"""exit_head and exit_step beside what a user writes in torch: pool, linear, softmax, max, compare, and nonzero to find the survivors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

import fastee
from fastee.testing.bench import Case, Context, Group

from .shapes import HEADLINE, Shape, select

POOLS = {
    "mean": lambda x: x.mean((2, 3)),
    "none": lambda x: x,
    "mean_tokens": lambda x: x.mean(1),
    "cls": lambda x: x[:, 0],
    "last": lambda x: x[:, -1],
}
THRESHOLD = 0.9


def eager_head(x, weight, bias, pool):
    p = F.softmax(F.linear(pool(x), weight, bias), -1)
    confidence, label = p.max(-1)
    return label, confidence, confidence >= THRESHOLD


def eager_step(x, weight, bias, pool):
    label, confidence, exits = eager_head(x, weight, bias, pool)
    stay = (~exits).nonzero().squeeze(1)
    return label, confidence, exits, stay, stay.shape[0]


def eager_stats(x, weight, bias, pool):
    """All that a RowStats holds, not only what max_prob needs."""
    z = F.linear(pool(x), weight, bias)
    logp = F.log_softmax(z, -1)
    p = logp.exp()
    top, label = p.topk(2, -1)
    return label[:, 0], top[:, 0], top[:, 0] >= THRESHOLD, top[:, 0] - top[:, 1], -(p * logp).sum(-1), z.logsumexp(-1)


def with_tensors(op, *args, **kwargs):
    """Results make their tensors on first access (the runner reads plain numbers instead): the call with all three of them."""
    r = op(*args, **kwargs)
    return r.label, r.confidence, r.exits


def check(shape: Shape, ours, theirs) -> None:
    """Refuse to time two providers that disagree."""
    if not torch.allclose(ours.confidence, theirs[1], atol=1e-4) or (ours.label != theirs[0])[ours.stats.margin > 1e-4].any():
        raise RuntimeError(f"{shape}: fastee and torch disagree: {ours.confidence[:4].tolist()} against {theirs[1][:4].tolist()}")


def group(ctx: Context, op: str, shape: Shape, regime="", bars: tuple[str, ...] = (), compiled=False, extra=False) -> Group:
    gen = torch.Generator().manual_seed(ctx.seed)
    weight = torch.randn(shape.C, shape.D, generator=gen) / shape.D**0.5
    bias = torch.randn(shape.C, generator=gen)
    base = torch.randn(shape.B, *shape.dims, generator=gen)
    nbytes = base.numel() * 4
    inputs = ctx.rotate(lambda i: (base + 0.01 * i, weight, bias), nbytes, regime)
    ours, eager = (fastee.ops.exit_head, eager_head) if op == "exit_head" else (fastee.ops.exit_step, eager_step)
    eager = partial(eager, pool=POOLS[shape.pool])
    kwargs = {"pool": shape.pool, "threshold": THRESHOLD}
    check(shape, ours(*inputs[0], **kwargs), eager(*inputs[0]))
    ran = fastee.explain(op, *inputs[0], **kwargs)
    path = f"{ran.chosen} ({ran.isa}), batch invariant" if ran.chosen == "cpu" else ran.chosen
    cases = [Case("fastee", ours, inputs, kwargs, note=path), Case("torch", eager, inputs, note="eager")]
    if compiled:
        cases.append(ctx.compiled(eager, inputs))
    cases += ctx.backends(ours, inputs, kwargs)
    if extra:
        cases.append(Case("fastee_tensors", partial(with_tensors, ours), inputs, kwargs, note="label, confidence and exits made into tensors"))
        cases.append(Case("torch_stats", partial(eager_stats, pool=POOLS[shape.pool]), inputs, note="eager, all five statistics"))
    return Group(
        op, str(shape), "fp32", cases, bytes=4 * (shape.read + weight.numel() + bias.numel()),
        flops=2 * shape.B * shape.D * shape.C + shape.read, working_set=len(inputs) * nbytes + 4 * weight.numel(),
        regime=regime or "warm", bars=bars,
    )  # fmt: skip


SMALL = (">= 15x torch", ">= 5x compile")  # one row, a head of at most 768 features and 100 classes


def cases(ctx: Context) -> Iterator[Group]:
    for op in ("exit_head", "exit_step"):
        yield group(ctx, op, HEADLINE, bars=("<= 3 us", *SMALL, ">= 15x torch_stats"), compiled=True, extra=True)
        yield group(ctx, op, HEADLINE, regime="cold", bars=(">= 1x torch",))
        for shape in select(ctx.shapes):
            if shape != HEADLINE:
                bars = SMALL if shape.B == 1 and shape.D <= 768 and shape.C <= 100 else (">= 1x torch",)
                yield group(ctx, op, shape, bars=bars, compiled=not ctx.quick and ctx.shapes == "small")

"""Inputs that break kernels: hand-written edge rows and masks, and the statistics of rows in float64."""

from __future__ import annotations

import torch

# Around every vector width, the 32-row boundary of a mask word, and past one block (style: life of one kernel).
MASK_SIZES = (0, 1, 3, 7, 31, 32, 33, 63, 64, 65, 1023, 1024, 1025, 70_000)
CLASS_COUNTS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 100, 1000)
NAN, INF = float("nan"), float("inf")


def _gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def half_dominant(rows: int, classes: int, seed: int = 0) -> torch.Tensor:
    """Return fp32 [rows, classes] noise in which every second row has one class far ahead: random rows alone never test the maximum's path."""
    z = torch.randn(rows, classes, generator=_gen(seed))
    winner = torch.randint(classes, (rows,), generator=_gen(seed + 1))
    z[torch.arange(0, rows, 2), winner[::2]] += 12.0
    return z


def edge_logits(seed: int = 0) -> list[tuple[str, torch.Tensor]]:
    """Return named fp32 [B, C] logits: empty, odd widths, ties, NaN, +inf, -inf, extreme scales, dominated and row-strided ones.

    Every row that design calls invalid (a NaN or +inf among its logits, or all -inf) stands between valid rows, so that a kernel that
    lets one row leak into the next fails. The last dimension is always contiguous; rows may be strided.

    >>> [name for name, z in edge_logits() if len(z) == 0]
    ['empty', 'empty_one_class']
    """
    g = _gen(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g)
    cases = [("empty", rand(0, 10)), ("empty_one_class", rand(0, 1))]
    cases += [(f"classes_{c}", 3.0 * rand(5, c)) for c in CLASS_COUNTS]
    cases += [("one_row", rand(1, 10)), ("many_rows", half_dominant(257, 10, seed)), ("half_dominant", half_dominant(33, 100, seed))]

    ties = rand(6, 19).clamp(max=2.0)
    ties[0] = 1.0  # all equal
    ties[1, [3, 17]] = 5.0  # the winner twice, far apart
    ties[2, [0, 18]] = 5.0  # first and last
    ties[3, [7, 8]] = 5.0  # either side of an 8-lane boundary
    ties[4] = 0.0
    ties[4, ::2] = -0.0  # -0 equals +0: the smaller index wins
    cases += [("ties", ties), ("uniform_nobody_exits", torch.zeros(9, 10)), ("all_exit", torch.eye(10)[[1, 9, 4, 0]] * 50.0)]

    for name, value in (("nan", NAN), ("plus_inf", INF)):
        for where in (0, 8, 16):
            z = rand(5, 17)
            z[1, where] = value
            z[3] = value
            cases.append((f"{name}_at_{where}", z))
    z = rand(6, 17)
    z[1] = -INF  # invalid: nothing is possible
    z[2, 1:] = -INF  # one class possible
    z[3, :16] = -INF  # only the tail lane is finite
    z[4, ::3] = -INF
    z[5, 4], z[5, 5] = -INF, NAN
    cases += [("minus_inf", z), ("minus_inf_one_class", torch.tensor([[-INF], [0.5], [NAN], [INF]]))]

    cases += [("huge", 1e4 * rand(4, 33)), ("near_overflow", torch.full((2, 9), 3.0e38)), ("tiny", 1e-30 * rand(4, 33)), ("offset", rand(4, 33) + 1000.0)]
    cases += [("far_below", torch.cat([rand(3, 1) + 200.0, rand(3, 40) - 200.0], 1)), ("denormal", torch.full((2, 5), 1e-41))]

    cases += [("strided_rows", half_dominant(14, 12, seed)[::2]), ("strided_columns", half_dominant(7, 40, seed)[:, 3:20])]
    cases += [("row_broadcast", rand(1, 10).expand(4, 10)), ("unaligned", rand(3 * 10 + 1)[1:].view(3, 10))]
    return cases


def edge_masks(B: int, seed: int = 0) -> list[tuple[str, torch.Tensor]]:
    """Return named bool [B] masks (True = the row survives): none, all, alternating, first, last, all but one, random, strided.

    >>> [name for name, m in edge_masks(3) if m.all()]
    ['all', 'strided_all']
    """
    at = torch.arange(B)
    rand = torch.rand(2 * B, generator=_gen(seed)) < 0.5
    wide = torch.zeros(2 * B, dtype=torch.bool)
    wide[::2] = True
    return [
        ("none", torch.zeros(B, dtype=torch.bool)),
        ("all", torch.ones(B, dtype=torch.bool)),
        ("alternating", at % 2 == 0),
        ("first", at == 0),
        ("last", at == B - 1),
        ("all_but_middle", at != B // 2),
        ("random", rand[:B].clone()),
        ("sparse", torch.rand(B, generator=_gen(seed + 1)) < 0.03),
        ("strided_random", rand[::2]),
        ("strided_all", wide[::2]),
    ]


def edge_rows(seed: int = 0) -> list[tuple[str, torch.Tensor]]:
    """Return named finite fp32 [B, D] activations for pooling, moving and quantising: zeros, outliers, exact halves, odd widths, strides."""
    g = _gen(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g)
    cases = [("empty", rand(0, 8)), ("zeros", torch.zeros(3, 17)), ("negative_zero", torch.full((2, 9), -0.0)), ("constant", torch.full((2, 33), -2.5))]
    cases += [(f"width_{d}", rand(3, d)) for d in (1, 7, 8, 9, 15, 16, 17, 31, 64, 65, 1023)]
    halves = torch.arange(-127, 128, dtype=torch.float32).clone()[None].repeat(2, 1)
    halves[:, 1:-1] += 0.5  # with abs-max 127 the scale is 1: every value lies half way and must round to even
    outlier = rand(4, 65)
    outlier[1, 0], outlier[2, -1] = 1e4, -1e4
    cases += [("exact_halves", halves), ("outlier", outlier), ("large", 1e30 * rand(2, 40)), ("small", 1e-30 * rand(2, 40))]
    cases += [("strided_rows", rand(10, 24)[::2]), ("strided_columns", rand(5, 40)[:, 5:22]), ("relu", rand(6, 100).relu())]
    return cases


def stats_in(z: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return label, max_prob, margin, entropy and lse of the rows of z [B, C], computed the plain way in z's own dtype.

    Invalid rows (a NaN or +inf, or all -inf) have label -1 and NaN elsewhere; ties go to the smaller index.
    """
    bad = (torch.isnan(z) | (z == INF)).any(1) | (z == -INF).all(1)
    safe = torch.where(bad[:, None], torch.zeros_like(z), z)
    logp = safe.log_softmax(1)
    p = logp.exp()
    top = safe.amax(1, keepdim=True)
    out = {
        "max_prob": p.amax(1),
        "margin": p.amax(1) if z.shape[1] == 1 else p.topk(2, 1).values.diff(dim=1).neg().squeeze(1),
        "entropy": -torch.where(p > 0, p * logp, torch.zeros_like(p)).sum(1),
        "lse": safe.logsumexp(1),
    }
    out = {k: v.masked_fill(bad, NAN) for k, v in out.items()}
    index = torch.arange(z.shape[1]).expand(z.shape)
    label = torch.where(safe == top, index, z.shape[1]).amin(1)
    return {"label": label.masked_fill(bad, -1), **out}


def float64_stats(logits: torch.Tensor, temperature: float = 1.0) -> dict[str, torch.Tensor]:
    """Return the true statistics of logits [B, C] / temperature: int64 `label` [B] and float64 `max_prob`, `margin`, `entropy`, `lse` [B].

    >>> s = float64_stats(torch.tensor([[0.0, 0.0]])); s["label"].item(), s["max_prob"].item()
    (0, 0.5)
    """
    return stats_in(logits.double() / temperature)

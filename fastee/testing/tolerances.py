"""What counts as equal, by dtype: one table, so that no test invents a bound of its own.

Exact: indices, packing, masks away from the threshold. Statistics: the truth is float64, and a kernel may err at most twice as much as
plain torch in the same dtype plus a floor, in the maximum and in the root mean square.
"""

from __future__ import annotations

import torch

from fastee.testing.inputs import float64_stats, stats_in

# Relative to max(1, max |z|) for fp32 and absolute for the 16-bit types, whose inputs dominate the error.
FLOOR = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1e-4, torch.float16: 1e-4}
FIELDS = ("max_prob", "margin", "entropy", "lse")


def floor(logits: torch.Tensor) -> float:
    """Return the absolute error that is always granted for these logits: 1e-6 x max(1, max |z|) in fp32, 1e-4 in bf16 and fp16."""
    finite = logits[torch.isfinite(logits)].double()
    scale = float(finite.abs().max()) if finite.numel() and logits.dtype in (torch.float32, torch.float64) else 1.0
    return FLOOR[logits.dtype] * max(1.0, scale)


def _field(stats, name: str) -> torch.Tensor:
    return torch.as_tensor(stats[name] if isinstance(stats, dict) else getattr(stats, name))


def assert_stats_close(got, logits: torch.Tensor, *, truth: torch.Tensor | None = None, temperature: float = 1.0) -> None:
    """Assert that row statistics are right.

    `got` has label, max_prob, margin, entropy and lse [B] (a RowStats or a dict). `logits` [B, C] are what plain torch computes in the dtype
    under test; `truth` are the same logits in float64 when they come from a product (default: `logits` are exact). Labels must be equal; with
    `truth` (or a temperature) another class may win only if it is within the tolerance of the top.
    """
    exact = truth is None and temperature == 1.0
    z64 = (logits if truth is None else truth).double() / temperature
    want, plain = float64_stats(z64), stats_in((logits / temperature).to(logits.dtype))
    granted = floor(logits / temperature)
    label, bad = _field(got, "label"), want["label"] < 0
    if label.shape != want["label"].shape:
        raise AssertionError(f"label: shape {tuple(label.shape)}, expected {tuple(want['label'].shape)}")
    wrong = label != want["label"]
    if not exact and wrong.any():
        near = 2 * (z64 - logits.double() / temperature).nan_to_num(0, 0, 0).abs().amax(1) + granted
        picked = z64.gather(1, label.clamp(0, z64.shape[1] - 1)[:, None]).squeeze(1)
        wrong &= bad | (label < 0) | ~(picked >= z64.amax(1) - near)
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise AssertionError(f"label: row {i} has {int(label[i])}, expected {int(want['label'][i])}")
    for name in FIELDS:
        value = _field(got, name).double()
        if not torch.equal(value.isnan(), bad):
            i = int((value.isnan() != bad).nonzero()[0])
            raise AssertionError(f"{name}: row {i} is {float(value[i])}, expected {'NaN' if bad[i] else float(want[name][i])}")
        err, ref = (value - want[name])[~bad].abs(), (plain[name].double() - want[name])[~bad].abs()
        if not err.numel():
            continue
        for kind, a, b in (("max", err.max(), ref.max()), ("rms", err.square().mean().sqrt(), ref.square().mean().sqrt())):
            bound = 2 * float(b) + granted
            if not float(a) <= bound:
                raise AssertionError(f"{name}: {kind} error {float(a):.3e} exceeds {bound:.3e} (plain {logits.dtype}: {float(b):.3e})")


def assert_decisions_match(exits: torch.Tensor, confidence: torch.Tensor, threshold: float, tol: float = 0.0) -> None:
    """Assert that bool `exits` [B] equals `confidence >= threshold` wherever |confidence - threshold| > tol; NaN must never exit.

    `confidence` is the true one (float64, or the op's own with ``tol=0``).
    """
    if exits.dtype != torch.bool or exits.shape != confidence.shape:
        raise AssertionError(f"exits: expected bool {tuple(confidence.shape)}, got {exits.dtype} {tuple(exits.shape)}")
    conf = confidence.double()
    away = ~((conf - threshold).abs() <= tol) if tol else torch.ones_like(exits)
    wrong = away & (exits != (conf >= threshold))
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise AssertionError(f"exits: row {i} is {bool(exits[i])} at confidence {float(conf[i])} and threshold {threshold}")


def assert_compacted(index: torch.Tensor, count: int, survives: torch.Tensor) -> None:
    """Assert that `index` int64 [B] is the survivors in order, then the other rows reversed, and `count` their number (bit-exact)."""
    kept, dropped = survives.nonzero().flatten(), (~survives).nonzero().flatten()
    if int(count) != len(kept):
        raise AssertionError(f"count: got {int(count)}, expected {len(kept)}")
    if index.dtype != torch.int64 or not torch.equal(index, torch.cat([kept, dropped.flip(0)])):
        raise AssertionError(f"index: got {index.tolist()[:16]}, expected survivors {kept.tolist()[:8]} then dropped {dropped.flip(0).tolist()[:8]}")


def assert_quantized(data: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, limit: int = 127) -> None:
    """Assert int8 rows: scale within 1 ulp of abs-max / limit, data = round half to even of x / scale, round trip within scale / 2."""
    rows = x.flatten(1).double()
    want = (rows.abs().amax(1) / limit if rows.shape[1] else rows.sum(1)).float()
    ulp = torch.nextafter(want, torch.full_like(want, float("inf"))) - want
    moved = (scale - want).abs() > ulp
    if (moved & (want > 0)).any():
        i = int((moved & (want > 0)).nonzero()[0])
        raise AssertionError(f"scale: row {i} is {float(scale[i])!r}, expected {float(want[i])!r} within 1 ulp")
    back = data.flatten(1).double() * scale.double()[:, None]
    off = (back - rows).abs() > scale.double()[:, None] * 0.5 * (1 + 1e-5) + 1e-45
    if off.any():
        i, j = off.nonzero()[0].tolist()
        raise AssertionError(f"data: row {i}, column {j}: {float(back[i, j])!r} is more than half a step from {float(rows[i, j])!r}")
    safe = torch.where(scale > 0, scale, torch.ones_like(scale)).double()[:, None]
    exact = (rows / safe).frac().abs() == 0.5  # half to even is only observable where the quotient is exact
    odd = exact & (data.flatten(1).remainder(2) != 0) & (data.flatten(1).abs() < limit)
    if odd.any():
        i, j = odd.nonzero()[0].tolist()
        raise AssertionError(f"data: row {i}, column {j} was rounded to the odd neighbour of an exact half")

"""Multiply-adds of the parts of a network, and exits at even cost."""

from __future__ import annotations

import math

import torch
from torch import fx, nn

from fastee.errors import CannotCut
from fastee.nn.segment import Cut, Splitter


def segment_macs(splitter: Splitter, cuts: list[Cut]) -> list[float]:
    """Return the multiply-adds per sample of each of the K+1 segments (matrix products, convolutions, attention)."""
    marks = [0.0, *[spent(splitter, c.index) for c in cuts], spent(splitter, len(splitter.nodes) - 1)]
    return [b - a for a, b in zip(marks, marks[1:], strict=False)]


def spent(splitter: Splitter, index: int) -> float:
    """Return the multiply-adds per sample of the graph up to and including node `index`."""
    return max((splitter.trace.macs.get(n, 0.0) for n in splitter.nodes[: index + 1]), default=0.0)


def choose_exits(backbone: nn.Module, splitter: Splitter, count: int) -> tuple[str, ...]:
    """Return `count` legal places whose costs lie nearest to even, preferring narrow carries and ends of blocks.

    Each place p and rank j costs ``|share_p - j/(N+1)| + 0.02 log2(bytes_p / least bytes) + 0.1 (tensors in the carry - 1)``
    plus 0.05 for a leaf module; the cheapest increasing choice is found exactly by dynamic programming.
    """
    total = spent(splitter, len(splitter.nodes) - 1)
    if total <= 0:
        raise CannotCut("exits: auto placement needs multiply-adds to count, and this backbone has none")
    modules = dict(backbone.named_modules())
    places: dict[int, tuple[Cut, str]] = {}
    for name in sorted(splitter.trace.taps, key=lambda n: (n.count("."), len(n))):
        if splitter.trace.calls.get(name, 0) != 1:
            continue
        try:
            cut = splitter.cut(name)
        except CannotCut:
            continue
        shape = splitter.trace.at2[cut.carry[0]].shape
        share = spent(splitter, cut.index) / total
        if 2 <= len(shape) <= 5 and 0.01 <= share <= 0.99:
            places.setdefault(cut.index, (cut, name))
    found = [places[i] for i in sorted(places)]
    if len(found) < count:
        raise CannotCut(f"exits: auto placement found {len(found)} legal places, {count} asked: {[n for _, n in found]}")
    least = min(_bytes(splitter, c.carry) for c, _ in found)

    def cost(place: tuple[Cut, str], rank: int) -> float:
        cut, name = place
        off = abs(spent(splitter, cut.index) / total - rank / (count + 1))
        wide = 0.02 * math.log2(_bytes(splitter, cut.carry) / least)
        more = 0.1 * (len(cut.carry) - 1 - len(splitter.keep))
        leaf = 0.05 * (next(modules[name].children(), None) is None)
        return off + wide + more + leaf

    best: list[list[tuple[float, int]]] = []
    for j in range(1, count + 1):
        row: list[tuple[float, int]] = []
        for p, place in enumerate(found):
            before = min(((best[-1][q][0], q) for q in range(p)), default=(math.inf, -1)) if best else (0.0, -1)
            row.append((before[0] + cost(place, j), before[1]))
        best.append(row)
    p = min(range(len(found)), key=lambda q: (best[-1][q][0], -q))
    chosen = []
    for j in range(count - 1, -1, -1):
        chosen.append(found[p][1])
        p = best[j][p][1]
    return tuple(reversed(chosen))


def _bytes(splitter: Splitter, carry: list[fx.Node]) -> int:
    infos = [splitter.trace.at2[n] for n in carry]
    return max(1, sum(math.prod(i.shape[1:]) * torch.empty(0, dtype=i.dtype).element_size() for i in infos))

"""The model of csrc/plan/spatial.cc in plain Python: the oracle of the tests, and what plans where nothing was compiled.

Doubles are combined in the order of the C++ code, so both agree bit for bit.
"""

from __future__ import annotations

import math
from bisect import insort

import numpy as np

from fastee.planning.spatial.geometry import Net, check_plan, vsl


class SpatialModel:
    """Latency recursion and LC-PSS for one net on N providers; the methods of ``fastee._C.SpatialModel`` that need no search."""

    def __init__(self, net: Net, times: np.ndarray, tail: list[float]):
        self.net, self.tail, self.n = net, [float(t) for t in tail], len(tail)
        starts = np.cumsum([0, *(layer.out_h + 1 for layer in net.layers)])
        self.times = [[row[a:b].tolist() for a, b in zip(starts, starts[1:], strict=False)] for row in np.asarray(times, dtype=np.float64).reshape(self.n, -1)]
        self.whole = []
        for d in range(self.n):
            total = self.tail[d]
            for table in self.times[d]:
                total += table[-1]
            self.whole.append(total)
        self.cut_points = list(net.cut_points)
        self.set_links([math.inf] * self.n, [True] * self.n, math.inf, 0.0, False)

    def set_links(self, rates, up, requester, latency, contention):
        self.rates, self.up, self.requester, self.delay, self.contention = list(rates), list(up), requester, latency, contention
        usable = [d for d in range(self.n) if up[d] and rates[d] > 0]
        self.root = min(usable, key=lambda d: self.whole[d]) if usable else 0

    def part(self, provider: int, begin: int, end: int, lo: int, hi: int) -> tuple[float, int, int]:
        """Seconds of rows [lo, hi) of a volume on a provider, and the rows of its input."""
        need, source = vsl(self.net, begin, end, (lo, hi))
        seconds = 0.0
        for i in sorted(need, reverse=True):
            seconds += self.times[provider][i][need[i][1] - need[i][0]]
        if lo < hi and not self.up[provider]:
            seconds = math.inf
        return seconds, *source

    def _move(self, amount: float, a: float, b: float) -> float:
        rate = min(a, b)
        return amount * (8.0 / rate if rate > 0 else math.inf)

    def finish_times(self, bounds, cuts) -> tuple[float, list[float]]:
        """(T_end, finish time of every provider after every volume)."""
        n, volumes = self.n, len(bounds) - 1
        splits = [list(cuts[j * (n + 1) : (j + 1) * (n + 1)]) for j in range(volumes)]
        check_plan(self.net, n, bounds, splits)
        finish, every, before = [0.0] * n, [], None
        for j in range(volumes):
            e = splits[j]
            size = self.net.row_bytes(bounds[j])
            after, sent, leaving = list(finish), 0.0, list(finish)
            for d in range(n):
                if e[d] == e[d + 1]:
                    continue
                seconds, lo, hi = self.part(d, bounds[j], bounds[j + 1], e[d], e[d + 1])
                ready = finish[d]
                if lo < hi and before is None:
                    move = self._move(size * (hi - lo), self.rates[d], self.requester)
                    sent = sent + move if self.contention else move
                    ready = self.delay + sent
                elif lo < hi:
                    for s in range(n):
                        rows = min(hi, before[s + 1]) - max(lo, before[s])
                        if s == d or rows <= 0:
                            continue
                        move = self._move(size * rows, self.rates[s], self.rates[d])
                        arrives = (leaving[s] if self.contention else finish[s]) + move
                        leaving[s] = arrives
                        ready = max(ready, arrives)
                after[d] = ready + seconds
            finish, before = after, e
            every += finish
        size, end = self.net.row_bytes(len(self.net.layers)), finish[self.root]
        for d in range(n):
            rows = before[d + 1] - before[d]
            move = 0.0 if d == self.root or rows == 0 else self._move(size * rows, self.rates[d], self.rates[self.root])
            end = max(end, finish[d] + move)
        return end + self.tail[self.root], every

    def latency(self, bounds, cuts) -> float:
        return self.finish_times(bounds, cuts)[0]

    def volume_cost(self, begin: int, end: int, vectors) -> tuple[float, float]:
        """Mean (bytes a provider lacks at the start, MACs with halo) of a volume over split vectors [R, N-1]."""
        h_in, h_out, first = self.net.height(begin), self.net.height(end), begin == 0
        moved, total = 0.0, 0.0
        for u in np.asarray(vectors, dtype=np.float64).tolist():
            at = lambda h, u=u: [0, *(int(math.floor(h * v + 0.5)) for v in u), h]
            ins, outs = at(h_in), at(h_out)
            for d in range(self.n):
                need, (lo, hi) = vsl(self.net, begin, end, (outs[d], outs[d + 1]))
                part = 0.0
                for i in sorted(need, reverse=True):
                    part += self.net.layers[i].row_macs * (need[i][1] - need[i][0])
                total += part
                if lo < hi:
                    moved += hi - lo - (0 if first else max(0, min(hi, ins[d + 1]) - max(lo, ins[d])))
        return moved * self.net.row_bytes(begin) / len(vectors), total / len(vectors)

    def lcpss(self, vectors, alpha: float) -> tuple[list[int], list[float]]:
        """(bounds, score after each added cut): LC-PSS, greedy."""
        points, costs = self.cut_points, {}

        def score(at):
            t = o = 0.0
            for pair in zip(at, at[1:], strict=False):
                if pair not in costs:
                    costs[pair] = self.volume_cost(points[pair[0]], points[pair[1]], vectors)
                t += costs[pair][0]
                o += costs[pair][1]
            return (alpha * t / t0 if t0 > 0 else 0.0) + ((1 - alpha) * o / o0 if o0 > 0 else 0.0)

        t0, o0 = 0.0, 0.0
        for a in range(len(points) - 1):
            costs[a, a + 1] = self.volume_cost(points[a], points[a + 1], vectors)
            t0 += costs[a, a + 1][0]
        for layer in self.net.layers:
            o0 += layer.row_macs * layer.out_h
        chosen = [0, len(points) - 1]
        best = score(chosen)
        scores = [best]
        while True:
            cut = None
            for p in range(1, len(points) - 1):
                if p in chosen:
                    continue
                c = score(sorted([*chosen, p]))
                if c < best:
                    best, cut = c, p
            if cut is None:
                return [points[p] for p in chosen], scores
            insort(chosen, cut)
            scores.append(best)

"""Cross-entropy search over the cuts of fixed volumes: the deterministic substitute of OSDS where torch is absent."""

from __future__ import annotations

import numpy as np

from fastee.planning.spatial.baselines import by_weight

ITERATIONS, CANDIDATES, ELITES, DEVIATION, FLOOR = 60, 40, 8, 0.25, 0.01


def cross_entropy(problem, seed: int = 0, iterations: int = ITERATIONS):
    """Return (volumes, splits): the best of `iterations` x 40 sampled cut vectors over the LC-PSS volumes (reconstructed).

    Cuts as fractions of the rows, normal with deviation 0.25 at first and 0.01 at least, around proportional cuts; the 8 best of 40
    give the next mean and deviation. The mean itself is always tried.
    """
    rng = np.random.default_rng(seed)
    volumes, n = tuple(problem.lcpss()), problem.providers
    heights = [problem.net.height(b) for b in volumes[1:]]
    weights = [1.0 / max(problem.whole[d], 1e-12) if problem.up[d] and problem.rates[d] > 0 else 0.0 for d in range(n)]
    start = [by_weight(h, weights) for h in heights]
    mean = np.array([[e / h for e in cuts[1:-1]] for cuts, h in zip(start, heights, strict=True)])
    deviation = np.full_like(mean, DEVIATION)
    best, best_latency = start, problem.latency(volumes, start)
    for _ in range(iterations if n > 1 else 0):
        samples = np.clip(mean + deviation * rng.standard_normal((CANDIDATES, *mean.shape)), 0.0, 1.0)
        samples[0] = mean
        samples.sort(axis=2)
        if n > 1:
            down = [d for d in range(n) if weights[d] == 0.0]
            for d in down:  # nothing for who cannot be reached: its upper cut falls onto its lower one
                if d < n - 1:
                    samples[:, :, d] = samples[:, :, d - 1] if d else 0.0
                else:
                    samples[:, :, d - 1] = 1.0
        plans = [[[0, *np.floor(h * u + 0.5).astype(int).tolist(), h] for u, h in zip(s, heights, strict=True)] for s in samples]
        latencies = np.array([problem.latency(volumes, p) for p in plans])
        order = np.argsort(latencies, kind="stable")[:ELITES]
        if latencies[order[0]] < best_latency:
            best, best_latency = plans[order[0]], float(latencies[order[0]])
        elite = samples[order]
        mean, deviation = elite.mean(axis=0), np.maximum(elite.std(axis=0), FLOOR)
    return volumes, best

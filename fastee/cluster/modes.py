"""Ways of using a running cluster that every plan must beat, by the same client: all here, send the input, data parallel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastee.cluster.local import Cluster
from fastee.cluster.result import ClusterResult
from fastee.errors import ClusterError, did_you_mean

MODES = ("scheduled", "here", "send_input", "data_parallel")


def placements(cluster: Cluster, mode: str, rows: int) -> list[list[int] | None]:
    """Return one plan (node per segment, None: the scheduler decides) for each of `rows` rows sent at once.

    "scheduled": None. "here": all on node 0, where the caller is. "send_input": all on the node that would answer one row first, the way there
    included. "data_parallel": whole rows dealt out, each to the node that would have it done first after those it has. Costs are the cluster's
    profile, so a cluster of :meth:`Cluster.connect`, which has none, knows the first two only. ``ValueError`` for another mode.

    >>> placements(cluster, "data_parallel", 3)     # doctest: +SKIP
    [[0, 0, 0], [2, 2, 2], [1, 1, 1]]
    """
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(MODES)}{did_you_mean(mode, MODES)}")
    if mode == "scheduled":
        return [None] * rows
    segments = cluster._net.num_segments
    if mode == "here":
        return [[0] * segments for _ in range(rows)]
    profile = cluster.profile
    if profile is None:
        raise ClusterError(f"cluster: mode {mode!r} needs measured costs, which a cluster of `connect` leaves to its nodes")
    raw = profile.codecs.index("raw")
    service = profile.mean[:, :, 0].sum(0)
    there = [0.0] + [profile.delay[0, n] + 8 * profile.wire_bytes[0, raw] / profile.bandwidth[0, n] for n in range(1, len(profile.nodes))]
    back = [0.0] + [profile.delay[n, 0] for n in range(1, len(profile.nodes))]
    if mode == "send_input":
        best = min(range(1, len(there)), key=lambda n: there[n] + service[n] + back[n]) if len(there) > 1 else 0
        return [[best] * segments for _ in range(rows)]
    # Each node works on its rows one after the other while the next ones cross its link.
    arrives, free, out = list(there), [0.0] * len(there), []
    for _ in range(rows):
        done = [max(arrives[n], free[n]) + service[n] for n in range(len(there))]
        best = min(range(len(there)), key=lambda n: done[n] + back[n])
        free[best] = done[best]
        arrives[best] += there[best] - (profile.delay[0, best] if best else 0.0)
        out.append([best] * segments)
    return out


def run_mode(cluster: Cluster, x: Any, mode: str, deadline: float | None = None, exits: bool = True, codec: str | None = None) -> ClusterResult:
    """Answer every row of `x` at once in a mode of `MODES` and return the ClusterResult; a row's clock starts when its batch was given.

    `exits`: False runs every row to the network's end. `codec` as of the cluster's call. Errors stand in ``.errors``.

    >>> run_mode(cluster, x, "send_input", exits=False).latency.max()     # doctest: +SKIP
    """
    values = cluster._values(x)
    plans: Sequence[list[int] | None] = placements(cluster, mode, len(values[0]))
    futures = [cluster.submit(tuple(v[i : i + 1] for v in values), deadline, plan, exits, codec) for i, plan in enumerate(plans)]
    return ClusterResult([future.exception() or future.result() for future in futures], cluster._net.num_classes)


def summary(result: ClusterResult) -> dict[str, float]:
    """Return what a table of modes shows: ``seconds`` until the last row, ``p50`` and ``p99`` of the rows' seconds, ``answered``, ``forced``, ``bytes`` on links."""
    good = result.latency[~result.latency.isnan()]
    p50, p99, last = torch.quantile(good, torch.tensor([0.5, 0.99, 1.0], dtype=good.dtype)).tolist() if len(good) else [float("nan")] * 3
    return {"seconds": last, "p50": p50, "p99": p99, "answered": len(good), "forced": int(result.forced.sum()), "bytes": int(result.wire_bytes.sum())}

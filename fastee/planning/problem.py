"""From profile, cluster and promise to the numbers of csrc/plan/problem.h, checked."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastee.errors import BackendUnavailable, did_you_mean
from fastee.planning.cluster import ClusterSpec
from fastee.scheduling import Profile, QoS

try:
    from fastee import _C
except ImportError as error:  # FASTEE_BUILD=none, or not built yet
    _C, _WHY_NOT = None, str(error)
else:
    _WHY_NOT = ""

OBJECTIVES = ("latency", "throughput", "cost")
WEIGHTS = ("seconds", "money", "energy", "bytes")
MAX_WIDTH = 4096


def core(who: str) -> Any:
    """Return fastee._C, or raise BackendUnavailable with the reason."""
    if _C is None:
        raise BackendUnavailable(f"{who}: the C++ core is not there ({_WHY_NOT}); build it with `make build`")
    return _C


@dataclass(frozen=True)
class Question:
    """A checked planning question: `numbers` goes to C++, the rest names what the indices mean."""

    numbers: dict
    nodes: tuple[str, ...]
    codecs: tuple[str, ...]
    objective: str
    source: int
    batch: int
    fingerprint: str
    deadline: float | None
    max_drop: float | None
    quantile: float | None

    def with_numbers(self, **changes) -> dict:
        return {**self.numbers, **changes}


def question(
    prof: Profile, cluster: ClusterSpec | None, qos: QoS | None, *, objective: str, weights: Mapping[str, float] | None, source: str | int, batch: int,
    quantile: float | None, exit_probability: Any, exit_loss: Any, head_seconds: Any, segment_memory: Any, answer_bytes: float, choose_exits: bool,
) -> Question:  # fmt: skip
    """Check every argument of `fastee.plan` and return the Question."""
    if not isinstance(prof, Profile):
        raise TypeError(f"plan: prof must be a Profile, got {type(prof).__name__}")
    cluster = ClusterSpec.of(prof) if cluster is None else cluster
    qos = QoS() if qos is None else qos
    if not isinstance(cluster, ClusterSpec):
        raise TypeError(f"plan: cluster must be a ClusterSpec, got {type(cluster).__name__}")
    if not isinstance(qos, QoS):
        raise TypeError(f"plan: qos must be a QoS, got {type(qos).__name__}")
    if objective not in OBJECTIVES:
        raise ValueError(f"plan: objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}{did_you_mean(str(objective), OBJECTIVES)}")
    segments, nodes = prof.num_segments, len(cluster.nodes)
    z = _quantile(quantile)
    column = _batch_column(prof, batch)
    columns, speed = cluster.columns(prof), np.array([node.speed for node in cluster.nodes])
    run = (prof.mean[:, columns, column] + z * prof.spread[:, columns, column]) / speed
    head = _heads(head_seconds, segments - 1, nodes) / speed
    if (head > run[:-1]).any():
        k, n = (int(i) for i in np.argwhere(head > run[:-1])[0])
        raise ValueError(f"plan: head_seconds[{k}] on {cluster.names[n]!r} must be at most the profile's segment with its head ({run[k, n]:g} s), got {head[k, n]:g}")
    run[:-1] -= head
    for n, node in enumerate(cluster.nodes):
        if node.hosts is not None:
            outside = [s for s in node.hosts if not 0 <= s < segments]
            if outside:
                raise ValueError(f"cluster: hosts of {node.name!r} must lie in 0..{segments - 1}, got {outside[0]}")
            run[[s for s in range(segments) if s not in node.hosts], n] = math.inf
    bandwidth, delay = cluster.network(prof)
    room = np.array([math.inf if node.memory is None else node.memory for node in cluster.nodes])
    if segment_memory is None and np.isfinite(room).any():
        limited = cluster.names[int(np.flatnonzero(np.isfinite(room))[0])]
        raise ValueError(f"plan: segment_memory [{segments}] is needed because node {limited!r} has a memory limit")
    prices, second_price, byte_price = _prices(cluster, objective, weights)
    leave = _per_exit("exit_probability", exit_probability, segments - 1)
    loss = _per_exit("exit_loss", exit_loss, segments - 1)
    if isinstance(answer_bytes, bool) or not isinstance(answer_bytes, (int, float)):
        raise TypeError(f"plan: answer_bytes must be a number, got {type(answer_bytes).__name__}")
    if not 0 <= answer_bytes < math.inf:
        raise ValueError(f"plan: answer_bytes must be finite and >= 0, got {answer_bytes}")
    numbers = dict(
        segments=segments, nodes=nodes, codecs=len(prof.codecs), source=_source(source, cluster.names), objective=OBJECTIVES.index(objective),
        run=run, head=head, wire_bytes=prof.wire_bytes * batch, codec_seconds=prof.codec_seconds * batch, bandwidth=bandwidth, delay=delay,
        leave=leave, loss=loss, memory=_array("segment_memory", segment_memory, (segments,), "[S]"), room=room, price=prices,
        second_price=second_price, byte_price=byte_price, answer_bytes=float(answer_bytes) * batch,
        deadline=math.inf if qos.deadline is None else qos.deadline, max_drop=math.inf if qos.max_drop is None else qos.max_drop,
        choose_exits=choose_exits, max_width=MAX_WIDTH,
    )  # fmt: skip
    return Question(numbers, cluster.names, tuple(prof.codecs), objective, numbers["source"], batch, prof.fingerprint, qos.deadline, qos.max_drop, quantile)


def _quantile(quantile: float | None) -> float:
    if quantile is None:
        return 0.0
    if isinstance(quantile, bool) or not isinstance(quantile, (int, float)):
        raise TypeError(f"plan: quantile must be a number in [0.5, 1) or None, got {type(quantile).__name__}")
    if not 0.5 <= quantile < 1:
        raise ValueError(f"plan: quantile must be a number in [0.5, 1) or None, got {quantile}")
    return statistics.NormalDist().inv_cdf(quantile)


def _batch_column(prof: Profile, batch: int) -> int:
    if isinstance(batch, bool) or not isinstance(batch, int):
        raise TypeError(f"plan: batch must be an int, got {type(batch).__name__}")
    if batch not in prof.batch_sizes:
        raise ValueError(f"plan: batch must be one of the profile's {list(prof.batch_sizes)}, got {batch}")
    return prof.batch_sizes.index(batch)


def _source(source: str | int, names: tuple[str, ...]) -> int:
    if isinstance(source, str):
        if source not in names:
            raise ValueError(f"plan: source must be one of the nodes {list(names)}, got {source!r}{did_you_mean(source, names)}")
        return names.index(source)
    if isinstance(source, bool) or not isinstance(source, int):
        raise TypeError(f"plan: source must be a node's name or index, got {type(source).__name__}")
    if not 0 <= source < len(names):
        raise ValueError(f"plan: source must be in 0..{len(names) - 1}, got {source}")
    return source


def _array(name: str, value: Any, shape: tuple[int, ...], meaning: str, high: float = math.inf) -> np.ndarray:
    if value is None:
        return np.zeros(shape)
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"plan: {name} must be an array of numbers {meaning}: {error}") from None
    if array.shape != shape:
        raise ValueError(f"plan: {name} must have shape {meaning} = {list(shape)}, got {list(array.shape)}")
    bad = ~(np.isfinite(array) & (array >= 0) & (array <= high))
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        limit = "finite and >= 0" if math.isinf(high) else f"in [0, {high:g}]"
        raise ValueError(f"plan: {name}{list(at)} must be {limit}, got {array[at]}")
    return array


def _per_exit(name: str, value: Any, exits: int) -> np.ndarray:
    return _array(name, value, (exits,), "[K]", 1.0)


def _heads(value: Any, exits: int, nodes: int) -> np.ndarray:
    if value is not None and np.ndim(value) == 1:
        return np.repeat(_array("head_seconds", value, (exits,), "[K]")[:, None], nodes, axis=1)
    return _array("head_seconds", value, (exits, nodes), "[K, N]")


def _prices(cluster: ClusterSpec, objective: str, weights: Mapping[str, float] | None) -> tuple[np.ndarray, float, float]:
    weights = {"money": 1.0} if weights is None else weights
    if not isinstance(weights, Mapping):
        raise TypeError(f"plan: weights must be a mapping with keys {', '.join(WEIGHTS)}, got {type(weights).__name__}")
    for name, value in weights.items():
        if name not in WEIGHTS:
            raise ValueError(f"plan: weights must have keys among {', '.join(WEIGHTS)}, got {name!r}{did_you_mean(str(name), WEIGHTS)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"plan: weights[{name!r}] must be a number, got {type(value).__name__}")
        if not 0 <= value < math.inf:
            raise ValueError(f"plan: weights[{name!r}] must be finite and >= 0, got {value}")
    w = {name: float(weights.get(name, 0.0)) for name in WEIGHTS}
    prices = np.array([w["money"] * node.price + w["energy"] * node.watts for node in cluster.nodes])
    if objective == "cost" and not (prices.any() or w["seconds"] or w["bytes"]):
        raise ValueError("plan: objective 'cost' needs something that costs: a node with a price or watts under weights, or weights for seconds or bytes")
    return prices, w["seconds"], w["bytes"]

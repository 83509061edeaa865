"""One inference over several processes, split by rows as a spatial plan says: ``spatial_cluster()`` and what it measures first."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cloudpickle
import torch

from fastee.cluster import codec as codecs
from fastee.cluster.client import Client, NodeState, _Task
from fastee.cluster.frame import FREE, Flag, Frame, Kind
from fastee.cluster.link import Link, link_table
from fastee.cluster.local import LocalNode, check_nodes, end_nodes, launch, open_clusters
from fastee.cluster.messages import node_peer
from fastee.cluster.spatial_node import Schedule
from fastee.cluster.spatial_worker import SpatialSettings
from fastee.errors import ClusterError, FrameError, PeerLost
from fastee.planning.spatial import Device, Links, SpatialPlan, plan_spatial
from fastee.planning.spatial.extract import SpatialModule, extract
from fastee.planning.spatial.geometry import input_rows
from fastee.planning.spatial.planner import without

LOSSLESS = ("raw", "planes")


@dataclass(frozen=True)
class SpatialAnswer:
    """One answered input: the network's `output`, `latency` in seconds since its clock started, `attempts` (1: none was lost)."""

    output: torch.Tensor
    latency: float
    attempts: int


class SpatialClient(Client):
    """A client whose tasks go to all nodes at once; a lost or returned node means a new plan, and tasks that needed a lost one start over."""

    def __init__(self, names: Sequence[str], *, module: SpatialModule, plan: SpatialPlan, overlap: bool, **options: Any):
        self.module, self.plan, self.plans = module, plan, 1
        self._overlap, self._gone = overlap, set()
        super().__init__(names, machine=len(names), **options)

    def _entry(self) -> NodeState | None:
        return self.nodes[self.plan.root] if self.nodes[self.plan.root].up else None

    def _lost(self, node: NodeState) -> None:
        self._gone.add(node.index)
        self._replan(lost=[node.index])
        super()._lost(node)

    def _found(self, node: NodeState) -> None:
        if node.index in self._gone:
            self._gone.remove(node.index)
            self._replan(back=[node.index])

    def _replan(self, **change: list[int]) -> None:
        if len(self._gone) == len(self.nodes):
            return
        if self.plan.planner is not None and self.plan.planner.native:
            self.plan = self.plan.replan(**change)
        else:
            alive = [n.index not in self._gone for n in self.nodes]
            splits = tuple(tuple(without(cuts, alive)) for cuts in self.plan.splits)
            root = self.plan.root if alive[self.plan.root] else alive.index(True)
            self.plan = replace(self.plan, splits=splits, root=root, latency=math.nan, method="shared out", compared={})
        self.plans += 1

    def _send(self, task: _Task, entry: NodeState) -> None:
        plan = self.plan
        schedule = Schedule(self.module.net, plan.volumes, plan.splits, plan.root, self._overlap)
        users = {d for cuts in plan.splits for d in range(schedule.providers) if cuts[d] < cuts[d + 1]} | {plan.root}
        task.entry = task.place = entry.index
        task.visited = users
        entry.in_flight += 1
        packed = schedule.pack(min(self._pending))
        for d in sorted(users, key=lambda d: self.nodes[d].index):
            lo, hi = schedule.reads(0, d)
            tensors, payload = codecs.pack((task.values[0][:, :, lo:hi], torch.tensor([lo, hi]), packed))
            frame = Frame(Kind.TASK, task=task.number, origin=self._incarnation, hops=task.attempt << 8, tensors=tensors, payload=payload)
            if not self._endpoint.put(node_peer(d), d, frame):
                self._fail(task, PeerLost(f"cluster: the link from the caller to {self.nodes[d].name!r} is down"))
                return

    def _answered(self, node: NodeState, frame: Frame) -> None:
        task = self._pending.get(frame.task)
        if task is None or frame.hops >> 8 > task.attempt:
            self.counts["duplicates"] += 1
            return
        values = codecs.unpack(frame)
        if len(values) != 1:
            raise FrameError(f"frame: an answer holds one tensor, got {len(values)}")
        latency = (time.monotonic_ns() - task.start) * 1e-9
        late = task.deadline is not None and latency > task.deadline
        if self._settle(task, "answers", *["late"] * late):
            self.served[node.index] += 1
            self._finish(task, SpatialAnswer(values[0], latency, task.attempt + 1))


class SpatialCluster:
    """Running nodes that compute every input together; made by :func:`spatial_cluster`, a context manager, callable.

    ``cluster(x, deadline=0.5)`` returns a `SpatialAnswer`, ``cluster.submit(x)`` its Future; ``.nodes``, ``.plan`` (the present one), ``.stats()``,
    ``.close()``.
    """

    def __init__(self, module: SpatialModule, example: torch.Tensor, nodes: list[LocalNode], client: SpatialClient):
        self.nodes = nodes
        self._module, self._example, self._client = module, example, client
        self._closed = False
        open_clusters.add(self)

    def __enter__(self) -> SpatialCluster:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    @property
    def plan(self) -> SpatialPlan:
        """The plan that the next input is computed by; may be set to another one for this network and these nodes."""
        return self._client.plan

    @plan.setter
    def plan(self, plan: SpatialPlan) -> None:
        _check_plan(plan, self._module, len(self.nodes))
        self._client.plan = plan

    def __call__(self, x: torch.Tensor, deadline: float | None = None) -> SpatialAnswer:
        """Answer `x` [B, C, H, W] (of the example's C, H, W and dtype) as one task; raises what `submit`'s Future would."""
        return self.submit(x, deadline).result()

    def submit(self, x: torch.Tensor, deadline: float | None = None) -> Future:
        """Send an input and return the Future of its `SpatialAnswer`; the clock starts now.

        An answer or an error comes by `deadline` seconds plus the cluster's `grace` (its `timeout` without): ``DeadlineExceeded``, ``PeerLost`` when no
        node is left, ``ClusterError`` with the traceback of the user's module.
        """
        if self._closed:
            raise ClusterError("cluster: it is closed")
        want = self._example
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        if x.ndim != 4 or x.shape[1:] != want.shape[1:] or x.dtype != want.dtype or not x.shape[0]:
            raise ValueError(f"x: expected {want.dtype} [B >= 1, {', '.join(map(str, want.shape[1:]))}], got {x.dtype} {list(x.shape)}")
        if deadline is not None and (isinstance(deadline, bool) or not isinstance(deadline, int | float) or not 0 < deadline < 1e6):
            raise ValueError(f"deadline: expected seconds > 0 or None, got {deadline!r}")
        return self._client.submit((x.detach(),), deadline, b"", Flag.NONE, FREE, from_now=True)

    def stats(self) -> dict[str, Any]:
        """Return counters: tasks == answers + errors + pending always; `plans` made so far, `retries`, which nodes are `up`."""
        counts, pending = self._client.snapshot()
        wanted = ("tasks", "answers", "errors", "retries", "duplicates", "late")
        return {**{k: counts[k] for k in wanted}, "pending": pending, "plans": self._client.plans, "up": {n.name: n.up for n in self._client.nodes}}

    def close(self) -> None:
        """End the client and all processes; what is pending fails with ClusterError. Harmless when repeated."""
        if not self._closed:
            self._closed = True
            open_clusters.discard(self)
            self._client.close()
            end_nodes(self.nodes)


def _check_plan(plan: Any, module: SpatialModule, nodes: int) -> None:
    if not isinstance(plan, SpatialPlan):
        raise TypeError(f"plan: expected a SpatialPlan or a method's name, got {type(plan).__name__}")
    if plan.fingerprint != module.net.fingerprint or len(plan.devices) != nodes:
        raise ValueError(f"plan: it is for {plan.net!r} on {len(plan.devices)} providers, expected {module.net.name!r} with these shapes on {nodes}")
    Schedule(module.net, plan.volumes, plan.splits, plan.root)


@torch.no_grad()
def measure_spatial(module: SpatialModule, example: torch.Tensor, slowdown: Sequence[float], names: Sequence[str], repeat: int = 5) -> list[Device]:
    """Return a Device per factor of `slowdown`: this machine's seconds per layer and row count (medians of `repeat`, one thread), times the factor.

    Points at 1, 2, 4, ... rows and all; `example` [B, C, H, W] sets batch, width and dtype.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers
    try:
        points: dict[str, list[tuple[int, float]]] = {}
        for i, layer in enumerate(module.net.layers):
            counts = sorted({layer.out_h, *(1 << k for k in range(layer.out_h.bit_length())), *(layer.out_h * k // 4 for k in (1, 2, 3) if layer.out_h >= 4)})
            points[layer.name] = [(rows, _seconds(partial(_layer_part, module, i, rows, _layer_inputs(module, i, rows, example)), repeat)) for rows in counts]
        last = len(module.net.layers) - 1
        x = torch.randn(example.shape[0], module.net.layers[last].channels, module.net.layers[last].out_h, module.width(last, example), dtype=example.dtype)
        tail = _seconds(partial(module.tail, x), repeat)
    finally:
        torch.set_num_threads(threads)
    scaled = lambda f: {name: [(rows, t * f) for rows, t in found] for name, found in points.items()}
    return [Device(name, measured=scaled(f), tail_seconds=tail * f) for name, f in zip(names, slowdown, strict=True)]


def _layer_inputs(module: SpatialModule, i: int, rows: int, example: torch.Tensor) -> list[torch.Tensor]:
    layer = module.net.layers[i]
    lo, hi = input_rows(layer, _middle(layer, rows))
    channels = [module.net.layers[u].channels if u >= 0 else example.shape[1] for u in layer.inputs]
    return [torch.randn(example.shape[0], c, hi - lo, module.width(u, example), dtype=example.dtype) for c, u in zip(channels, layer.inputs, strict=True)]


def _middle(layer: Any, rows: int) -> tuple[int, int]:
    lo = (layer.out_h - rows) // 2
    return lo, lo + rows


def _layer_part(module: SpatialModule, i: int, rows: int, inputs: list[torch.Tensor]) -> torch.Tensor:
    return module.layer(i, _middle(module.net.layers[i], rows), inputs)


def _seconds(call: Any, repeat: int) -> float:
    call()
    times = []
    for _ in range(repeat):
        began = time.thread_time()
        call()
        times.append(time.thread_time() - began)
    return statistics.median(times)


def spatial_cluster(
    backbone: torch.nn.Module,
    plan: SpatialPlan | str = "search",
    nodes: int = 4,
    link: str | Mapping[tuple[int, int], str] | None = "100mbit 0ms",
    slowdown: float | Sequence[float] | None = None,
    *,
    example: torch.Tensor,
    names: Sequence[str] | None = None,
    devices: Sequence[Device] | None = None,
    codec: str = "raw",
    overlap: bool = True,
    credit: int = 1,
    grace: float = 0.5,
    timeout: float = 30.0,
    start_timeout: float = 60.0,
) -> SpatialCluster:
    """Start `nodes` processes that compute every inference of a CNN together, each its rows of each volume (DistrEdge), and return the
    :class:`SpatialCluster`.

    Every node gets the input rows it needs, computes its parts and sends only rows that others lack; the root gathers the last volume, runs
    the tail and answers: the unsplit network's answer up to fp32 rounding. `plan`: a `SpatialPlan` for this network and as many providers,
    or a method of ``plan_spatial``, which then plans for `devices` (None: this machine measured, times `slowdown`). `link`: one text for all
    directed pairs, or a dict; the caller is a machine of its own, number `nodes`. `example` [B, C, H, W] fixes C, H, W and dtype. `codec`: "raw" or
    "planes", both lossless. `overlap`: compute border rows first, and middles while borders are on their way. `credit`: inputs under way.
    `grace`, `timeout`, `start_timeout`: as in ``local_cluster``. When a node is lost its rows go to the others and what it had is computed again.
    ``CannotCut`` when no layer of `backbone` can be split.

    >>> with fastee.spatial_cluster(vgg, nodes=4, link="100mbit 0ms", example=x) as cluster:     # doctest: +SKIP
    ...     y = cluster(x).output
    """
    names = tuple(f"node{i}" for i in range(nodes)) if names is None and isinstance(nodes, int) else names
    count, names, factors = check_nodes(nodes, names, slowdown)
    links = link_table(link, count + 1)
    if codec not in LOSSLESS:
        raise ValueError(f"codec: got {codec!r}, expected one of {', '.join(LOSSLESS)}: a split must not change the answer")
    if isinstance(credit, bool) or not isinstance(credit, int) or not 1 <= credit <= 64:
        raise ValueError(f"credit: expected an int in 1..64, got {credit!r}")
    for label, value in (("grace", grace), ("timeout", timeout), ("start_timeout", start_timeout)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
            raise ValueError(f"{label}: expected seconds, got {value!r}")
    module = extract(backbone, example)
    if isinstance(plan, str):
        providers = measure_spatial(module, example, factors, names) if devices is None else devices
        plan = plan_spatial(module.net, providers, planner_links(links, count), method=plan)
    _check_plan(plan, module, count)
    fingerprint = bytes.fromhex(module.net.fingerprint)
    blobs = (cloudpickle.dumps((backbone, example[:1].clone(), SpatialSettings(i, names, fingerprint, factors[i], codec), links)) for i in range(count))
    client = partial(SpatialClient, names, module=module, plan=plan, overlap=overlap, fingerprint=fingerprint, links=links, credit=credit, grace=grace,
                     timeout=timeout)  # fmt: skip
    return SpatialCluster(module, example, *launch(names, blobs, client, start_timeout, "fastee.cluster.spatial_worker"))


def planner_links(links: Mapping[tuple[int, int], Link], nodes: int) -> Links:
    """The planner's access rates for a table of directed links: a node's slowest link, the caller's slowest, the longest delay."""
    rate = lambda d: min(link.rate for pair, link in links.items() if d in pair and nodes not in pair) if nodes > 1 else math.inf
    caller = min(link.rate for (a, _), link in links.items() if a == nodes)
    return Links(tuple(min(rate(d), 1e12) for d in range(nodes)), min(caller, 1e12), max(link.delay for link in links.values()))

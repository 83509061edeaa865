"""A cluster on this machine: real processes, real sockets, emulated links and speeds."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import cloudpickle
import msgspec
import numpy as np
import torch

from fastee.cluster import codec as codecs
from fastee.cluster.client import Client, TaskAnswer
from fastee.cluster.frame import FREE, MAX_DIMS, MAX_ROUTE, Flag
from fastee.cluster.keys import make_keys
from fastee.cluster.link import link_table
from fastee.cluster.messages import Intro, Peers, Ports
from fastee.cluster.node import Settings
from fastee.cluster.result import ClusterResult
from fastee.errors import ClusterError, FingerprintMismatch
from fastee.planning.plan import Plan
from fastee.scheduling import Profile, QoS, Scheduler, profile

NAMES = ("mobile", "edge", "cloud")
UNSHAPED_RATE = 10e9
_TERM_SECONDS = 1.0
_JOIN_SECONDS = 2.0
_STDERR_BYTES = 4000
open_clusters: weakref.WeakSet[Any] = weakref.WeakSet()


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
        # Fresh pages are half of the time of a 1 MB message: let malloc keep them.
        "MALLOC_MMAP_THRESHOLD_": str(256 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


class LocalNode:
    """A worker process: ``.index .name .pid .alive``."""

    def __init__(self, index: int, name: str, module: str = "fastee.cluster.worker"):
        self.index, self.name = index, name
        self._stderr = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=_environment(),
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        """True while the process runs (a stopped one counts as running)."""
        return self._process.poll() is None

    def introduce(self, blob: bytes) -> Ports:
        """Hand the network over the private pipe and read where the node listens; raises OSError or ValueError when it died."""
        pipe = self._process.stdin
        pipe.write(msgspec.json.encode(Intro(len(blob))) + b"\n")
        pipe.write(blob)
        pipe.flush()
        return msgspec.json.decode(self._process.stdout.readline(), type=Ports)

    def tell_peers(self, peers: Peers) -> None:
        self._process.stdin.write(msgspec.json.encode(peers) + b"\n")
        self._process.stdin.flush()

    def complaint(self) -> str:
        """The end of what the process wrote to stderr."""
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - _STDERR_BYTES))
        return self._stderr.read().decode(errors="replace").strip()

    def end(self) -> None:
        """Ask the process to end (it may be stopped: wake it)."""
        for s in (signal.SIGTERM, signal.SIGCONT):
            with contextlib.suppress(ProcessLookupError):
                if self.alive:
                    self._process.send_signal(s)

    def reap(self, seconds: float) -> None:
        """Wait for the end, kill after `seconds`, leave no zombie."""
        try:
            self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            with contextlib.suppress(OSError):
                stream.close()


class RemoteNode:
    """A node that somebody else started (``fastee node``): ``.index .name``; closing the cluster leaves it running."""

    def __init__(self, index: int, name: str):
        self.index, self.name = index, name

    def end(self) -> None:
        pass

    def reap(self, seconds: float) -> None:
        pass


class Cluster:
    """Running nodes and the client that uses them; made by :func:`local_cluster` or :meth:`connect`, a context manager, callable.

    ``cluster(x, deadline=0.1)`` answers a batch, ``await cluster.ask(x)`` does in asyncio, ``cluster.submit(row, deadline)`` returns a Future
    for streams, ``.nodes``, ``.stats()``, ``.profile`` (None after `connect`: every node measures itself), ``.close()``.
    """

    @classmethod
    def connect(cls, config: str | os.PathLike, keys: str | os.PathLike | None = None, codec: str | None = None) -> Cluster:
        """Join the running nodes of a cluster.toml as a client, on the first node's machine, and return the Cluster.

        The model is loaded here too, which tells the inputs' shapes and the fingerprint. `keys`: this client's file of `fastee keys`, needed
        where the nodes have public keys. Returns when every node is up, or two seconds after some are. Raises ``ClusterError`` when none
        is within ``timeouts.start`` or the file is wrong, ``FingerprintMismatch`` when a node runs another model.

        >>> with fastee.Cluster.connect("cluster.toml") as cluster:     # doctest: +SKIP
        ...     out = cluster(x, deadline=0.1)
        """
        from fastee.cluster.config import load_config

        read = load_config(config)
        if codec is not None:
            codecs.codec_id(codec)
        own, net = read.keys(keys), read.network()
        client = Client(
            read.names, [n.at for n in read.nodes], bytes.fromhex(net.fingerprint), read.declared_links(emulated=True), credit=read.credit,
            grace=read.timeouts.grace, timeout=read.timeouts.task, keys=own, public=[n.public_key for n in read.nodes] if own else (),
            segments=net.num_segments,
        )  # fmt: skip
        end = time.monotonic() + read.timeouts.start
        late = client.wait_ready(min(_JOIN_SECONDS, read.timeouts.start))
        while not any(n.up for n in client.nodes) and not any(n.refusal for n in client.nodes) and time.monotonic() < end:
            late = client.wait_ready(min(_JOIN_SECONDS, end - time.monotonic()))
        refused = next((n for n in late if n.refusal), None)
        if refused is not None or not any(n.up for n in client.nodes):
            client.close()
            if refused is not None:
                raise FingerprintMismatch(f"cluster: node {refused.name!r} refused this client: {refused.refusal}")
            where = ", ".join(f"{n.name} at {n.host}:{n.port}" for n in read.nodes)
            raise ClusterError(f"cluster: no node answered within {read.timeouts.start} s ({where}); `fastee node` starts one")
        return cls(net, [RemoteNode(i, name) for i, name in enumerate(read.names)], client, None, codec)

    def __init__(self, net: Any, nodes: Sequence[LocalNode | RemoteNode], client: Client, prof: Profile | None, codec: str | None):
        self.nodes = nodes
        self.profile = prof
        self._net, self._client, self._codec = net, client, codec
        self._lock = threading.Lock()
        self._closed = False
        open_clusters.add(self)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def __call__(
        self,
        x: Any,
        deadline: float | None = None,
        plan: Plan | Sequence[int] | None = None,
        exits: bool = True,
        codec: str | None = None,
        on_error: str = "raise",
    ) -> ClusterResult:
        """Answer every row of `x` (tensor, tuple or mapping of the model's inputs) as a task of its own.

        `deadline`: seconds per row from the moment the row is admitted; at most `credit` rows are under way at once, the others wait
        without their clock running. None: no deadline, but every wait ends after the cluster's `timeout`. `plan`: one node index
        per segment, which is then the only host of that segment while it lives, or a `fastee.plan` of this network, whose nodes must all be up
        (`CheckpointMismatch`); None: the scheduler decides each hop. `exits=False`
        runs every row to the end whatever the deadline. `codec`: "raw" or "int8" on every link; None: the scheduler's choice.
        `on_error`: "raise" the first row's error, or "return" all in ``.errors``. The last input's order is kept.
        """
        tasks = self._send(self._client.begin, x, deadline, plan, exits, codec, on_error)
        self._client.wait(tasks)
        return self._collect([task.outcome for task in tasks], on_error)

    async def ask(
        self,
        x: Any,
        deadline: float | None = None,
        plan: Plan | Sequence[int] | None = None,
        exits: bool = True,
        codec: str | None = None,
        on_error: str = "raise",
    ) -> ClusterResult:
        """Answer every row of `x` without holding up the event loop; else as calling the cluster. A cancelled wait leaves its tasks running."""
        futures = [asyncio.wrap_future(future) for future in self._send(self._client.submit, x, deadline, plan, exits, codec, on_error)]
        return self._collect(await asyncio.gather(*futures, return_exceptions=True), on_error)

    def _send(
        self, begin: Callable[..., Any], x: Any, deadline: float | None, plan: Plan | Sequence[int] | None, exits: bool, codec: str | None, on_error: str
    ) -> list[Any]:
        if on_error not in ("raise", "return"):
            raise ValueError(f"on_error: got {on_error!r}, expected 'raise' or 'return'")
        values, options = self._values(x), self._options(deadline, plan, exits, codec)
        rows = values[0].shape[0]
        if rows == 1:
            return [begin(values, *options, from_now=False)]
        return [begin(tuple(v[i : i + 1] for v in values), *options, from_now=False) for i in range(rows)]

    def _collect(self, answers: list[TaskAnswer | Exception], on_error: str) -> ClusterResult:
        if on_error == "raise":
            for row, answer in enumerate(answers):
                if isinstance(answer, Exception):
                    answer.add_note(f"row {row} of {len(answers)}") if hasattr(answer, "add_note") else None
                    raise answer
        return ClusterResult(answers, self._net.num_classes)

    def submit(
        self, x_row: Any, deadline: float | None = None, plan: Plan | Sequence[int] | None = None, exits: bool = True, codec: str | None = None
    ) -> Any:
        """Send one sample (batch dimension of 1) and return the ``concurrent.futures.Future`` of its `TaskAnswer`.

        The clock starts now, also while the task waits for credit: this is the open loop of a stream.
        """
        values = self._values(x_row)
        if values[0].shape[0] != 1:
            raise ValueError(f"x_row: expected one row, got {values[0].shape[0]}")
        return self._client.submit(values, *self._options(deadline, plan, exits, codec), from_now=True)

    def _values(self, x: Any) -> tuple[torch.Tensor, ...]:
        inputs = getattr(self._net, "inputs", None)
        values = inputs.flat(x) if inputs is not None else (x,) if isinstance(x, torch.Tensor) else tuple(x)
        for value in values:
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"x: expected tensors, got {type(value).__name__}")
            if value.ndim == 0 or value.shape[0] != values[0].shape[0]:
                raise ValueError(f"x: all inputs need the same number of rows on dimension 0, got {[list(v.shape) for v in values]}")
            if value.ndim > MAX_DIMS:
                raise ValueError(f"x: at most {MAX_DIMS} dimensions can travel, got {value.ndim}")
        return tuple(v.detach() if v.requires_grad else v for v in values)

    def _options(self, deadline: float | None, plan: Plan | Sequence[int] | None, exits: bool, codec: str | None) -> tuple:
        if self._closed:
            raise ClusterError("cluster: it is closed")
        if deadline is not None:
            if isinstance(deadline, bool) or not isinstance(deadline, int | float):
                raise TypeError(f"deadline: expected seconds or None, got {type(deadline).__name__}")
            if not 0 < deadline < 1e6:
                raise ValueError(f"deadline: expected seconds > 0, got {deadline}")
        route = b""
        if isinstance(plan, Plan):
            plan.check(self._net, [node.name for node in self._client.nodes if node.up])
            names = [node.name for node in self.nodes]
            plan = [names.index(place) for place in plan.place]
        if plan is not None:
            segments = self._net.num_segments
            if len(plan) != segments or any(not isinstance(n, int) or not 0 <= n < len(self.nodes) for n in plan):
                raise ValueError(f"plan: expected {segments} node indices in 0..{len(self.nodes) - 1}, one per segment, got {list(plan)}")
            route = bytes(plan)
        name = codec if codec is not None else self._codec
        return deadline, route, Flag.NONE if exits else Flag.EXITS_OFF, FREE if name is None else codecs.codec_id(name)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the model's inputs."""
        return tuple(self._net.inputs.names)

    def beats(self) -> dict[str, dict[str, Any]]:
        """Return what every node last said of itself, by name: whether it is up, its pid, and all of its heartbeat."""
        return {n.name: {"up": n.up, "pid": n.told.pid, **msgspec.structs.asdict(n.beat)} for n in self._client.nodes}

    def stats(self) -> dict[str, Any]:
        """Return counters: tasks == answers + errors + pending always; per node and link what heartbeats told (up to 0.1 s old).

        ``exits`` maps exit index to answers, ``served`` node name to answers, ``link_bytes`` "from->to" to bytes put on that link,
        ``late`` counts answers after their deadline, ``duplicates`` answers dropped because the task had one (or an error) already.
        """
        client = self._client
        names = [n.name for n in self.nodes]
        links: dict[str, int] = {}
        for node in client.nodes:
            own = client.bytes_from_here() if node.index == 0 else {}
            for other, name in enumerate(names):
                if other != node.index:
                    sent = node.beat.sent[other] if other < len(node.beat.sent) else 0
                    links[f"{node.name}->{name}"] = sent + own.get(other, 0)
        counts, pending = client.snapshot()
        return {
            **{k: counts[k] for k in ("tasks", "answers", "errors", "retries", "replanned", "duplicates", "forced", "late")},
            "pending": pending,
            "errors_by_type": {k.split(" ", 1)[1]: v for k, v in sorted(counts.items()) if k.startswith("error ")},
            "exits": {k: client.exits[k] for k in sorted(client.exits)},
            "served": {names[k]: client.served[k] for k in sorted(client.served)},
            "queue": {n.name: n.beat.queue for n in client.nodes},
            "up": {n.name: n.up for n in client.nodes},
            "link_bytes": links,
        }

    def close(self) -> None:
        """End the client and all processes (SIGTERM, then SIGKILL); what is pending fails with ClusterError. Harmless when repeated."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        open_clusters.discard(self)
        self._client.close()
        end_nodes(self.nodes)


def end_nodes(nodes: list[LocalNode]) -> None:
    for node in nodes:
        node.end()
    end = time.monotonic() + _TERM_SECONDS
    for node in nodes:
        node.reap(end - time.monotonic())


@atexit.register
def _close_all() -> None:
    for cluster in list(open_clusters):
        cluster.close()


def local_cluster(
    net: Any,
    nodes: int = 3,
    link: str | Mapping[tuple[int, int], str] | None = "20mbit 10ms",
    slowdown: float | Sequence[float] | None = None,
    *,
    names: Sequence[str] | None = None,
    codec: str | None = None,
    thresholds: Sequence[float] | None = None,
    profile: Profile | None = None,
    example: Any = None,
    qos: QoS | None = None,
    credit: int = 8,
    grace: float = 0.5,
    timeout: float = 30.0,
    start_timeout: float = 60.0,
    secure: bool = False,
    policy: str = "deadline",
    params: Mapping[str, Any] | None = None,
) -> Cluster:
    """Start `nodes` worker processes that run `net` together and return the :class:`Cluster` (a context manager).

    `net`: an ``EarlyExit``. The caller lives on node 0. `link`: one text for all directed links ("20mbit 10ms": rate, one-way delay),
    None for unshaped, or a dict ``{(source, target): text}`` (what it leaves out is unshaped), emulated in user space. `slowdown`: factor
    >= 1 for all nodes or one per node: an emulated slower machine. `codec`: "raw", "int8" or None (the scheduler's choice). `thresholds`
    replaces the net's own. `profile`: measured costs with these node names; None measures `net` here on `example` (default: the example
    given to ``attach``), scaled by slowdown and link. `credit`: tasks under way per entry node. `grace`: seconds after a deadline in which
    an answer is still taken. `timeout`: bound in seconds for tasks without deadline. Raises ``ClusterError`` with the end of the
    worker's stderr when a node does not start within `start_timeout`. `secure`: encrypt and authenticate every connection with CURVE keys
    made for this cluster (beyond loopback they are required, here a choice). `policy`, `params`: every node's, as of ``Scheduler``.

    >>> with fastee.local_cluster(net, nodes=3, link="20mbit 10ms") as cluster:     # doctest: +SKIP
    ...     out = cluster(x, deadline=0.1)
    """
    count, names, factors = check_nodes(nodes, names, slowdown)
    links = link_table(link, count)
    if codec is not None:
        codecs.codec_id(codec)
    for label, value in (("grace", grace), ("timeout", timeout), ("start_timeout", start_timeout)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
            raise ValueError(f"{label}: expected seconds, got {value!r}")
    if isinstance(credit, bool) or not isinstance(credit, int) or not 1 <= credit <= 1024:
        raise ValueError(f"credit: expected an int in 1..1024, got {credit!r}")
    for name in ("num_segments", "num_classes", "run_segment", "exit_step", "fingerprint", "thresholds", "measure"):
        if not hasattr(net, name):
            raise TypeError(f"net: expected an EarlyExit (fastee.attach), got {type(net).__name__} without {name!r}")
    if net.num_segments > MAX_ROUTE:
        raise ValueError(f"net: at most {MAX_ROUTE} segments can be placed, got {net.num_segments}")
    rule = tuple(float(t) for t in (net.thresholds if thresholds is None else thresholds))
    if len(rule) != net.num_segments - 1:
        raise ValueError(f"thresholds: expected {net.num_segments - 1} numbers, one per exit, got {len(rule)}")
    prof = _profile(net, names, factors, links, example) if profile is None else profile
    if not isinstance(prof, Profile):
        raise TypeError(f"profile: expected a Profile or None, got {type(prof).__name__}")
    if prof.nodes != names or prof.num_segments != net.num_segments:
        raise ValueError(f"profile: it has nodes {prof.nodes} and {prof.num_segments} segments, expected {names} and {net.num_segments}")
    prof.check(net)
    given = dict(params or {})
    Scheduler(prof, qos or QoS(), policy=policy, thresholds=list(rule), params=given)  # a wrong name or number fails here, not in a worker
    fingerprint = bytes.fromhex(net.fingerprint)
    keys = [make_keys() for _ in range(count + 1)] if secure else []
    public = tuple(k.public for k in keys)
    allowed = {k: name for k, name in zip(public, (*names, "client"), strict=False)}

    def settings(i: int) -> Settings:
        own = keys[i] if keys else None
        return Settings(i, names, fingerprint, factors[i], rule, qos or QoS(), credit, own, allowed, public[:count], policy, given)

    blobs = (cloudpickle.dumps((net, settings(i), prof, links)) for i in range(count))
    client = partial(Client, names, fingerprint=fingerprint, links=links, credit=credit, grace=grace, timeout=timeout,
                     keys=keys[-1] if keys else None, public=public[:count], segments=net.num_segments)  # fmt: skip
    started, client = launch(names, blobs, client, start_timeout)
    return Cluster(net, started, client, prof, codec)


def launch(
    names: Sequence[str], blobs: Iterable[bytes], client: Callable[..., Client], start_timeout: float, module: str = "fastee.cluster.worker"
) -> tuple[list[LocalNode], Any]:
    """Start a process of `module` per name, hand each its blob, return them with ``client(ports=, running=)`` once all reach each other.

    `blobs` are made while the processes start. ``ClusterError`` with the end of its stderr for a node that is not there within
    `start_timeout` seconds; then all are ended.
    """
    started: list[LocalNode] = []
    made = None
    try:
        for index, name in enumerate(names):
            started.append(LocalNode(index, name, module))
        end = time.monotonic() + start_timeout
        ports = _introduce(started, list(blobs), end)
        for node in started:
            node.tell_peers(Peers(ports))
        made = client(ports=ports, running=lambda i: started[i].alive)
        late = made.wait_ready(end - time.monotonic())
        if late:
            raise _did_not_start(started[late[0].index], start_timeout)
    except BaseException as error:
        if made is not None:
            made.close()
        if isinstance(error, OSError) and not isinstance(error, ClusterError):
            dead = next((n for n in started if not n.alive), None)
            if dead is not None:
                error = _did_not_start(dead, start_timeout)
        end_nodes(started)
        raise error from None
    return started, made


def check_nodes(nodes: Any, names: Any, slowdown: Any) -> tuple[int, tuple[str, ...], tuple[float, ...]]:
    if isinstance(nodes, bool) or not isinstance(nodes, int) or not 1 <= nodes <= 64:
        raise ValueError(f"nodes: expected an int in 1..64, got {nodes!r}")
    if names is None:
        names = NAMES[:nodes] if nodes <= len(NAMES) else tuple(f"node{i}" for i in range(nodes))
    names = tuple(names)
    if len(names) < nodes or len(set(names[:nodes])) != nodes or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"names: expected {nodes} different names, got {names}")
    factors = [1.0] * nodes if slowdown is None else [float(slowdown)] * nodes if isinstance(slowdown, int | float) else [float(f) for f in slowdown]
    if len(factors) != nodes or not all(1 <= f < math.inf for f in factors):
        raise ValueError(f"slowdown: expected {nodes} factors >= 1, got {factors}")
    return nodes, names[:nodes], tuple(factors)


def _profile(net: Any, names: tuple[str, ...], factors: tuple[float, ...], links: Mapping, example: Any) -> Profile:
    if example is None:
        example = getattr(getattr(net, "inputs", None), "example", None)
    if example is None:
        raise ClusterError("cluster: give profile= (fastee.profile) or example= (one input), to know what each segment costs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers
    try:
        measured = profile(net, example, nodes=names, batch_sizes=(1,), slowdown=factors)
    finally:
        torch.set_num_threads(threads)
    bandwidth, delay = np.zeros((len(names),) * 2), np.zeros((len(names),) * 2)
    for (a, b), link in links.items():
        bandwidth[a, b], delay[a, b] = min(link.rate, UNSHAPED_RATE), link.delay
    fields = {k: getattr(measured, k) for k in measured.__dataclass_fields__}
    return Profile(**{**fields, "bandwidth": bandwidth, "delay": delay})


def _introduce(nodes: list[LocalNode], blobs: list[bytes], end: float) -> list[Ports]:
    """Talk to all children at once: each needs a second to import torch, and a hung one must not hold up the others."""
    ports: list[Ports | None] = [None] * len(nodes)

    def talk(node: LocalNode) -> None:
        with contextlib.suppress(OSError, ValueError):
            ports[node.index] = node.introduce(blobs[node.index])

    threads = [threading.Thread(target=talk, args=(node,), daemon=True) for node in nodes]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    for node, at in zip(nodes, ports, strict=True):
        if at is None:
            raise _did_not_start(node, time.monotonic() - began)
    return ports


def _did_not_start(node: LocalNode, seconds: float) -> ClusterError:
    with contextlib.suppress(subprocess.TimeoutExpired):
        node._process.wait(3.0)  # its pipe closes a moment before it has ended
    code = node._process.returncode
    state = f"ended with status {code}" if code is not None else f"did not answer within {seconds:.0f} s"
    return ClusterError(f"cluster: node {node.name!r} {state} while starting; the end of its stderr:\n{node.complaint() or '(nothing)'}")

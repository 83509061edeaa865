"""The cluster: a 64 KB offload through the whole runtime beside raw libzmq and its peers; wire time, detection and recovery.

``ratio`` is a measured duration over its bound (wire: over bytes/rate + delay; offload: over raw libzmq, trip by trip in turn); the note says
the times. Those in the row's columns are of an offload on the same cluster afterwards.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

import fastee
from fastee import native
from fastee.testing.bench import Case, Context, Group, percentile, quiet, sample

from . import cluster_peers

VALUES = 16384  # 64 KiB of fp32


class Cut(torch.nn.Module):
    """As little computing as a network with one exit can do, so that what is timed is the runtime."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Identity(), torch.nn.Linear(4, 10)

    def forward(self, x):
        return self.b(self.a(x)[:, :4])


def network():
    net = fastee.attach(Cut(), exits=["a"], num_classes=10, example=torch.zeros(1, VALUES)).eval()
    return net.set_rule(thresholds=[float("inf")])


def offload(cluster, x, node: int = 0, **options) -> Callable[[], object]:
    plan = [node, node]
    return lambda: cluster(x, plan=plan, exits=False, codec="raw", **options)


def _median(fn: Callable[[], object], count: int) -> float:
    times = []
    for _ in range(count):
        began = time.perf_counter()
        fn()
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def _until(condition: Callable[[], bool], seconds: float) -> float:
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise RuntimeError(f"nothing happened within {seconds} s")
        time.sleep(0.0005)
    return time.monotonic() - began


def _wire() -> Iterator[Group]:
    """Time on an emulated 20 Mbit/s, 20 ms link: a task's way out and the answer's way back. The network reads four values of any width."""
    with fastee.local_cluster(network(), nodes=2, link="20mbit 20ms") as cluster:
        for values in (4096, VALUES, 1 << 18):
            x = torch.randn(1, values)
            here, far = offload(cluster, x, 0), offload(cluster, x, 1)
            for _ in range(2):
                here(), far()
            outs = [far() for _ in range(3 if values > VALUES else 9)]
            ideal = float(outs[0].wire_bytes[0]) * 8 / 20e6 + 2 * 0.020
            there, base = float(np.median([float(o.latency[0]) for o in outs])), _median(here, 20)
            note = f"{there * 1e3:.2f} ms, of them {base * 1e3:.2f} off the link; bytes/rate + delay is {ideal * 1e3:.2f} ms"
            yield Group("cluster_wire", f"{4 * values // 1024} KB, 20mbit 20ms", "fp32", [Case("fastee", far, note=note, ratio=(there - base) / ideal)],
                        baseline="fastee", per_call=True, bars=("ratio <= 1.05",))  # fmt: skip


def _fault(shape: str, trip: Callable[[], object], note: str, ratio: float) -> Group:
    return Group("cluster_faults", shape, "fp32", [Case("fastee", trip, note=note, ratio=ratio)], baseline="fastee", per_call=True, bars=("ratio <= 1",))


def _detection() -> Iterator[Group]:
    hang, recovery, kill, x, rounds = [], [], [], torch.randn(1, VALUES), 5
    with fastee.local_cluster(network(), nodes=3, link=None) as cluster:
        trip, state, pids = offload(cluster, x), cluster._client.nodes, [node.pid for node in cluster.nodes]
        for _ in range(rounds):
            os.kill(pids[1], signal.SIGSTOP)
            hang.append(_until(lambda: not state[1].up, 5))
            time.sleep(0.2)
            os.kill(pids[1], signal.SIGCONT)
            recovery.append(_until(lambda: state[1].up, 5))
        for node in (1, 2):
            os.kill(pids[node], signal.SIGKILL)
            kill.append(_until(lambda node=node: not state[node].connected, 5))
        for name, times, bound, how in (
            ("SIGSTOP to down", hang, 1.0, ""),
            ("SIGCONT to up", recovery, 1.0, ""),
            ("SIGKILL to down", kill, 0.3, ", by the lost connection, not by looking at the process"),
        ):
            note = f"worst of {len(times)}: {max(times):.4f} s, best {min(times):.4f} s; bound {bound} s{how}"
            yield _fault(name, trip, note, max(times) / bound)


def _heartbeats() -> Iterator[Group]:
    """By how much two heartbeats came further apart than their 0.1 s, at most: while 4 MB cross the same link, and without."""
    gaps, x = {}, torch.randn(1, 1 << 20)
    with fastee.local_cluster(network(), nodes=2, link="20mbit 1ms") as cluster:
        node = cluster._client.nodes[1]
        for busy in (False, True):
            # Segment 0 runs on node 1, the end on node 0: the carry goes over the link on which node 1's heartbeats reach the client.
            seen, last, end = [], node.beats, time.monotonic() + 2.0
            job = cluster.submit(x, plan=[1, 0], exits=False, codec="raw") if busy else None
            while (time.monotonic() < end) if job is None else not job.done():
                if node.beats != last:
                    last = node.beats
                    seen.append(time.monotonic())
                time.sleep(0.0005)
            if not node.up:
                raise RuntimeError("node 1 was called down behind its own transfer")
            gaps[busy] = float(np.diff(seen).max()) - 0.1
        note = f"{gaps[True] * 1e3:.1f} ms behind a 4 MB activation, {gaps[False] * 1e3:.1f} ms without one; bound 50 ms"
        yield _fault("heartbeat behind 4 MB, 20mbit", offload(cluster, x[:, :VALUES]), note, max(0.0, gaps[True]) / 0.05)


def _bars(cluster, trip: Callable[[], object], raw: Callable[[], object], seconds: float) -> Iterator[Group]:
    """The issue's bars: median without what the node says its two segments took, and the tail with it."""
    with quiet():
        (ours, theirs), _ = sample([Case("fastee", trip), Case("zmq_cpp", raw)], seconds, 0.3, per_call=True)
    time.sleep(0.2)  # the next heartbeat tells how long a segment took lately
    computing = 2e9 * cluster._client.nodes[0].beat.service
    middle, middle_raw = percentile(ours, 50), percentile(theirs, 50)
    tail, tail_raw = percentile(ours, 99), percentile(theirs, 99)
    for shape, ratio, note, bar in (
        ("median less compute", (middle - computing) / middle_raw,
         f"{middle / 1e3:.0f} us, {computing / 1e3:.0f} of them in the segments; raw libzmq {middle_raw / 1e3:.0f}", "ratio <= 2"),
        ("p99", tail / tail_raw, f"{tail / 1e3:.0f} us, raw libzmq {tail_raw / 1e3:.0f}; {len(ours)} trips each", "ratio <= 3"),
    ):  # fmt: skip
        yield Group("cluster_offload", f"64 KB, loopback, {shape}", "fp32", [Case("fastee", trip, note=note, ratio=ratio)], baseline="fastee",
                    per_call=True, bars=(bar,))  # fmt: skip


def offloads(ctx: Context) -> Iterator[Group]:
    net, x = network(), torch.randn(1, VALUES)
    if not hasattr(native.core, "RawEcho"):
        raise RuntimeError(f"the I/O thread was not built: {native.reason.get('_C', 'not on this system')}")
    from fastee.cluster.native_endpoint import libraries

    raw = native.core.RawEcho(libraries(), 4 * VALUES)
    with fastee.local_cluster(net, nodes=1, link=None) as cluster:
        yield from _bars(cluster, offload(cluster, x), raw.trip, 1.0 if ctx.quick else 4.0)
        yield _beside(raw, "fastee", offload(cluster, x), "cluster(x): pack, send, schedule, run, answer")
    with fastee.local_cluster(net, nodes=1, link=None, secure=True) as secure:
        yield _beside(raw, "fastee_curve", offload(secure, x), "the same with CURVE")
    with _python_transport(), fastee.local_cluster(net, nodes=1, link=None) as python:
        yield _beside(raw, "fastee_pyzmq", offload(python, x), "FASTEE_TRANSPORT=python")
    for start, notes in cluster_peers.PEERS:
        try:
            with start(4 * VALUES) as trips:
                yield from (_beside(raw, name, fn, notes[name]) for fn, name in zip(trips, notes, strict=True))
        except cluster_peers.Missing as why:
            yield from (_beside(raw, name, None, str(why)) for name in notes)


def _beside(raw, name: str, fn: Callable[[], object] | None, note: str) -> Group:
    """A row of one of them in turn with raw libzmq, while the processes of the others do not run: on two cores they would be what is measured."""
    for _ in range(50 if fn else 0):
        fn()
    cases = [Case(name, fn, note=note), Case("zmq_cpp", raw.trip, note=f"raw libzmq ROUTER/DEALER, two C++ threads, 64 B back, in turn with {name}")]
    ours = name == "fastee"
    return Group("cluster_offload", "64 KB, loopback", "fp32", cases if ours else cases[::-1], baseline="zmq_cpp", per_call=True,
                 bars=(">= 0.5x zmq_cpp",) if ours else ())  # fmt: skip


@contextlib.contextmanager
def _python_transport() -> Iterator[None]:
    before = os.environ.get("FASTEE_TRANSPORT")
    os.environ["FASTEE_TRANSPORT"] = "python"
    try:
        yield
    finally:
        os.environ.pop("FASTEE_TRANSPORT") if before is None else os.environ.update(FASTEE_TRANSPORT=before)


def cases(ctx: Context) -> Iterator[Group]:
    yield from offloads(ctx)
    yield from _detection()
    yield from _heartbeats()
    yield from _wire()

"""A node as a process of its own (``fastee node``): loads and measures the model, joins, serves, leaves when it is told to."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from fastee.cluster.config import ClusterConfig
from fastee.cluster.frame import Frame
from fastee.cluster.link import Link, media
from fastee.cluster.messages import Heartbeat, Hello, Ports
from fastee.cluster.node import Settings
from fastee.cluster.worker import Worker
from fastee.errors import ClusterError
from fastee.nn import EarlyExit
from fastee.scheduling import Profile, profile

UNSHAPED_RATE = 10e9
_QUIET_SECONDS = 0.3


def measured(net: EarlyExit, config: ClusterConfig, index: int) -> Profile:
    """Return what every segment costs here, one thread, one row. The other nodes' columns are this one's scaled by declared slowness,
    until they tell their own."""
    links, count = config.declared_links(), len(config.nodes)
    factors = [node.slowdown for node in config.nodes]
    here = profile(net, net.inputs.example, nodes=config.names, batch_sizes=(1,), slowdown=factors)
    bandwidth, delay = np.zeros((count, count)), np.zeros((count, count))
    for pair, link in links.items():
        bandwidth[pair], delay[pair] = min(link.rate, UNSHAPED_RATE), link.delay
    return replace(here, bandwidth=bandwidth, delay=delay)


def celsius() -> float:
    """Return the hottest thermal zone's degrees Celsius, 0 where the machine tells none."""
    found = 0.0
    for path in Path("/sys/class/thermal").glob("thermal_zone*/temp"):
        try:
            found = max(found, int(path.read_text()) / 1000)
        except (OSError, ValueError):
            continue
    return found


class Daemon(Worker):
    """A worker without a parent. :meth:`leave` makes it refuse new tasks, finish those it has and return from `serve`."""

    def __init__(self, net: EarlyExit, settings: Settings, prof: Profile, links: dict[tuple[int, int], Link], drain_timeout: float):
        self._leaving_since = 0.0
        self._drain_timeout = drain_timeout
        self._quiet_since = 0.0
        self._linger = _QUIET_SECONDS + max((link.delay for link in links.values()), default=0.0)
        self._measured_at, self._cpu_before, self._cpu, self._celsius = time.monotonic(), time.process_time(), 0.0, 0.0
        super().__init__(net, settings, prof, links)

    def leave(self) -> None:
        """Begin to leave; safe from a signal handler."""
        self._leaving_since = self._leaving_since or time.monotonic()

    def listen(self, at: Ports) -> Ports:
        """Bind the configured address."""
        try:
            return self._endpoint.bind(at.host, at.ctl, at.bulk)
        except ClusterError as error:
            raise ClusterError(f"{error}; is another node running there? `ss -ltnp` shows who has ports {at.ctl} and {at.bulk}") from None

    def _take(self, frame: Frame, sender: int) -> None:
        self.node.post("leaving" if self._leaving_since else "task", frame, sender)

    def _shortcut(self) -> Any:
        return None if self._leaving_since else super()._shortcut()

    def _stays(self) -> bool:
        if not self._leaving_since:
            return True
        now = time.monotonic()
        if self.node.queue_length or any(self._unconfirmed.values()) or not self._quiet_since:
            self._quiet_since = now
        # What was handed to the sockets needs a moment to be out; an answer that is lost all the same is asked for again by its client.
        return now - self._quiet_since < self._linger and now - self._leaving_since < self._drain_timeout

    def _hello(self, profile: Profile) -> Hello:
        hello = super()._hello(profile)
        return msgspec.structs.replace(hello, seconds=profile.mean[:, self.index, 0].tolist(), spread=profile.spread[:, self.index, 0].tolist())

    def _beat(self, beat: Heartbeat) -> Heartbeat:
        now = time.monotonic()
        if now - self._measured_at > 1.0:
            cpu = time.process_time()
            self._cpu, self._celsius = round((cpu - self._cpu_before) / (now - self._measured_at), 3), celsius()
            self._measured_at, self._cpu_before = now, cpu
        return msgspec.structs.replace(beat, leaving=bool(self._leaving_since), cpu=self._cpu, celsius=self._celsius)

    def metrics(self) -> str:
        """Return the node's state in Prometheus' text format."""
        beat, names = self._reported or Heartbeat(0, 0.0, 0), self.settings.names
        rows: list[tuple[str, str, str, list[tuple[str, float]]]] = [
            ("queue", "gauge", "Tasks that wait for the processor or occupy it.", [("", beat.queue)]),
            ("service_seconds", "gauge", "Mean seconds of one segment lately.", [("", beat.service)]),
            ("handled_total", "counter", "Tasks finished or passed on.", [("", beat.handled)]),
            ("late_total", "counter", "Answers after their deadline.", [("", beat.late)]),
            ("forced_total", "counter", "Answers at an exit that the deadline forced.", [("", beat.forced)]),
            ("cpu_share", "gauge", "Share of one processor used lately.", [("", beat.cpu)]),
            ("celsius", "gauge", "Hottest thermal zone; 0 where there is none.", [("", beat.celsius)]),
            ("leaving", "gauge", "1 when no new tasks are taken.", [("", float(beat.leaving))]),
            ("answers_total", "counter", "Answers given here, by exit.", [(f'{{exit="{k}"}}', n) for k, n in enumerate(beat.exits)]),
            ("peer_up", "gauge", "1 for a node that can be reached.",
             [(f"{{peer={msgspec.json.encode(n).decode()}}}", float(i in beat.up)) for i, n in enumerate(names) if i != self.index]),
            ("sent_bytes_total", "counter", "Bytes put on the link to a node.",
             [(f"{{peer={msgspec.json.encode(names[i]).decode()}}}", n) for i, n in enumerate(beat.sent) if i != self.index]),
        ]  # fmt: skip
        return "".join(
            f"# HELP fastee_{name} {text}\n# TYPE fastee_{name} {kind}\n" + "".join(f"fastee_{name}{label} {value}\n" for label, value in values)
            for name, kind, text, values in rows
        )


def serve_metrics(host: str, port: int, text: Callable[[], str]) -> ThreadingHTTPServer:
    """Answer GET /metrics with `text()` from a thread of its own; raises ``OSError`` when the port is taken."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 5  # a client that says nothing must not keep a thread for good

        def do_GET(self) -> None:
            found = self.path.partition("?")[0] == "/metrics"
            body = text().encode() if found else b"see /metrics\n"
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer((host, port), Handler)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server


def serve(config: ClusterConfig, name: str, keys: str | os.PathLike | None = None, say: Callable[[str], None] = print) -> int:
    """Run node `name` of `config` in this thread until SIGTERM or SIGINT has made it leave; return the exit status.

    `keys`: the file of `fastee keys`, needed where the config lists public keys. `say` is told when the node serves. Raises ``ValueError`` for
    an unknown name, ``ClusterError`` (also ``FingerprintMismatch``, ``CheckpointMismatch``) when the node cannot start.
    """
    index = config.index(name)
    own = config.keys(keys)
    me = config.nodes[index]
    if own is not None and own.public != me.public_key:
        raise ClusterError(f"cluster: {os.fspath(keys)} has public key {own.public}, expected {me.public_key}, that of {name!r} in the cluster.toml")
    torch.set_num_threads(1)
    sys.setswitchinterval(0.001)
    net = config.network()
    settings = Settings(
        index, config.names, bytes.fromhex(net.fingerprint), me.slowdown, tuple(net.thresholds), config.promise(), config.credit,
        own, config.allowed(), tuple(n.public_key for n in config.nodes) if config.secure else (), media=media(config.declared_links(), index),
    )  # fmt: skip
    prof = measured(net, config, index)
    daemon = Daemon(net, settings, prof, config.declared_links(emulated=True), config.timeouts.drain)
    daemon.listen(me.at)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: daemon.leave())
    metrics = serve_metrics(me.metrics_host, me.metrics_port, daemon.metrics) if me.metrics_port else None
    daemon.connect([node.at for node in config.nodes])
    times = " ".join(f"{1e3 * t:.3g}" for t in prof.mean[:, index, 0])
    say(f"node {name}: serves at {me.host}:{me.port} pid {os.getpid()} model {net.fingerprint} segments {times} ms")
    gc.collect()
    gc.freeze()
    try:
        return daemon.serve()
    finally:
        if metrics is not None:
            metrics.shutdown()

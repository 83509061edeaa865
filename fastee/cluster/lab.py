"""A whole cluster.toml on this one machine: a host per node, the file's links between them, and faults on demand.

As root with vde2 every host is a network namespace with real network devices (:mod:`fastee.cluster.lab_namespaces`); else a relay process stands
between the nodes (:class:`Relay`). Either way the nodes are ``fastee node`` processes that know nothing of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from fastee.cluster import lab_namespaces
from fastee.cluster.config import ClusterConfig, read_config
from fastee.cluster.keys import Keys, make_keys, save_keys
from fastee.cluster.lab_relay import two_ports
from fastee.cluster.link import Link
from fastee.cluster.local import Cluster, _environment
from fastee.cluster.messages import Ports
from fastee.errors import ClusterError
from fastee.simulation.capacity import CapacityTrace

SHAPERS = ("auto", "namespaces", "relay")
_SLICE_SECONDS = 0.02
_TRACE_SECONDS = 0.1
_STDERR_BYTES = 4000


class Hosts(Protocol):
    """What a lab needs of the machines that it emulates; machines are numbered as the file's nodes."""

    def addresses(self, viewer: int) -> list[Ports]:
        """Where machine `viewer` reaches every node (itself: where it listens)."""

    def command(self, machine: int, words: Sequence[str]) -> list[str]:
        """The command that runs `words` on a machine."""

    def visit(self, machine: int) -> AbstractContextManager[None]:
        """What this thread, and threads that it starts, open meanwhile belongs to the machine."""

    def shape(self, a: int, b: int, link: Link) -> None:
        """Change the link from `a` to `b`, which must be up."""

    def cut(self, machine: int, on: bool) -> None:
        """Drop silently everything between a machine and the others, or end that."""

    def close(self) -> None: ...


class Relay:
    """Hosts without root: the nodes share this machine's loopback, their connections pass through ``lab_relay.py``. It delays bytes of a stream,
    not packets: nothing is ever lost, a cut holds bytes back, and what was on the way arrives after the heal, as TCP would send it again."""

    def __init__(self, links: dict[tuple[int, int], Link], count: int):
        held = [two_ports() for _ in range(count)]
        self._own = [Ports(a.getsockname()[1], b.getsockname()[1]) for a, b in held]
        for socket in (s for pair in held for s in pair):
            socket.close()
        script = Path(__file__).with_name("lab_relay.py")
        self._process = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
        self._lock = threading.Lock()
        of = lambda a, b: _numbers(links[a, b]) if a != b else (0.0, 0.0)
        self._doors = self._ask({"targets": [(at.host, at.ctl, at.bulk) for at in self._own], "links": [[of(a, b) for b in range(count)] for a in range(count)]})
        self._count = count

    def _ask(self, order: dict) -> Any:
        with self._lock:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise ClusterError(f"lab: the relay process ended with status {self._process.wait()}")
        return json.loads(line)

    def addresses(self, viewer: int) -> list[Ports]:
        return [self._own[b] if b == viewer else Ports(door, door + 1) for b, door in enumerate(self._doors[viewer])]

    def command(self, machine: int, words: Sequence[str]) -> list[str]:
        return list(words)

    def visit(self, machine: int) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def shape(self, a: int, b: int, link: Link) -> None:
        self._ask({"link": [a, b, link.rate, link.delay]})

    def cut(self, machine: int, on: bool) -> None:
        for other in range(self._count):
            if other != machine:
                self._ask({"open": [machine, other, not on]})
                self._ask({"open": [other, machine, not on]})

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


def _numbers(link: Link) -> tuple[float, float]:
    return (0.0 if link.rate == float("inf") else link.rate), link.delay


class _Host:
    """A machine of the lab and the node process on it, None while there is none; `serves` once it has said so."""

    def __init__(self, index: int, name: str):
        self.index, self.name = index, name
        self.process: subprocess.Popen | None = None
        self.stderr = tempfile.TemporaryFile()
        self.cut = self.frozen = self.serves = False
        self.slowing: threading.Event | None = None

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None


class Lab:
    """The hosts and links of a cluster.toml on this machine; a context manager that ends every process and device it made.

    `config`: what :func:`~fastee.cluster.config.load_config` read. Every node gets an address of its own, and fresh CURVE keys where the
    file lists keys or the hosts are namespaces; model, names, links, promise and credit are the file's. `shaper`: "namespaces" (Linux, root, vde2:
    real devices, whole milliseconds of delay), "relay" (anywhere, TCP streams) or "auto", the first that can be. `program`: the words before
    ``--config ... --name ...`` that start a node. Machine 0, the first node's, is also the client's: :meth:`connect`. Raises ``ClusterError`` with the
    end of its stderr when a node is not there in `start_timeout` seconds.

    >>> with Lab(load_config("cluster.toml")) as lab, lab.connect() as cluster:     # doctest: +SKIP
    ...     lab.cut("edge")
    ...     out = cluster(x, deadline=0.4)
    """

    def __init__(self, config: ClusterConfig, shaper: str = "auto", *, program: Sequence[str] = (), start_timeout: float = 60.0):
        if shaper not in SHAPERS:
            raise ValueError(f"shaper: got {shaper!r}, expected one of {', '.join(SHAPERS)}")
        why = lab_namespaces.unavailable()
        if shaper == "namespaces" and why:
            raise ClusterError(f"lab: no namespaces here: {why}")
        self.names, self.shaper = config.names, shaper if shaper != "auto" else "relay" if why else "namespaces"
        self._program = list(program) or [sys.executable, "-m", "fastee", "node"]
        self._timeout = start_timeout
        self._hosts = [_Host(i, name) for i, name in enumerate(config.names)]
        self._links = config.declared_links()
        self._replays: list[threading.Event] = []
        self._dir = Path(tempfile.mkdtemp(prefix="fastee-lab-"))
        try:
            if self.shaper == "relay":
                self._net: Hosts = Relay(self._links, len(self.names))
            else:
                self._net = lab_namespaces.Namespaces(config, self._links)
            self._write(config)
        except BaseException:
            self.close()
            raise

    def _write(self, config: ClusterConfig) -> None:
        """Every machine's cluster.toml and keys: the given file but for addresses, keys and links, which the hosts now have."""
        machines = [*self.names, "client"]
        top = config.model.backbone.partition(":")[0].partition(".")[0]
        for beside in (Path(config.folder, top), Path(config.folder, f"{top}.py")):
            if beside.exists():
                (self._dir / beside.name).symlink_to(beside)
        keys: list[Keys | None] = [make_keys() for _ in machines] if config.secure or self.shaper == "namespaces" else [None] * len(machines)
        for machine, name, own in zip([*range(len(self.names)), 0], machines, keys, strict=True):
            nodes = [
                msgspec.structs.replace(node, host=at.host, port=at.ctl, public_key=key.public if key else "", metrics_host="127.0.0.1")
                for node, at, key in zip(config.nodes, self._net.addresses(machine), keys, strict=False)
            ]
            model = msgspec.structs.replace(config.model, checkpoint=str(Path(config.folder, config.model.checkpoint)))
            links = [msgspec.structs.replace(link, emulate=False) for link in config.links]
            clients = {"client": keys[-1].public} if keys[-1] else {}
            made = msgspec.structs.replace(config, model=model, nodes=nodes, links=links, clients=clients, folder="")
            text = _toml(msgspec.to_builtins(made))
            read_config(text)
            self.config_of(name).write_text(text)
            if own:
                save_keys(own, self._dir / f"{name}.keys")

    def config_of(self, name: str) -> Path:
        """The cluster.toml that a node (or "client") has; its keys, where there are any, lie beside it."""
        return self._dir / f"{name}.toml"

    def keys_of(self, name: str) -> Path | None:
        """The key file of a node or "client", None where the lab has no keys."""
        path = self._dir / f"{name}.keys"
        return path if path.exists() else None

    def __enter__(self) -> Lab:
        try:
            self.start(*self.names)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    # processes

    def start(self, *names: str) -> None:
        """Start nodes that do not run and wait until each serves."""
        hosts = [self._host(name) for name in names]
        for host in hosts:
            if host.alive:
                raise ValueError(f"name: node {host.name!r} runs already")
            words = [*self._program, "--config", str(self.config_of(host.name)), "--name", host.name]
            keys = self.keys_of(host.name)
            host.process = subprocess.Popen(
                self._net.command(host.index, [*words, *(["--keys", str(keys)] if keys else [])]),
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=host.stderr, env=_environment(), start_new_session=True,
            )  # fmt: skip
            host.frozen = host.serves = False
        end = time.monotonic() + self._timeout
        for host in hosts:
            if b": serves at" not in self._line(host, end):
                host.process.poll() is None and self._signal(host, signal.SIGKILL)
                status = host.process.wait()
                raise ClusterError(f"lab: node {host.name!r} did not start within {self._timeout:.0f} s (status {status}); its stderr ends:\n{self._complaint(host)}")
            host.serves = True

    def _line(self, host: _Host, end: float) -> bytes:
        """The first line of the node's stdout, b"" when it ends or its time is up before; the pipe is then closed, nothing else is expected."""
        out = b""
        with host.process.stdout as pipe, selectors.DefaultSelector() as ready:
            ready.register(pipe, selectors.EVENT_READ)
            while not out.endswith(b"\n"):
                data = os.read(pipe.fileno(), 4096) if ready.select(max(0.0, end - time.monotonic())) else b""
                if not data:
                    return b""
                out += data
        return out

    def _complaint(self, host: _Host) -> str:
        host.stderr.seek(0, os.SEEK_END)
        host.stderr.seek(max(0, host.stderr.tell() - _STDERR_BYTES))
        return host.stderr.read().decode(errors="replace").strip()

    def kill(self, name: str) -> None:
        """kill -9; returns when the process is gone."""
        host = self._running(name)
        self._signal(host, signal.SIGKILL)
        host.process.wait()

    def stop(self, name: str) -> int:
        """SIGTERM: the node drains and leaves. Returns its exit status."""
        host = self._running(name)
        self._signal(host, signal.SIGTERM)
        return host.process.wait()

    def freeze(self, name: str) -> None:
        """SIGSTOP: a hung machine, whose connections stay."""
        self._freeze(self._running(name), True)

    def thaw(self, name: str) -> None:
        """End `freeze`."""
        self._freeze(self._running(name), False)

    def _freeze(self, host: _Host, on: bool) -> None:
        host.frozen = on
        self._signal(host, signal.SIGSTOP if on else signal.SIGCONT)

    def slow(self, name: str, share: float) -> None:
        """Let a node run for `share` of every 20 ms, in (0, 1]; 1 ends it. By SIGSTOP and SIGCONT, so its I/O thread is slow as well."""
        if not 0 < share <= 1:
            raise ValueError(f"share: got {share!r}, expected a number in (0, 1]")
        host = self._running(name)
        if host.slowing is not None:
            host.slowing.set()
            host.slowing = None
        if share < 1:
            host.slowing = threading.Event()
            threading.Thread(target=self._slow, args=(host, host.process, host.slowing, share), name=f"slow {name}", daemon=True).start()

    def _slow(self, host: _Host, process: subprocess.Popen, end: threading.Event, share: float) -> None:
        with contextlib.suppress(ProcessLookupError):
            while process.poll() is None and not end.wait(share * _SLICE_SECONDS):
                os.kill(process.pid, signal.SIGSTOP)
                end.wait((1 - share) * _SLICE_SECONDS)
                host.frozen or os.kill(process.pid, signal.SIGCONT)

    # network

    def cut(self, name: str) -> None:
        """Part a machine silently from the others: no packet passes, nobody gets an error. Machine 0 is parted with its client."""
        self._cut(self._host(name), True)

    def heal(self, name: str) -> None:
        """End `cut`."""
        self._cut(self._host(name), False)

    def _cut(self, host: _Host, on: bool) -> None:
        host.cut = on
        self._net.cut(host.index, on)

    def link(self, a: str, b: str, speed: str) -> None:
        """Give the link between two nodes, both directions, a new speed such as "2mbit 20ms"."""
        new = Link.parse(speed)
        if not new.up:
            raise ValueError(f"speed: got {speed!r}, expected a rate above 0; `cut` parts a machine")
        for pair in ((a, b), (b, a)):
            self._shape(*(self._host(name).index for name in pair), new)

    def _shape(self, a: int, b: int, link: Link) -> None:
        self._links[a, b] = link
        self._net.shape(a, b, link)

    def replay(self, source: str, target: str, trace: CapacityTrace, seconds: float = float("inf")) -> threading.Event:
        """Let the rate from one node to another follow a trace (repeated), averaged over 0.1 s, for `seconds` or until the returned event is set.

        A step in which nothing passes gets 10 kbit/s: a link that is down is a `cut`. The delay stays; in the end the former rate comes back.
        """
        a, b = self._host(source).index, self._host(target).index
        stop = threading.Event()
        self._replays.append(stop)
        threading.Thread(target=self._replay, args=(a, b, trace, seconds, stop), name=f"replay {source} {target}", daemon=True).start()
        return stop

    def _replay(self, a: int, b: int, trace: CapacityTrace, seconds: float, stop: threading.Event) -> None:
        before, began, step = self._links[a, b], time.monotonic(), 0
        while (at := step * _TRACE_SECONDS) < seconds and not stop.wait(max(0.0, began + at - time.monotonic())):
            self._shape(a, b, Link(max(1e4, (_passed(trace, at + _TRACE_SECONDS) - _passed(trace, at)) * 8 / _TRACE_SECONDS), self._links[a, b].delay))
            step += 1
        stop.wait(max(0.0, began + seconds - time.monotonic()))
        with contextlib.suppress(ClusterError, OSError):  # the lab may be gone
            self._shape(a, b, before)

    # use

    def connect(self, **options: Any) -> Cluster:
        """Join as the client on machine 0; the Cluster of :meth:`fastee.Cluster.connect`, whose keyword arguments may be given."""
        return self.on(0, lambda: Cluster.connect(self.config_of("client"), keys=self.keys_of("client"), **options))

    def on(self, machine: int, call: Callable[[], Any]) -> Any:
        """Return `call()`, run by a thread on a machine: what it opens, and threads that it starts, stay there."""
        out: list[Any] = []

        def run() -> None:
            try:
                with self._net.visit(machine):
                    out.extend((call(), None))
            except BaseException as error:
                out.extend((None, error))

        thread = threading.Thread(target=run, name="lab visitor")
        thread.start()
        thread.join()
        if out[1] is not None:
            raise out[1]
        return out[0]

    def popen(self, name: str, words: Sequence[str], **options: Any) -> subprocess.Popen:
        """Start a command on a machine; its end is the caller's business. FASTEE_LAB_CONFIG and FASTEE_LAB_KEYS name the client's files."""
        environment = {**os.environ, "FASTEE_LAB_CONFIG": str(self.config_of("client")), "FASTEE_LAB_KEYS": str(self.keys_of("client") or "")}
        return subprocess.Popen(self._net.command(self._host(name).index, words), env=environment, **options)

    def state(self) -> dict[str, dict[str, Any]]:
        """Return per node: ``pid``, whether its process is ``alive`` and has begun to serve (``serves``), ``frozen``, ``cut``."""
        return {
            h.name: {"pid": h.process.pid if h.process else 0, "alive": h.alive, "serves": h.alive and h.serves, "frozen": h.frozen, "cut": h.cut}
            for h in self._hosts
        }

    def close(self) -> None:
        """Kill the nodes, take the network down, remove the files. Harmless when repeated."""
        for stop in self._replays:
            stop.set()
        for host in self._hosts:
            if host.slowing is not None:
                host.slowing.set()
            if host.alive:
                self._signal(host, signal.SIGKILL)
                host.process.wait()
            host.stderr.close()
        net, self._net = getattr(self, "_net", None), None
        if net is not None:
            net.close()
        shutil.rmtree(self._dir, ignore_errors=True)

    def _signal(self, host: _Host, number: int) -> None:
        os.kill(host.process.pid, number)

    def _host(self, name: str) -> _Host:
        if name not in self.names:
            raise ValueError(f"name: got {name!r}, expected one of {', '.join(self.names)}")
        return self._hosts[self.names.index(name)]

    def _running(self, name: str) -> _Host:
        host = self._host(name)
        if not host.alive:
            raise ValueError(f"name: node {name!r} does not run")
        return host


def _passed(trace: CapacityTrace, seconds: float) -> float:
    """Bytes that a trace, repeated for ever, has let pass by a time."""
    rounds, rest = divmod(seconds * 1e9, float(trace.at[-1]))
    return rounds * float(trace.cum[-1]) + float(np.interp(rest, trace.at, trace.cum))


def _toml(tables: dict[str, Any]) -> str:
    """TOML of scalars, tables of scalars and lists of such tables; JSON's strings, numbers and lists are TOML's. None is left out."""
    lines = lambda table: "".join(f"{json.dumps(key)} = {json.dumps(value)}\n" for key, value in table.items() if value is not None)
    out = lines({k: v for k, v in tables.items() if not isinstance(v, dict | list) and k != "folder"})
    for key, value in tables.items():
        if isinstance(value, dict):
            out += f"[{key}]\n{lines(value)}"
        elif isinstance(value, list):
            out += "".join(f"[[{key}]]\n{lines(table)}" for table in value)
    return out

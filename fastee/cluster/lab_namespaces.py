"""The hosts of a lab as network namespaces of Linux, every pair joined by a wire of its own with rate and delay per direction.

A wire is vde2's ``wirefilter`` between two TAP devices. Kernels without netem have it too, and it can be changed and cut while packets are on it.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import platform
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastee.cluster.config import ClusterConfig
from fastee.cluster.link import Link
from fastee.cluster.messages import Ports
from fastee.errors import ClusterError

_CLONE_NEWNET = 0x40000000
_PROMPT = b"VDEwf$"
_QUEUE_BYTES = 128 << 10
_TOOLS = ("ip", "vde_switch", "wirefilter")


def unavailable() -> str:
    """Say why there can be no namespaces here, "" when there can."""
    if platform.system() != "Linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not os.path.exists("/dev/net/tun"):
        return "no /dev/net/tun"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    return f"{', '.join(missing)} not found (Debian: apt-get install vde2 iproute2)" if missing else ""


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(f"lab: `ip {' '.join(words)}` failed: {done.stderr.strip()}")


class _Wire:
    """The link between machines `a` < `b`; wirefilter calls the way there LR."""

    def __init__(self, folder: Path, name: str):
        self._pids: list[int] = []
        self._control: socket.socket | None = None
        self._folder, self._name = folder, name

    def open(self, taps: Sequence[str]) -> None:
        switches = [self._folder / f"{self._name}{side}" for side in "ab"]
        for switch, tap in zip(switches, taps, strict=True):
            self._daemon("vde_switch", "-s", str(switch), "-tap", tap, "-daemon")
        at = self._folder / f"{self._name}.control"
        self._daemon("wirefilter", "-v", f"{switches[0]}:{switches[1]}", "-M", str(at), "--daemon")
        self._control = socket.socket(socket.AF_UNIX)
        self._control.settimeout(5)
        _retry(lambda: self._control.connect(str(at)))
        self._answer()

    def _daemon(self, *words: str) -> None:
        at = self._folder / "pid"
        at.unlink(missing_ok=True)
        done = subprocess.run([*words, "--pidfile", str(at)], capture_output=True, text=True)
        if done.returncode:
            raise ClusterError(f"lab: `{' '.join(words)}` failed: {done.stderr.strip()}")
        pid = _retry(lambda: int(at.read_text()))
        self._pids.append(pid)
        with contextlib.suppress(OSError):  # else a busy machine adds 5 to 10 ms to every packet
            os.sched_setscheduler(pid, os.SCHED_RR, os.sched_param(2))

    def _answer(self) -> bytes:
        text = b""
        while not text.rstrip().endswith(_PROMPT):
            data = self._control.recv(4096)
            if not data:
                raise ClusterError(f"lab: the wirefilter of {self._name} ended")
            text += data
        return text

    def say(self, *orders: str) -> None:
        for order in orders:
            self._control.sendall(order.encode() + b"\n")
            if b"1000 Success" not in (answer := self._answer()):
                raise ClusterError(f"lab: wirefilter refused {order!r}: {answer.decode(errors='replace').strip()}")

    def close(self) -> None:
        if self._control is not None:
            self._control.close()
        for pid in reversed(self._pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def _retry(call, seconds: float = 3.0):
    """The result of `call` once it raises neither OSError nor ValueError; what it raised last when the time is up."""
    end = time.monotonic() + seconds
    while True:
        try:
            return call()
        except (OSError, ValueError):
            if time.monotonic() > end:
                raise
            time.sleep(0.01)


class Namespaces:
    """A namespace per node of `config`. Each keeps its own address where all have different IPv4 ones beyond loopback, else 10.79.0.1, 2, ..."""

    def __init__(self, config: ClusterConfig, links: dict[tuple[int, int], Link]):
        count = len(config.nodes)
        own = [ipaddress.ip_address(node.host) for node in config.nodes]
        keep = len(set(own)) == count and not any(ip.is_loopback or ip.version != 4 for ip in own)
        self._ips = [str(ip) for ip in own] if keep else [f"10.79.0.{i + 1}" for i in range(count)]
        self._ports = [node.at for node in config.nodes]
        self._spaces = [f"fastee{os.getpid()}-{i}" for i in range(count)]
        self._folder = Path(tempfile.mkdtemp(prefix="fastee-wires-"))
        self._wires: dict[tuple[int, int], _Wire] = {}
        self._cut: set[int] = set()
        self._links = dict(links)
        for pair, link in links.items():
            _whole(pair, link)
        try:
            for space in self._spaces:
                _ip("netns", "add", space)
                _ip("-n", space, "link", "set", "lo", "up")
            for pair in (pair for pair in links if pair[0] < pair[1]):
                self._join(*pair)
        except BaseException:
            self.close()
            raise

    def _join(self, a: int, b: int) -> None:
        wire = self._wires[a, b] = _Wire(self._folder, f"{a}-{b}")
        taps = [f"fe{os.getpid() % 100000}-{a}{side}{b}" for side in "lr"]  # at most 15 characters
        wire.open(taps)
        for tap, here, there in zip(taps, (a, b), (b, a), strict=True):
            space = self._spaces[here]
            _ip("link", "set", tap, "netns", space)
            _ip("-n", space, "addr", "add", f"{self._ips[here]}/32", "dev", tap)
            _ip("-n", space, "link", "set", tap, "up")
            _ip("-n", space, "route", "add", self._ips[there], "dev", tap, "src", self._ips[here])
        self.shape(a, b, self._links[a, b])
        self.shape(b, a, self._links[b, a])

    def addresses(self, viewer: int) -> list[Ports]:
        return [Ports(at.ctl, at.bulk, ip) for at, ip in zip(self._ports, self._ips, strict=True)]

    def command(self, machine: int, words: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self._spaces[machine], *words]

    @contextlib.contextmanager
    def visit(self, machine: int) -> Iterator[None]:
        with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{self._spaces[machine]}") as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(home.fileno())

    def shape(self, a: int, b: int, link: Link) -> None:
        _whole((a, b), link)
        way, rate = "LR" if a < b else "RL", link.rate
        limited = rate < float("inf")
        # The queue holds a round trip at least, or TCP cannot fill the link.
        queue = max(_QUEUE_BYTES, round(rate / 8 * 2 * link.delay)) if limited else 0
        self._wire(a, b).say(f"delay {way} {round(link.delay * 1e3)}", f"bandwidth {way} {round(rate / 8) if limited else 0}", f"chanbufsize {way} {queue}")

    def cut(self, machine: int, on: bool) -> None:
        (self._cut.add if on else self._cut.discard)(machine)
        for pair, wire in self._wires.items():
            wire.say(f"loss {100 if self._cut.intersection(pair) else 0}")

    def _wire(self, a: int, b: int) -> _Wire:
        return self._wires[min(a, b), max(a, b)]

    def close(self) -> None:
        for wire in self._wires.values():
            wire.close()
        for space in self._spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
        shutil.rmtree(self._folder, ignore_errors=True)


def _whole(pair: tuple[int, int], link: Link) -> None:
    if abs(link.delay * 1e3 - round(link.delay * 1e3)) > 1e-9:
        raise ClusterError(f"lab: link {pair}: got a delay of {link.delay * 1e3:g} ms, wirefilter knows whole milliseconds only; use the relay shaper")


def _enter(fd: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")

"""What a lab's link really does: round trip of a byte and rate of a stream, over plain sockets."""

from __future__ import annotations

import socket
import threading
import time

from fastee.cluster.lab import Hosts


def measured_link(net: Hosts, a: int, b: int, nbytes: int = 1_000_000) -> tuple[float, float]:
    """Return (seconds of the fastest of ten round trips of one byte, bit/s of a stream of `nbytes`) from machine `a` to `b` of some hosts."""
    with net.visit(b):
        server = socket.create_server((net.addresses(b)[b].host, net.addresses(b)[b].ctl))

    def echo() -> None:
        with server.accept()[0] as far:
            for _ in range(10):
                far.sendall(far.recv(1))
            left = nbytes
            while left:
                left -= len(far.recv(min(left, 65536)))
            far.sendall(b".")

    thread = threading.Thread(target=echo)
    thread.start()
    at = net.addresses(a)[b]
    with net.visit(a):
        near = socket.create_connection((at.host, at.ctl))
    with near, server:
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trips = []
        for _ in range(10):
            began = time.monotonic()
            near.sendall(b".")
            near.recv(1)
            trips.append(time.monotonic() - began)
        began = time.monotonic()
        near.sendall(bytes(nbytes))
        near.recv(1)
        seconds = time.monotonic() - began - min(trips)
    thread.join()
    return min(trips), nbytes * 8 / seconds


def best_link(net: Hosts, a: int, b: int, enough: float, nbytes: int = 1_000_000, tries: int = 4) -> tuple[float, float]:
    """Return the fastest round trip and the highest rate of `tries` measurements, or of fewer when one has reached `enough` bit/s.

    Another load on the machine only lengthens a transfer, so the best of some is what the link allows.
    """
    seconds, rate = measured_link(net, a, b, nbytes)
    for _ in range(tries - 1):
        if rate >= enough:
            break
        again = measured_link(net, a, b, nbytes)
        seconds, rate = min(seconds, again[0]), max(rate, again[1])
    return seconds, rate

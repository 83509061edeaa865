"""The links of a lab that has no root: one process between the nodes, which passes their TCP streams on late, slowly or not at all.

Run by path, not with ``-m``, and made of the standard library alone: importing ``fastee.cluster`` would cost the relay two seconds and 200 MB. Who
drives it is :class:`fastee.cluster.lab.Relay`: one JSON object a line on stdin, one line back for each. It ends when stdin closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import Sequence

# A link takes new bytes while less than this much of its time is taken: the queue in front of a real one, and what a heartbeat waits at most.
_QUEUE_SECONDS = 0.02
_PIECE_SECONDS = 0.002
_PIECES = 256


class Road:
    """A directed link: `rate` in bit/s, `delay` in seconds. While `open` is not set what is on it stays there, and nobody is told."""

    def __init__(self, rate: float, delay: float):
        self.rate, self.delay = rate, delay
        self.open = asyncio.Event()
        self.open.set()
        self._free = 0.0
        self._turn = asyncio.Lock()

    @property
    def piece(self) -> int:
        """Bytes that are taken at once."""
        return int(min(65536.0, max(1500.0, self.rate * _PIECE_SECONDS / 8)))

    async def take(self, nbytes: int) -> float:
        """Wait for a place in the queue and return the loop's time at which these bytes arrive."""
        async with self._turn:
            now = asyncio.get_running_loop().time()
            self._free = max(now, self._free) + nbytes * 8 / self.rate
            if self._free - now > _QUEUE_SECONDS:
                await asyncio.sleep(self._free - now - _QUEUE_SECONDS)
            return self._free + self.delay


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, road: Road) -> None:
    """Pass a stream on over `road` until its end, and the end too."""
    on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_PIECES)

    async def read() -> None:
        data = b"-"
        while data:
            with contextlib.suppress(OSError):
                data = b""
                data = await reader.read(road.piece)
            await on_the_way.put((await road.take(len(data)), data))

    reading = asyncio.create_task(read())
    loop = asyncio.get_running_loop()
    try:
        while True:
            due, data = await on_the_way.get()
            if (wait := due - loop.time()) > 0:
                await asyncio.sleep(wait)
            await road.open.wait()
            if not data:
                break
            writer.write(data)
            await writer.drain()
    except OSError:
        pass  # the receiver is gone; closing tells the sender
    finally:
        reading.cancel()
        writer.close()


class Roads:
    """Every directed link between `targets` ((host, control port, bulk port) of each machine), and the doors by which others reach them."""

    def __init__(self, targets: Sequence[tuple[str, int, int]], links: Sequence[Sequence[tuple[float, float]]]):
        count = len(targets)
        self.targets = targets
        self.roads = {(a, b): Road(*links[a][b]) for a in range(count) for b in range(count) if a != b}
        self._kept: set[asyncio.Task] = set()

    async def doors(self) -> list[list[int]]:
        """Listen; return [a][b]: the control port by which machine a reaches b (bulk is the next one), 0 for itself."""
        count = len(self.targets)
        out = [[0] * count for _ in range(count)]
        for a, b in self.roads:
            first, second = two_ports()
            out[a][b] = first.getsockname()[1]
            for which, door in enumerate((first, second)):
                await asyncio.start_server(lambda r, w, a=a, b=b, which=which: self._enter(r, w, a, b, which), sock=door)
        return out

    async def _enter(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, a: int, b: int, which: int) -> None:
        there, back = self.roads[a, b], self.roads[b, a]
        try:
            await there.open.wait()  # towards a silent machine no connection comes about either
            await back.open.wait()
            await asyncio.sleep(there.delay + back.delay)
            far_reader, far_writer = await asyncio.open_connection(self.targets[b][0], self.targets[b][1 + which])
        except OSError:
            writer.close()
            return
        ways = asyncio.gather(_carry(reader, far_writer, there), _carry(far_reader, writer, back))
        self._kept.add(ways)
        ways.add_done_callback(self._kept.discard)

    def obey(self, order: dict) -> None:
        """{"link": [a, b, rate, delay]} or {"open": [a, b, bool]}."""
        if "link" in order:
            a, b, rate, delay = order["link"]
            self.roads[a, b].rate, self.roads[a, b].delay = rate, delay
        else:
            a, b, is_open = order["open"]
            (self.roads[a, b].open.set if is_open else self.roads[a, b].open.clear)()


def two_ports(host: str = "127.0.0.1") -> tuple[socket.socket, socket.socket]:
    """Return sockets bound to a free port of `host` and the one after it."""
    while True:
        first, second = socket.socket(), socket.socket()
        first.bind((host, 0))
        try:
            second.bind((host, first.getsockname()[1] + 1))
            return first, second
        except (OSError, OverflowError):
            first.close()
            second.close()


async def _main() -> None:
    loop = asyncio.get_running_loop()
    orders = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    first = json.loads(await orders.readline())
    # JSON knows no infinity: an unshaped link comes as rate 0.
    roads = Roads(first["targets"], [[(rate or float("inf"), delay) for rate, delay in row] for row in first["links"]])
    answer = await roads.doors()
    while True:
        print(json.dumps(answer), flush=True)
        line = await orders.readline()
        if not line:
            os._exit(0)  # nothing is worth tidying up; cancelled streams would each leave a traceback
        answer = roads.obey(json.loads(line))


if __name__ == "__main__":
    asyncio.run(_main())

"""`fastee serve` on loopback under load: 8 clients that send at random times, at 70 % of what it can answer and at twice that; late, lost, refused.

Open loop: a request is sent at its time (Poisson), on a free connection of its client or a new one, however slow the others are; its time runs
from when it was due. Capacity is the rate of 8 clients that each send as soon as they are answered, without deadlines.
`FASTEE_BENCH_SERVE_SECONDS` sets the length of a phase (20).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

import fastee
from fastee.testing.bench import Case, Context, Group

CLIENTS, DEADLINE = 8, 0.05
GIVE_UP = 10.0
"""Seconds after which a client counts its request as timed out."""
_LENGTH = b"content-length:"


def network() -> fastee.EarlyExit:
    """A CIFAR ResNet-20 with two exits, the first for about half of all images; what the server of this bench runs."""
    from .bench_attach import networks

    torch.manual_seed(0)
    net = networks()[1]
    with torch.no_grad():
        scores = net.exit_step(0, net.run_segment(0, (torch.randn(256, 3, 32, 32),))).confidence
    return net.set_rule(thresholds=[float(scores.median()), float("inf")])


@contextlib.contextmanager
def serving(spec: str, *options: str) -> Iterator[int]:
    """A `fastee serve` of its own for what `spec` names; gives its port. SIGTERM ends it, and it must end well."""
    command = [sys.executable, "-m", "fastee", "serve", spec, "--port", "0", *options]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            line = process.stdout.readline()
            if "http://" not in line:
                raise RuntimeError(f"{' '.join(command)} did not start: {line!r}")
            yield int(line.rsplit(":", 1)[1])
        finally:
            process.terminate()
            process.wait(30)


def request(x: torch.Tensor, deadline: float | None) -> bytes:
    """Return one whole HTTP request: the tensor as bytes, labels and confidences wanted."""
    data = x.numpy().tobytes()
    body = json.dumps({
        "inputs": [{"name": "x", "shape": list(x.shape), "datatype": "FP32", "parameters": {"binary_data_size": len(data)}}],
        "outputs": [{"name": n} for n in ("label", "confidence", "exit")],
    }).encode()  # fmt: skip
    told = "" if deadline is None else f"X-Deadline: {deadline}\r\n"
    head = f"POST /v2/models/net/infer HTTP/1.1\r\nHost: l\r\n{told}Inference-Header-Content-Length: {len(body)}\r\nContent-Length: {len(body) + len(data)}\r\n\r\n"
    return head.encode() + body + data


@dataclass
class Tally:
    """What became of the requests: seconds of those answered and of those refused, and how all of them ended."""

    answered: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    exits: Counter[int] = field(default_factory=Counter)
    late_sends: float = 0.0
    seconds: float = 0.0

    @property
    def sent(self) -> int:
        return sum(self.ends.values())

    @property
    def broken(self) -> int:
        """How many got neither an answer nor a refusal (429, 503) with Retry-After."""
        return self.sent - len(self.answered) - len(self.refused)

    @property
    def in_time(self) -> int:
        return sum(t <= DEADLINE for t in self.answered)

    def __str__(self) -> str:
        ends = ", ".join(f"{n} {what}" for what, n in sorted(self.ends.items()))
        leave = ", ".join(f"{n} at exit {e}" for e, n in sorted(self.exits.items()))
        return (
            f"{self.sent} requests in {self.seconds:.0f} s: {ends}; {self.in_time} answered in {DEADLINE * 1e3:.0f} ms; {leave}; "
            f"worst send {self.late_sends * 1e3:.1f} ms after its time"
        )


class Client:
    """One client's connections; `send` uses a free one or opens one."""

    def __init__(self, port: int, tally: Tally):
        self.port, self.tally, self.free = port, tally, []

    async def send(self, data: bytes, due: float) -> None:
        """Send a request and count what becomes of it; its time runs from `due`."""
        try:
            status, headers, body = await asyncio.wait_for(self._exchange(data), GIVE_UP)
        except asyncio.TimeoutError:
            self.tally.ends["timed out"] += 1
            return
        except (OSError, asyncio.IncompleteReadError) as error:
            self.tally.ends[f"lost: {type(error).__name__}"] += 1
            return
        seconds = time.perf_counter() - due
        self.tally.ends[str(status)] += 1
        if status == 200:
            self.tally.answered.append(seconds)
            self.tally.exits[next(o["data"][0] for o in json.loads(body)["outputs"] if o["name"] == "exit")] += 1
        elif status in (429, 503) and b"retry-after:" in headers.lower() and json.loads(body)["type"]:
            self.tally.refused.append(seconds)

    async def _exchange(self, data: bytes) -> tuple[int, bytes, bytes]:
        while self.free and self.free[-1][0].at_eof():  # idle for so long that the server has closed it
            self.free.pop()
        pair = self.free.pop() if self.free else await asyncio.open_connection("127.0.0.1", self.port)
        try:
            pair[1].write(data)
            headers = await pair[0].readuntil(b"\r\n\r\n")
            low = headers.lower()
            body = await pair[0].readexactly(int(low[low.index(_LENGTH) + len(_LENGTH) :].split(b"\r\n", 1)[0]))
        except BaseException:
            pair[1].close()
            raise
        self.free.append(pair)
        return int(headers.split(b" ", 2)[1]), headers, body

    def close(self) -> None:
        for _, writer in self.free:
            writer.close()


async def _closed(client: Client, wanted: list[bytes], end: float) -> None:
    while (now := time.perf_counter()) < end:
        await client.send(random.choice(wanted), now)


async def _open(client: Client, wanted: list[bytes], end: float, rate: float, dice: random.Random) -> None:
    due, going = time.perf_counter(), set()
    while True:
        due += dice.expovariate(rate)
        if due > end:
            break
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        client.tally.late_sends = max(client.tally.late_sends, time.perf_counter() - due)
        task = asyncio.create_task(client.send(dice.choice(wanted), due))
        going.add(task)
        task.add_done_callback(going.discard)
    await asyncio.gather(*going)


def load(port: int, run: Callable[[Client, float, int], Awaitable[None]], seconds: float) -> Tally:
    """Let all clients run for some seconds and return what became of their requests."""

    async def all_of_them() -> Tally:
        tally = Tally()
        clients = [Client(port, tally) for _ in range(CLIENTS)]
        begin = time.perf_counter()
        await asyncio.gather(*(run(c, begin + seconds, i) for i, c in enumerate(clients)))
        tally.seconds = time.perf_counter() - begin
        for c in clients:
            c.close()
        return tally

    return asyncio.run(all_of_them())


def closed(port: int, wanted: list[bytes], seconds: float) -> Tally:
    """Each client sends as soon as it is answered."""
    return load(port, lambda c, end, i: _closed(c, wanted, end), seconds)


def arrivals(port: int, wanted: list[bytes], seconds: float, rate: float, seed: int = 0) -> Tally:
    """The clients send `rate` requests a second together, at random times, whatever becomes of them."""
    return load(port, lambda c, end, i: _open(c, wanted, end, rate / CLIENTS, random.Random(seed * CLIENTS + i)), seconds)


def share(part: int, whole: int) -> float:
    return part / max(1, whole)


def cases(ctx: Context) -> Iterator[Group]:
    seconds = float(os.environ.get("FASTEE_BENCH_SERVE_SECONDS", "2" if ctx.quick else "20"))
    generator = torch.Generator().manual_seed(ctx.seed)
    images = [torch.randn(1, 3, 32, 32, generator=generator) for _ in range(64)]
    silent, told = ([request(x, d) for x in images] for d in (None, DEADLINE))
    name = f"resnet20 1x3x32x32, {CLIENTS} clients, deadline {DEADLINE * 1e3:.0f} ms"

    def group(load: str, case: Case, *bars: str) -> Group:
        return Group("serve", f"{name}, {load}", "fp32", [case], baseline=case.provider, per_call=True, bars=bars)

    def case(tally: Tally, times: list[float], ratio: float, provider: str = "fastee", say: str = "") -> Case:
        return Case(provider, None, note=f"{say}{tally}; capacity {capacity:.0f}/s", ratio=ratio, times=[t * 1e9 for t in times] or [np.inf])

    with serving(f"{__name__}:network") as port:
        closed(port, silent, min(2.0, seconds))
        at_once = closed(port, silent, seconds / 2)
        capacity = len(at_once.answered) / at_once.seconds
        calm = arrivals(port, told, seconds, 0.7 * capacity, 1)
        p99 = f"p99 <= {DEADLINE * 1e3:.0f} ms"
        late = share(calm.sent - calm.in_time, calm.sent)
        yield group("70 % of capacity", case(calm, calm.answered, late, say="ratio: not answered in time; "), "ratio <= 0.01", p99)
        full = arrivals(port, told, seconds, 2 * capacity, 2)
        late = share(len(full.answered) - full.in_time, len(full.answered))
        yield group("twice the capacity", case(full, full.answered, late, say="ratio: of those answered, late; "), "ratio <= 0.01", p99)
        text = "ratio: neither answered nor refused with Retry-After; "
        yield group("twice the capacity, the refusals", case(full, full.refused, full.broken + calm.broken, say=text), "ratio <= 0")
        blind = arrivals(port, silent, seconds / 2, 2 * capacity, 3)
        late = share(blind.sent - blind.in_time, blind.sent)
        yield group("twice the capacity, not told of the deadline", case(blind, blind.answered, late, "no deadline", "ratio: not answered in time; "))

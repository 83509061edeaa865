"""Round trips of N bytes out and 64 back through what others would use, each with a server process of its own: pyzmq, gloo, pipelining, gRPC, Ray.

``python -m benchmarks.cluster_peers <peer> <bytes> <port>`` is the server.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ANSWER = bytes(64)


class Missing(RuntimeError):
    """A peer that cannot run here, with the reason."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def served(peer: str, nbytes: int, port: int = 0) -> Iterator[int]:
    """A server process on a port that it listens on when this returns, or on the given one where all wait for each other."""
    ready, port = not port, port or free_port()
    command = [sys.executable, "-m", "benchmarks.cluster_peers", peer, str(nbytes), str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        if ready and process.stdout.readline().strip() != b"ready":
            raise Missing(f"the {peer} server did not start")
        yield port
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def _ready() -> None:
    print("ready", flush=True)


@contextlib.contextmanager
def pyzmq(nbytes: int) -> Iterator[tuple[Callable[[], object]]]:
    import zmq

    with served("pyzmq", nbytes) as port:
        context = zmq.Context()
        s = context.socket(zmq.DEALER)
        s.connect(f"tcp://127.0.0.1:{port}")
        payload = bytearray(nbytes)

        def trip():
            s.send_multipart([b"head", payload], copy=False)
            return s.recv()

        yield (trip,)
        context.destroy(linger=0)


def serve_pyzmq(nbytes: int, port: int) -> None:
    import zmq

    s = zmq.Context().socket(zmq.ROUTER)
    s.bind(f"tcp://127.0.0.1:{port}")
    _ready()
    while True:
        who, _, _ = s.recv_multipart(copy=False)
        s.send_multipart([who, ANSWER])


def _world(rank: int, port: int):
    """One group of three, since a process may have but one: 0 asks, 1 answers sends, 2 is the second stage of a pipeline with 0."""
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=3)
    return dist, dist.new_group([0, 2])


def _stage(index: int, nbytes: int, group):
    import torch
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    stage = PipelineStage(torch.nn.Identity(), index, 2, torch.device("cpu"), group=group)
    return ScheduleGPipe(stage, 1), torch.zeros(1, nbytes // 4)


@contextlib.contextmanager
def distributed(nbytes: int) -> Iterator[tuple[Callable[[], object], Callable[[], object]]]:
    import torch

    port = free_port()
    with served("gloo", nbytes, port), served("pipelining", nbytes, port):
        dist, group = _world(0, port)
        x, answer = torch.zeros(nbytes, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
        schedule, values = _stage(0, nbytes, group)

        def trip():
            dist.send(x, 1)
            dist.recv(answer, 1)

        def pipeline():
            schedule.step(values)
            dist.recv(answer, 2)

        yield trip, pipeline
        dist.destroy_process_group()


def serve_gloo(nbytes: int, port: int) -> None:
    import torch

    dist, _ = _world(1, port)
    x, answer = torch.zeros(nbytes, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
    while True:
        dist.recv(x, 0)
        dist.send(answer, 0)


def serve_pipelining(nbytes: int, port: int) -> None:
    import torch

    dist, group = _world(2, port)
    schedule, _ = _stage(1, nbytes, group)
    answer = torch.zeros(64, dtype=torch.uint8)
    with torch.no_grad():
        while True:
            schedule.step()
            dist.send(answer, 0)


@contextlib.contextmanager
def grpc(nbytes: int) -> Iterator[tuple[Callable[[], object]]]:
    if importlib.util.find_spec("grpc") is None:
        raise Missing("grpcio is not installed (pip install grpcio)")
    import grpc as api

    with served("grpc", nbytes) as port, api.insecure_channel(f"127.0.0.1:{port}") as channel:
        call, payload = channel.unary_unary("/fastee.Echo/Ack"), bytes(nbytes)
        yield (lambda: call(payload),)


def serve_grpc(nbytes: int, port: int) -> None:
    from concurrent.futures import ThreadPoolExecutor

    import grpc as api

    server = api.server(ThreadPoolExecutor(1))
    method = api.unary_unary_rpc_method_handler(lambda request, context: ANSWER)
    server.add_generic_rpc_handlers((api.method_handlers_generic_handler("fastee.Echo", {"Ack": method}),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    _ready()
    server.wait_for_termination()


@contextlib.contextmanager
def ray(nbytes: int) -> Iterator[tuple[Callable[[], object]]]:
    if importlib.util.find_spec("ray") is None:
        raise Missing("ray is not installed (pip install ray)")
    import numpy
    import ray as api

    api.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")

    @api.remote
    class Echo:
        def ack(self, x):
            return ANSWER

    actor, x = Echo.remote(), numpy.zeros(nbytes, numpy.uint8)
    yield (lambda: api.get(actor.ack.remote(x)),)
    api.shutdown()


PEERS: tuple[tuple[Callable, dict[str, str]], ...] = (
    (pyzmq, {"pyzmq": "ROUTER/DEALER, a Python loop on both sides"}),
    (
        distributed,
        {
            "gloo": "torch.distributed send and recv, sizes known beforehand",
            "pipelining": "torch.distributed.pipelining over gloo, two stages, one microbatch, and 64 B back",
        },
    ),
    (grpc, {"grpc": "unary call with bytes"}),
    (ray, {"ray": "call of a plain actor on one node"}),
)


if __name__ == "__main__":
    globals()[f"serve_{sys.argv[1]}"](int(sys.argv[2]), int(sys.argv[3]))

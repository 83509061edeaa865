"""The process of one node of a spatial split (``python -m fastee.cluster.spatial_worker``); how it gets the network is in ``worker.py``."""

from __future__ import annotations

import os
import secrets
import traceback
from dataclasses import dataclass

import torch

from fastee.cluster.endpoint import Arrival, Complaint, Identity, Item, Lost
from fastee.cluster.frame import Frame, Kind
from fastee.cluster.messages import Heartbeat, Hello, Ports, Refused, client_peer, node_of, node_peer, to_payload
from fastee.cluster.spatial_node import CLIENT, SpatialNode
from fastee.cluster.transport import PeerEvent
from fastee.cluster.worker import Child, run
from fastee.errors import FrameError
from fastee.planning.spatial.extract import extract

_IDLE_SECONDS = 0.05
_PEER_FRAMES = 4096


@dataclass(frozen=True)
class SpatialSettings:
    """What a node is told at start: who it is, the declared slowness, how rows travel. The caller's machine is number ``len(names)``."""

    index: int
    names: tuple[str, ...]
    fingerprint: bytes
    slowdown: float = 1.0
    codec: str = "raw"


class SpatialWorker(Child):
    """A `SpatialNode` on the network: one Python thread receives and computes, the endpoint's thread transfers meanwhile."""

    def __init__(self, backbone: torch.nn.Module, example: torch.Tensor, settings: SpatialSettings, links: dict, stdin_fd: int):
        self.settings, self.index = settings, settings.index
        providers, incarnation = len(settings.names), secrets.randbits(63)
        hello = to_payload(Hello(settings.names[self.index], self.index, os.getpid()))
        name = f"n{self.index}:{incarnation:016x}"
        super().__init__(stdin_fd, Identity(name, self.index, incarnation, settings.fingerprint, hello, links, node=True, peer_tasks=_PEER_FRAMES))
        self._up: dict[int, bool] = {}
        self.node = SpatialNode(extract(backbone, example), self.index, providers, self._send, settings.slowdown, settings.codec)

    def connect(self, ports: list[Ports]) -> None:
        self._report()
        for index, at in enumerate(ports):
            if index != self.index:
                self._endpoint.connect(node_peer(index), index, "127.0.0.1", at)

    def serve(self) -> int:
        """Run until the parent is gone; returns the exit status."""
        busy = False
        try:
            while self._stays():
                for item in self._endpoint.receive(0.0 if busy else _IDLE_SECONDS, self._stdin):
                    self._handle(item)
                busy = self._step()
        finally:
            self._endpoint.close()
        return 0

    def _step(self) -> bool:
        try:
            return self.node.step()
        except Exception:  # the user's module, at one task: tell its caller and go on
            key, attempt = self.node.abandon()
            text = traceback.format_exc()[-2000:]
            refusal = to_payload(Refused("failed", f"node {self.settings.names[self.index]!r}: {text}"))
            self._send(CLIENT, Frame(Kind.REFUSED, task=key[1], origin=key[0], hops=attempt << 8, payload=refusal))
            return True

    def _handle(self, item: Item) -> None:
        if isinstance(item, Arrival):
            if item.frame.kind is Kind.TASK:
                try:
                    self.node.take(item.frame)
                except FrameError as error:
                    self._complain(item.peer, str(error))
        elif isinstance(item, PeerEvent):
            self._up[node_of(item.peer)] = item.up
            self._report()
        elif isinstance(item, Complaint):
            self._complain(item.peer, item.reason)
        elif isinstance(item, Lost):
            task, origin, hops = item.key
            refusal = to_payload(Refused("undeliverable", f"rows from node {self.settings.names[self.index]!r} did not arrive"))
            self._send(CLIENT, Frame(Kind.REFUSED, task=task, origin=origin, hops=hops, payload=refusal))

    def _send(self, target: int, frame: Frame) -> None:
        if target == CLIENT:
            self._endpoint.put(client_peer(frame.origin), len(self.settings.names), frame)
        else:
            self._endpoint.put(node_peer(target), target, frame)

    def _report(self) -> None:
        self._endpoint.set_beat(to_payload(Heartbeat(0, 0.0, self.node.handled, up=[n for n, up in self._up.items() if up and n >= 0])))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run(SpatialWorker)

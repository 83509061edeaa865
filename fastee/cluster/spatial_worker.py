"""The process of one node of a spatial split (``python -m fastee.cluster.spatial_worker``); how it gets the network is in ``worker.py``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastee.cluster.endpoint import Lost
from fastee.cluster.frame import Frame, Kind
from fastee.cluster.messages import node_peer
from fastee.cluster.spatial_node import CLIENT, SpatialNode
from fastee.cluster.stepper import Stepper
from fastee.cluster.worker import run
from fastee.planning.spatial.extract import extract

_PEER_FRAMES = 4096


@dataclass(frozen=True)
class SpatialSettings:
    """What a node is told at start: who it is, the declared slowness, how rows travel. The caller's machine is number ``len(names)``."""

    index: int
    names: tuple[str, ...]
    fingerprint: bytes
    slowdown: float = 1.0
    codec: str = "raw"


class SpatialWorker(Stepper):
    """A `SpatialNode` on the network: one Python thread receives and computes, the endpoint's thread transfers meanwhile."""

    def __init__(self, backbone: torch.nn.Module, example: torch.Tensor, settings: SpatialSettings, links: dict, stdin_fd: int):
        super().__init__(settings, links, stdin_fd, peer_tasks=_PEER_FRAMES)
        self.node = SpatialNode(extract(backbone, example), self.index, len(settings.names), self._send, settings.slowdown, settings.codec)

    @property
    def handled(self) -> int:
        return self.node.handled

    def take(self, frame: Frame) -> None:
        if frame.kind is Kind.TASK:
            self.node.take(frame)

    def step(self) -> bool:
        try:
            return self.node.step()
        except Exception:  # the user's module, at one task: tell its caller and go on
            (origin, task), attempt = self.node.abandon()
            self.refuse_raised((task, origin, attempt << 8))
            return True

    def lost(self, item: Lost) -> None:
        self.refuse(item.key, "undeliverable", "rows from it did not arrive")

    def _send(self, target: int, frame: Frame) -> None:
        if target == CLIENT:
            self.tell(frame)
        else:
            self._endpoint.put(node_peer(target), target, frame)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run(SpatialWorker)

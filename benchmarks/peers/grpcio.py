"""gRPC: a unary call with bytes, beside an offload of the cluster."""

from __future__ import annotations

from ..bench_cluster import offloads
from . import Peer

PEER = Peer("1.85.1", "Apache-2.0", (("grpcio==1.85.1",),))
CASES = {"cluster": offloads}

"""Ray: a call of a plain actor on one node, beside an offload of the cluster."""

from __future__ import annotations

from ..bench_cluster import offloads
from . import Peer

PEER = Peer("2.60.0", "Apache-2.0", (("ray==2.60.0",),))
CASES = {"cluster": offloads}

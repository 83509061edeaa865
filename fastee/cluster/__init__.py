"""A network over several machines: wire frames, transports, nodes, the client, ``local_cluster()``."""

from fastee.cluster.client import TaskAnswer
from fastee.cluster.local import Cluster, local_cluster
from fastee.cluster.result import ClusterResult

__all__ = ["Cluster", "ClusterResult", "TaskAnswer", "local_cluster"]

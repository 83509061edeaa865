"""A network over several machines: wire frames, transports, nodes, the client, ``local_cluster()``."""

from fastee.cluster.client import TaskAnswer
from fastee.cluster.local import Cluster, local_cluster
from fastee.cluster.result import ClusterResult
from fastee.cluster.spatial import SpatialAnswer, SpatialCluster, spatial_cluster
from fastee.cluster.students import StudentAnswer, StudentCluster, student_cluster

__all__ = [
    "Cluster", "ClusterResult", "SpatialAnswer", "SpatialCluster", "StudentAnswer", "StudentCluster", "TaskAnswer", "local_cluster", "spatial_cluster",
    "student_cluster",
]  # fmt: skip

"""A network over several machines: wire frames, transports, nodes, the client, ``local_cluster()``."""

from fastee.cluster.client import TaskAnswer
from fastee.cluster.local import Cluster, local_cluster
from fastee.cluster.result import ClusterResult
from fastee.cluster.spatial import SpatialAnswer, SpatialCluster, spatial_cluster

__all__ = ["Cluster", "ClusterResult", "SpatialAnswer", "SpatialCluster", "TaskAnswer", "local_cluster", "spatial_cluster"]

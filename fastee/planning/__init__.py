"""Which node runs what, which exits are on, how a cut is packed, and at which thresholds to leave: planners and their searches."""

from fastee.errors import NoPlan
from fastee.planning.cluster import ClusterSpec, NodeSpec
from fastee.planning.joint import Replanner
from fastee.planning.plan import Alternative, Figures, Plan, plan
from fastee.planning.search import SearchReport, ThresholdSearch, search_thresholds

__all__ = ["Alternative", "ClusterSpec", "Figures", "NoPlan", "NodeSpec", "Plan", "Replanner", "SearchReport", "ThresholdSearch", "plan", "search_thresholds"]

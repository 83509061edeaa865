"""Splitting the rows of a CNN's layers over several machines: geometry, latency model, planners, baselines."""

from fastee.planning.spatial.baselines import BASELINES
from fastee.planning.spatial.devices import Device, Links
from fastee.planning.spatial.geometry import Layer, Net, input_rows, part_padding, vsl
from fastee.planning.spatial.nets import NETS, NetBuilder, mobilenet_v2, resnet18, resnet50, vgg16
from fastee.planning.spatial.plan import SpatialPlan
from fastee.planning.spatial.planner import METHODS, SpatialPlanner, plan_spatial

__all__ = [
    "BASELINES", "Device", "Layer", "Links", "METHODS", "NETS", "Net", "NetBuilder", "SpatialPlan", "SpatialPlanner",
    "input_rows", "mobilenet_v2", "part_padding", "plan_spatial", "resnet18", "resnet50", "vgg16", "vsl",
]  # fmt: skip

"""A cluster on a virtual clock, with the schedulers of the live one: simulate(), its spec, traces, log and proof."""

from fastee.simulation.capacity import CapacityTrace, parse_csv, parse_mahimahi, read_capacity, synthetic_capacity
from fastee.simulation.check import ConservationError, check_log
from fastee.simulation.difficulty import DifficultyTrace
from fastee.simulation.events import FaultKind, Outcome, What
from fastee.simulation.result import SimulationResult
from fastee.simulation.simulate import simulate
from fastee.simulation.spec import (
    Arrivals,
    Capacity,
    Connection,
    Difficulty,
    FaultSpec,
    Machine,
    Network,
    Promise,
    Spec,
    load_spec,
)

__all__ = [
    "Arrivals", "Capacity", "CapacityTrace", "Connection", "ConservationError", "Difficulty", "DifficultyTrace", "FaultKind", "FaultSpec", "Machine",
    "Network", "Outcome", "Promise", "SimulationResult", "Spec", "What", "check_log", "load_spec", "parse_csv", "parse_mahimahi", "read_capacity",
    "simulate", "synthetic_capacity",
]  # fmt: skip

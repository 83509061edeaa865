"""Networks with exits: ``attach``, ``EarlyExit``, ``ExitHead``, ``ExitResult``, ``load``."""

from fastee.nn.attach import attach
from fastee.nn.checkpoint import load
from fastee.nn.early_exit import EarlyExit
from fastee.nn.frames import FrameExits, FrameResult
from fastee.nn.graphs import GraphRunner
from fastee.nn.heads import ExitHead
from fastee.nn.result import ExitResult
from fastee.nn.students import StudentTeam

__all__ = ["EarlyExit", "ExitHead", "ExitResult", "FrameExits", "FrameResult", "GraphRunner", "StudentTeam", "attach", "load"]

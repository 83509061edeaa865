"""Training of the exits: ``fit`` and the settings of its methods."""

from fastee.training.fit import FitReport, fit
from fastee.training.frames import codebook, train_frames
from fastee.training.hierarchical import CutTimes, HierarchicalReport, choose_cut, cut_times, train_hierarchical
from fastee.training.loop import TrainingDiverged
from fastee.training.methods import Distill, Frozen, Gated, Joint
from fastee.training.students import partition, train_students

__all__ = [
    "CutTimes", "Distill", "FitReport", "Frozen", "Gated", "HierarchicalReport", "Joint", "TrainingDiverged", "choose_cut", "codebook", "cut_times", "fit",
    "partition", "train_frames", "train_hierarchical", "train_students",
]  # fmt: skip

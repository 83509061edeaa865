"""Training of the exits: ``fit`` and the settings of its methods."""

from fastee.training.fit import FitReport, fit
from fastee.training.loop import TrainingDiverged
from fastee.training.methods import Distill, Frozen, Gated, Joint

__all__ = ["Distill", "FitReport", "Frozen", "Gated", "Joint", "TrainingDiverged", "fit"]

"""Training of the exits: ``fit``."""

from fastee.training.fit import FitReport, fit

__all__ = ["FitReport", "fit"]

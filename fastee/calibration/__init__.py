"""Thresholds under a budget: ``calibrate`` for a network, ``thresholds`` for arrays."""

from fastee.calibration.calibrate import CalibrationReport, calibrate, collect
from fastee.calibration.thresholds import ThresholdReport, thresholds

__all__ = ["CalibrationReport", "ThresholdReport", "calibrate", "collect", "thresholds"]

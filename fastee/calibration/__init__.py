"""Thresholds under a budget: ``calibrate``, for arrays ``thresholds``, ``watch`` for what happens afterwards; ``dimee`` finds pools and alpha."""

from fastee.calibration import dimee
from fastee.calibration.calibrate import CalibrationReport, calibrate, collect
from fastee.calibration.temperature import reliability, temperature
from fastee.calibration.thresholds import ThresholdReport, thresholds
from fastee.calibration.watch import DriftTest, Watch, watch

__all__ = [
    "CalibrationReport", "DriftTest", "ThresholdReport", "Watch", "calibrate", "collect", "dimee", "reliability", "temperature",
    "thresholds", "watch",
]  # fmt: skip

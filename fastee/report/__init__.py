"""What a measurement looks like to a reader: tables for the terminal, plots, one HTML page, JSON."""

from fastee.report.html import page
from fastee.report.plots import accuracy_against_cost, calibration_plot, exit_histogram, latency_distribution
from fastee.report.result import Result, Row, closing, difference, row
from fastee.report.tables import calibration_table, profile_table, table

__all__ = [
    "Result", "Row", "accuracy_against_cost", "calibration_plot", "calibration_table", "closing", "difference", "exit_histogram", "latency_distribution", "page", "profile_table", "row", "table"
]  # fmt: skip

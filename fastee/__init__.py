"""Early exit and split inference that pay.

The public names are imported on first use, so ``import fastee`` costs milliseconds and needs no torch.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# name -> module that defines it; a module name alone means the module itself
_PUBLIC = {
    "attach": "fastee.integrations.attach",
    "load": "fastee.nn",
    "EarlyExit": "fastee.nn",
    "ExitHead": "fastee.nn",
    "ExitResult": "fastee.nn",
    "fit": "fastee.training",
    "calibrate": "fastee.calibration",
    "profile": "fastee.scheduling",
    "Profile": "fastee.scheduling",
    "QoS": "fastee.scheduling",
    "Scheduler": "fastee.scheduling",
    "rule": "fastee.scheduling",
    "policy": "fastee.scheduling",
    "plan": "fastee.planning",
    "plan_spatial": "fastee.planning.spatial",
    "search_thresholds": "fastee.planning",
    "ClusterSpec": "fastee.planning",
    "NodeSpec": "fastee.planning",
    "simulate": "fastee.simulation",
    "local_cluster": "fastee.cluster",
    "spatial_cluster": "fastee.cluster",
    "student_cluster": "fastee.cluster",
    "Cluster": "fastee.cluster",
    "export": "fastee.exporting",
    "load_exported": "fastee.exporting",
    "explain": "fastee.dispatch",
    "doctor": "fastee.dispatch",
    "FasteeError": "fastee.errors",
}
_ROOMS = ("ops", "reference", "nn", "training", "calibration", "scheduling", "planning", "simulation", "cluster", "exporting", "integrations", "data", "report", "testing", "dispatch", "native", "errors")

__all__ = [*_PUBLIC, "ops", "calibration", "__version__"]


def __getattr__(name: str):
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return importlib.import_module(f"fastee.{name}")
    from fastee.errors import did_you_mean

    raise AttributeError(f"module 'fastee' has no attribute {name!r}{did_you_mean(name, [*_PUBLIC, *_ROOMS])}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, *_ROOMS})

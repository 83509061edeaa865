"""``fastee bench``: the benchmark suite, from a checkout's ``benchmarks`` folder or from the copy that an install carries."""

from __future__ import annotations

from importlib import import_module


def run(arguments: list[str]) -> int:
    """Run ``fastee bench <arguments>`` and return its exit code."""
    return import_module("fastee.benchmarks.__main__").main(arguments, "fastee bench")

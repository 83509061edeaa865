"""The kernels under pytest-benchmark: ``pytest benchmarks [--shapes small] [--benchmark-save=NAME] [--benchmark-compare=NAME]``.

The same cases as ``python -m benchmarks run``, for those who live in pytest-benchmark. It times provider after provider, not interleaved,
and its loop adds some 0.1 us to a call: rows and bars come from the harness.
"""

from __future__ import annotations

import itertools

import pytest

from fastee.testing.bench import Case, Context, Group, quiet

from . import run as runner

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
KERNELS = ("compact", "exit_pack", "exit_step", "pack_planes", "quantize", "row_stats")


def pytest_generate_tests(metafunc):
    groups = [
        g for op in KERNELS for g in runner.load(op)(Context(True, metafunc.config.getoption("shapes"), ("torch",))) if g.regime == "warm"
    ]
    pairs = [(group, case) for group in groups for case in group.cases if case.fn is not None]
    metafunc.parametrize("group, case", pairs, ids=[f"{g.op}-{g.shape}-{g.dtype}-{c.provider}".replace(" ", "_") for g, c in pairs])


def test_kernel(benchmark, group: Group, case: Case):
    feed = itertools.cycle(case.inputs)
    benchmark.group = f"{group.op} {group.shape} {group.dtype}"
    with quiet(group.threads):
        benchmark(lambda: case.fn(*next(feed), **case.kwargs))

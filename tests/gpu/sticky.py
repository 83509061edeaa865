"""A pytest plugin (``-p tests.gpu.sticky``): a worker whose device context a test has broken ends with that test, and xdist starts another.

An illegal access is sticky: every later call of the process fails with the error of a kernel that it never launched.
"""

import os
import sys

import pytest
import torch


def broken() -> str | None:
    """Return what the device says when nothing can run on it any more, None while something can."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError as why:
        return str(why).splitlines()[0]
    return None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.excinfo is not None and report.failed and hasattr(item.config, "workerinput") and (why := broken()):
        print(f"\n{item.nodeid} broke the device: {why}\n{report.longreprtext}", file=sys.stderr, flush=True)
        os._exit(3)
    return report

"""What every test shares: one compute thread, the small networks, and which tests the wall clock decides."""

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
# Live clusters and emulated links: their detection times, rates and deadlines are those of a machine that does nothing else.
LIVE = [HERE / "cluster", HERE / "netns"]

sys.path.insert(0, str(HERE / "nn"))  # small_nets, of every folder that attaches exits


def pytest_collection_modifyitems(items):
    for item in items:
        if any(folder in item.path.parents for folder in LIVE):
            item.add_marker(pytest.mark.timed)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Networks this small run several times faster on one thread, workers use one, and sums split over threads may differ in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

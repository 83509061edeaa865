"""One tiny network with three segments, one shared cluster of three processes."""

import pytest
import torch
from answers import rows

import fastee


@pytest.fixture(scope="session")
def net():
    torch.manual_seed(0)
    body = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 64, 10),
    )
    net = fastee.attach(body, exits=["1", "3"], num_classes=10, example=torch.zeros(1, 1, 8, 8)).eval()
    x = rows(64)
    first = net.exit_step(0, net.run_segment(0, (x,))).confidence
    second = net.exit_step(1, net.run_segment(1, net.run_segment(0, (x,)))).confidence
    # About a third of the rows leave at each exit.
    return net.set_rule(thresholds=[float(first.quantile(0.67)), float(second.quantile(0.5))])


@pytest.fixture(scope="session")
def cluster(net):
    with fastee.local_cluster(net, nodes=3, link="20mbit 5ms", timeout=15) as running:
        yield running

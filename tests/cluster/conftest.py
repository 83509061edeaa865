"""One tiny network with three segments, one shared cluster of three processes."""

import pytest
import torch

import fastee


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Workers compute with one thread; sums split over threads may differ in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def rows(count, seed=1):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.2, 3, count).view(-1, 1, 1, 1)


def local_answers(net, x):
    """The same rows answered in this process, one by one."""
    outs = [net(x[i : i + 1]) for i in range(len(x))]
    return {name: torch.cat([getattr(o, name) for o in outs]) for name in ("logits", "label", "confidence", "exit")}


def equal_local(out, net, x):
    want = local_answers(net, x)
    return all(torch.equal(getattr(out, name), value) for name, value in want.items())


@pytest.fixture(scope="session")
def cluster(net):
    with fastee.local_cluster(net, nodes=3, link="20mbit 5ms", timeout=15) as running:
        yield running

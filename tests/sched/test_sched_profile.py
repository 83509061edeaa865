"""profile() on a small network whose costs are known."""

import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fastee.scheduling import Profile, QoS, Scheduler, profile  # noqa: E402


class Sleeper:
    """Two exits; segment i takes (i + 1) ms whatever the batch, its head 2 ms; nothing else costs anything."""

    num_segments, fingerprint, training = 3, "sleeper", True

    def __init__(self):
        self.batches, self.modes = [], []

    def train(self):
        self.training = True

    def eval(self):
        self.training = False

    def run_segment(self, i, carry):
        self.batches.append(len(carry[0]))
        self.modes.append(self.training or torch.is_grad_enabled())
        time.sleep((i + 1) * 1e-3)
        return (carry[0][:, : 4 - i] * 2.0,)

    def exit_step(self, i, carry):
        time.sleep(2e-3)


@pytest.mark.timed
def test_profile_measures_segments_with_heads_bytes_and_nodes(tmp_path):
    net = Sleeper()
    prof = profile(net, torch.ones(3, 4, 2), nodes=("mobile", "cloud"), batch_sizes=(1, 5), slowdown={"mobile": 8.0}, link="20mbit 10ms",
                   repeats=5, warmup=1)  # fmt: skip
    assert prof.nodes == ("mobile", "cloud") and prof.fingerprint == "sleeper" and prof.num_exits == 2
    for s, least in enumerate((3e-3, 4e-3, 3e-3)):  # the last segment has no head
        assert least <= prof.mean[s, 1, 0] < least + 4e-3
    assert np.array_equal(prof.mean[:, 0], 8.0 * prof.mean[:, 1]) and np.array_equal(prof.spread[:, 0], 8.0 * prof.spread[:, 1])
    assert prof.wire_bytes[:, 0].tolist() == [32.0, 32.0, 24.0], "fp32 per sample: input, then 4 and 3 of 4 channels"
    assert prof.wire_bytes[:, 1].tolist() == [12.0, 12.0, 10.0], "one byte per element and one fp32 scale"
    assert prof.codec_seconds[:, 0].tolist() == [0.0, 0.0, 0.0] and (prof.codec_seconds[:, 1] > 0).all()
    assert prof.bandwidth.tolist() == [[0, 20e6], [20e6, 0]] and prof.delay[0, 1] == 0.01
    assert set(net.batches) == {1, 5} and not any(net.modes) and net.training, "measured in eval mode without gradients, then put back"
    prof.save(tmp_path / "p.json")
    sched = Scheduler(Profile.load(tmp_path / "p.json"), QoS(deadline=1.0), thresholds=[0.9, 0.9])
    assert sched.decide(sched.admit(0), 0, 0.95, 0).action.name == "EXIT"


def test_profile_links_per_pair():
    net = Sleeper()
    prof = profile(net, torch.ones(1, 4, 2), nodes=("a", "b"), batch_sizes=(1,), repeats=1, warmup=0, link={("a", "b"): "1mbit 5ms"})
    assert prof.bandwidth.tolist() == [[0, 1e6], [0, 0]] and prof.delay[0, 1] == 5e-3


@pytest.mark.parametrize("change, error, message", [
    (dict(example=[1, 2]), TypeError, "profile: example must be a tensor or a tuple of tensors, got int"),
    (dict(example=torch.ones(0, 4)), ValueError, r"profile: example must have at least one row, got shape \[0, 4\]"),
    (dict(example=()), ValueError, "profile: example must hold at least one tensor"),
    (dict(batch_sizes=()), ValueError, r"batch_sizes must be 1..64 rising ints >= 1, got \[\]"),
    (dict(slowdown=(1, 2)), ValueError, r"profile: slowdown must have one factor per node \(1\), got 2"),
    (dict(slowdown=(0,)), ValueError, "profile: slowdown must hold finite factors > 0, got 0"),
    (dict(slowdown={"nope": 1}), ValueError, r"profile: slowdown names unknown nodes \['nope'\], the nodes are \['here'\]"),
    (dict(link="fast"), ValueError, "link must be a rate and a delay"),
    (dict(link={("here", "x"): "1mbit 1ms"}), ValueError, r"profile: link must map pairs of the nodes \['here'\]"),
    (dict(repeats=0), ValueError, r"profile: repeats must be in 1..100000, got 0"),
    (dict(warmup=-1), ValueError, r"profile: warmup must be in 0..100000, got -1"),
    (dict(repeats=2.5), TypeError, "profile: repeats must be an int, got float"),
])  # fmt: skip
def test_profile_bad_input(change, error, message):
    arguments = {**dict(example=torch.ones(1, 4, 2), nodes=("here",), batch_sizes=(1,)), **change}
    if "link" in change and isinstance(change["link"], str):
        arguments["nodes"] = ("here", "there")
    net = Sleeper()
    with pytest.raises(error, match=message):
        profile(net, arguments.pop("example"), **arguments)
    assert net.batches == [], "nothing is measured before the arguments are right"

"""The baselines by the same client: where rows run, what they answer, what the dealing-out promises."""

from collections import Counter

import numpy as np
import pytest
import torch
from answers import equal_local, rows

import fastee
from fastee.cluster.modes import MODES, placements, run_mode, summary
from fastee.errors import ClusterError
from fastee.scheduling import Profile

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_answers_as_the_network(cluster, net, mode):
    x = rows(24)
    out = run_mode(cluster, x, mode, codec="raw")
    assert equal_local(out, net, x)
    assert torch.equal(run_mode(cluster, x[:6], mode, exits=False).exit, torch.full((6,), net.num_segments - 1))
    nodes = set(out.node.tolist())
    assert {"here": nodes == {0}, "send_input": len(nodes) == 1 and nodes != {0}}.get(mode, True)
    told = summary(out)
    assert told["answered"] == 24 and 0 < told["p50"] <= told["p99"] <= told["seconds"] and (told["bytes"] == 0) == (mode == "here" or nodes == {0})


class Idle:
    """A cluster of which only the costs are asked: segments of 1 s in all, node 1 twice and node 2 four times as fast, 1 s to node 2."""

    class _net:
        num_segments = 2

    profile = Profile(
        nodes=("a", "b", "c"), batch_sizes=(1,), mean=[[[4.0], [2.0], [1.0]], [[4.0], [2.0], [1.0]]], spread=np.zeros((2, 3, 1)), codecs=("raw",),
        wire_bytes=[[1e6], [1e6]], codec_seconds=[[0.0], [0.0]], bandwidth=np.full((3, 3), 8e6), delay=[[0, 0.5, 0.5], [0.5, 0, 0], [0.5, 0, 0]],
    )  # fmt: skip


def test_rows_are_dealt_out_so_that_all_end_together():
    assert placements(Idle(), "send_input", 2) == [[2, 2], [2, 2]]
    assert placements(Idle(), "here", 1) == [[0, 0]] and placements(Idle(), "scheduled", 2) == [None, None]
    dealt = Counter(plan[0] for plan in placements(Idle(), "data_parallel", 140))
    # 2, 4 and 8 s a row: in the long run shares as their speeds.
    assert dealt == pytest.approx({0: 20, 1: 40, 2: 80}, abs=2)
    assert placements(Idle(), "data_parallel", 1) == [[2, 2]]


def test_what_is_no_mode_and_what_cannot_be_known(cluster):
    with pytest.raises(ValueError, match="did you mean 'send_input'"):
        run_mode(cluster, rows(1), "send_inputs")
    blind = fastee.Cluster.__new__(fastee.Cluster)
    blind.profile, blind._net = None, Idle._net
    with pytest.raises(ClusterError, match="needs measured costs"):
        placements(blind, "data_parallel", 2)

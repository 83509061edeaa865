"""Inference split by rows over real processes: the unsplit answer, nodes that die, stop and fail, limits, wrong arguments."""

import os
import signal
import threading
import time

import pytest
import torch
from spatial_nets import network

import fastee
from fastee.errors import CannotCut, ClusterError, DeadlineExceeded, PeerLost
from fastee.planning.spatial import Device, SpatialPlanner
from fastee.planning.spatial.extract import extract


def equal(answer, net, x):
    with torch.no_grad():
        torch.testing.assert_close(answer.output, net(x), rtol=1e-5, atol=1e-5)


def even(net, x, nodes, bounds=1):
    """A plan with equal rows and several volumes: everybody has work and exchanges rows."""
    module = extract(net, x)
    # So slow that a re-plan, too, gives rows to everybody.
    planner = SpatialPlanner(module.net, [Device("slow", rate=1e6)] * nodes, 100e6)
    points = module.net.cut_points
    volumes = (0, *points[1 + bounds : -1 : 1 + bounds], len(module.net.layers))
    cuts = [[h * d // nodes for d in range(nodes + 1)] for h in map(module.net.height, volumes[1:])]
    return planner._plan(volumes, cuts, "even", {})


@pytest.mark.parametrize(("family", "nodes"), [("vgg", 3), ("resnet", 2), ("mobilenet", 2)])
def test_processes_answer_as_the_unsplit_network(family, nodes):
    net, x = network(family)
    codec = "planes" if family == "resnet" else "raw"
    with fastee.spatial_cluster(net, even(net, x, nodes), nodes=nodes, link="100mbit 1ms", example=x, codec=codec) as cluster:
        equal(cluster(x), net, x)
        equal(cluster(x[:1] * 3, deadline=10), net, x[:1] * 3)
        futures = [cluster.submit(x + k) for k in range(4)]
        for k, future in enumerate(futures):
            equal(future.result(), net, x + k)
        stats = cluster.stats()
        assert stats["tasks"] == stats["answers"] == 6 and not stats["pending"] and stats["plans"] == 1


def test_a_killed_node_is_planned_around_and_a_stopped_one_comes_back():
    net, x = network("vgg")
    # 16 KB at 2 Mbit/s take 0.1 s: the input is on its way when the node dies.
    with fastee.spatial_cluster(net, even(net, x, 3), nodes=3, link="2mbit 1ms", example=x) as cluster:
        equal(cluster(x), net, x)
        future = cluster.submit(x, deadline=10)
        time.sleep(0.02)
        os.kill(cluster.nodes[1].pid, signal.SIGKILL)
        answer = future.result()
        equal(answer, net, x)
        assert answer.attempts == 2 and all(cuts[1] == cuts[2] for cuts in cluster.plan.splits)
        os.kill(cluster.nodes[2].pid, signal.SIGSTOP)
        answer = cluster(x, deadline=10)
        equal(answer, net, x)
        assert answer.attempts == 2 and all(cuts[2] == cuts[3] for cuts in cluster.plan.splits)
        os.kill(cluster.nodes[2].pid, signal.SIGCONT)
        end = time.monotonic() + 10
        while not cluster.stats()["up"]["node2"]:
            assert time.monotonic() < end
            time.sleep(0.02)
        equal(cluster(x, deadline=10), net, x)
        for node in (cluster.nodes[0], cluster.nodes[2]):
            os.kill(node.pid, signal.SIGKILL)
        with pytest.raises((PeerLost, DeadlineExceeded)):
            cluster(x, deadline=0.5)
        stats = cluster.stats()
        assert stats["tasks"] == stats["answers"] + stats["errors"] and stats["duplicates"] == 0


def test_without_a_planner_the_rows_of_a_lost_node_are_shared_out():
    net, x = network("resnet")
    plan = even(net, x, 2)
    plan = type(plan).from_json(plan.to_json())
    with fastee.spatial_cluster(net, plan, nodes=2, link=None, example=x) as cluster:
        os.kill(cluster.nodes[plan.root].pid, signal.SIGKILL)
        equal(cluster(x, deadline=10), net, x)
        assert cluster.plan.root != plan.root and cluster.plan.method == "shared out"


def fussy(module, args):
    if args[0].isnan().any():
        raise ArithmeticError("a number is missing")


def test_errors_of_the_network_and_missed_deadlines_are_typed():
    net, x = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU()).eval(), torch.randn(1, 3, 8, 8)
    net[1].register_forward_pre_hook(fussy)
    with fastee.spatial_cluster(net, "aofl", nodes=2, link="1mbit 0ms", example=x, grace=0.1) as cluster:
        with pytest.raises(ClusterError, match="a number is missing"):
            cluster(x * float("nan"))
        equal(cluster(x), net, x)
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="deadline of 0.001 s"):
            cluster(x.expand(64, -1, -1, -1), deadline=0.001)
        assert time.monotonic() - began < 0.4
        equal(cluster(x), net, x)
        waiting = cluster.submit(x.expand(64, -1, -1, -1))
        threading.Timer(0.05, cluster.close).start()
        with pytest.raises(ClusterError, match="closed"):
            waiting.result()
    with pytest.raises(ClusterError, match="closed"):
        cluster(x)


def test_wrong_arguments_are_named():
    net, x = network("vgg")
    other = even(*network("resnet"), 2)
    for options, error, text in (
        ({"plan": other, "nodes": 2}, ValueError, "plan: it is for"),
        ({"plan": even(net, x, 2), "nodes": 3}, ValueError, "on 2 providers, expected"),
        ({"plan": 3}, TypeError, "plan: expected a SpatialPlan"),
        ({"plan": even(net, x, 2), "nodes": 2, "codec": "int8"}, ValueError, "codec: got 'int8'"),
        ({"nodes": 0}, ValueError, "nodes: expected"),
        ({"credit": 0}, ValueError, "credit: expected"),
        ({"grace": -1}, ValueError, "grace: expected"),
    ):
        with pytest.raises(error, match=text):
            fastee.spatial_cluster(net, example=x, **options)
    with pytest.raises(CannotCut):
        fastee.spatial_cluster(torch.nn.Flatten(), example=x)
    with fastee.spatial_cluster(net, even(net, x, 1), nodes=1, link=None, example=x) as cluster:
        equal(cluster(x), net, x)
        for bad, error in ((x[0], ValueError), (x.double(), ValueError), (x[:0], ValueError), ("x", TypeError)):
            with pytest.raises(error, match="x: expected"):
                cluster(bad)
        with pytest.raises(ValueError, match="deadline: expected"):
            cluster(x, deadline=0)

"""Nodes placed by a real Ray cluster of two machines (two raylets here): the model arrives through Ray, who is alive is ZeroMQ's to say."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from answers import rows
from test_node_cli import BACKBONE, free_ports, wait_for

import fastee
from fastee.cluster.config import load_config
from fastee.cluster.ray import SETTINGS, pushed_files, resource_of, up
from fastee.errors import ClusterError

pytestmark = [pytest.mark.timeout(240), pytest.mark.peer]


class FakeRay:
    @staticmethod
    def cluster_resources():
        return {"edge": 1.0, "node:10.0.0.7": 1.0, "CPU": 2.0}


def test_a_node_goes_to_its_name_else_to_its_address():
    assert resource_of(FakeRay, "edge", "10.0.0.7") == {"edge": 1.0}
    assert resource_of(FakeRay, "cloud", "10.0.0.7") == {"node:10.0.0.7": 0.001}
    with pytest.raises(ClusterError, match="no machine of the Ray cluster has the resource 'cloud'.*10.0.0.8"):
        resource_of(FakeRay, "cloud", "10.0.0.8")


def ended(pid):
    """Whether a process is gone, or dead and waiting for a parent that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture
def config(tmp_path, net):
    (tmp_path / "model_for_ray.py").write_text(BACKBONE)
    net.save(tmp_path / "model.safetensors", weights="all")
    nodes = "".join(f'[[node]]\nname = "{name}"\nport = {port}\n' for name, port in zip(("mobile", "edge"), free_ports(2), strict=True))
    path = tmp_path / "cluster.toml"
    path.write_text(f'[model]\nbackbone = "model_for_ray:backbone"\ncheckpoint = "model.safetensors"\nfingerprint = "{net.fingerprint}"\n{nodes}[timeouts]\nstart = 120\n')
    return path


def test_the_model_is_pushed_whole(config):
    files = pushed_files(load_config(config))
    assert sorted(files) == ["model.safetensors", "model_for_ray.py"] and files["model_for_ray.py"] == BACKBONE.encode()
    Path(config.parent, "model.safetensors").unlink()
    with pytest.raises(ClusterError, match="no file"):
        pushed_files(load_config(config))


def test_two_machines_of_ray(config, net, monkeypatch):
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install -r requirements-ray.txt")
    from ray.cluster_utils import Cluster

    for name, value in {**SETTINGS, "RAY_DISABLE_IMPORT_WARNING": "1", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.getcwd()}.items():
        monkeypatch.setenv(name, value)
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"mobile": 1}, "object_store_memory": 80 << 20, "include_dashboard": False})
    edge = machines.add_node(num_cpus=1, resources={"edge": 1}, object_store_memory=80 << 20)
    ray.init(address=machines.address, logging_level="ERROR")
    nodes = up(config)
    try:
        x = rows(12)
        want = torch.cat([net(x[i : i + 1]).label for i in range(12)])
        with fastee.Cluster.connect(config, codec="raw") as cluster:
            wait_for(lambda: all(cluster.stats()["up"].values()) and all(len(b["up"]) == 1 for b in cluster.beats().values()), 90)
            out = cluster(x, plan=[0, 1, 1])
            assert torch.equal(out.label, want) and set(out.node.tolist()) <= {0, 1} and 1 in out.node

            # The node's process dies: its actor starts it again.
            first = cluster.beats()["edge"]["pid"]
            os.kill(first, signal.SIGKILL)
            wait_for(lambda: not cluster.stats()["up"]["edge"], 5)
            wait_for(lambda: cluster.stats()["up"]["edge"] and cluster.beats()["edge"]["pid"] != first, 60)

            # The actor dies: the node goes with it, Ray starts both again.
            second = cluster.beats()["edge"]["pid"]
            ray.kill(nodes.actors["edge"], no_restart=False)
            wait_for(lambda: cluster.stats()["up"]["edge"] and cluster.beats()["edge"]["pid"] != second, 60)
            wait_for(lambda: ended(second), 30)
            assert not nodes.ended()
            wait_for(lambda: all(len(b["up"]) == 1 for b in cluster.beats().values()), 10)
            assert torch.equal(cluster(x, plan=[1, 1, 1]).label, want)

            # The machine dies: ZeroMQ says so, long before Ray does, and nothing is lost.
            third = cluster.beats()["edge"]["pid"]
            began = time.monotonic()
            machines.remove_node(edge, allow_graceful=False)
            wait_for(lambda: not cluster.stats()["up"]["edge"], 30)
            gone = time.monotonic() - began
            assert torch.equal(cluster(x, plan=[0, 1, 1]).label, want)
            assert gone < 5.0
            wait_for(lambda: ended(third), 30)  # the node leaves with its actor
        nodes.close(drain=5)
    finally:
        ray.shutdown()
        machines.shutdown()

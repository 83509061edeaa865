"""`fastee node`, `fastee run`, `fastee top`: real processes, started by hand as a user would, killed, restarted, drained."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import torch
from answers import equal_local, rows

import fastee
from fastee.cluster.config import read_config
from fastee.cluster.link import media
from fastee.errors import ClusterError, FingerprintMismatch

NAMES = ("mobile", "edge", "cloud")
BACKBONE = """
import torch

def backbone():
    return torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.ReLU(),
                               torch.nn.Flatten(), torch.nn.Linear(8 * 64, 10))
"""


def free_ports(count):
    """`count` ports, each free together with the next."""
    held, found = [], []
    while len(found) < count:
        a = socket.socket()
        a.bind(("127.0.0.1", 0))
        port = a.getsockname()[1]
        b = socket.socket()
        try:
            b.bind(("127.0.0.1", port + 1))
        except OSError:
            a.close()
            continue
        held += [a, b]
        found.append(port)
    for s in held:
        s.close()
    return found


class Machines:
    """The folder that every machine has, and the processes on them."""

    def __init__(self, folder, net):
        self.folder, self.config, self.running = folder, folder / "cluster.toml", {}
        (folder / "model_of_test.py").write_text(BACKBONE)
        net.save(folder / "model.safetensors", weights="all")
        *ports, self.metrics = free_ports(len(NAMES) + 1)
        nodes = "".join(f'[[node]]\nname = "{n}"\nport = {p}\n' + (f"metrics_port = {self.metrics}\n" if n == "edge" else "") for n, p in zip(NAMES, ports, strict=True))
        self.config.write_text(
            f'[model]\nbackbone = "model_of_test:backbone"\ncheckpoint = "model.safetensors"\nfingerprint = "{net.fingerprint}"\n{nodes}'
            '[[link]]\nbetween = ["mobile", "edge"]\nspeed = "20mbit 2ms"\nemulate = true\n[timeouts]\nstart = 20\ntask = 15\n'
        )

    def start(self, *names):
        for name in names:
            self.running[name] = self.spawn("node", "--config", str(self.config), "--name", name)
        for name in names:
            line = self.running[name].stdout.readline()
            assert f"node {name}: serves at" in line, line + self.running[name].communicate()[1]

    def spawn(self, *words):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
        return subprocess.Popen([sys.executable, "-m", "fastee", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    def command(self, *words):
        process = self.spawn(*words)
        out, err = process.communicate(timeout=90)
        return process.returncode, out, err

    def stop(self):
        for process in self.running.values():
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def machines(tmp_path_factory, net):
    made = Machines(tmp_path_factory.mktemp("machines"), net)
    try:
        made.start(*NAMES)
        yield made
    finally:
        made.stop()


def wait_for(what, seconds=10.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_a_client_gets_local_answers(machines, net):
    x = rows(24)
    with fastee.Cluster.connect(machines.config, codec="raw") as cluster:
        assert equal_local(cluster(x), net, x)
        out = cluster(x, plan=[0, 1, 2], exits=False)
        assert set(out.node.tolist()) == {2}, "the plan's last node answers"
        assert {b["pid"] for b in cluster.beats().values()} == {p.pid for p in machines.running.values()}

        async def both():
            return await asyncio.gather(cluster.ask(x[:8]), cluster.ask(x[8:16]))

        first, second = asyncio.run(both())
        assert equal_local(first, net, x[:8]) and equal_local(second, net, x[8:16])
        assert cluster.submit(x[:1]).result(15).label == int(net(x[:1]).label)
    assert all(p.poll() is None for p in machines.running.values()), "closing a client must not end the nodes"


def test_run_top_and_metrics(machines, net, tmp_path):
    x = rows(6)
    np.savez(tmp_path / "x.npz", x=x.numpy())
    code, out, err = machines.command("run", "--config", str(machines.config), "--input", str(tmp_path / "x.npz"), "--json", "--out", str(tmp_path / "y.npz"))
    assert code == 0, err
    want = [int(net(x[i : i + 1]).label) for i in range(6)]
    assert [json.loads(line)["label"] for line in out.splitlines()] == want
    assert np.load(tmp_path / "y.npz")["label"].tolist() == want
    code, out, err = machines.command("top", "--config", str(machines.config), "--json")
    assert code == 0, err
    state = json.loads(out)
    assert state["answers"] >= 6 and sum(state["exits"].values()) == state["answers"] and all(b["up"] for b in state["nodes"].values())
    with urllib.request.urlopen(f"http://127.0.0.1:{machines.metrics}/metrics", timeout=5) as reply:
        text = reply.read().decode()
    handled = next(float(line.split()[1]) for line in text.splitlines() if line.startswith("fastee_handled_total "))
    assert handled >= state["nodes"]["edge"]["handled"] and 'fastee_peer_up{peer="cloud"} 1.0' in text


def test_killed_node_is_replaced_by_a_new_incarnation(machines, net):
    x = rows(30)
    with fastee.Cluster.connect(machines.config, codec="raw") as cluster:
        before = cluster.beats()["edge"]["pid"]
        futures = [cluster.submit(x[i : i + 1], plan=[0, 1, 1]) for i in range(30)]
        machines.running["edge"].send_signal(signal.SIGKILL)
        machines.running["edge"].communicate()
        labels = [f.result(20).label for f in futures]
        assert labels == [int(net(x[i : i + 1]).label) for i in range(30)]
        wait_for(lambda: not cluster.stats()["up"]["edge"])
        machines.start("edge")
        wait_for(lambda: cluster.stats()["up"]["edge"] and cluster.beats()["edge"]["pid"] != before)
        wait_for(lambda: 1 in cluster.beats()["mobile"]["up"])
        out = cluster(x[:4], plan=[0, 1, 1], exits=False)
        assert set(out.node.tolist()) == {1}, "the new incarnation takes tasks"


def test_sigterm_drains_and_loses_nothing(machines, net):
    x = rows(60)
    with fastee.Cluster.connect(machines.config, codec="raw") as cluster:
        futures = [cluster.submit(x[i : i + 1]) for i in range(20)]
        machines.running["mobile"].send_signal(signal.SIGTERM)  # the entry node: what comes now must go elsewhere
        futures += [cluster.submit(x[i : i + 1]) for i in range(20, 60)]
        assert [f.result(20).label for f in futures] == [int(net(x[i : i + 1]).label) for i in range(60)]
        assert machines.running["mobile"].wait(15) == 0
        counts = cluster.stats()
        assert counts["errors"] == 0 and counts["answers"] == 60
        machines.running["mobile"].communicate()
        machines.start("mobile")
        wait_for(lambda: cluster.stats()["up"]["mobile"])
        assert equal_local(cluster(x[:4]), net, x[:4])


def test_another_model_is_refused_with_the_reason(machines, net, tmp_path):
    text = machines.config.read_text().replace(f'fingerprint = "{net.fingerprint}"', 'fingerprint = "' + "0" * 32 + '"')
    wrong = machines.folder / "wrong.toml"
    wrong.write_text(text)
    code, _, err = machines.command("node", "--config", str(wrong), "--name", "edge")
    assert code == 1 and "model.fingerprint" in err and net.fingerprint in err
    # A client that really has another model: the nodes themselves refuse it.
    other = fastee.load(machines.folder / "model.safetensors", _backbone(machines))
    with torch.no_grad():
        other.backbone[0].weight.mul_(2)
    other.save(machines.folder / "other.safetensors", weights="all")
    wrong.write_text(text.replace("0" * 32, other.fingerprint).replace("model.safetensors", "other.safetensors"))
    with pytest.raises(FingerprintMismatch, match="refused this client"):
        fastee.Cluster.connect(wrong)


def _backbone(machines):
    space = {}
    exec(BACKBONE, space)
    return space["backbone"]()


def test_a_taken_port_and_an_unknown_name_are_told(machines):
    code, _, err = machines.command("node", "--config", str(machines.config), "--name", "edge")
    assert code == 1 and "another node running there" in err
    code, _, err = machines.command("node", "--config", str(machines.config), "--name", "egde")
    assert code == 2 and "edge" in err


GOOD = '[model]\nbackbone = "m:b"\ncheckpoint = "m.safetensors"\n[[node]]\nname = "a"\nport = 5600\n[[node]]\nname = "b"\nport = 5602\n'


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.replace('name = "a"\n', ""), ["name", "$.node[0]"]),
        (lambda t: t.replace("port = 5600", 'port = "5600"'), ["int", "str", "$.node[0].port"]),
        (lambda t: t.replace("port = 5600", "port = 0"), [">= 1", "$.node[0].port"]),
        (lambda t: t.replace("port = 5602", "port = 5601"), ["node.port", "5601"]),
        (lambda t: t.replace('"b"\n', '"a"\n'), ["node.name", "different"]),
        (lambda t: t + "slowdwon = 2\n", ["slowdwon", "$.node[1]"]),
        (lambda t: t + "slowdown = 0.5\n", [">= 1", "slowdown"]),
        (lambda t: t + 'host = "10.0.0.1"\n', ["10.0.0.1", "fastee keys"]),
        (lambda t: t + 'public_key = "short"\n', ["40 characters"]),
        (lambda t: t + '[[link]]\nspeed = "1mbit 1ms"\nbetween = ["a", "c"]\n', ["'c'", "expected one of"]),
        (lambda t: t + '[[link]]\nspeed = "fast"\nbetween = ["a", "b"]\n', ["fast"]),
        (lambda t: t + '[[link]]\nspeed = "1mbit 1ms"\nfrom = "a"\n', ["between", "from"]),
        (lambda t: t + "[qos]\ndeadlin = 1\n", ["deadlin", "deadline"]),
        (lambda t: t + "[qos]\ndeadline = -1.0\n", ["deadline", "> 0"]),
        (lambda t: t + "[timeouts]\ngrace = -1\n", [">= 0", "$.timeouts.grace"]),
        (lambda t: "credit = 0\n" + t, [">= 1", "$.credit"]),
        (lambda t: "folder = 'x'\n" + t, ["unknown field", "folder"]),
        (lambda t: t.replace("[model]", "[modle]"), ["modle"]),
        (lambda t: "x = = 1", ["cluster.toml"]),
    ],
)
def test_bad_files_are_refused_by_name(change, words):
    assert read_config(GOOD).names == ("a", "b")
    with pytest.raises(ClusterError) as caught:
        read_config(change(GOOD))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_links_of_one_medium_are_told_to_the_scheduler():
    third = '[[node]]\nname = "c"\nport = 5604\n'
    links = "".join(f'[[link]]\nbetween = ["a", "{other}"]\nspeed = "20mbit 2ms"\nmedium = "radio"\n' for other in "bc")
    config = read_config(GOOD + third + links)
    declared = config.declared_links()
    assert [media(declared, index) for index in range(3)] == [[[1, 2]], [[0]], [[0]]]
    assert not any(link.shaped for link in config.declared_links(emulated=True).values())  # on a real radio nothing is held back

"""CURVE through `fastee node`, `Cluster.connect` and `fastee run`, as on machines of their own; the live view of `fastee top` on a terminal."""

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from answers import equal_local, rows
from test_node_cli import BACKBONE, free_ports

import fastee
from fastee.cluster.config import load_config
from fastee.cluster.keys import make_keys, save_keys
from fastee.cluster.lab import Lab
from fastee.errors import ClusterError, FasteeError

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(os.environ.get("FASTEE_TRANSPORT") == "python", reason="the Python transport has no CURVE")]


@pytest.fixture(scope="module")
def lab(tmp_path_factory, net):
    """Two nodes with keys; the file also lists the client's."""
    folder = tmp_path_factory.mktemp("secure")
    (folder / "model_with_keys.py").write_text(BACKBONE)
    net.save(folder / "model.safetensors", weights="all")
    text = f'[model]\nbackbone = "model_with_keys:backbone"\ncheckpoint = "model.safetensors"\nfingerprint = "{net.fingerprint}"\n'
    for name, port in zip(("mobile", "edge"), free_ports(2), strict=True):
        text += f'[[node]]\nname = "{name}"\nport = {port}\npublic_key = {json.dumps(make_keys().public)}\n'
    (folder / "cluster.toml").write_text(text + "[timeouts]\nstart = 20\ntask = 15\n")
    with Lab(load_config(folder / "cluster.toml"), "relay") as made:
        yield made


def fastee_command(*words, **options):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "TERM": "xterm", "COLUMNS": "140", "LINES": "50"}
    return subprocess.Popen([sys.executable, "-m", "fastee", *words], env=env, **options)


def test_a_listed_client_is_answered_and_nobody_else(lab, net, tmp_path):
    x = rows(12)
    config = lab.config_of("client")
    with lab.connect(codec="raw") as cluster:
        assert equal_local(cluster(x, plan=[0, 1, 1]), net, x)

    with pytest.raises(ClusterError, match="pass --keys FILE"):
        fastee.Cluster.connect(config)

    (tmp_path / "model_with_keys.py").write_text(BACKBONE)
    impatient = tmp_path / "impatient.toml"
    impatient.write_text(config.read_text().replace("\"start\" = 20.0", "\"start\" = 2.0"))
    save_keys(make_keys(), tmp_path / "stranger.keys")
    with pytest.raises(FasteeError, match="not on its list"):
        fastee.Cluster.connect(impatient, keys=tmp_path / "stranger.keys")

    # The right client, but what it takes for the nodes' keys are not theirs: somebody else listens there.
    other = tmp_path / "other.toml"
    keys = re.findall(r'"public_key" = (".*")', impatient.read_text())
    other.write_text(impatient.read_text().replace(keys[0], json.dumps(make_keys().public)).replace(keys[1], json.dumps(make_keys().public)))
    with pytest.raises(FasteeError, match="the keys do not fit"):
        fastee.Cluster.connect(other, keys=lab.keys_of("client"))

    # Without keys nothing is even said.
    plain = tmp_path / "plain.toml"
    plain.write_text("".join(line for line in impatient.read_text().splitlines(True) if "public_key" not in line and "client" not in line))
    with pytest.raises(FasteeError, match="no node answered within 2.0 s|the keys do not fit"):
        fastee.Cluster.connect(plain)

    with lab.connect(codec="raw") as cluster:
        assert equal_local(cluster(x[:4], plan=[1, 0, 1]), net, x[:4]), "the nodes took no harm"


def test_fastee_run_and_a_killed_node_with_keys(lab, net, tmp_path):
    x = rows(4)
    np.savez(tmp_path / "x.npz", x=x.numpy())
    words = ["run", "--config", str(lab.config_of("client")), "--keys", str(lab.keys_of("client")), "--input", str(tmp_path / "x.npz"), "--json"]
    done = fastee_command(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = done.communicate(timeout=60)
    assert done.returncode == 0, err
    assert [json.loads(line)["label"] for line in out.splitlines()] == [int(net(x[i : i + 1]).label) for i in range(4)]
    with lab.connect(codec="raw") as cluster:
        lab.kill("edge")
        assert equal_local(cluster(x, plan=[0, 1, 1]), net, x)
        lab.start("edge")
        end = time.monotonic() + 10
        while not (cluster.stats()["up"]["edge"] and 1 in cluster.beats()["mobile"]["up"]):
            assert time.monotonic() < end, "the new incarnation has the same keys"
            time.sleep(0.02)
        assert torch.equal(cluster(x, plan=[1, 1, 1], exits=False).node, torch.ones(4, dtype=torch.int64))


def test_top_is_live_on_a_terminal(lab):
    master, slave = pty.openpty()
    words = ["top", "--config", str(lab.config_of("client")), "--keys", str(lab.keys_of("client")), "--every", "0.2"]
    process = fastee_command(*words, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    screens = ""

    def read(until, seconds):
        nonlocal screens
        end = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < end, screens[-2000:]
            if process.poll() is None and select.select([master], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # its other end closes with the process
                    screens += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", os.read(master, 65536).decode(errors="replace"))

    def answers():
        return [int(n) for n in re.findall(r"answers (\d+), in time", screens)]

    try:
        read(lambda: "mobile->edge" in screens and answers(), 60)
        before = answers()[-1]
        with lab.connect() as cluster:
            cluster(rows(40))
        read(lambda: answers()[-1] >= before + 40, 20)
        assert all(word in screens for word in ("nodes", "links", "exits", "queue", "service ms", "mobile", "edge"))
        lab.kill("edge")
        read(lambda: "down" in screens, 10)
        lab.start("edge")
        process.send_signal(signal.SIGINT)
        read(lambda: process.poll() is not None, 20)
        assert process.returncode == 130
    finally:
        process.kill()
        process.wait()
        os.close(master)

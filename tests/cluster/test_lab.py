"""The lab without root: links as declared, faults that do what they say, and a stream of tasks that survives all of them."""

import os
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import typer

from benchmarks.bench_faults import Truth, storm, until
from benchmarks.fault_net import inputs, write_cluster
from benchmarks.lab_link import best_link
from fastee.cli.lab import obey, run
from fastee.cluster.config import load_config, read_config
from fastee.cluster.lab import Lab, Relay, _passed, _toml
from fastee.cluster.link import Link
from fastee.errors import ClusterError
from fastee.simulation.capacity import CapacityTrace, parse_mahimahi

pytestmark = pytest.mark.timeout(120)
LINKS = {(0, 1): Link(16e6, 0.015), (1, 0): Link(16e6, 0.015)}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return load_config(write_cluster(tmp_path_factory.mktemp("lab")))


@pytest.fixture(scope="module")
def lab(config):
    """Every test needs a whole lab and leaves one; its nodes say everything twice."""
    with Lab(config, "relay", program=[sys.executable, "-m", "benchmarks.faulty_node"]) as made:
        yield made


def test_relayed_links_have_their_rate_and_delay():
    net = Relay(LINKS, 2)
    try:
        seconds, rate = best_link(net, 0, 1, 0.85 * 16e6)
        assert 0.030 <= seconds < 0.045, "two delays of 15 ms, and what a busy machine adds"
        assert 0.85 * 16e6 < rate < 1.15 * 16e6
        net.shape(0, 1, Link(4e6, 0.001))
        net.shape(1, 0, Link(4e6, 0.001))
        seconds, rate = best_link(net, 0, 1, 0.85 * 4e6)
        assert 0.002 <= seconds < 0.015 and 0.85 * 4e6 < rate < 1.15 * 4e6
    finally:
        net.close()


def test_a_cut_is_silent_and_loses_nothing():
    net = Relay(LINKS, 2)
    try:
        with socket.create_server(("127.0.0.1", net.addresses(1)[1].ctl)) as server, socket.create_connection(("127.0.0.1", net.addresses(0)[1].ctl)) as near:
            far, _ = server.accept()
            with far:
                near.sendall(b"before")
                assert far.recv(16) == b"before"
                net.cut(1, True)
                near.sendall(b"meanwhile")
                far.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    far.recv(16)
                net.cut(1, False)
                far.settimeout(5)
                assert far.recv(16) == b"meanwhile"
                far.close()
                near.settimeout(5)
                assert near.recv(16) == b"", "the end of a stream passes too"
    finally:
        net.close()


def test_a_silent_cut_is_noticed_within_a_second_and_so_is_the_heal(lab):
    with lab.connect() as cluster:
        until(lambda: all(cluster.stats()["up"].values()), 10)
        lab.cut("edge")
        began = time.monotonic()
        until(lambda: not cluster.stats()["up"]["edge"], 5)
        assert time.monotonic() - began < 1.0
        assert cluster.stats()["up"]["cloud"]
        lab.heal("edge")
        began = time.monotonic()
        until(lambda: cluster.stats()["up"]["edge"], 5)
        assert time.monotonic() - began < 1.0


def test_a_slow_node_gets_its_share(lab):
    pid, x = lab.state()["edge"]["pid"], inputs(4)

    def share(seconds):
        before, began = _cpu(pid), time.monotonic()
        with lab.connect() as cluster:
            while time.monotonic() - began < seconds:
                cluster(x, plan=[1, 1, 1], exits=False)
        return (_cpu(pid) - before) / (time.monotonic() - began)

    lab.slow("edge", 0.1)
    slowed = share(1.5)
    lab.slow("edge", 1)
    assert slowed < 0.2
    assert lab.state()["edge"]["alive"]


def _cpu(pid):
    """Seconds of processor that a process has had."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def test_a_stream_survives_every_fault(lab):
    tally = storm(lab, "all", 400, Truth(), seed=1)
    assert not +tally.broken, str(tally)
    assert tally.faults >= 4 and tally.stats["duplicates"] > 50, "nothing happened"
    assert len(tally.answered) + tally.errors.total() == 400
    assert set(tally.errors) <= {"DeadlineExceeded", "Rejected"}, "somebody was always up"
    assert len(tally.answered) > 100, str(tally)


def test_the_lines_of_the_command(lab, capsys):
    assert obey(lab, "state").count("alive") == 3
    for line in ("# nothing", "", "freeze cloud", "thaw cloud", "link mobile edge 50mbit 2ms", "wait 0.01"):
        assert obey(lab, line) == ""
    for line, words in (("cutt edge", "expected one of"), ("cut", "cut NODE"), ("cut egde", "egde"), ("start edge", "runs already"), ("slow edge 2", "in (0, 1]")):
        with pytest.raises(ValueError, match=words.replace("(", r"\(")):
            obey(lab, line)
    obey(lab, "stop cloud")
    assert "cloud" in obey(lab, "state") and obey(lab, "state").count("alive") == 2
    with pytest.raises(ValueError, match="does not run"):
        obey(lab, "kill cloud")
    obey(lab, "start cloud")
    assert obey(lab, "state").count("alive") == 3


def test_a_trace_is_replayed(lab):
    seen = []
    shape, lab._net.shape = lab._net.shape, lambda a, b, link: seen.append((time.monotonic(), a, b, link))
    try:
        before, asked = lab._links[0, 1], time.monotonic()
        lab.replay("mobile", "edge", CapacityTrace.steps([8e6, 2e6], 0.2), seconds=0.8)
        until(lambda: seen and seen[-1][3] == before, 5)
    finally:
        lab._net.shape = shape
    assert {(a, b) for _, a, b, _ in seen} == {(0, 1)} and all(link.delay == before.delay for *_, link in seen)
    assert [round(link.rate / 1e6, 3) for *_, link in seen[:-1]] == [8, 8, 2, 2, 8, 8, 2, 2]
    assert 0.8 <= seen[-1][0] - asked  # the last step, too, takes its time


def test_what_a_trace_lets_pass_by_a_time():
    trace = parse_mahimahi(b"1\n1\n3\n")  # 3,000 bytes in the second millisecond, 1,500 in the fourth, four milliseconds long
    assert [_passed(trace, ms * 1e-3) for ms in (0, 1, 2, 4, 5, 6, 8)] == pytest.approx([0, 0, 3000, 4500, 4500, 7500, 9000])


def test_what_a_lab_refuses(config):
    with pytest.raises(ValueError, match="namespace"):
        Lab(config, "netns")
    with pytest.raises(ClusterError, match="did not start within .*status 3.*stderr ends:\nwhy it died"):
        with Lab(config, "relay", program=["sh", "-c", "echo why it died >&2; exit 3"]):
            pass
    assert not [t for t in threading.enumerate() if t.name.startswith(("slow", "replay"))]


def test_a_wrong_script_is_told_before_anything_starts(config, tmp_path):
    script = tmp_path / "faults.txt"
    script.write_text("# first\ncut edge\nheel edge\n")
    with pytest.raises(typer.BadParameter, match="faults.txt line 3: .*heel edge"):
        run(Path(config.folder, "cluster.toml"), "relay", script, (), [])


def test_the_written_file_says_what_the_read_one_said(config):
    import msgspec

    text = _toml({**msgspec.to_builtins(config), "folder": ""})
    again = read_config(text, config.folder)
    assert again == config

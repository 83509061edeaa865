"""Wrong specs and arguments: one typed error that names the field."""

import numpy as np
import pytest
from sim_worlds import three_tiers

from fastee.scheduling import QoS
from fastee.simulation import DifficultyTrace, load_spec, simulate

MINIMAL = """
arrivals = [{sources = ["here"], rate = 10.0}]
machines = [{name = "here"}]
thresholds = [0.5]
tasks = 5
[network]
seconds = [0.001, 0.001]
wire_bytes = [[100], [100]]
"""


def toml(tmp_path, text):
    path = tmp_path / "spec.toml"
    path.write_text(text)
    return path


def test_the_minimal_spec_runs(tmp_path):
    assert simulate(toml(tmp_path, MINIMAL)).check() == 5


@pytest.mark.parametrize("change, words", [
    (("tasks = 5", "tasks = 'many'"), "tasks"), (("tasks = 5", "tasks = 0"), "tasks"), (("tasks = 5", "taks = 5"), "taks"), (("seconds", "second"), "second"),
    (("[0.001, 0.001]", "[0.001]"), "wire_bytes"), (("[0.001, 0.001]", "[-0.001, 0.001]"), "seconds"), (("[0.001, 0.001]", "[nan, 0.001]"), "seconds"),
    (('sources = ["here"]', 'sources = ["hre"]'), "did you mean 'here'"), (("rate = 10.0", "rate = 0.0"), "rate"), (("rate = 10.0", "rate = inf"), "rate"),
    (("thresholds = [0.5]", "thresholds = [0.5, 0.5]"), "thresholds"), (("thresholds = [0.5]", "policy = 'deadlne'\nthresholds = [0.5]"), "did you mean 'deadline'"),
    (('{name = "here"}', '{name = "here"}, {name = "here"}'), "different names"), (('{name = "here"}', '{name = "here", count = 2000}'), "count"),
    (('{name = "here"}', '{name = "here", slowdown = 0.0}'), "slowdown"), (('{name = "here"}', '{name = "here", batch = 0}'), "batch"),
    (("tasks = 5", "tasks = 5\nfaults = [{kind = 'quake', at = 1.0}]"), "kind"), (("tasks = 5", "tasks = 5\nfaults = [{kind = 'death', at = 1.0}]"), "node"),
    (("tasks = 5", "tasks = 5\nfaults = [{kind = 'death', at = -1.0, node = 'here'}]"), "at"),
    (("tasks = 5", "tasks = 5\nfaults = [{kind = 'freeze', at = 1.0, node = 'here'}]"), "seconds"),
    (("tasks = 5", "tasks = 5\nfaults = [{kind = 'flap', at = 1.0, source = 'here', target = 'here', seconds = 1.0}]"), "no link"),
    (("tasks = 5", "tasks = 5\nconnections = [{source = 'here', target = 'here', link = 'fast'}]"), "link"),
    (("tasks = 5", "tasks = 5\nconnections = [{source = 'here', target = 'there', link = '1mbit 1ms'}]"), "there"),
    (("tasks = 5", "tasks = 5\n[capacities.x]\nrate = 1.0\n[qos]"), "capacities.x"), (("tasks = 5", "tasks = 5\n[capacities.x]\nfile = '/nowhere.up'\n[qos]"), "nowhere"),
    (("tasks = 5", "tasks = 5\n[difficulty]\naccuracy = [0.5]\n[qos]"), "accuracy"), (("tasks = 5", "tasks = 5\n[difficulty]\naccuracy = [0.5, 1.5]\n[qos]"), "accuracy"),
    (("tasks = 5", "tasks = 5\n[qos]\nhit_rate = 2.0"), "hit_rate"), (("tasks", "= tasks"), "no simulation"),
])  # fmt: skip
def test_a_wrong_spec_names_its_field(tmp_path, change, words):
    assert change[0] in MINIMAL
    with pytest.raises((ValueError, OSError), match=words):
        simulate(toml(tmp_path, MINIMAL.replace(*change, 1)))


@pytest.mark.parametrize("arguments, error, words", [
    ({"cluster": 3}, TypeError, "cluster"), ({"trace": "x"}, TypeError, "trace"), ({"trace": (np.zeros((4, 2)), np.zeros((4, 2), bool))}, ValueError, "correct"),
    ({"trace": (np.zeros((4, 1)), np.zeros((4, 2), bool))}, ValueError, "exits"), ({"trace": (np.zeros((0, 2)), np.zeros((0, 3), bool))}, ValueError, "rows"),
    ({"tasks": 0}, ValueError, "tasks"), ({"tasks": "many"}, ValueError, "tasks"), ({"seed": -1}, ValueError, "seed"), ({"qos": 0.1}, TypeError, "qos"),
    ({"policy": "fast"}, ValueError, "policy"), ({"faults": [{"kind": "death"}]}, ValueError, "at"), ({"faults": [{"kind": "death", "at": 1.0, "node": "moon"}]}, ValueError, "moon"),
    ({"arrivals": []}, ValueError, "arrivals"), ({"thresholds": [0.5]}, ValueError, "thresholds"),
])  # fmt: skip
def test_wrong_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        simulate(**{"cluster": three_tiers(), **arguments})


def test_two_links_for_one_pair_are_refused():
    twice = [{"source": "mobile", "target": "edge", "link": "1mbit 1ms"}, {"source": "edge", "target": "mobile", "link": "1mbit 1ms"}]
    with pytest.raises(ValueError, match="given twice"):
        simulate(three_tiers(connections=twice))


def test_a_log_must_be_asked_for():
    with pytest.raises(ValueError, match="log=True"):
        next(simulate(three_tiers(tasks=5)).log())


def test_npz_with_objects_is_refused(tmp_path):
    np.savez(tmp_path / "evil.npz", confidence=np.array([object()], dtype=object), correct=np.zeros(1, bool))
    with pytest.raises(ValueError, match="npz"):
        DifficultyTrace.load(tmp_path / "evil.npz")
    (tmp_path / "junk.npz").write_bytes(b"PK\x03\x04junk")
    with pytest.raises(ValueError):
        DifficultyTrace.load(tmp_path / "junk.npz")


def test_a_huge_spec_is_not_read(tmp_path):
    path = tmp_path / "big.toml"
    with path.open("wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(ValueError, match="at most"):
        load_spec(path)


def test_qos_objects_are_taken():
    assert simulate(three_tiers(tasks=5), qos=QoS(deadline=0.5)).deadline.tolist() == [0.5] * 5

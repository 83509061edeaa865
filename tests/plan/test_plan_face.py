"""plan(), its answers on disk and in words, cluster.toml, and the exact message of every refusal."""

import dataclasses
import doctest
import json
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from plan_worlds import profile_of

import fastee
from fastee.cluster.local import Cluster, open_clusters
from fastee.errors import BackendUnavailable, CheckpointMismatch
from fastee.planning import ClusterSpec, NodeSpec, NoPlan, Plan, Replanner, plan
from fastee.planning import problem as edge
from fastee.planning.spatial import vgg16
from fastee.scheduling import QoS


def two(**changes):
    fields = dict(run=[[0.010, 0.001]] * 3, wire=[[4000.0, 1000.0]] * 3, bandwidth=[[0, 1e6], [1e6, 0]], delay=[[0, 0.001], [0.001, 0]],
                  nodes=("mobile", "cloud"), fingerprint="net-a")  # fmt: skip
    return profile_of(**{**fields, **changes})


P = two()


def raises(error, message):
    return pytest.raises(error, match="^" + re.escape(message) + "$")


def spec(**mobile):
    return ClusterSpec([NodeSpec("mobile", **mobile), NodeSpec("cloud")])


CALLS = [
    ((1,), {}, TypeError, "plan: prof must be a Profile, got int"),
    ((P, ["mobile"]), {}, TypeError, "plan: cluster must be a ClusterSpec, got list"),
    ((P, None, 0.1), {}, TypeError, "plan: qos must be a QoS, got float"),
    ((P,), {"kind": "pipelin"}, ValueError, "plan: kind must be one of auto, pipeline, joint, spatial, got 'pipelin', did you mean 'pipeline'?"),
    ((P,), {"kind": "joint"}, ValueError, "plan: kind 'joint' needs exit_probability [K], the share of tasks that each exit answers"),
    ((P,), {"objective": "speed"}, ValueError, "plan: objective must be one of latency, throughput, cost, got 'speed'"),
    ((P,), {"colour": 1}, TypeError, "plan: unknown argument 'colour' for kind 'auto'"),
    ((P,), {"exit_probability": [0.5]}, ValueError, "plan: exit_probability must have shape [K] = [2], got [1]"),
    ((P,), {"exit_probability": [0.5, 1.5]}, ValueError, "plan: exit_probability[1] must be in [0, 1], got 1.5"),
    ((P,), {"exit_probability": [math.nan, 0]}, ValueError, "plan: exit_probability[0] must be in [0, 1], got nan"),
    ((P,), {"exit_loss": [-0.1, 0]}, ValueError, "plan: exit_loss[0] must be in [0, 1], got -0.1"),
    ((P,), {"head_seconds": [0.1, 0]}, ValueError, "plan: head_seconds[0] on 'mobile' must be at most the profile's segment with its head (0.01 s), got 0.1"),
    ((P,), {"head_seconds": [[0.0]]}, ValueError, "plan: head_seconds must have shape [K, N] = [2, 2], got [1, 1]"),
    ((P,), {"segment_memory": [1, 1, -1]}, ValueError, "plan: segment_memory[2] must be finite and >= 0, got -1.0"),
    ((P,), {"source": "edge"}, ValueError, "plan: source must be one of the nodes ['mobile', 'cloud'], got 'edge'"),
    ((P,), {"source": 2}, ValueError, "plan: source must be in 0..1, got 2"),
    ((P,), {"source": 0.5}, TypeError, "plan: source must be a node's name or index, got float"),
    ((P,), {"batch": 2}, ValueError, "plan: batch must be one of the profile's [1], got 2"),
    ((P,), {"batch": 1.0}, TypeError, "plan: batch must be an int, got float"),
    ((P,), {"quantile": 0.3}, ValueError, "plan: quantile must be a number in [0.5, 1) or None, got 0.3"),
    ((P,), {"quantile": "p99"}, TypeError, "plan: quantile must be a number in [0.5, 1) or None, got str"),
    ((P,), {"answer_bytes": -1}, ValueError, "plan: answer_bytes must be finite and >= 0, got -1"),
    ((P,), {"weights": {"euro": 1}}, ValueError, "plan: weights must have keys among seconds, money, energy, bytes, got 'euro'"),
    ((P,), {"weights": {"money": -1}}, ValueError, "plan: weights['money'] must be finite and >= 0, got -1"),
    ((P,), {"objective": "cost"}, ValueError,
     "plan: objective 'cost' needs something that costs: a node with a price or watts under weights, or weights for seconds or bytes"),
    ((P, ClusterSpec([NodeSpec("mobil")])), {}, ValueError,
     "cluster: node 'mobil' has no measurements: the profile's nodes are ['mobile', 'cloud'], set like= to one of them, did you mean 'mobile'?"),
    ((P, spec(memory=10)), {}, ValueError, "plan: segment_memory [3] is needed because node 'mobile' has a memory limit"),
    ((P, spec(hosts=[3])), {}, ValueError, "cluster: hosts of 'mobile' must lie in 0..2, got 3"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, options, error, message", CALLS, ids=range(len(CALLS)))
def test_bad_arguments(arguments, options, error, message):
    with raises(error, message):
        plan(*arguments, **options)


SPECS = [
    (lambda: NodeSpec(3), TypeError, "NodeSpec: name must be a string, got int"),
    (lambda: NodeSpec(""), ValueError, "NodeSpec: name must not be empty"),
    (lambda: NodeSpec("a", speed=0), ValueError, "NodeSpec: speed of 'a' must be finite and > 0, got 0"),
    (lambda: NodeSpec("a", price=-1), ValueError, "NodeSpec: price of 'a' must be finite and >= 0, got -1"),
    (lambda: NodeSpec("a", watts="2"), TypeError, "NodeSpec: watts of 'a' must be a number, got str"),
    (lambda: NodeSpec("a", memory="64XB"), ValueError, "memory must be a number of bytes or a text such as '64MB', got '64XB'"),
    (lambda: NodeSpec("a", memory=math.nan), ValueError, "NodeSpec: memory of 'a' must be finite and >= 0, got nan"),
    (lambda: NodeSpec("a", hosts=[0.5]), TypeError, "NodeSpec: hosts of 'a' must hold ints, got float"),
    (lambda: ClusterSpec([]), ValueError, "ClusterSpec: nodes must hold at least one node, got none"),
    (lambda: ClusterSpec(["a"]), TypeError, "ClusterSpec: nodes must hold NodeSpec, got str"),
    (lambda: ClusterSpec([NodeSpec("a")] * 2), ValueError, "ClusterSpec: nodes must have different names, got ['a', 'a']"),
    (lambda: ClusterSpec([NodeSpec("a")], {("a", "b"): "1mbit 1ms"}), ValueError, "ClusterSpec: link ('a', 'b') names an unknown node 'b'"),
    (lambda: ClusterSpec([NodeSpec("a")], {("a", "a"): "fast"}), ValueError, "link must be a rate and a delay such as '20mbit 10ms', got 'fast'"),
    (lambda: ClusterSpec.from_toml(3), TypeError, "cluster: expected TOML text, got int"),
    (lambda: ClusterSpec.from_toml('[[node]]\nname = "a"\n[[link]]\nspeed = "1mbit 1ms"\nfrom = "a"'), ValueError,
     "cluster: a link needs either between = [a, b] or both from and to"),
    (lambda: Replanner(P, hysteresis=1.0), ValueError, "Replanner: hysteresis must be a number in [0, 1), got 1.0"),
    (lambda: Replanner(P, hysteresis="no"), TypeError, "Replanner: hysteresis must be a number in [0, 1), got str"),
]  # fmt: skip


@pytest.mark.parametrize("make, error, message", SPECS, ids=range(len(SPECS)))
def test_bad_specs(make, error, message):
    with raises(error, message):
        make()


NO_PLAN = [
    ((P, ClusterSpec([NodeSpec("mobile", hosts=[0, 1]), NodeSpec("cloud", hosts=[0])])), {}, "plan: segment 2 has no host"),
    ((two(bandwidth=[[0, 0], [0, 0]]), ClusterSpec([NodeSpec("mobile", hosts=[0]), NodeSpec("cloud")])), {},
     "plan: no path of links leads from 'mobile' over the hosts of all segments and back"),
    ((P, spec(hosts=[0, 2], memory=9)), {"segment_memory": [10, 1, 1]}, None),
    ((P, ClusterSpec([NodeSpec("mobile", memory=9), NodeSpec("cloud", memory=8)])), {"segment_memory": [10, 1, 1]},
     "plan: segment 0 needs 10 bytes of memory, its hosts have at most 9"),
    ((P, ClusterSpec([NodeSpec("mobile", memory=4), NodeSpec("cloud", memory=4)])), {"segment_memory": [3, 3, 3]},
     "plan: the segments need 9 bytes of memory, the nodes have 8 together"),
    ((P, ClusterSpec([NodeSpec("mobile", memory=4), NodeSpec("cloud", memory=5)])), {"segment_memory": [3, 3, 3]},
     "plan: no placement fits the nodes' memory (9 bytes of segments, limits {'mobile': 4.0, 'cloud': 5.0})"),
    ((P, None, QoS(deadline=0.005)), {}, "plan: the quickest plan takes 13.512 ms, the deadline is 5 ms"),
    ((P, None, QoS(deadline=0.005)), {"objective": "throughput"}, "plan: the quickest plan takes 13.512 ms, the deadline is 5 ms"),
    ((P, None, QoS(max_drop=0.01)), {"kind": "pipeline", "exit_probability": [0.5, 0.0], "exit_loss": [0.1, 0.0]},
     "plan: the exits lose 0.05 of accuracy, max_drop is 0.01; kind 'joint' may switch exits off"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, options, message", NO_PLAN, ids=range(len(NO_PLAN)))
def test_no_plan_says_which_limit(arguments, options, message):
    if message is None:  # the same world with room in the cloud has one
        assert plan(*arguments, **options).place[0] == "cloud"
        return
    with raises(NoPlan, message):
        plan(*arguments, **options)


# -- files and words ---------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    made = fastee.plan(P, qos=QoS(deadline=0.1), kind="joint", exit_probability=[0.5, 0.2], exit_loss=[0.01, 0.01])
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json", P) == made and Plan.from_json(made.to_json().decode()) == made
    with raises(CheckpointMismatch, "plan: made for the network 'net-a', the profile is of 'net-b'; plan again"):
        Plan.load(tmp_path / "plan.json", two(fingerprint="net-b"))
    with raises(CheckpointMismatch, "plan: places 3 segments, the profile has 2; plan again"):
        made.check(two(run=[[0.01, 0.001]] * 2, wire=[[1.0]] * 2))
    made.check(P, ("cloud", "mobile"))
    with raises(CheckpointMismatch, "plan: node 'cloud' has left, there are ['mobile']; plan again"):
        made.check(P, ["mobile"])
    lonely = ClusterSpec([NodeSpec("mobile"), NodeSpec("cloud")], {})
    unreachable = plan(P, lonely)
    assert unreachable.alternatives[1].value is None and Plan.from_json(unreachable.to_json()) == unreachable


def net_of(seed):
    torch.manual_seed(seed)
    body = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    return fastee.attach(body, ["1", "3"], 3, torch.zeros(1, 4)).eval()


def test_a_profile_of_another_network_with_equally_many_segments_is_refused():
    ours, other = net_of(0), net_of(1)
    prof = fastee.profile(ours, torch.zeros(1, 4), nodes=("mobile", "cloud"), batch_sizes=(1,), repeats=1, warmup=0)
    ours.profile = prof
    message = f"profile: measured for the network {ours.fingerprint!r}, this one is {other.fingerprint!r}; "
    for take in (lambda: setattr(other, "profile", prof), lambda: fastee.local_cluster(other, nodes=2, names=("mobile", "cloud"), profile=prof)):
        with pytest.raises(CheckpointMismatch, match="^" + re.escape(message)):
            take()
    assert other.profile is None
    other.profile = dataclasses.replace(prof, fingerprint=other.fingerprint)
    assert other.profile.num_segments == 3


@pytest.mark.parametrize("up, of, message", [
    ((True, True), 0, None),
    ((True, False), 0, "node 'cloud' has left, there are ['mobile']; plan again"),
    ((True, True), 1, "plan: made for the network"),
])  # fmt: skip
def test_a_cluster_takes_a_plan_only_for_its_network_and_nodes_that_are_there(up, of, message):
    nets = [net_of(0), net_of(1)]
    made = plan(two(fingerprint=nets[of].fingerprint))
    assert made.place == ("cloud",) * 3
    nodes = [SimpleNamespace(name=name, up=u) for name, u in zip(("mobile", "cloud"), up, strict=True)]
    cluster = Cluster(nets[0], nodes, SimpleNamespace(nodes=nodes), None, None)
    cluster.close = lambda: None
    try:
        if message is None:
            assert cluster._options(None, made, True, None)[1] == bytes([1, 1, 1]) == cluster._options(None, made.indices, True, None)[1]
        else:
            with pytest.raises(CheckpointMismatch, match=re.escape(message)):
                cluster._options(None, made, True, None)
    finally:
        open_clusters.discard(cluster)


def changed(change) -> str:
    fields = json.loads(plan(P).to_json())
    change(fields)
    return json.dumps(fields)


@pytest.mark.parametrize("data", [
    "", "{", "[]", b"\xff\xfe", "[" * 100_000, changed(lambda f: f["plan"].pop("place")), changed(lambda f: f["plan"].update(extra=1)),
    changed(lambda f: f["plan"].update(value="1")), changed(lambda f: f["plan"].update(place=["mobile"])), changed(lambda f: f["plan"].update(exits=[1, 0])),
    changed(lambda f: f["plan"].update(nodes=["a"])), changed(lambda f: f.update(version=2)), changed(lambda f: f.update(format="x")),
], ids=range(13))  # fmt: skip
def test_hostile_files_are_refused(data):
    with pytest.raises(ValueError):
        Plan.from_json(data)


def test_it_explains_itself():
    made = plan(P, qos=QoS(deadline=0.1, max_drop=0.05), exit_probability=[0.5, 0.2], exit_loss=[0.01, 0.0])
    text = made.explain()
    assert f"joint plan for least latency: {made.latency * 1e3:.4g} ms, the optimum of the model" in text
    assert "send the input as c1: mobile -> cloud" in text and "the answer goes home: cloud -> mobile" in text
    assert "all here: possible" in text and "send the input, all on cloud: possible" in text and "without exits: possible" in text
    here = made.alternatives[0]
    assert f"{here.value / made.value:.3g}x better" in text and here.figures.latency > made.latency
    late = plan(P, qos=QoS(deadline=0.015)).explain()
    assert "all here: the quickest plan takes 30 ms, the deadline is 15 ms" in late
    for objective in ("throughput", "cost"):
        assert objective in plan(P, objective=objective, weights={"bytes": 1.0, "seconds": 1.0}).explain()


# -- clusters ----------------------------------------------------------------------------------------------------------

TOML = """
[[node]]
name = "phone"
like = "mobile"
memory = "64MB"
watts = 2

[[node]]
name = "big"
like = "cloud"
speed = 4.0
price = 0.5
hosts = [1, 2]

[[link]]
between = ["phone", "big"]
speed = "10mbit 2ms"
"""


def test_cluster_toml(tmp_path):
    (tmp_path / "cluster.toml").write_text(TOML)
    cluster = ClusterSpec.load(tmp_path / "cluster.toml")
    assert cluster == ClusterSpec([NodeSpec("phone", memory=64e6, watts=2, like="mobile"), NodeSpec("big", speed=4, price=0.5, hosts=(1, 2), like="cloud")],
                                  {("phone", "big"): "10mbit 2ms", ("big", "phone"): "10mbit 2ms"})  # fmt: skip
    made = plan(P, cluster, segment_memory=[1e6] * 3)
    assert made.place == ("phone", "big", "big") and made.indices == [0, 1, 1] and made.codecs == (None, "c1", None)
    assert made.latency == pytest.approx(0.010 + 0.002 + 0.0008 + 2 * 0.00025 + 0.002 + 64 * 8e-7)
    assert made.memory == {"phone": 1e6, "big": 2e6} and made.bytes == 1064


@pytest.mark.parametrize("text", ["node = 1", '[[node]]\nnam = "a"', '[[node]]\nname = 3\nspeed = "x"', "[[", b"\xff", '[[link]]\nspeed = "1mbit 1ms"'])
def test_hostile_toml_is_refused(text):
    with pytest.raises(ValueError, match="^cluster: not a cluster description: "):
        ClusterSpec.from_toml(text)


def test_links_of_the_profile_serve_where_the_cluster_gives_none():
    assert plan(P, spec()).value == plan(P).value
    assert plan(P, ClusterSpec([NodeSpec("mobile"), NodeSpec("cloud")], {})).place == ("mobile",) * 3


def test_a_net_is_split_by_rows():
    net = vgg16(32)
    ask = dict(links="50mbit 0ms", effort=20_000)
    auto = plan(net, ["xavier", "nano"], **ask)
    assert auto.volumes[-1] == len(net.layers) and auto.latency == plan(net, ["xavier", "nano"], kind="spatial", **ask).latency
    with raises(TypeError, "net must be a Net (see vgg16, extract), got Profile"):
        plan(P, ["xavier"], kind="spatial", links="50mbit 0ms")
    with raises(ValueError, "devices must hold 1..256 providers, got 0"):
        plan(net, [], **ask)


def test_weights_move_the_cost_plan():
    cluster = ClusterSpec([NodeSpec("mobile", watts=10), NodeSpec("cloud", price=100.0)])
    assert plan(P, cluster, objective="cost").place == ("mobile",) * 3
    assert plan(P, cluster, objective="cost", weights={"energy": 1.0}).place == ("cloud",) * 3
    assert plan(P, cluster, objective="cost", weights={"energy": 1.0}, qos=QoS(deadline=0.02)).latency <= 0.02
    hurried = plan(P, cluster, objective="cost", qos=QoS(deadline=0.025))
    assert hurried.latency <= 0.025 and hurried.cost > plan(P, cluster, objective="cost").cost and hurried.exact


def test_a_batch_moves_as_one():
    wide = {f: getattr(P, f) for f in P.__dataclass_fields__}
    wide.update(batch_sizes=(1, 8), mean=np.repeat(P.mean, 2, axis=2), spread=np.repeat(P.spread, 2, axis=2))
    one, eight = (plan(type(P)(**wide), batch=b) for b in (1, 8))
    assert one.value == plan(P).value and eight.place == ("mobile",) * 3 and eight.throughput == pytest.approx(8 / 0.03)


def test_without_the_core_it_says_so(monkeypatch):
    monkeypatch.setattr(edge, "_C", None)
    monkeypatch.setattr(edge, "_WHY_NOT", "no such module")
    with raises(BackendUnavailable, "plan: the C++ core is not there (no such module); build it with `make build`"):
        plan(P)


@pytest.mark.parametrize("name", ["cluster", "explain", "joint", "plan", "search"])
def test_examples_of_the_docstrings(name):
    result = doctest.testmod(sys.modules[f"fastee.planning.{name}"])
    assert result.attempted and not result.failed

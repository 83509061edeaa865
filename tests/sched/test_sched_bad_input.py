"""Wrong arguments name themselves, what was got and what was expected; in C++ and in the twin with the same words."""

import doctest
import json
import math
import re
import sys

import numpy as np
import pytest
from sched_worlds import local_profile, small_profile

from fastee.errors import BackendUnavailable, CheckpointMismatch
from fastee.scheduling import POLICIES, Profile, QoS, Scheduler, parse_link
from fastee.scheduling import scheduler as face


def raises(error, message):
    return pytest.raises(error, match="^" + re.escape(message) + "$")


@pytest.mark.parametrize("exit", [-1, 0, 1])
def test_an_empty_cluster_gives_the_best_head_reached_or_a_refusal(native, exit):
    """Nobody is left, this node included: a sample that has an answer leaves with it, one without is refused."""
    with raises(ValueError, "Profile: nodes must be 1..1024 different names, got []"):
        local_profile(nodes=())
    sched = Scheduler(small_profile(), QoS(deadline=1.0), thresholds=[0.9, 0.9], native=native)
    for node in (0, 1):
        sched.set_node_up(node, False)
    assert sched.decide(sched.admit(0), exit, 0.1, 0).action.name == ("EXIT" if exit >= 0 else "REJECT")


CALLS = [
    ("decide", ("x", 0, 0.5, 0), TypeError, "decide: task must be an int, got str"),
    ("decide", (0, 1.0, 0.5, 0), TypeError, "decide: exit must be an int, got float"),
    ("decide", (0, 3, 0.5, 0), ValueError, "decide: exit must be in -1..2, got 3"),
    ("decide", (0, -2, 0.5, 0), ValueError, "decide: exit must be in -1..2, got -2"),
    ("decide", (0, 0, "high", 0), TypeError, "decide: confidence must be a number, got str"),
    ("decide", (0, 0, None, 0), TypeError, "decide: confidence must be a number, got NoneType"),
    ("decide", (0, 0, 0.5, 0.1), TypeError, "decide: now must be an int, got float"),
    ("decide", (0, 0, 0.5, 1 << 63), ValueError, "decide: now must fit in 64 bits, got 9223372036854775808"),
    ("admit", (0.5,), TypeError, "admit: now must be an int, got float"),
    ("admit", (0, 0.1), TypeError, "admit: deadline must be an int, got float"),
    ("admit", (0, None, 3), ValueError, "admit: segment must be in 0..2, got 3"),
    ("admit", (0, None, -1), ValueError, "admit: segment must be in 0..2, got -1"),
    ("observe", (3, 0, 1, 5), ValueError, "observe: segment must be in 0..2, got 3"),
    ("observe", (0, 2, 1, 5), ValueError, "observe: node must be in 0..1, got 2"),
    ("observe", (0, 0, 0, 5), ValueError, "observe: batch must be in 1..1073741824, got 0"),
    ("observe", (0, 0, 1, 0), ValueError, "observe: duration_ns must be in 1..9223372036854775807, got 0"),
    ("observe", (0, 0, 1, math.nan), TypeError, "observe: duration_ns must be an int, got float"),
    ("observe_link", (0, 2, 1, 5), ValueError, "observe_link: dst must be in 0..1, got 2"),
    ("observe_link", (0, 1, 0, 5), ValueError, "observe_link: nbytes must be in 1..1125899906842624, got 0"),
    ("observe_link", (0, 1, 1, -5), ValueError, "observe_link: duration_ns must be in 1..9223372036854775807, got -5"),
    ("observe_link", (0, 1, 1, 5, 0.5), TypeError, "observe_link: now must be an int, got float"),
    ("observe_link", (0, 1, 1, 5, 1 << 63), ValueError, "observe_link: now must fit in 64 bits, got 9223372036854775808"),
    ("observe_queue", (0, -1), ValueError, "observe_queue: length must be in 0..1099511627776, got -1"),
    ("set_node_up", (2, True), ValueError, "set_node_up: node must be in 0..1, got 2"),
    ("set_link_up", (0, 9, True), ValueError, "set_link_up: dst must be in 0..1, got 9"),
    ("finish", ("x",), TypeError, "finish: task must be an int, got str"),
    ("decide_batch", ([0.5], 0, [0.5], 0), TypeError, "decide_batch: tasks must be int64, got float64"),
    ("decide_batch", ([0], 0, ["a"], 0), TypeError, "decide_batch: confidences must be float, got <U1"),
    ("decide_batch", ([0, 1], 0, [0.5], 0), ValueError, "decide_batch: tasks and confidences must both be [B], got [2] and [1]"),
    ("decide_batch", ([[0]], 0, [[0.5]], 0), ValueError, "decide_batch: tasks and confidences must both be [B], got [1, 1] and [1, 1]"),
    ("decide_batch", ([0], 3, [0.5], 0), ValueError, "decide_batch: exit must be in -1..2, got 3"),
]


@pytest.mark.parametrize("call, arguments, error, message", CALLS, ids=[f"{c[0]}-{i}" for i, c in enumerate(CALLS)])
def test_calls(native, call, arguments, error, message):
    sched = Scheduler(small_profile(), QoS(deadline=1.0), thresholds=[0.9, 0.9], native=native)
    before = sched.snapshot()
    with raises(error, message):
        getattr(sched, call)(*arguments)
    assert sched.snapshot() == before, "a refused call changes nothing"


def test_argument_counts_and_keywords(native):
    sched = Scheduler(small_profile(), QoS(deadline=1.0), thresholds=[0.9, 0.9], native=native)
    task = sched.admit(now=5, segment=1, deadline=None)
    assert sched.decide(task, exit=1, confidence=np.float32(0.95), now=np.int64(6)).action.name == "EXIT"
    for call in (lambda: sched.decide(task), lambda: sched.decide(task, 0, 0.5, 0, *[0.0, 0.0, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0]), lambda: sched.decide(task, 0, 0.5, when=3),
                 lambda: sched.decide(task, 0, 0.5, 3, now=3), lambda: sched.admit()):  # fmt: skip
        with pytest.raises(TypeError):
            call()


P, Q = small_profile(), QoS(deadline=1.0)
CONSTRUCTIONS = [
    (dict(profile={}), TypeError, "Scheduler: profile must be a Profile, got dict"),
    (dict(qos=0.1), TypeError, "Scheduler: qos must be a QoS, got float"),
    (dict(policy="dedline"), ValueError, f"Scheduler: policy must be one of {list(POLICIES)}, got 'dedline', did you mean 'deadline'?"),
    (dict(thresholds=None), ValueError,
     "Scheduler: thresholds must hold 2 scores, got None (only a profile with a gain table goes without)"),
    (dict(thresholds=[0.9]), ValueError, "Scheduler: thresholds must hold 2 scores, one per exit, got 1"),
    (dict(thresholds=[0.9, math.nan]), ValueError, "Scheduler: thresholds[1] must not be NaN (+inf switches an exit off)"),
    (dict(thresholds=0.9), TypeError, "Scheduler: thresholds must be a sequence of numbers, got float"),
    (dict(node=2), ValueError, "Scheduler: node must be in 0..1, got 2"),
    (dict(node="mobile"), TypeError, "Scheduler: node must be an int, got str"),
    (dict(home=-1), ValueError, "Scheduler: home must be in 0..1, got -1"),
    (dict(max_tasks=0), ValueError, "Scheduler: max_tasks must be in 1..16777216, got 0"),
    (dict(hosts=[[1, 1]] * 3), TypeError, "Scheduler: hosts must be bool [S, N], got int64"),
    (dict(hosts=[[True, True]]), ValueError, "Scheduler: hosts must have shape [S, N] = [3, 2], got [1, 2]"),
    (dict(hosts=[[True, True], [False, False], [True, True]]), ValueError, "Scheduler: segment 1 has no host"),
    (dict(media=3), TypeError, "Scheduler: media must be a sequence of groups of nodes, got 3"),
    (dict(media=[0, 1]), TypeError, "Scheduler: media must be a sequence of groups of nodes, got [0, 1]"),
    (dict(media=[[0, 2]]), ValueError, "Scheduler: media must be in 0..1, got 2"),
    (dict(media=[[0], [1, 0]]), ValueError, "Scheduler: media must name each node once, got [[0], [1, 0]]"),
    (dict(answer_bytes=-1), ValueError, "Scheduler: answer_bytes must be in 0..1125899906842624, got -1"),
]


@pytest.mark.parametrize("change, error, message", CONSTRUCTIONS, ids=[next(iter(c[0])) + str(i) for i, c in enumerate(CONSTRUCTIONS)])
def test_construction(native, change, error, message):
    with raises(error, message):
        Scheduler(**{**dict(profile=P, qos=Q, thresholds=[0.9, 0.9]), **change}, native=native)


@pytest.mark.skipif(face._C is None, reason="fastee._C is not built")
@pytest.mark.parametrize("name, value, message", [
    ("mean", np.full((3, 2, 2), np.nan), "Scheduler: mean must be finite and >= 0.000000, got nan at 0"),
    ("spread", np.full((3, 2, 2), -1.0), "Scheduler: spread must be finite and >= 0.000000, got -1.000000 at 0"),
    ("spread", np.zeros((3, 2)), "Scheduler: spread must have shape [3, 2, 2], got [3, 2]"),
    ("delay", np.zeros((3, 2)), "Scheduler: delay must have shape [2, 2], got [3, 2]"),
    ("thresholds", np.array([0.9, np.nan]), "Scheduler: thresholds must not be NaN"),
    ("batch_sizes", [8, 1], "Scheduler: batch_sizes (rising) must be in 9..1073741824, got 1"),
    ("batch_sizes", [1], "Scheduler: mean must have shape [3, 2, 1], got [3, 2, 2]"),
    ("policy", "none", "Scheduler: policy must be one of deadline, threshold, patience, distree, mdi_exit, dimee, splitee, jei_gate, daisy, custom, got 'none'"),
    ("node", 5, "Scheduler: node must be in 0..1, got 5"),
    ("max_tasks", 1 << 40, "Scheduler: max_tasks must be in 1..16777216, got 1099511627776"),
    ("medium", [0], "Scheduler: medium must hold 2 numbers, got 1"),
    ("quantile", math.inf, "Scheduler: quantile must be finite and >= 0, got inf"),
])  # fmt: skip
def test_the_core_checks_for_itself(name, value, message, monkeypatch):
    """Programs that reach the core without the Python face get an error as well, not undefined behaviour."""
    configs = []
    real = face._C.Scheduler
    monkeypatch.setattr(face, "_C", type("Spy", (), {"Scheduler": lambda config: configs.append(config) or real(config)}))
    Scheduler(P, Q, thresholds=[0.9, 0.9], native=True)
    with raises(ValueError, message):
        real({**configs[0], name: value})


QOS = [
    (dict(deadline=0), ValueError, "QoS: deadline must be > 0 seconds or None, got 0.0"),
    (dict(deadline=math.nan), ValueError, "QoS: deadline must be > 0 seconds or None, got nan"),
    (dict(deadline="20ms"), TypeError, "QoS: deadline must be a number, got str"),
    (dict(hit_rate=1.0), ValueError, "QoS: hit_rate must be in [0.5, 1), got 1.0"),
    (dict(hit_rate=math.nan), ValueError, "QoS: hit_rate must be in [0.5, 1), got nan"),
    (dict(max_drop=-0.1), ValueError, "QoS: max_drop must be in [0, 1] or None, got -0.1"),
    (dict(cost_weight=math.inf), ValueError, "QoS: cost_weight must be finite and >= 0, got inf"),
]


@pytest.mark.parametrize("arguments, error, message", QOS, ids=[next(iter(q[0])) + str(i) for i, q in enumerate(QOS)])
def test_qos(arguments, error, message):
    with raises(error, message):
        QoS(**arguments)
    assert QoS().deadline_ns == QoS(deadline=math.inf).deadline_ns == 2**63 - 1
    assert QoS(hit_rate=0.5).quantile == 0.0


PROFILES = [
    (dict(mean=np.zeros((3, 2))), "Profile: mean must have shape [S, nodes, batch_sizes] = [any, 2, 2], got [3, 2]"),
    (dict(mean=np.zeros((0, 2, 2))), "Profile: mean must have shape [S, nodes, batch_sizes] = [any, 2, 2], got [0, 2, 2]"),
    (dict(spread=np.full((3, 2, 2), np.nan)), "Profile: spread[0, 0, 0] must be finite and >= 0, got nan"),
    (dict(mean=np.full((3, 2, 2), -1)), "Profile: mean[0, 0, 0] must be finite and >= 0, got -1.0"),
    (dict(wire_bytes=[[1]] * 3), "Profile: wire_bytes must have shape [S, codecs] = [3, 2], got [3, 1]"),
    (dict(bandwidth=[[0, math.inf], [1, 0]]), "Profile: bandwidth[0, 1] must be finite and >= 0, got inf"),
    (dict(delay=[[0, 1]]), "Profile: delay must have shape [nodes, nodes] = [2, 2], got [1, 2]"),
    (dict(nodes=("a", "a")), "Profile: nodes must be 1..1024 different names, got ['a', 'a']"),
    (dict(codecs=()), "Profile: codecs must be 1..64 different names, got []"),
    (dict(batch_sizes=(8, 1)), "batch_sizes must be 1..64 rising ints >= 1, got [8, 1]"),
    (dict(batch_sizes=(0, 1)), "batch_sizes must be 1..64 rising ints >= 1, got [0, 1]"),
    (dict(gain=[[0.1]]), "Profile: gain must have shape [exits, bins] = [2, any], got [1, 1]"),
    (dict(gain=[[-2.0]] * 2), "Profile: gain[0, 0] must be finite and >= -1, got -2.0"),
    (dict(gain_range=(1.0, 0.0)), "Profile: gain_range must be two finite numbers, low < high, got (1.0, 0.0)"),
]


@pytest.mark.parametrize("change, message", PROFILES, ids=[next(iter(p[0])) + str(i) for i, p in enumerate(PROFILES)])
def test_profile(change, message):
    with raises(ValueError, message):
        small_profile(**change)


def test_profile_types():
    with raises(TypeError, "Profile: nodes must be a sequence of names, got str"):
        small_profile(nodes="ab")
    with raises(TypeError, "batch_sizes must hold ints, got float"):
        small_profile(batch_sizes=(1.0, 2.0))
    with raises(TypeError, "Profile: fingerprint must be a string, got int"):
        small_profile(fingerprint=3)


def test_profile_is_a_read_only_copy():
    mean = np.full((3, 1, 1), 1e-3)
    prof = local_profile(mean=mean)
    mean[:] = 9
    assert prof.mean.max() == 1e-3
    with pytest.raises(ValueError):
        prof.mean[0] = 1


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_json_round_trip(tmp_path):
    for prof in (small_profile(), small_profile(gain=np.full((2, 3), 1 / 3)), local_profile(segments=1)):
        assert Profile.from_json(prof.to_json()) == prof and hash(Profile.from_json(prof.to_json().decode())) == hash(prof)
        prof.save(tmp_path / "p.json")
        assert Profile.load(tmp_path / "p.json") == prof
        assert Profile.load(tmp_path / "p.json").mean.tobytes() == prof.mean.tobytes()
    assert small_profile() != small_profile(fingerprint="other")


def hostile(change) -> str:
    fields = json.loads(small_profile().to_json())
    change(fields)
    return json.dumps(fields)


HOSTILE = {
    "empty": "",
    "not json": "{",
    "list": "[]",
    "not utf-8": b"\xff\xfe{}",
    "deep": "[" * 100_000,
    "nan": hostile(lambda f: f["mean"][0][0].__setitem__(0, math.nan)),
    "inf": hostile(lambda f: f["mean"][0][0].__setitem__(0, math.inf)),
    "overflow": hostile(lambda f: None).replace("0.004", "1e999", 1),
    "ragged": hostile(lambda f: f["mean"][0].pop()),
    "string": hostile(lambda f: f["delay"][0].__setitem__(0, "1")),
    "missing": hostile(lambda f: f.pop("spread")),
    "unknown": hostile(lambda f: f.update(extra=1)),
    "negative": hostile(lambda f: f["wire_bytes"][0].__setitem__(0, -1)),
    "null": hostile(lambda f: f["mean"][0][0].__setitem__(0, None)),
    "float batch": hostile(lambda f: f.update(batch_sizes=[1.5, 8])),
    "huge batch": hostile(lambda f: f.update(batch_sizes=[1, 1 << 62])),
    "huge int": hostile(lambda f: f.update(batch_sizes=[1, 1 << 200])),
    "object": hostile(lambda f: f.update(nodes={"a": 1})),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_json_is_refused(data):
    with pytest.raises(ValueError):
        Profile.from_json(data)


def test_json_of_another_format_or_version():
    with raises(CheckpointMismatch, "from_json: expected fastee-profile version 1, got 'fastee-profile' version 2"):
        Profile.from_json(hostile(lambda f: f.update(version=2)))
    with raises(CheckpointMismatch, "from_json: expected fastee-profile version 1, got 'x' version 1"):
        Profile.from_json(hostile(lambda f: f.update(format="x")))
    with raises(TypeError, "from_json: data must be bytes or str, got dict"):
        Profile.from_json({})


# -- links -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, rate, delay", [
    ("20mbit 10ms", 20e6, 0.01), ("1gbit 0s", 1e9, 0.0), ("1.5 Mbit/s 250 us", 1.5e6, 250e-6), (" 64kbit 1s ", 64e3, 1.0), ("0bit 1ms", 0.0, 1e-3),
])  # fmt: skip
def test_parse_link(text, rate, delay):
    assert parse_link(text) == pytest.approx((rate, delay), rel=1e-15)


@pytest.mark.parametrize("text", ["", "20mbit", "10ms 20mbit", "-1mbit 1ms", "20mb 10ms", "1e9bit 1ms", "20mbit 10ms x", "nanbit 1ms", "1" * 70 + "bit 1ms"])
def test_parse_link_refuses(text):
    with raises(ValueError, f"link must be a rate and a delay such as '20mbit 10ms', got {text[:64]!r}"):
        parse_link(text)
    with raises(TypeError, "link must be a string such as '20mbit 10ms', got float"):
        parse_link(20e6)


# -- without the compiled core -----------------------------------------------------------------------------------------


def test_without_the_core_the_twin_stands_in_and_a_demand_is_refused(monkeypatch):
    monkeypatch.setattr(face, "_C", None)
    monkeypatch.setattr(face, "_WHY_NOT", "no such module")
    assert Scheduler(P, Q, thresholds=[0.9, 0.9]).native is False
    with raises(BackendUnavailable, "Scheduler: the C++ core is not there (no such module); build it with `make build`"):
        Scheduler(P, Q, thresholds=[0.9, 0.9], native=True)


@pytest.mark.parametrize("name", ["decision", "links", "profile", "qos", "scheduler"])
def test_examples_of_the_docstrings(name):
    pytest.importorskip("torch")
    result = doctest.testmod(sys.modules[f"fastee.scheduling.{name}"])
    assert result.attempted and not result.failed

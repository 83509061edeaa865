"""Students on nodes of their own: the team's own answers, zeros for who is missing, forced exits, speculation."""

import os
import signal
import time

import pytest
import torch

import fastee
from fastee.errors import ClusterError, PeerLost
from fastee.nn.students import StudentTeam

pytestmark = pytest.mark.timeout(120)


def body(width, seed):
    torch.manual_seed(seed)
    layers = [torch.nn.Conv2d(1, width, 3, padding=1), torch.nn.ReLU()]
    for _ in range(2):
        layers += [torch.nn.Conv2d(width, width, 3, padding=1), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(64 * width, 10))


@pytest.fixture(scope="module")
def team():
    students = [fastee.attach(body(width, i), exits=["1", "3", "5"], num_classes=10, example=torch.zeros(1, 1, 8, 8)).eval() for i, width in enumerate((4, 8, 6))]
    torch.manual_seed(7)
    team = StudentTeam(students, [[0, 1, 2, 3], [4, 5], [6, 7, 8]], 10).eval()
    x = rows(64)
    with torch.no_grad():
        # Half of the rows settle at the second exit.
        return team.set_delta([0.0, float(_second_delta(team, x).median()), 0.0])


def _second_delta(team, x):
    out = team.set_delta([0.0, 9.0, 0.0])(x)
    return -out.confidence


def rows(count, seed=1):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def alone(team, x, **options):
    """The same rows by the team in this process, one by one."""
    outs = [team(x[i : i + 1], **options) for i in range(len(x))]
    return {name: torch.cat([getattr(o, name) for o in outs]) for name in ("logits", "label", "confidence", "exit")}


def agrees(out, want):
    same = torch.equal(out.label, want["label"]) and torch.equal(out.exit, want["exit"])
    return same and torch.allclose(out.logits, want["logits"], atol=1e-5) and torch.allclose(out.confidence, want["confidence"], atol=1e-5)


def until(what, seconds=10.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_cluster_answers_as_the_team_with_and_without_its_students(team):
    x = rows(24)
    with fastee.student_cluster(team, link="50mbit 2ms", straggler=5.0, timeout=20) as cluster:
        want = alone(team, x)
        assert set(want["exit"].tolist()) == {1, 2}
        assert agrees(cluster(x), want)

        # Hung: the straggler's time passes, its part counts as zeros; then it is known to be down and nobody waits.
        cluster._client.straggler = 0.3
        os.kill(cluster.nodes[1].pid, signal.SIGSTOP)
        without = alone(team, x, lost=[{1}] * 3)
        began = time.monotonic()
        answer = cluster.submit(x[:1]).result(10)
        assert 0.3 < time.monotonic() - began < 3 and answer.missing == {1} and answer.label == int(without["label"][0])
        until(lambda: not cluster.stats()["up"]["student1"])
        cluster._client.straggler = 5.0
        out = cluster(x)
        assert agrees(out, without) and float(out.latency.max()) < 4

        # Back again: it answers new tasks.
        os.kill(cluster.nodes[1].pid, signal.SIGCONT)
        until(lambda: cluster.stats()["up"]["student1"])
        assert agrees(cluster(x), want)

        # Killed while tasks are under way: none is lost, none waits for the straggler's time.
        futures = [cluster.submit(x[i : i + 1]) for i in range(24)]
        os.kill(cluster.nodes[0].pid, signal.SIGKILL)
        answers = [future.result(20) for future in futures]
        assert {frozenset(), frozenset({0})} >= {a.missing for a in answers} and answers[-1].missing == {0}
        assert agrees(cluster(x), alone(team, x, lost=[{0}] * 3))

        for node in cluster.nodes[1:]:
            os.kill(node.pid, signal.SIGKILL)
        until(lambda: not any(cluster.stats()["up"].values()))
        with pytest.raises(PeerLost):
            cluster(x[:1], deadline=0.5)
        stats = cluster.stats()
        assert stats["tasks"] == stats["answers"] + stats["errors"] and stats["pending"] == 0
    with pytest.raises(ClusterError, match="it is closed"):
        cluster(x)


def test_deadlines_force_the_exit_reached_and_speculation_saves_round_trips(team):
    x = rows(6)
    final = team.delta
    try:
        team.set_delta(0.0)  # nothing settles: every row would go to the end
        times = {}
        for ahead in (0, 2):
            with fastee.student_cluster(team, link="50mbit 40ms", ahead=ahead, credit=1, straggler=5.0, timeout=20) as cluster:
                cluster(x)
                out = cluster(x)
                assert out.exit.tolist() == [2] * 6 and not out.forced.any()
                times[ahead] = float(out.latency.median())
                if ahead == 0:
                    # Two exits need 0.16 s, three 0.24: by 0.2 s the team is at its second.
                    out = cluster(x, deadline=0.2)
                    assert out.exit.tolist() == [1] * 6 and out.forced.all() and float(out.latency.median()) < 0.2
                    assert cluster.stats()["forced"] == 6
        assert times[0] > 0.23 and times[2] < times[0] - 0.1, times
    finally:
        team.set_delta(final)


@pytest.mark.parametrize(
    ("options", "words"), [({"ahead": -1}, "ahead"), ({"straggler": "x"}, "straggler"), ({"slowdown": [1]}, "slowdown"), ({"credit": 0}, "credit")]
)
def test_wrong_options_are_named(team, options, words):
    with pytest.raises(ValueError, match=words):
        fastee.student_cluster(team, **options)


def test_what_is_no_team_is_told():
    with pytest.raises(TypeError, match="expected a StudentTeam"):
        fastee.student_cluster(torch.nn.Linear(2, 2))

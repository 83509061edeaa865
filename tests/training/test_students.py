"""Partition of a teacher's channels, joint training of the students, and the team's exits by feature difference."""

import copy
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastee
from fastee.nn import StudentTeam
from fastee.training import partition, train_students
from fastee.training.students import teacher_features
from tests.training.test_fit import same, snapshot


def teacher():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    )  # fmt: skip


def student(seed, width=6):
    torch.manual_seed(seed)
    body = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4),
    )  # fmt: skip
    return fastee.attach(body, ["1", "3", "5"], 4, torch.zeros(1, 1, 8, 8)).eval()


def made(groups=((0, 3, 5, 8), (1, 2, 10)), seed=0):
    torch.manual_seed(seed)
    return StudentTeam([student(i + seed) for i in range(len(groups))], groups, 4)


def images(n, seed):
    """Which quarter of the picture is bright."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (n,), generator=g)
    x = torch.randn(n, 1, 8, 8, generator=g)
    for i, label in enumerate(y.tolist()):
        x[i, 0, 4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 1.0
    return TensorDataset(x, y)


@pytest.fixture(scope="module")
def taught():
    """A teacher, a team before and after its training, the report."""
    big = teacher()
    fastee.fit(fastee.attach(big, ["1"], 4, torch.zeros(1, 1, 8, 8)), DataLoader(images(1500, 0), 50, shuffle=True), method="joint", epochs=6, lr=0.01, seed=0)
    team = made().eval()
    before = copy.deepcopy(team)
    report = train_students(team, big, "3", DataLoader(images(1500, 0), 50, shuffle=True), epochs=8, seed=0)
    return big, before, team, report


# partition


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 4), st.booleans(), st.sampled_from([0.0, 50.0, 90.0]))
def test_a_partition_covers_each_kept_channel_once(seed, parts, drop, percentile):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 6, 24)
    f = rng.random((30, 24)) * (blocks[None, :] == rng.integers(0, 6, 30)[:, None])
    found = partition(f, parts, percentile=percentile, drop_largest=drop, fallback="balanced", seed=1)
    flat = [c for p in found for c in p]
    assert len(found) == parts and all(p == sorted(p) and p for p in found) and len(flat) == len(set(flat)) and set(flat) <= set(range(24))
    assert drop or sorted(flat) == list(range(24))
    assert partition(f, parts, percentile=percentile, drop_largest=drop, fallback="balanced", seed=1) == found


def test_the_largest_group_is_dropped_as_in_the_official_code():
    f = np.zeros((40, 9))
    for i in range(40):
        f[i, {0: [0, 1, 2, 3], 1: [4, 5, 6], 2: [7, 8]}[i % 3]] = np.linspace(1, 0.4, [4, 3, 2][i % 3])
    assert partition(f, 2, percentile=0) == [[4, 5, 6], [7, 8]]
    assert partition(f, 2, percentile=0, drop_largest=False) == [[0, 1, 2, 3], [4, 5, 6, 7, 8]] or partition(f, 3, percentile=0, drop_largest=False) == [
        [0, 1, 2, 3], [4, 5, 6], [7, 8],
    ]  # fmt: skip
    with pytest.raises(ValueError, match=re.escape("parts: the channels fall into 2 groups, 3 are needed; pass fallback='balanced'")):
        partition(f, 3, percentile=0)
    assert partition(np.vstack([f, np.zeros(9)]), 2, percentile=0) == partition(f, 2, percentile=0)  # a dark image ties nothing


# the team


def test_a_threshold_of_zero_runs_everything_and_infinity_leaves_at_the_second(taught):
    *_, team, _ = taught
    x = images(100, 5).tensors[0]
    whole = team.set_delta(0.0)(x)
    carries, joined = [(x,)] * 2, None
    with torch.no_grad():
        for m in range(3):
            shown = [team.run_student(i, m, c) for i, c in enumerate(carries)]
            carries, joined = [c for c, _ in shown], team.join([f for _, f in shown])
        assert torch.equal(whole.logits, team.heads[2](joined)) and (whole.exit == 2).all()
    assert (team.set_delta(math.inf)(x).exit == 1).all()


def test_the_exit_never_rises_with_delta_and_every_exit_is_used(taught):
    *_, team, _ = taught
    x = images(300, 5).tensors[0]
    last = torch.full((300,), 2)
    seen = set()
    for delta in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, math.inf):
        out = team.set_delta(delta)(x)
        assert (out.exit <= last).all() and (out.exit >= 1).all()
        left = out.exit < 2
        assert (-out.confidence[left] < delta).all() and (-out.confidence <= math.sqrt(2) + 1e-6).all()
        last, seen = out.exit, seen | set(out.exit.tolist())
    assert seen == {1, 2}


def test_a_lost_student_is_a_zero_feature(taught):
    *_, team, _ = taught
    x = images(50, 5).tensors[0]
    out = team.set_delta(0.0)(x, lost=[(), (1,), (1,)])
    with torch.no_grad():
        carries = [(x,)]
        for m in range(3):
            carry, f = team.run_student(0, m, carries[0])
            carries = [carry]
        assert torch.equal(out.logits, team.heads[2](team.join([f, None]))) and torch.equal(team.join([f, None])[:, 4:], torch.zeros(50, 3))
    back = team(x, lost=[(), (1,), ()])
    assert torch.equal(back.logits, team(x).logits)  # it may answer again
    alone = team.set_delta(math.inf)(x, lost=[(1,), (0,), ()])
    assert (alone.exit == 2).all()  # nobody answered twice in a row, so nothing could be compared at exit 1
    gone = team(x, lost=[(), (0, 1), ()])
    assert gone.forced.all() and (gone.exit == 0).all()
    with pytest.raises(ValueError, match="lost: no student answered at the first exit"):
        team(x, lost=[(0, 1), (), ()])


def test_macs_are_those_of_every_part(taught):
    *_, team, _ = taught
    want = 0
    for m in range(3):
        for s, g in zip(team.students, (4, 3), strict=True):
            want += s.macs["segments"][m] + 6 * g * (64 if m == 0 else 16)
        want += 7 * 4
        assert team.macs[m] == want


# training


def test_students_learn_and_come_closer_to_the_teacher(taught):
    big, before, team, report = taught
    x, y = images(400, 5).tensors
    right = [float((t.set_delta(0.0)(x).label == y).float().mean()) for t in (before, team)]
    assert right[1] > 0.85 > right[0] and len(report.history) == 8 and len(report.history[0]["loss"]) == 3
    goal = teacher_features(big, "3", x)[0][:, [c for g in team.groups for c in g]]
    apart = []
    for t in (before, team):
        with torch.no_grad():
            carries = [(x,)] * 2
            for m in range(3):
                shown = [t.run_student(i, m, c) for i, c in enumerate(carries)]
                carries, joined = [c for c, _ in shown], t.join([f for _, f in shown])
        apart.append(float(fastee.ops.feature_delta(joined, goal).mean()))
    assert apart[1] < 0.75 * apart[0]
    for a, b in zip(before.students, team.students, strict=True):
        assert same(snapshot(a.heads), snapshot(b.heads)) and same(snapshot(a.backbone[8]), snapshot(b.backbone[8]))  # unused parts stay


def test_teacher_features_and_bad_settings():
    big = teacher().eval()
    x = images(5, 1).tensors[0]
    f, z = teacher_features(big, "3", x)
    assert torch.equal(z, big(x)) and torch.equal(f, big[:4](x).mean((2, 3)).clamp_min(0)) and not f.requires_grad
    with pytest.raises(ValueError, match=re.escape("layer: the teacher has no submodule '33'")):
        teacher_features(big, "33", x)
    loader = [tuple(images(20, 1).tensors)]
    for change, error, message in (
        (dict(alpha=2), ValueError, "alpha: expected a finite number in [0, 1], got 2"),
        (dict(lr=0), ValueError, "lr: expected a finite number > 0, got 0"),
        (dict(weights=[1]), ValueError, "weights: expected 3 numbers >= 0"),
        (dict(team=big), TypeError, "team: expected a StudentTeam, got Sequential"),
        (dict(team=made(groups=((0,), (40,)))), ValueError, "layer: '3' has 16 channels, the students' groups name channel 40"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            train_students(**{"team": made(), "teacher": big, "layer": "3", "loader": loader, "epochs": 1, **change})
    with pytest.warns(UserWarning, match="with beta=0 nothing ties the exits"):
        train_students(made(), big, "3", loader, epochs=1, beta=0.0)
    with pytest.raises(ValueError, match=re.escape("groups: expected one non-empty list of channels per student (2), got [1]")):
        StudentTeam([student(0), student(1)], [[0]], 4)
    with pytest.raises(ValueError, match=re.escape("delta: expected 3 numbers >= 0, got [0.1, 0.1]")):
        made().set_delta([0.1, 0.1])
    for bad, message in ((dict(parts=0), "parts: expected an integer in 1..4, got 0"), (dict(features=-np.ones((2, 4))), "features: expected finite numbers >= 0")):
        with pytest.raises(ValueError, match=re.escape(message)):
            partition(**{"features": np.ones((3, 4)), "parts": 2, **bad})

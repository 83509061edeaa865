"""fastee profile and fastee calibrate on a module of the user's own."""

import json
import sys

import pytest
from typer.testing import CliRunner

import fastee
from fastee.cli import app

MODULE = """
import torch, fastee
from torch import nn

def backbone():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

def rows(n, seed):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return [(x, x[:, :3].argmax(1))]

def net():
    net = fastee.attach(backbone(), ["1", "3"], 3, torch.zeros(1, 6))
    fastee.fit(net, rows(600, 0) * 8, method="joint", epochs=6, lr=0.02, seed=0, progress=False)
    return net

held_out = rows(3000, 1)
few = rows(20, 2)
number = 3
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    (tmp_path / "my_model_of_tests.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_model_of_tests", None)


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_profile_writes_what_the_planner_reads(user):
    done = invoke("profile", "my_model_of_tests:net", "--batch", "1", "--batch", "4", "--node", "phone:8", "--node", "cloud", "--link", "20mbit 10ms", "--json")
    assert done.exit_code == 0, done.output
    prof = fastee.Profile.load(user / "profile.json")
    assert prof.nodes == ("phone", "cloud") and prof.batch_sizes == (1, 4) and prof.num_segments == 3
    assert (prof.mean[:, 0] > 4 * prof.mean[:, 1]).all() and prof.bandwidth[0, 1] == 20e6
    assert fastee.Profile.from_json(done.stdout[done.stdout.index("{") :]) == prof and "to 1" in done.stderr


def test_calibrate_sets_saves_and_draws(user):
    made = invoke("calibrate", "my_model_of_tests:net", "my_model_of_tests:held_out", "--max-drop", "0.05", "--out", "net.safetensors", "--plot", "plot.png", "--json")
    assert made.exit_code == 0, made.output
    report = json.loads(made.stdout)
    assert report["drop"] <= 0.05 and report["cost"] < 1 and (user / "plot.png").read_bytes()[:4] == b"\x89PNG"
    again = invoke("calibrate", "my_model_of_tests:backbone", "my_model_of_tests:held_out", "--checkpoint", "net.safetensors", "--max-cost", "0.9", "--temperature")
    # heads were trained with a backbone that moved; its own weights are not in the file
    assert again.exit_code == 1 and "CheckpointMismatch" in again.output


def test_calibrate_leaves_with_1_when_no_exit_can_be_switched_on(user):
    done = invoke("calibrate", "my_model_of_tests:net", "my_model_of_tests:few", "--max-drop", "0.01")
    assert done.exit_code == 1 and "needs at least" in done.output


@pytest.mark.parametrize(("arguments", "message"), [
    (["profile", "nothing_like_it:net"], "there is no module 'nothing_like_it'"),
    (["profile", "my_model_of_tests"], "expected package.module:name, got 'my_model_of_tests'"),
    (["profile", "my_model_of_tests:nett"], "has no 'nett', did you mean 'net'?"),
    (["profile", "my_model_of_tests:number"], "gave a int, expected an EarlyExit"),
    (["profile", "my_model_of_tests:backbone"], "or name its backbone and pass --checkpoint"),
    (["profile", "my_model_of_tests:net", "--node", "a:fast"], "expected NAME or NAME:SLOWDOWN"),
    (["calibrate", "my_model_of_tests:net", "my_model_of_tests:held_out", "--max-drop", "0.1", "--max-cost", "0.5"], "give either"),
    (["calibrate", "my_model_of_tests:net", "my_model_of_tests:held_out", "--measure", "sure"], "measure: expected one of"),
    (["calibrate", "my_model_of_tests:net", "my_model_of_tests:held_out", "--confidence", "1.5"], "expected a number between 0 and 1"),
])  # fmt: skip
def test_usage_errors_leave_with_2(user, arguments, message):
    done = invoke(*arguments)
    shown = " ".join(done.output.replace("│", " ").split())
    assert done.exit_code == 2 and message in shown, done.output

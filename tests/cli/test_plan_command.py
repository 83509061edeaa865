"""fastee plan: from a profile on disk, and for the rows of a CNN."""

import json

import pytest
from typer.testing import CliRunner

from fastee.cli.app import app
from fastee.planning import Plan
from fastee.planning.spatial import SpatialPlan
from fastee.scheduling import Profile


@pytest.fixture
def profile(tmp_path):
    prof = Profile(nodes=("here", "there"), batch_sizes=(1,), mean=[[[0.01], [0.001]]] * 2, spread=[[[0], [0]]] * 2, codecs=("raw",),
                   wire_bytes=[[1000], [250]], codec_seconds=[[0], [0]], bandwidth=[[0, 1e6], [1e6, 0]], delay=[[0, 0.001], [0.001, 0]])  # fmt: skip
    prof.save(tmp_path / "profile.json")
    return str(tmp_path / "profile.json")


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_it_explains_saves_and_draws(profile, tmp_path):
    text = run(profile, "--out", tmp_path / "plan.json", "--plot", tmp_path / "plan.png")
    assert "pipeline plan for least latency: 12.51 ms, the optimum of the model" in text and "send the input as raw: here -> there" in text
    assert Plan.load(tmp_path / "plan.json").place == ("there", "there")
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"


def test_json_and_options(profile, tmp_path):
    made = json.loads(run(profile, "--json", "--leave", 0.9, "--loss", 0.001, "--source", "there"))["plan"]
    assert made["kind"] == "joint" and made["place"] == ["there", "there"] and made["exits"] == [True]
    (tmp_path / "cluster.toml").write_text('[[node]]\nname = "here"\nmemory = 15\n[[node]]\nname = "there"\nmemory = 15\n'
                                           '[[link]]\nbetween = ["here", "there"]\nspeed = "1mbit 1ms"')  # fmt: skip
    made = json.loads(run(profile, "--json", "--cluster", tmp_path / "cluster.toml", "--memory", 10, "--memory", 10))["plan"]
    assert sorted(made["place"]) == ["here", "there"]


def test_rows_of_a_network(tmp_path):
    assert "vgg16 on 2 providers" in run("vgg16", "--device", "xavier", "--device", "pi", "--link", "5mbit 1ms", "--out", tmp_path / "plan.json")
    assert SpatialPlan.load(tmp_path / "plan.json").devices == ("xavier", "pi")


def test_wrong_use_is_named(profile):
    assert "no such file" in run("nothing.json", code=2)
    assert "vgg16" in run("vgg17", "--device", "nano", code=2)
    assert "the quickest plan takes 12.512 ms, the deadline is 1 ms" in run(profile, "--deadline", 0.001, code=1)
    assert "a spatial plan has no plot" in run("vgg16", "--device", "nano", "--plot", "x.png", code=2)

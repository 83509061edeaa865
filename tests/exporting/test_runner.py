"""AOTInductor packages from Python and from C++: find_package(fastee), the example program, the same answers, refusals with reasons."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import fastee

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("g++") is None, reason="needs CMake and g++"),
    pytest.mark.skipif(not (ROOT / "build" / "cmake_install.cmake").exists(), reason="needs the build folder"),
]


def run(*command, **options):
    return subprocess.run([str(c) for c in command], capture_output=True, timeout=600, **options)


def built(*command):
    done = run(*command, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5))
    net, x = fastee.attach(body, exits=["1"], example=torch.randn(2, 6), head="two_layer:7", norm="layer").eval(), torch.randn(32, 6)
    net.heads[0].temperature = 0.7
    with torch.no_grad():
        u = net.exit_step(0, net.run_segment(0, (x,))).confidence.sort().values
    net.set_rule(thresholds=[float(u[15:17].mean())])
    return net, x, fastee.export(net, tmp_path_factory.mktemp("aoti") / "net", format="aoti")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runner")
    built("cmake", "--install", ROOT / "build", "--component", "dev", "--prefix", folder / "prefix")
    paths = f"{folder / 'prefix'};{torch.utils.cmake_prefix_path}"
    built("cmake", "-S", ROOT / "examples/runner", "-B", folder / "build", f"-DCMAKE_PREFIX_PATH={paths}", "-DCMAKE_CXX_FLAGS=-O1 -Wall -Wextra -Werror")
    built("cmake", "--build", folder / "build")
    return folder / "build" / "run_exported"


def test_python_runs_the_packages(exported):
    net, x, folder = exported
    want, got = net(x), fastee.load_exported(folder, net.fingerprint)(x)
    assert got.exit.tolist() == want.exit.tolist() and torch.allclose(got.logits, want.logits, atol=1e-5)


def rows_of(done):
    assert done.returncode == 0, done.stderr.decode()
    return [line.split() for line in done.stdout.decode().splitlines()]


def test_a_program_without_python_gives_the_same_answers(exported, program):
    net, x, folder = exported
    want = net(x)
    assert want.exit.sum() == 16
    rows = rows_of(run(program, folder, 6, input=x.numpy().tobytes()))
    assert [int(r[0]) for r in rows] == want.exit.tolist() and [int(r[1]) for r in rows] == want.label.tolist()
    assert all(math.isclose(float(r[2]), u, abs_tol=1e-5) for r, u in zip(rows, want.confidence.tolist(), strict=True))
    assert {r[3] for r in rows} == {"0"}
    assert rows_of(run(program, folder, 6, input=b"")) == []


def test_the_scheduler_ends_late_rows_at_the_exit_they_reached(exported, program):
    net, x, folder = exported
    rows = rows_of(run(program, folder, 6, "-1", input=x.numpy().tobytes()))
    assert {r[0] for r in rows} == {"0"} and sorted(r[3] for r in rows) == ["0"] * 16 + ["1"] * 16
    rows = rows_of(run(program, folder, 6, "1000", input=x.numpy().tobytes()))
    assert [int(r[0]) for r in rows] == net(x).exit.tolist() and {r[3] for r in rows} == {"0"}


def edited(folder, to, change):
    copy = shutil.copytree(folder, to / "net")
    manifest = json.loads((copy / "exits.json").read_text())
    change(manifest)
    (copy / "exits.json").write_text(json.dumps(manifest))
    return copy


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda m: m.update(format=9), "another format than 1"),
        (lambda m: m.update(kind="torch"), "expected 'aoti'; export again"),
        (lambda m: m["heads"].update(name="../heads.safetensors"), "is no name of an exported file"),
        (lambda m: m["segments"][1]["file"].update(digest="00"), "not the file of this export"),
        (lambda m: m.update(thresholds=[]), "do not match"),
        (lambda m: m.update(num_classes=6), "do not make a head of 6 classes"),
        (lambda m: m.pop("exits"), "exits is missing"),
    ],
)
def test_what_is_not_an_export_is_refused(exported, program, tmp_path, change, says):
    done = run(program, edited(exported[2], tmp_path, change), 6, input=b"", text=False)
    assert done.returncode == 1 and says in done.stderr.decode()


def test_wrong_rows_and_broken_json_are_refused(exported, program, tmp_path):
    done = run(program, exported[2], 5, input=bytes(20))
    assert done.returncode == 1 and b"'input' must be Float [B, 6]" in done.stderr, done.stderr
    copy = edited(exported[2], tmp_path, lambda m: None)
    for text in ("", "[" * 99, '{"format": 1, "format": 1}', '{"a": "\\ud800"}', '{"a": 1} x', '{"a": nan}'):
        (copy / "exits.json").write_text(text)
        done = run(program, copy, 6, input=b"")
        assert done.returncode == 1 and b"malformed JSON at byte" in done.stderr, (text, done.stderr)

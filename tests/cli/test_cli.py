import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import fastee
from fastee.cli import app
from fastee.cli.explain import known
from fastee.errors import BackendUnavailable, FasteeError
from fastee.report import Result


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_version():
    done = invoke("--version")
    assert done.exit_code == 0 and done.stdout.strip() == f"fastee {fastee.__version__}"


def test_doctor_json_is_what_doctor_returns():
    done = invoke("doctor", "--json")
    found = json.loads(done.stdout)
    assert found["fastee"] == fastee.__version__ and found["native"] == fastee.doctor()["native"]
    assert done.exit_code == (1 if found["problems"] else 0)


def test_doctor_shows_problem_and_repair(monkeypatch):
    good = fastee.doctor()
    broken = {**good, "problems": [{"what": "_hot is missing", "why": "it [was] eaten", "repair": "do this"}]}
    monkeypatch.setattr(fastee, "doctor", lambda: broken, raising=False)
    done = invoke("doctor")
    assert done.exit_code == 1
    assert "_hot is missing: it [was] eaten\n  repair: do this" in done.stdout


def test_doctor_without_problems_leaves_with_0(monkeypatch):
    monkeypatch.setattr(fastee, "doctor", lambda good=fastee.doctor(): {**good, "problems": []}, raising=False)
    done = invoke("doctor")
    assert done.exit_code == 0 and "everything is in place" in done.stdout


@pytest.mark.parametrize("op", known())
def test_explain_answers_for_every_op(op):
    done = invoke("explain", op, "--json", "--batch", "2", "--features", "32", "--spatial", "4")
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and found["op"] == op
    assert found["backends"][found["chosen"]] == "chosen" and set(found["backends"]) >= {"cpu", "reference"}


def test_explain_knows_every_registered_op():
    assert set(known()) == set(fastee.doctor()["backends"])


def test_explain_prints_the_table():
    done = invoke("explain", "exit_step", "--backend", "reference")
    assert done.exit_code == 0 and done.stdout.startswith("exit_step: reference\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("explain", "exit_stop"), ("exit_stop", "did you mean", "exit_step")),
        (("explain", "pool", "--batch", "-1"), ("--batch",)),
        (("doctr",), ("doctr",)),
        (("demo", "--seed", "-3"), ("--seed",)),
        (("demo", "--nonsense"), ("--nonsense",)),
    ],
)
def test_wrong_usage_leaves_with_2(arguments, words):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert all(word in done.output for word in words) and "Traceback" not in done.output


def test_demo_refuses_a_file_as_folder_before_it_works(tmp_path):
    (tmp_path / "taken").write_text("x")
    done = invoke("demo", "--out", str(tmp_path / "taken"))
    assert done.exit_code == 2 and "is a file, expected a folder" in " ".join(done.output.replace("│", " ").split())


@pytest.mark.parametrize("error", [FasteeError("the [thing] broke; do that"), OSError("no disk"), ValueError("bad"), RuntimeError("torch said no")])
def test_errors_become_one_message_and_1(monkeypatch, error):
    def broken():
        raise error

    monkeypatch.setattr(fastee, "doctor", broken, raising=False)
    done = invoke("doctor")
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert f"error {type(error).__name__}: {error}" in done.stderr and "fastee doctor" in done.stderr


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("FASTEE_DEBUG", "1")
    done = invoke("explain", "compact", "--backend", "triton")
    assert isinstance(done.exception, BackendUnavailable)


def test_an_explicit_backend_that_cannot_run_leaves_with_1():
    done = invoke("explain", "compact", "--backend", "triton")
    assert done.exit_code == 1 and "backend='triton' cannot run" in done.stderr


def test_module_runs_in_a_process_of_its_own():
    done = subprocess.run([sys.executable, "-m", "fastee", "explain", "nothing"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timed
def test_quick_demo_end_to_end(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fastee", "demo", "--quick", "--json", "--out", str(tmp_path / "report")],
        capture_output=True, text=True, timeout=120, cwd=tmp_path, env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = Result.from_json(done.stdout)
    assert found == Result.from_json((tmp_path / "report" / "results.json").read_bytes())
    assert "<html" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    rows = {r.key: r for r in found.rows}
    assert set(rows) == {"full-1", "full-32", "exits-1", "exits-32", "cloud-1", "cloud-32", "split-1", "split-exits-1", "split-exits-32"}
    assert all(r.samples >= 32 and sum(r.exits) + r.failed == r.samples for r in found.rows)
    assert all(r.failed == 0 for r in found.rows if r.key != "split-exits-32")  # 32 at once under a deadline may be refused
    # Same samples, same network: without exits all ways agree up to rounding near a tie; exits spend fewer multiply-adds.
    for key in ("full-32", "cloud-1", "cloud-32", "split-1"):
        assert sum(a != b for a, b in zip(rows[key].correct, rows["full-1"].correct, strict=True)) <= 1
        assert rows[key].exits[:-1] == [0, 0, 0] and rows[key].macs == 1
    assert rows["exits-1"].macs < 0.95 and rows["exits-1"].depth < 4
    assert abs(rows["exits-1"].accuracy - rows["full-1"].accuracy) <= 0.05
    assert all(sum(r.nodes.values()) == sum(r.exits) and sum(r.errors.values()) == r.failed for r in found.rows)
    assert rows["full-1"].nodes["cloud"] == rows["cloud-1"].nodes["mobile"] == 0
    # Everything here stays here; the raw input sent to the cloud is its 784 pixels and small headers.
    assert rows["full-1"].wire_bytes < 784 <= rows["cloud-1"].wire_bytes < 2 * 784
    # The declared 10 ms each way and 12x slower mobile are really there.
    assert rows["cloud-1"].p50 > 0.020 and rows["full-1"].p50 > 4 * found.local[0].p50
    assert f"{rows['split-exits-1'].samples} samples" in found.summary

"""Peers: the plumbing always, each peer itself where it is installed (``python -m benchmarks peers install all``)."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as cli
from benchmarks import peers
from fastee.testing.rows import Machine, Row, dumps, read_rows

ROOT = Path(__file__).parents[2]
HERE = Machine("test-2c", "test", 2, None, "3", "2", "0", "abc", "pytest")


def _row(**changes) -> Row:
    fields = dict(
        op="pack_planes",
        provider="lz4",
        shape="1",
        dtype="bf16",
        regime="warm",
        baseline="lz4",
        p50_us=1.0,
        speedup=1.0,
        peer="lz4",
        machine=HERE,
    )
    return Row(**{**fields, **changes})


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "HOME", tmp_path)
    return tmp_path


def child(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_listing_the_peers_imports_none():
    code = "import sys; from benchmarks import peers; [peers.module(n) for n in peers.names()]; print(*(n for n in peers.names() if n in sys.modules))"
    assert subprocess.run(child(code), capture_output=True, text=True, check=True, cwd=ROOT).stdout.split() == []


def test_every_peer_says_what_it_is_pins_every_package_and_names_known_ops():
    from benchmarks import run as runner

    codecs, others = {"zipnn", "zstandard", "lz4", "blosc2"}, {"onnxruntime", "simpy", "grpcio", "ray"}
    assert {"earlyon", "axonmesh", "economize", "tide-inference"} | codecs | others == set(peers.names())
    for name in peers.names():
        module = peers.module(name)
        assert module.__doc__ and module.PEER.licence and set(module.CASES) <= set(runner.ops()), name
        packages = [word for arguments in module.PEER.pip for word in arguments if not word.startswith("--")]
        assert packages and all("==" in word for word in packages), name
        assert any(word.startswith(f"{name}=={module.PEER.version}") for word in packages), name


def test_list_prints_every_peer_with_the_command_that_installs_it(home, capsys):
    assert cli.main(["peers", "list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in peers.names()) and "`python -m benchmarks peers install earlyon`" in out


def test_a_missing_peer_is_an_error_with_the_repair_before_anything_is_timed(home, capsys):
    assert cli.main(["peers", "run", "lz4", "zipnn", "--no-save"]) == 2
    err = capsys.readouterr().err
    assert "lz4 4.4.5 is not installed: `python -m benchmarks peers install lz4`" in err and "peers install zipnn" in err
    with pytest.raises(peers.PeerError, match="is not installed"):
        peers.run("lz4", [], print)


def test_a_peer_of_another_recipe_is_outdated(home):
    peers.python("lz4").parent.mkdir(parents=True)
    peers.python("lz4").touch()
    (home / "lz4" / "recipe").write_text("3.9.0\nlz4==4.0.0")
    assert "another recipe or Python: `python -m benchmarks peers install lz4`" in peers.unavailable("lz4")


def test_unknown_names_are_corrected(capsys):
    assert cli.main(["peers", "run", "zipn", "--no-save"]) == 2
    assert cli.main(["run", "compact", "--against", "torch,zstandart", "--no-save"]) == 2
    assert cli.main(["run", "compact", "--against", "lz4", "--no-save"]) == 2
    err = capsys.readouterr().err
    assert "did you mean 'zipnn'?" in err and "did you mean 'zstandard'?" in err and "lz4 is timed on pack_planes, not on compact" in err


def test_rows_arrive_one_by_one_and_what_the_peer_says_is_passed_on(home):
    rows, said = [_row(), _row(shape="2", p50_us=None, speedup=None, skipped="no compiler")], []
    code = f"import sys\nfor row in {[dumps(r) for r in rows]!r}: print(row, flush=True)\nprint('hello', file=sys.stderr)"
    got = []
    assert peers.run("lz4", [], got.append, said.append, child(code)) == rows == got
    assert said == ["hello"]


@pytest.mark.parametrize(
    "printed, why",
    [
        ("print('downloading weights')", "expected a benchmark row, got b'downloading weights"),
        ("print('[1, 2]')", "expected a benchmark row"),
        ("print('{' * 100000)", "expected a benchmark row"),
        ("sys.stdout.buffer.write(b'\\xff\\x00\\n')", "expected a benchmark row"),
        ("sys.stdout.write(LINE[:-9])", "expected a benchmark row"),
        ('print(LINE.replace(\'"peer":"lz4"\', \'"peer":"zipnn"\'))', "expected its own rows, got one of 'zipnn'"),
        ("print(LINE.replace('\"p50_us\":1.0', '\"p50_us\":-1.0'))", "expected either a time or a reason to skip"),
        ("print(LINE.replace('\"p50_us\":1.0', '\"p50_us\":NaN'))", "expected a benchmark row"),
        ("print(LINE.replace('\"p50_us\":1.0,', ''))", "expected either a time or a reason to skip"),
        ("print(LINE.replace('\"p50_us\"', '\"__class__\"'))", "expected a benchmark row"),
        ("print(LINE); sys.exit('no such symbol')", "its process ended with 1: no such symbol"),
        ("import os; os.kill(os.getpid(), 9)", "its process ended with -9: it said nothing"),
        ("[print(LINE) for _ in range(10001)]", "expected at most 10000 rows"),
    ],
)
def test_hostile_output_is_refused_and_the_process_ended(home, printed, why):
    with pytest.raises(peers.PeerError) as error:
        peers.run("lz4", [], lambda row: None, lambda line: None, child(f"import sys\nLINE = {dumps(_row())!r}\n{printed}"))
    assert str(error.value).startswith("lz4: ") and why in str(error.value)


def test_a_peer_that_does_not_stop_is_killed_when_its_output_is_refused(home):
    with pytest.raises(peers.PeerError):
        peers.run("lz4", [], print, print, child("import time; print('no row', flush=True); time.sleep(200)"))


def test_a_failed_install_shows_what_pip_said_and_leaves_nothing_usable(home, monkeypatch):
    broken = peers.Peer("1", "MIT", (("--no-index", "lz4==99.9.9"),))
    monkeypatch.setattr(peers.module("lz4"), "PEER", broken)
    with pytest.raises(peers.PeerError, match="(?s)lz4: `python -m pip .*failed.*lz4==99.9.9"):
        peers.install("lz4", lambda line: None)
    assert "is not installed" in peers.unavailable("lz4")


def test_an_environment_lies_over_the_projects_own(home, monkeypatch):
    import subprocess

    monkeypatch.setattr(peers.module("lz4"), "PEER", peers.Peer("1", "MIT", ()))
    peers.install("lz4", lambda line: None)
    assert peers.unavailable("lz4") is None
    code = "import sys, torch, fastee; print(sys.prefix, torch.__file__, fastee.__file__, sep='\\n')"
    prefix, torch_file, fastee_file = subprocess.run(
        [peers.python("lz4"), "-c", code], capture_output=True, text=True, check=True, cwd=home
    ).stdout.split()
    import torch

    import fastee

    assert prefix == str(home / "lz4") and torch_file == torch.__file__ and fastee_file == fastee.__file__


@pytest.mark.peer
@pytest.mark.parametrize("name", peers.names())
def test_a_peer_runs_beside_fastee(name, tmp_path):
    """One op of each peer, its smallest shapes: the inputs agree (the scripts refuse otherwise), the rows are sound and are saved."""
    reason = peers.unavailable(name)
    if reason:
        pytest.skip(reason)
    assert cli.main(["peers", "run", name, "--quick", "--shapes", "headline", "--results", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.jsonl")
    rows = read_rows(file)
    assert {r.peer for r in rows} == {name} and {r.peer_version for r in rows} == {peers.module(name).PEER.version}
    assert {"fastee"} < {r.provider for r in rows} and all(r.p50_us for r in rows) and any(r.bars for r in rows)

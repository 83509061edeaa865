"""An install without a compiler: the wheel holds no native part, everything answers, and the build says what is slower."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys
import fastee, torch
from fastee import native, ops
from fastee.kernels import numba

assert fastee.__file__.startswith(sys.argv[1]), fastee.__file__
assert native.hot is None and native.core is None, "a native part came along"
x, w, b = torch.randn(6, 8, 4, 4), torch.randn(3, 8), torch.randn(3)
before = fastee.explain("exit_step", x, w, b)
print("before:", before.chosen, "|", dict(before.rows)["numba"])

want = ops.exit_step(x, w, b, threshold=0.5)
assert "numba" not in sys.modules, "an op that numba does not run imported it"
got = ops.exit_step(x, w, b, threshold=0.5, backend="numba")
assert torch.equal(got.index, want.index) and got.count == want.count and torch.allclose(got.confidence, want.confidence, atol=1e-5)
assert torch.equal(ops.dequantize_rows(ops.quantize_rows(x)), ops.dequantize_rows(ops.quantize_rows(x, backend="numba"), backend="numba"))
assert ops.compact(want.exits, backend="numba").index.tolist() == ops.compact(want.exits).index.tolist()
print("after:", fastee.explain("exit_step", x, w, b).chosen)
print("large:", dict(fastee.explain("exit_step", torch.randn(64, 8, 64, 64), w, b).rows)["numba"])

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = torch.nn.Linear(8, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 3)

    def forward(self, x):
        return self.last(self.second(self.first(x).relu()).relu())

torch.manual_seed(0)
net = fastee.attach(Net().eval(), exits=["first"], num_classes=3, example=torch.randn(2, 8)).eval()
net.set_rule(measure="max_prob", thresholds=[0.4])
out = net(torch.randn(9, 8))
assert out.label.shape == (9,) and set(out.exit.tolist()) <= {0, 1}
print("exits:", sorted(set(out.exit.tolist())))

profile = fastee.Profile(
    nodes=("here",), batch_sizes=(1,), mean=[[[0.001]], [[0.002]]], spread=[[[0]], [[0]]], codecs=("raw",), wire_bytes=[[784], [4096]],
    codec_seconds=[[0], [0]], bandwidth=[[0]], delay=[[0]],
)
sched = fastee.Scheduler(profile, fastee.QoS(deadline=0.02), thresholds=[0.9])
task = sched.admit(now=0)
print("decisions:", sched.decide(task, 0, 0.5, 1_000_000), sched.decide(task, 0, 0.95, 1_000_000))
print("doctor:", fastee.doctor()["native"], [p["repair"] for p in fastee.doctor()["problems"]][0])
"""


def run(command, cwd, **env):
    return subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=240)


def python(code, target, cwd, **env):
    """Run `code` with the installed wheel. -S keeps an editable install's finder out, which would hand in this tree's native parts."""
    path = os.pathsep.join([str(target), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    command = [sys.executable, "-S", "-c", code, str(target)]
    return run(command, cwd, PYTHONPATH=path, HOME=str(cwd), XDG_CACHE_HOME=str(cwd / "cache"), FASTEE_BACKEND="", FASTEE_NATIVE="1", **env)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Build the wheel from a copy without build outputs and install it; returns its folder, the wheel and what pip printed."""
    at = tmp_path_factory.mktemp("pure")
    source, target, wheels = at / "source", at / "site", at / "wheels"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "CMakeLists.txt"):
        shutil.copy(ROOT / name, source / name)
    for name in ("fastee", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = run([*pip, "wheel", "-v", ".", "--no-build-isolation", "--no-deps", "--no-index", "-w", wheels], source, FASTEE_BUILD="none")
    assert built.returncode == 0, built.stderr[-3000:]
    wheel = next(wheels.glob("fastee-*.whl"))
    put = run([*pip, "install", "--no-deps", "--no-index", "--target", target, wheel], at)
    assert put.returncode == 0, put.stderr[-3000:]
    return target, wheel, built.stdout + built.stderr


@pytest.mark.slow
def test_the_wheel_is_pure_and_the_build_says_what_is_slower(installed):
    _, wheel, told = installed
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [n for n in names if n.endswith((".so", ".nbi", ".nbc", ".compiled"))] and "fastee/kernels/numba/exit_head.py" in names
    assert "pure-Python install" in told and "slower" in told and "python -m fastee.kernels.numba" in told and "C++20 compiler" in told


@pytest.mark.slow
def test_everything_answers_without_a_compiler(installed, tmp_path):
    pytest.importorskip("numba", reason="numba is not installed")
    target, _, _ = installed
    first = python(PROGRAM, target, tmp_path)
    assert first.returncode == 0, first.stderr[-3000:]
    lines = dict(line.split(": ", 1) for line in first.stdout.splitlines())
    assert lines["before"].startswith("reference | able, but passed over: not compiled on this machine yet")
    assert lines["after"] == "numba" and "for more than 400,000 torch is faster" in lines["large"]
    assert lines["decisions"] == "Decision(CONTINUE, node=0) Decision(EXIT, node=0)"
    assert all(f"'{part}': False" in lines["doctor"] for part in ("libfastee", "scheduler")) and "FASTEE_BUILD=cpu pip install" in lines["doctor"]
    again = python(
        "import torch, fastee; print(fastee.explain('exit_step', torch.ones(2, 3), torch.eye(3), pool='none').chosen)", target, tmp_path
    )
    assert again.stdout.strip() == "numba", again.stderr  # compiled code outlives the process that made it


@pytest.mark.slow
def test_without_numba_the_reference_answers_and_says_why(installed, tmp_path):
    target, _, _ = installed
    code = (
        "import sys, importlib.util as u; find = u.find_spec; u.find_spec = lambda n, *a: None if n == 'numba' else find(n, *a)\n"
        "import torch, fastee; from fastee import ops\n"
        "print(dict(fastee.explain('compact', torch.ones(3).bool()).rows)['numba']); print(ops.compact(torch.ones(3).bool()).count)\n"
        "ops.compact(torch.ones(3).bool(), backend='numba')"
    )
    out = python(code, target, tmp_path)
    assert out.stdout.splitlines() == ["numba is not installed: pip install numba", "3"], out.stderr
    assert "BackendUnavailable: compact: backend='numba' cannot run: numba is not installed: pip install numba" in out.stderr


@pytest.mark.slow
def test_the_benchmarks_run_without_a_checkout(installed, tmp_path):
    target, _, _ = installed
    code = "import sys; from fastee.cli import app; sys.argv[1:] = sys.argv[2:]; app(prog_name='fastee')"

    def bench(*arguments):
        path = os.pathsep.join([str(target), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
        return run([sys.executable, "-S", "-c", code, str(target), "bench", *arguments], tmp_path, PYTHONPATH=path, FASTEE_BACKEND="")

    assert "exit_step" in bench("list").stdout
    done = bench("run", "compact", "--quick", "--shapes", "headline", "--against", "torch", "--json", "--results", "rows")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["provider"] for r in rows] == ["fastee", "torch", "argsort"] and rows[0]["machine"]["command"].startswith("fastee bench run compact")
    (file,) = (tmp_path / "rows").glob("*.jsonl")
    slower = [{**r, "speedup": r["speedup"] / 2} if r["provider"] == "argsort" else r for r in rows]
    (tmp_path / "slower.jsonl").write_text("".join(json.dumps(r) + "\n" for r in slower))
    assert bench("compare", str(file), str(file)).returncode == 0
    assert bench("compare", str(file), "slower.jsonl").returncode == 1
    assert bench("run", "compct").returncode == 2 and "did you mean 'compact'" in bench("run", "compct").stderr
    assert bench("table").returncode == 2

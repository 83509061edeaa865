import copy
import inspect
import pickle
import pydoc
import subprocess
import sys
import typing

import pytest
import torch

import fastee
from fastee import native
from fastee.kernels import cuda, numba


def run(code, **env):
    import os

    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=120)


def test_explain_names_every_backend_and_why():
    told = fastee.explain("exit_head", torch.zeros(1, 4), torch.zeros(2, 4), pool="none")
    assert [name for name, _ in told.rows] == ["cuda", "triton", "cpu", "numba", "reference"]
    assert dict(told.rows)[told.chosen] == "chosen" and told.chosen in str(told)
    half = fastee.explain("exit_head", torch.zeros(1, 4).double(), torch.zeros(2, 4).double(), pool="none")
    assert half.chosen == "reference" and "float64" in dict(half.rows)["cpu"] or native.hot is None
    with pytest.raises(ValueError, match="op must be one of .*, got 'exit_hed', did you mean 'exit_head'"):
        fastee.explain("exit_hed")
    with pytest.raises(ValueError, match="weight must be"):
        fastee.explain("exit_head", torch.zeros(1, 4), torch.zeros(2, 5))


def test_doctor_reports_what_runs():
    report = fastee.doctor()
    assert report["native"]["isa"] == native.isa() and report["torch"]["version"] == torch.__version__
    standing = report["backends"]["exit_step"]
    assert standing["reference"] == "runs" and (standing["cpu"] == "runs") == (native.hot is not None)
    assert torch.cuda.is_available() or standing["triton"] != "runs"
    assert isinstance(report["problems"], list)


def test_without_native_parts_everything_answers_and_says_why():
    out = run(
        "import fastee, torch; r = fastee.ops.exit_step(torch.ones(2, 3), torch.eye(3), pool='none', threshold=0.1);"
        "e = fastee.explain('exit_step', torch.ones(2, 3), torch.eye(3), pool='none'); print(r.count, e.chosen, dict(e.rows)['cpu']);"
        "print([p['repair'] for p in fastee.doctor()['problems'] if 'FASTEE_NATIVE' in p['why']][:1])",
        FASTEE_NATIVE="0",
    )
    assert out.returncode == 0, out.stderr
    chosen = "numba" if numba.missing() is None and numba.on_disk("exit_head") else "reference"
    assert out.stdout.startswith(f"0 {chosen} libfastee is not loaded (switched off by FASTEE_NATIVE=0)") and "make build" in out.stdout


@pytest.mark.skipif(native.hot is None, reason="native parts are not built")
def test_isa_can_be_lowered_never_exceeded():
    assert run("from fastee import native; print(native.isa())", FASTEE_CPU_ISA="scalar").stdout.strip() == "scalar"
    wrong = run("from fastee import native; import fastee.ops", FASTEE_CPU_ISA="avx9000")
    assert wrong.returncode != 0 and f"FASTEE_CPU_ISA: this build on this CPU runs {','.join(native.isas())}, got 'avx9000'" in wrong.stderr


def test_import_is_light():
    out = run("import sys, fastee; print('torch' in sys.modules)")
    assert out.stdout.strip() == "False"
    with pytest.raises(AttributeError, match="module 'fastee' has no attribute 'attatch', did you mean 'attach'"):
        fastee.attatch  # noqa: B018


@pytest.mark.skipif(native.hot is None, reason="native parts are not built")
def test_a_torch_without_the_exchange_table_takes_the_slow_view():
    code = (
        "import torch; del torch.Tensor.__dlpack_c_exchange_api__;"
        "import fastee; x = torch.arange(24.).view(2, 3, 4);"
        "r = fastee.ops.exit_step(x, torch.eye(3), threshold=0.1, backend='cpu'); print(r.label.tolist(), fastee.doctor()['torch']['dlpack_exchange'])"
    )
    out = run(code)
    assert out.stdout.strip() == "[2, 2] False", out.stderr


def test_the_environment_chooses_a_backend_for_every_op():
    code = "import torch, fastee; print(type(fastee.ops.exit_step(torch.ones(2, 3), torch.eye(3), pool='none')).__module__)"
    assert run(code, FASTEE_BACKEND="reference").stdout.strip() == "fastee.ops.results"
    code = "import torch, fastee; fastee.ops.compact(torch.zeros(3, dtype=torch.bool))"
    if cuda.missing() is None:
        pytest.skip("a CUDA device is there: the backend declines the tensor instead")
    assert "compact: FASTEE_BACKEND='cuda' cannot run: " + str(cuda.missing()) in run(code, FASTEE_BACKEND="cuda").stderr


@pytest.mark.skipif(native.hot is None, reason="native parts are not built")
@pytest.mark.parametrize("name", ["exit_head", "exit_step"])
def test_the_native_function_has_the_signature_of_the_public_one(name):
    op, direct = getattr(fastee.ops, name), getattr(native.hot, f"direct_{name}")
    x, w = torch.randn(3, 4, 2, 2), torch.randn(2, 4)
    defaults = {n: p.default for n, p in inspect.signature(op).parameters.items() if p.default is not p.empty}
    positional = [v for n, v in defaults.items() if inspect.signature(op).parameters[n].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    results = [direct(x, w), direct(x=x, weight=w, **defaults), direct(x, w, *positional), op(x, w)]
    assert all(type(r) is type(results[0]) and torch.equal(r.confidence, results[0].confidence) and torch.equal(r.exits, results[0].exits) for r in results)
    with pytest.raises(TypeError):
        direct(x, w, *positional, 2.0)  # temperature goes by its name
    assert direct(x, w, backend="cpu") is None and direct(x, w[:, :3]) is None  # handed back, to be chosen and explained


@pytest.mark.parametrize("name", ["exit_head", "exit_step"])
def test_an_op_whose_calls_start_in_c_is_a_function_to_everybody_else(name):
    op = getattr(fastee.ops, name)
    assert pickle.loads(pickle.dumps(op)) is op is copy.deepcopy(op)
    assert inspect.isroutine(op) and inspect.getdoc(op).startswith("Run") and "def head(" in inspect.getsource(op)
    assert pydoc.plaintext.document(op).startswith(f"{name}(x: 'Tensor', weight: 'Tensor | QuantizedRows', bias: 'Tensor | None' = None, pool")
    assert set(typing.get_type_hints(op)) == {*inspect.signature(op).parameters, "return"}
    with pytest.raises(TypeError, match=rf"{name}\(\) missing 1 required positional argument: 'weight'"):
        op(torch.ones(1, 2))
    with pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'wait'"):
        op(torch.ones(1, 2), torch.ones(1, 2), wait=0)

    class Head:
        run = op

    with pytest.raises(TypeError, match="x must be"):
        Head().run(torch.ones(1, 2))  # bound, as a function would be: the object is x

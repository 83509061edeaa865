"""The numba backend's own promises: lazy, kept on disk, never a surprise of seconds, the same bits whoever else is in the batch."""

import subprocess
import sys

import pytest
import torch

import fastee
from fastee import dispatch, ops
from fastee.kernels import numba

pytestmark = pytest.mark.skipif(numba.missing() is not None, reason=str(numba.missing()))


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)


def test_every_op_has_the_backend_and_says_when_it_yields():
    for op in dispatch._ops.values():
        assert "numba" in [b.name for b in op.backends], op.name
    x = torch.randn(64, 8, 64, 64)
    told = dict(fastee.explain("exit_step", x, torch.randn(3, 8)).rows)["numba"]
    assert told.startswith("able, but passed over: ")
    assert dict(fastee.explain("gather_rows", x, torch.tensor([1])).rows)["numba"] == "able, but passed over: torch moves rows as fast"


def test_neither_import_nor_explain_pay_for_numba():
    out = run("import sys, torch, fastee, fastee.ops; fastee.explain('compact', torch.ones(3).bool()); fastee.doctor(); print('numba' in sys.modules)")
    assert out.stdout.strip() == "False", out.stderr


def test_an_automatic_choice_waits_for_compiled_kernels(monkeypatch):
    mask = torch.tensor([True, False])
    spec = dispatch._ops["compact"]
    monkeypatch.setattr(numba, "loaded", lambda kernel: False)
    monkeypatch.setattr(numba, "on_disk", lambda kernel: False)
    without_cpu = dispatch.Op("compact", tuple(b for b in spec.backends if b.name != "cpu"), spec.check)
    assert dispatch.choose(without_cpu, (mask,), {}).name == "reference"
    assert dispatch.choose(without_cpu, (mask,), {}, "numba").name == "numba"
    monkeypatch.setattr(numba, "on_disk", lambda kernel: True)
    assert dispatch.choose(without_cpu, (mask,), {}).name == "numba"


def test_compiled_code_is_kept_and_loaded_fast():
    numba.load("exit_head")
    out = run("from time import perf_counter as t; from fastee.kernels import numba; import numba as jit; a = t(); print(numba.on_disk('exit_head'));"
              "k = numba.load('exit_head').exit_head; print(sum(k.stats.cache_hits.values()), sum(k.stats.cache_misses.values()))")  # fmt: skip
    assert out.stdout.split() == ["True", "1", "0"], out.stderr


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    from fastee.kernels.numba import _jit

    def refuse(*args, **kwargs):
        raise OSError("read-only")

    monkeypatch.setattr(_jit, "mark", refuse)
    half = _jit.kernel("f4(f4)")(lambda x: x / 2)
    assert half(3.0) == 1.5
    monkeypatch.setattr(numba, "_marks", lambda: [tmp_path / "file" / "below"])
    (tmp_path / "file").write_text("")
    numba.mark("compact")  # nowhere to write: says nothing


@pytest.mark.parametrize("shape,classes,pool", [((37, 64, 4, 4), 10, "mean"), ((20, 1100), 130, "none"), ((30, 5, 96), 7, "mean_tokens")])
def test_a_row_does_not_depend_on_its_batch(shape, classes, pool):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(*shape, generator=g), torch.randn(classes, shape[2] if pool == "mean_tokens" else shape[1], generator=g)
    whole = ops.exit_step(x, w, None, pool, logits=True, backend="numba")
    for start, stop in ((0, 1), (3, 7), (shape[0] - 2, shape[0])):
        part = ops.exit_step(x[start:stop], w, None, pool, logits=True, backend="numba")
        for field in ("label", "confidence", "exits", "logits"):
            assert torch.equal(getattr(part, field), getattr(whole, field)[start:stop]), (field, start, stop)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_widened(dtype):
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*s, generator=g).to(dtype) for s in ((6, 40, 5, 5), (10, 48), (10,)))
    norm = ops.Norm("layer", torch.randn(40, generator=g).to(dtype))
    for view in (x, x[::2], x.to(memory_format=torch.channels_last)):
        got = ops.exit_step(view, w[:, :40], b, norm=norm, logits=True, backend="numba")
        want = ops.exit_step(view.float(), w[:, :40].float(), b.float(), norm=norm._replace(weight=norm.weight.float()), logits=True, backend="numba")
        assert torch.equal(got.logits, want.logits) and torch.equal(got.index, want.index)
    with pytest.raises(fastee.errors.BackendUnavailable, match="exit_step: backend='numba' cannot run: dtype float64"):
        ops.exit_step(x.double(), w[:, :40].double(), backend="numba")

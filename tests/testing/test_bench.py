import gc
import json
import os
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastee.testing.bench import Case, Context, Group, Roofs, judge, measure, parse_bar, percentile, quiet, sample
from fastee.testing.rows import Machine, Row, append_rows, cpu_name, dumps, machine, read_rows

pytestmark = pytest.mark.timed
HERE = Machine("test-2c", "test", 2, None, "3", "2", "0", "abc", "pytest")


def busy(microseconds: float):
    def call():
        end = time.perf_counter_ns() + microseconds * 1e3
        while time.perf_counter_ns() < end:
            pass

    return call


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=60), st.sampled_from([0, 20, 50, 80, 95, 99, 100]))
@settings(deadline=None, max_examples=50)
def test_percentile_is_numpys(values, q):
    import numpy

    assert percentile(values, q) == pytest.approx(float(numpy.percentile(values, q)), rel=1e-9, abs=1e-9)


def test_rounds_interleave_and_the_first_place_rotates():
    calls = []
    cases = [Case(n, lambda n=n: calls.append(n)) for n in "abc"]
    rounds, inner = sample(cases, seconds=0.0, warmup=0.0, per_call=True)
    assert inner == [1, 1, 1] and [len(r) for r in rounds] == [5, 5, 5]
    timed = calls[-15:]
    assert ["".join(timed[i : i + 3]) for i in range(0, 15, 3)] == ["abc", "bca", "cab", "abc", "bca"]


def test_inputs_rotate_inside_a_batch_and_kwargs_arrive():
    seen = []
    sample([Case("a", lambda x, y, *, k: seen.append((x, y, k)), [(1, 2), (3, 4), (5, 6)], {"k": 9})], 0.0, 0.0, per_call=True)
    assert seen[:4] == [(1, 2, 9), (3, 4, 9), (5, 6, 9), (1, 2, 9)]


def test_a_slower_provider_is_measured_slower_by_its_ratio():
    g = Group("op", "s", "fp32", [Case("fast", busy(60)), Case("slow", busy(240)), Case("absent", None, note="no such peer")], baseline="slow",
              bytes=1 << 16, bars=(">= 2x slow", "<= 50 us", "min <= 1 ms", ">= 2x absent", "<= 0 us over slow"))  # fmt: skip
    fast, slow, absent = measure(g, Roofs(0.005), HERE, seconds=0.05, warmup=0.01)
    assert 60 <= fast.min_us <= fast.p20_us <= fast.p50_us <= fast.p80_us <= fast.p95_us <= fast.p99_us
    assert 2.5 < fast.speedup < 4.5 and slow.speedup == 1.0
    assert fast.rounds >= 5 and fast.timer_share < 0.05 and fast.inner >= 3
    assert fast.roof_share == pytest.approx(fast.floor_us / fast.p50_us, rel=0.01) and fast.roof_gbps > 1
    assert absent.skipped == "no such peer" and absent.p50_us is None and absent.speedup is None
    assert [b.met for b in fast.bars] == [True, False, True, None, True] and slow.bars == []


def test_calls_per_batch_keep_the_clock_below_one_percent():
    (row,) = measure(Group("op", "s", "-", [Case("a", lambda: None)], baseline="a"), Roofs(0.005), HERE, seconds=0.05, warmup=0.02)
    assert row.inner > 500 and row.timer_share < 0.01 and row.p50_us < 5


def test_per_call_shows_the_tail_that_batches_hide():
    fast, slow, n = busy(5), busy(300), iter(range(10**9))
    case = [Case("a", lambda: slow() if next(n) % 10 == 9 else fast())]
    (row,) = measure(Group("op", "s", "-", case, baseline="a", per_call=True), Roofs(0.005), HERE, seconds=0.05, warmup=0.01)
    assert row.inner == 1 and row.p50_us < 100 < 290 < row.p95_us


def test_quiet_restores_threads_affinity_gradient_and_collector():
    gc.enable()
    before = torch.get_num_threads(), os.sched_getaffinity(0), torch.is_grad_enabled(), gc.isenabled()
    with pytest.raises(KeyError), quiet():
        assert torch.get_num_threads() == 1 and len(os.sched_getaffinity(0)) == 1
        assert not gc.isenabled() and not torch.is_grad_enabled()
        raise KeyError
    assert (torch.get_num_threads(), os.sched_getaffinity(0), torch.is_grad_enabled(), gc.isenabled()) == before


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<= 3 us", ("p50", "<=", 3.0, "us", False, None)),
        ("p99 <= 2 us", ("p99", "<=", 2.0, "us", False, None)),
        (">= 12x torch", ("p50", ">=", 12.0, "x", False, "torch")),
        ("<= 5 us over bare", ("p50", "<=", 5.0, "us", True, "bare")),
        ("min <= 300 ns", ("min", "<=", 300.0, "ns", False, None)),
        ("ratio <= 0.72", ("ratio", "<=", 0.72, "", False, None)),
    ],
)
def test_bars_parse(text, expected):
    assert parse_bar(text) == expected


@pytest.mark.parametrize("text", ["fast", ">= 12x", "<= 3 us torch", "> 3 us", "<= 3", ">= 2x over torch", "p42 <= 3 us", "ratio <= 3 us", "ratio 0.7"])
def test_bars_that_are_none_are_refused_by_name(text):
    with pytest.raises(ValueError, match="bar: got"):
        Group("op", "s", "-", [Case("a", len), Case("torch", len)], bars=(text,))


def test_a_ratio_is_the_median_over_rounds_not_the_ratio_of_medians():
    times = {"a": [1.0, 100.0, 1.0, 100.0, 1.0], "b": [2.0, 200.0, 2.0, 200.0, 2.0]}
    assert judge(">= 2x b", "a", times).value == 2.0
    assert judge(">= 3x b", "b", {"a": [10.0], "b": [5.0]}).met is False


def test_shares_are_of_the_roofs_of_the_same_run_and_ratios_are_judged():
    g = Group("op", "s", "fp32", [Case("a", busy(100), ratio=0.7, flops=10**6), Case("b", busy(50))], baseline="b", bytes=1 << 20, threads=2 if os.cpu_count() > 1 else 1,
              bars=("ratio <= 0.72", "ratio <= 0.5"))  # fmt: skip
    g.flops = 1
    a, _ = measure(g, Roofs(0.005), HERE, seconds=0.03, warmup=0.01)
    assert a.bandwidth_share == pytest.approx((1 << 20) / a.roof_gbps / 1e3 / a.p50_us, rel=0.01)
    assert a.gemm_share == pytest.approx(1e6 / a.roof_gflops / 1e3 / a.p50_us, rel=0.01)
    assert a.roof_share == pytest.approx(max(a.bandwidth_share, a.gemm_share), rel=0.01) and a.threads == g.threads
    assert a.ratio == 0.7 and [b.met for b in a.bars] == [True, False]
    assert judge("ratio <= 1", "a", {"a": [1.0]}).met is None


def test_groups_refuse_what_cannot_be_measured():
    with pytest.raises(ValueError, match="cases: expected different providers"):
        Group("op", "s", "-", [Case("a", len), Case("a", len)], baseline="a")
    with pytest.raises(ValueError, match="baseline: 'torch' is none of"):
        Group("op", "s", "-", [Case("a", len)])
    with pytest.raises(ValueError, match="cannot be skipped"):
        measure(Group("op", "s", "-", [Case("a", None), Case("torch", len)]), Roofs(0.005), HERE)
    with pytest.raises(ValueError, match="tuples of one length"):
        sample([Case("a", max, [(1, 2), (1, 2, 3)])], 0.0, 0.0)


def test_cold_inputs_exceed_the_cache_and_warm_ones_do_not():
    from fastee.testing.bench import llc_bytes

    ctx, size = Context(), 1 << 20
    assert len(ctx.rotate(lambda i: (i,), size)) == 4
    assert len(ctx.rotate(lambda i: (i,), size, "cold")) * size >= 2 * llc_bytes()
    assert len(Context(regime="cold").rotate(lambda i: (i,), size)) * size >= 2 * llc_bytes()


def test_a_compiler_that_fails_is_a_skip_with_its_reason(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no g++ here")

    monkeypatch.setattr(torch, "compile", broken)
    case = Context().compiled(torch.sin, [(torch.ones(2),)])
    assert case.fn is None and "no g++ here" in case.note
    assert "not asked for" in Context(against=("torch",)).compiled(torch.sin, [()]).note


def test_roofs_are_plausible_and_measured_once():
    roofs = Roofs(0.005)
    with quiet():
        read, copy, mm = roofs.bandwidth("read", 1 << 16), roofs.bandwidth("copy", 1 << 16), roofs.gflops()
    assert 1 < read < 5000 and 1 < copy < 10_000 and 0.5 < mm < 5000
    assert roofs.bandwidth("read", (1 << 16) - 5) == read


def _row(**changes) -> Row:
    fields = dict(op="x", provider="fastee", shape="1", dtype="fp32", regime="warm", baseline="torch", p50_us=1.0, speedup=2.0, machine=HERE)
    return Row(**{**fields, **changes})


def test_rows_survive_the_file_and_are_appended(tmp_path):
    path = tmp_path / "deep" / "m.jsonl"
    a, b = _row(), _row(shape="2", skipped="no compiler", p50_us=None, speedup=None)
    append_rows(path, [a])
    append_rows(path, [b])
    assert read_rows(path) == [a, b]
    assert json.loads(dumps(a))["machine"]["slug"] == "test-2c"


@pytest.mark.parametrize(
    "line, why",
    [
        ('{"op": "x"', "not a benchmark row"),
        ('{"op": "x"}', "missing required field"),
        ("[1]", "not a benchmark row"),
        (dumps(_row()).replace('"p50_us":1.0', '"p50_us":"fast"'), "p50_us"),
        (dumps(_row()).replace('"op"', '"oops":1,"op"'), "unknown field"),
        (dumps(_row(schema=99)), "row schema 99"),
        (b"\xff\xfe", "not a benchmark row"),
    ],
)
def test_a_damaged_line_is_named_by_its_number(tmp_path, line, why):
    path = tmp_path / "m.jsonl"
    path.write_bytes(dumps(_row()).encode() + b"\n\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(ValueError, match=r"m\.jsonl:3: ") as error:
        read_rows(path)
    assert why in str(error.value)


def test_the_machine_record_is_a_usable_file_name():
    import re

    here = machine("cmd")
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", here.slug) and here.slug.endswith(f"-{os.cpu_count()}c")
    assert here.cpu == cpu_name() and here.torch == torch.__version__ and here.command == "cmd"

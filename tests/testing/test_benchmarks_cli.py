from pathlib import Path

import msgspec
import pytest

from benchmarks import __main__ as cli
from benchmarks import run as runner
from benchmarks import shapes, tables
from fastee.testing import instructions
from fastee.testing.bench import Case, Context, Group
from fastee.testing.rows import Bar, Machine, Row, append_rows, read_rows

HERE = Machine("test-2c", "test", 2, None, "3", "2", "0", "abc", "pytest")


def _row(**changes) -> Row:
    fields = dict(op="x", provider="fastee", shape="1", dtype="fp32", regime="warm", baseline="torch", p50_us=1.0, p99_us=2.0, min_us=0.9, machine=HERE)
    return Row(**{**fields, "speedup": 2.0, "date": "2026-01-01T00:00:00Z", **changes})


@pytest.fixture
def pair(tmp_path):
    def write(*new: Row):
        append_rows(tmp_path / "a.jsonl", [_row(), _row(provider="torch", speedup=1.0), _row(shape="2", speedup=8.0)])
        append_rows(tmp_path / "b.jsonl", list(new))
        return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]

    return write


def test_compare_passes_noise_and_a_slower_machine(pair, capsys):
    assert cli.main(["compare", *pair(_row(speedup=1.8, p50_us=50.0), _row(shape="2", speedup=9.0))]) == 0
    assert "2.00x -> 1.80x" in capsys.readouterr().out


def test_compare_exits_1_on_a_regression_and_names_it(pair, capsys):
    assert cli.main(["compare", *pair(_row(speedup=1.99), _row(shape="2", speedup=6.0))]) == 1
    out = capsys.readouterr().out
    assert out.count("REGRESSION") == 1 and "REGRESSION x 2 fp32 warm fastee: 8.00x -> 6.00x" in out


def test_compare_judges_the_latest_row_and_a_loosened_tolerance(pair):
    files = pair(_row(speedup=0.1), _row(speedup=1.5))
    assert cli.main(["compare", *files]) == 1
    assert cli.main(["compare", *files, "--tolerance", "1.4"]) == 0
    assert cli.main(["compare", *files, "--tolerance", "0.5"]) == 2


def test_compare_counts_a_provider_that_vanished_as_a_regression(pair):
    assert cli.main(["compare", *pair(_row(speedup=None, p50_us=None, skipped="broken"))]) == 1


def test_compare_refuses_files_without_a_common_measurement_or_with_damage(pair, tmp_path, capsys):
    files = pair(_row(shape="other"))
    assert cli.main(["compare", *files]) == 2
    assert "no measurement in common" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "b.jsonl").write_text("{}\n")
    assert cli.main(["compare", *files]) == 2
    assert "b.jsonl:1:" in "".join(capsys.readouterr().err.split())


def fake_cases(ctx: Context):
    yield Group("fake", "n", "-", [Case("fastee", sum, [((1, 2),)]), Case("torch", sorted, [((2, 1),)])], bars=(">= 100x torch",), bytes=16)


def test_run_json_prints_rows_only_and_appends_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(runner, "load", lambda op: fake_cases)
    args = ["run", "fake", "--quick", "--json", "--results", str(tmp_path)]
    assert cli.main(args) == 0 and cli.main(args) == 0 and cli.main([*args, "--no-save"]) == 0
    captured = capsys.readouterr()
    printed = [msgspec.json.decode(line, type=Row) for line in captured.out.splitlines()]
    (file,) = tmp_path.glob("*.jsonl")
    assert len(printed) == 6 and read_rows(file) == printed[:4] and file.stem == printed[0].machine.slug
    assert "missed" in captured.err and "0 of 1 bars met" in captured.err


def test_cold_rows_are_of_inputs_that_no_cache_holds(monkeypatch, tmp_path):
    from fastee.testing.bench import llc_bytes

    def cases(ctx: Context):
        for size in (1 << 20, 64):  # 4,096 inputs of 64 bytes are not cold in any cache of this century
            inputs = ctx.rotate(lambda i: (i,), size)
            yield Group("fake", str(size), "-", [Case("fastee", abs, inputs), Case("torch", abs, inputs)], bytes=size)

    monkeypatch.setattr(runner, "load", lambda op: cases)
    assert cli.main(["run", "fake", "--quick", "--cold", "--results", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.jsonl")
    assert [(r.shape, r.regime, r.working_set) for r in read_rows(file)] == [(str(1 << 20), "cold", 2 * llc_bytes())] * 2


def test_unknown_op_is_named_before_anything_is_timed(capsys):
    assert cli.main(["run", "exit_stp"]) == 2
    assert "did you mean 'exit_step'" in " ".join(capsys.readouterr().err.split())


def test_every_bench_file_lists_itself_and_yields_a_sound_group(capsys):
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(line.endswith(".") for line in out.splitlines())  # a sentence each, not the first line of one
    for op in ("exit_step", "compact", "quantize", "row_stats"):
        assert op in out
        first = next(iter(runner.load(op)(Context(quick=True, shapes="headline", against=("torch",)))))
        assert first.cases[0].provider == "fastee" and first.bytes > 0 and first.bars


def test_shapes_cover_the_promised_ranges():
    assert shapes.ALL[0] == shapes.HEADLINE and len(set(shapes.ALL)) == len(shapes.ALL)
    assert {s.B for s in shapes.ALL} >= {1, 4, 32, 64, 256}
    assert min(s.D for s in shapes.ALL) == 64 and max(s.D for s in shapes.ALL) == 4096
    assert min(s.C for s in shapes.ALL) == 2 and max(s.C for s in shapes.ALL) == 1000
    assert str(shapes.HEADLINE) == "1x256x8x8->10" and shapes.HEADLINE.read == 16384
    with pytest.raises(ValueError, match="shapes: got 'huge'"):
        shapes.select("huge")


def test_table_rewrites_between_the_markers_only(tmp_path):
    append_rows(tmp_path / "box.jsonl", [
        _row(p50_us=9.0), _row(p50_us=1.25, bars=[Bar(">= 12x torch", 3.5, False), Bar("<= 3 us", 1.25, True)]),
        _row(provider="compile", skipped="no compiler", p50_us=None, speedup=None),
    ])  # fmt: skip
    page = tmp_path / "page.md"
    page.write_text(f"above\n{tables.PEER_BEGIN}\n{tables.PEER_END}\n{tables.BEGIN}\nold\n{tables.END}\nbelow\n")
    for _ in range(2):
        tables.rewrite(tmp_path, page)
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "old" not in text and "9.00" not in text
    assert "No peer has been measured" in text and "| 1 fp32 | fastee | 1.25 |" in text and "**missed**" in text and "skipped: no compiler" in text
    page.write_text("no markers")
    with pytest.raises(ValueError, match="expected one line"):
        tables.rewrite(tmp_path, page)
    with pytest.raises(ValueError, match="no results"):
        tables.tables(tmp_path / "empty")


def test_the_tables_of_the_committed_rows_can_be_written():
    assert len(tables.tables(runner.HERE / "results").splitlines()) > 100


def test_table_sums_up_what_it_does_not_list(tmp_path):
    rows = [_row(shape=str(i), speedup=1.0 + i, bars=[Bar(">= 20x torch", 1.0 + i, i >= 19)]) for i in range(20)]
    append_rows(tmp_path / "box.jsonl", rows)
    text = tables.tables(tmp_path)
    assert "| 15 fp32 |" in text and "| 16 fp32 |" not in text
    assert "4 further shapes" in text and "17.00x at 16, 18.00x at 17" in text and "16 >= 20x torch: 17.0; 17 >= 20x torch: 18.0; 18 " in text
    assert "19 >= 20x" not in text


def test_the_peers_page_shows_every_group_and_where_fastee_loses(tmp_path):
    codec = dict(op="pack_planes", dtype="bf16", peer="zipnn", peer_version="0.5.4", baseline="zipnn")
    append_rows(tmp_path / "box.jsonl", [
        _row(op="exit_head"), _row(**codec, speedup=4.0, ratio=0.7054, bars=[Bar(">= 1x zipnn", 4.0, True)]),
        _row(**codec, provider="zipnn", speedup=1.0, ratio=0.66), _row(**codec, provider="copy", speedup=50.0),
        _row(**codec, shape="2", speedup=0.8, ratio=0.7), _row(**codec, shape="2", provider="zipnn", speedup=1.0, ratio=0.8),
        _row(**codec, shape="2", provider="zipnn_fast", speedup=None, p50_us=None, skipped="broken"),
    ])  # fmt: skip
    text = tables.peers(tmp_path)
    assert "| zipnn 0.5.4 | pack_planes | 2 | 0.8x to 4x | 1 of 1 met |" in text and "#### zipnn, pack_planes" in text and "exit_head" not in text
    losses = [line for line in text.splitlines() if line.startswith("* ")]
    assert losses == [
        "* pack_planes bf16: zipnn is 1.25x as fast (2)",
        "* pack_planes bf16: zipnn reaches 0.66 on 1 shapes, fastee 0.71 at 4.0x the speed",
    ]
    assert "zipnn" not in tables.tables(tmp_path)


def test_headline_is_the_machine_measured_last(tmp_path):
    append_rows(tmp_path / "new.jsonl", [_row(op="exit_head", date="2026-02-01T00:00:00Z", shape="new", bars=[Bar(">= 20x earlyon", 21.0, True), Bar("ratio <= 0.7", 0.6, True)],
                                            dtype="bf16", peer="earlyon", baseline="earlyon")])
    append_rows(tmp_path / "old.jsonl", [_row(op="exit_head", shape="old", bars=[Bar("<= 3 us", 1.0, True)])])
    text = tables.headline(tmp_path)
    assert "| ... beside earlyon's check | >= 20x earlyon | 1 of 1 | 21 |  |" in text and "<= 3 us" not in text and "ratio" not in text
    assert tables.tables(tmp_path).startswith("### old"), "the new machine has rows beside a peer only"


def test_plot_writes_one_picture_per_op(tmp_path):
    from benchmarks.plot import plot

    append_rows(tmp_path / "box.jsonl", [_row(gbps=1.0, roof_gbps=10.0, working_set=4096, floor_us=0.5), _row(provider="torch"), _row(op="y"),
                                            _row(op="z", peer="lz4", provider="lz4", ratio=0.9, gbps=2.0)])
    made = plot(tmp_path)
    assert [p.name for p in made] == ["box-x.svg", "box-y.svg", "box-codecs.svg"] and all("<svg" in p.read_text()[:600] for p in made)


def test_instructions_say_why_they_are_missing(monkeypatch):
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None)
    assert instructions.unavailable() in ("valgrind is not installed",) or "x86-64" in instructions.unavailable()
    monkeypatch.setattr(runner, "load", lambda op: fake_cases)
    assert runner._counts("fake", Context())[0] == {}


@pytest.mark.slow
@pytest.mark.skipif(instructions.unavailable() is not None, reason=str(instructions.unavailable()))
def test_instructions_grow_with_the_work_and_repeat(tmp_path):
    script = tmp_path / "work.py"
    script.write_text(
        "from fastee.testing.bench import Case\nfrom fastee.testing.instructions import count_in_this_process\n"
        "for name, n in (('a', 100), ('b', 200), ('c', 200)):\n"
        "    count_in_this_process(Case(name, lambda k: sum(range(k)), [(n,)]))\n    print(name, flush=True)\n"
    )
    n = instructions.count_named([str(script)], timeout=120)
    assert list(n) == ["a", "b", "c"] and n["a"] > 1000
    assert n["b"] == pytest.approx(n["c"], rel=0.02) and 1.4 < n["b"] / n["a"] < 2.2


@pytest.mark.slow
@pytest.mark.skipif(instructions.unavailable() is not None, reason=str(instructions.unavailable()))
def test_a_script_that_fails_under_valgrind_shows_its_error(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit('the reason')")
    with pytest.raises(RuntimeError, match="the reason"):
        instructions.count_named([str(script)], timeout=60)


def test_every_target_has_its_verdict_and_the_floor_is_counted(tmp_path):
    floor = [_row(shape=str(i), speedup=0.5 + i, bars=[Bar(">= 1x torch", 0.5 + i, i > 0)]) for i in range(3)]
    bars = [Bar(">= 12x torch", 3.5, False), Bar("<= 3 us", 1.25, True), Bar(">= 4x compile", None, None)]
    own = [_row(op="y", shape=f"y{i}", bars=[Bar(f"<= {i + 1}.5 ms", 2.0, i > 0)]) for i in range(4)]
    append_rows(tmp_path / "box.jsonl", [*floor, _row(p50_us=1.25, shape="big", bars=bars), *own])
    text = tables.tables(tmp_path)
    assert "| x | >= 12x torch | 0 of 1 | 3.5 | big (3.5) |" in text and "| x | <= 3 us | 1 of 1 | 1.25 |  |" in text
    assert "| x | >= 4x compile | 0 of 1 |  | big (not measured) |" in text
    assert "| y | <= its own ms | 3 of 4 | 2 | y0 (2) |" in text, "four targets that differ in a number share a line"
    assert "2 of 3 shapes; slower: " in text and " 0 0.50x." in text


def test_the_readme_gets_the_headlines_and_the_count_of_all(tmp_path):
    bars = [Bar(">= 15x torch", 16.0, True), Bar("<= 3 us", 3.5, False), Bar("<= 9 ms", 1.0, True)]
    append_rows(tmp_path / "box.jsonl", [_row(op="exit_head", shape="big", bars=bars)])
    page = tmp_path / "README.md"
    page.write_text(f"above\n{tables.HEAD_BEGIN}\n{tables.HEAD_END}\nbelow")
    tables.rewrite_headline(tmp_path, page)
    text = page.read_text()
    assert "| the same for small heads, beside torch eager | >= 15x torch | 1 of 1 | 16 |  |" in text and "| <= 3 us | 0 of 1 | 3.5 | big (3.5) |" in text
    assert "<= 9 ms" not in text and "2 of 3 targets on this machine are met." in text and text.endswith("\nbelow")


def test_headlines_are_targets_of_the_suite():
    rows = [row for file in sorted(Path("benchmarks/results").glob("*.jsonl")) for row in tables.read_rows(file)]
    stated = {(row.op, bar.text) for row in rows for bar in row.bars}
    assert {(op, target) for _, op, target in tables.HEADLINES} <= stated

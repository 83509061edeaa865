"""Writes the tables of docs/benchmarks.md, between its markers, from the rows in results/ and from nothing else."""

from __future__ import annotations

from pathlib import Path

from fastee.testing.rows import Row, latest, read_rows

BEGIN, END = "<!-- tables: begin, written by `python -m benchmarks table` -->", "<!-- tables: end -->"
HEAD_BEGIN, HEAD_END = "<!-- headline: begin, written by `python -m benchmarks table` -->", "<!-- headline: end -->"
MAX_SHAPES = 16  # per op; the page says how the others did


def _line(*cells) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _op(op: str, rows: list[Row]) -> list[str]:
    shapes = list(dict.fromkeys((r.shape, r.dtype, r.regime) for r in rows))
    shown, every = set(shapes[:MAX_SHAPES]), rows
    rows = [r for r in rows if (r.shape, r.dtype, r.regime) in shown]
    instructions = any(r.instructions for r in rows)
    head = ["shape", "provider", "p50 us", "p99 us", "min us", "speed-up", "GB/s", "floor us", "of roof", *(["instr."] if instructions else []), "path"]
    out = [f"#### {op}", "", _line(*head), _line("---", "---", *["---:"] * (len(head) - 3), "---")]
    for r in rows:
        shape = f"{r.shape} {r.dtype}" + (", cold" if r.regime == "cold" else "")
        extra = [_number(r.instructions, ",.0f")] if instructions else []
        if r.skipped:
            out.append(_line(shape, r.provider, *[""] * (7 + len(extra)), f"skipped: {r.skipped}"))
            continue
        out.append(
            _line(
                shape, r.provider, _number(r.p50_us, ".2f"), _number(r.p99_us, ".2f"), _number(r.min_us, ".2f"), f"{r.speedup:.2f}x",
                _number(r.gbps, ".2f"), _number(r.floor_us, ".2f"), _number(r.roof_share, ".0%"), *extra, r.note,
            )  # fmt: skip
        )
    rest = [r for r in every if r not in rows and r.bars and r.speedup is not None]
    if rest:
        slow = ", ".join(f"{r.speedup:.2f}x at {r.shape}" for r in sorted(rest, key=lambda r: r.speedup)[:5])
        missed = [f"{r.shape} {b.text}: {b.value}" for r in rest for b in r.bars if not b.met]
        out += ["", f"{len(rest)} further shapes are in the rows. Lowest speed-ups of {rest[0].provider} over {rest[0].baseline}: {slow}."]
        out += [f"Bars missed or not measured among them: {'; '.join(missed) or 'none'}."]
    word = {True: "met", False: "**missed**", None: "not measured"}
    bars = [_line(r.shape + (", cold" if r.regime == "cold" else ""), b.text, b.value, word[b.met]) for r in rows for b in r.bars]
    return [*out, "", *(["| shape | bar | measured | verdict |", "|---|---|---:|---|", *bars, ""] if bars else [])]


def tables(results: Path) -> str:
    """Return the Markdown of all results files: per machine and op the latest row of every measurement, and every bar's verdict."""
    files = sorted(Path(results).glob("*.jsonl"))
    if not files:
        raise ValueError(f"no results in {results}: run `python -m benchmarks run all` first")
    out = []
    for file in files:
        rows = list(latest(read_rows(file)).values())
        m, last = rows[-1].machine, max(r.date for r in rows)
        out += [f"### {file.stem}", "", f"{m.cpu}, {m.cores} cores, kernels on {m.isa or 'reference only'}, python {m.python}, torch {m.torch}, fastee {m.fastee},"]
        commits = ", ".join(dict.fromkeys(r.machine.commit for r in rows))
        out += [f"commits {commits}, last row {last}, load {min(r.loadavg for r in rows):.1f} to {max(r.loadavg for r in rows):.1f}.", ""]
        for op in dict.fromkeys(r.op for r in rows):
            out += _op(op, [r for r in rows if r.op == op])
    return "\n".join(out).rstrip()


def headline(results: Path) -> str:
    """Return the short table of the README: the measured value beside every bar but the many "never slower than torch" ones, counted below."""
    files = sorted(Path(results).glob("*.jsonl"))
    if not files:
        raise ValueError(f"no results in {results}: run `python -m benchmarks run all` first")
    out = []
    for file in files:
        rows = list(latest(read_rows(file)).values())
        m = rows[-1].machine
        out += [f"{m.cpu}, {m.cores} cores, one thread, kernels on {m.isa or 'reference only'}, called from Python, median:", ""]
        out += [_line("what", "shape", "p50 us", "target", "measured"), _line("---", "---", "---:", "---", "---")]
        floor = [(r, b) for r in rows for b in r.bars if b.text == ">= 1x torch"]
        for r in rows:
            for b in (b for b in r.bars if b.text != ">= 1x torch"):
                verdict = "not measured" if b.met is None else f"{b.value:.3g}" if b.met else f"{b.value:.3g} (missed)"
                out.append(_line(r.op, r.shape + (", cold" if r.regime == "cold" else ""), _number(r.p50_us, ".3g"), b.text, verdict))
        if floor:
            lost = [f"{r.op} {r.shape} {b.value:.2f}x" for r, b in floor if b.met is False]
            out += ["", f"Never slower than torch eager: {sum(b.met is True for _, b in floor)} of {len(floor)} shapes" + (f"; slower: {', '.join(lost)}." if lost else ".")]
    return "\n".join(out)


def _between(page: Path, begin: str, end: str, body: str) -> Path:
    text = page.read_text()
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{page}: expected one line {begin!r} and one {end!r}")
    page.write_text(f"{text[: text.index(begin)]}{begin}\n\n{body}\n\n{text[text.index(end) :]}")
    return page


def rewrite(results: Path, page: Path) -> Path:
    """Replace what stands between the markers of `page` by all tables and return its path."""
    return _between(page, BEGIN, END, tables(results))


def rewrite_headline(results: Path, page: Path) -> Path:
    """Replace what stands between the headline markers of `page` (the README) and return its path."""
    return _between(page, HEAD_BEGIN, HEAD_END, headline(results))

"""Writes the tables of docs/benchmarks.md, between its markers, from the rows in results/ and from nothing else."""

from __future__ import annotations

from pathlib import Path

from fastee.testing.rows import Row, latest, read_rows

BEGIN, END = "<!-- tables: begin, written by `python -m benchmarks table` -->", "<!-- tables: end -->"


def _line(*cells) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _op(op: str, rows: list[Row]) -> list[str]:
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


def rewrite(results: Path, page: Path) -> Path:
    """Replace what stands between the markers of `page` and return its path."""
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{page}: expected one line {BEGIN!r} and one {END!r}")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    page.write_text(f"{before}{BEGIN}\n\n{tables(results)}\n\n{after}")
    return page

"""Writes the tables of docs/benchmarks.md and README.md, between their markers, from the rows in results/ and from nothing else."""

from __future__ import annotations

from pathlib import Path

from fastee.testing.rows import Bar, Row, latest, read_rows

BEGIN, END = "<!-- tables: begin, written by `python -m benchmarks table` -->", "<!-- tables: end -->"
HEAD_BEGIN, HEAD_END = "<!-- headline: begin, written by `python -m benchmarks table` -->", "<!-- headline: end -->"
PEER_BEGIN, PEER_END = "<!-- peers: begin, written by `python -m benchmarks table` -->", "<!-- peers: end -->"
MAX_SHAPES = 16  # per op; the page says how the others did


def _line(*cells) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _op(op: str, rows: list[Row], title: str = "") -> list[str]:
    shapes = list(dict.fromkeys((r.shape, r.dtype, r.regime) for r in rows))
    shown, every = set(shapes[:MAX_SHAPES]), rows
    rows = [r for r in rows if (r.shape, r.dtype, r.regime) in shown]
    more = {"ratio": lambda r: _number(r.ratio, ".3f"), "instr.": lambda r: _number(r.instructions, ",.0f")}
    more = {name: show for name, show in more.items() if any(map(show, rows))}
    head = ["shape", "provider", "p50 us", "p99 us", "min us", "speed-up", "GB/s", "floor us", "of roof", *more, "path"]
    out = [f"#### {title or op}", "", _line(*head), _line("---", "---", *["---:"] * (len(head) - 3), "---")]
    for r in rows:
        shape = f"{r.shape} {r.dtype}" + (", cold" if r.regime == "cold" else "")
        extra = [show(r) for show in more.values()]
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


def _machines(results: Path) -> dict[str, list[Row]]:
    """Return the latest row of every measurement by machine, the machine measured last first."""
    files = sorted(Path(results).glob("*.jsonl"))
    if not files:
        raise ValueError(f"no results in {results}: run `python -m benchmarks run all` first")
    found = {file.stem: list(latest(read_rows(file)).values()) for file in files}
    return dict(sorted(found.items(), key=lambda item: max(r.date for r in item[1]), reverse=True))


def _measured(rows: list[Row]) -> str:
    m, loads = rows[-1].machine, [r.loadavg for r in rows]
    commits = ", ".join(dict.fromkeys(r.machine.commit for r in rows))
    return (
        f"{m.cpu}, {m.cores} cores, kernels on {m.isa or 'reference only'}, python {m.python}, torch {m.torch}, fastee {m.fastee},\n"
        f"commits {commits}, last row {max(r.date for r in rows)}, load {min(loads):.1f} to {max(loads):.1f}."
    )


def tables(results: Path) -> str:
    """Return the Markdown of all results files: per machine and op the latest row of every measurement, and every bar's verdict."""
    out = []
    for name, rows in _machines(results).items():
        rows = [r for r in rows if not r.peer]
        if rows:
            out += [f"### {name}", "", _measured(rows), ""]
        for op in dict.fromkeys(r.op for r in rows):
            out += _op(op, [r for r in rows if r.op == op])
    return "\n".join(out).rstrip()


ASIDE = ("copy", "bare", "torch", "twin")  # providers beside a peer that are not it


def _groups(rows: list[Row]) -> list[list[Row]]:
    """Return the rows measured together, fastee's first."""
    keys = dict.fromkeys((r.op, r.shape, r.dtype, r.regime) for r in rows)
    return [[r for r in rows if (r.op, r.shape, r.dtype, r.regime) == key] for key in keys]


def _span(values: list[float], spec: str) -> str:
    ends = [format(min(values), spec), format(max(values), spec)]
    return " to ".join(dict.fromkeys(ends))


def _losses(rows: list[Row]) -> list[str]:
    """Return a line for every provider and op that is faster than fastee or reaches a smaller ratio (once per shape)."""
    faster, smaller, seen = {}, {}, set()
    for ours, *others in _groups(rows):
        for r in others:
            if r.provider in ASIDE or r.provider.startswith("fastee") or r.speedup is None:
                continue
            key, fast = (r.op, r.dtype, r.provider), ours.speedup / r.speedup
            if fast < 1:
                faster.setdefault(key, []).append((1 / fast, r.shape))
            same = (r.shape, r.dtype, r.provider, r.ratio, ours.ratio)
            if r.ratio is not None and ours.ratio is not None and r.ratio < ours.ratio and same not in seen:
                seen.add(same)
                smaller.setdefault(key, []).append((r.ratio, ours.ratio, fast))
    lines = [
        f"{op} {dtype}: {provider} is {_span([f for f, _ in found], '.2f')}x as fast ({', '.join(shape for _, shape in found)})"
        for (op, dtype, provider), found in faster.items()
    ]
    for (op, dtype, provider), found in smaller.items():
        theirs, ours, fast = zip(*found, strict=True)
        own = f"fastee {_span(ours, '.2f')} at {_span(fast, '.1f')}x the speed"
        lines.append(f"{op} {dtype}: {provider} reaches {_span(theirs, '.2f')} on {len(found)} shapes, {own}")
    return lines


def peers(results: Path) -> str:
    """Return the Markdown of the rows measured beside peers: a summary, where fastee loses, every table."""
    out = []
    for name, rows in _machines(results).items():
        rows = [r for r in rows if r.peer]
        if not rows:
            continue
        out += [f"### {name} beside peers", "", _measured(rows), ""]
        out += [_line("peer", "op", "shapes", "fastee's speed-up, lowest to highest", "bars"), _line("---", "---", "---:", "---:", "---")]
        by_peer = {p: [r for r in rows if r.peer == p] for p in dict.fromkeys(r.peer for r in rows)}
        for peer, mine in by_peer.items():
            for op in dict.fromkeys(r.op for r in mine):
                ours = [g[0] for g in _groups([r for r in mine if r.op == op])]
                fast, bars = [r.speedup for r in ours], [b for r in ours for b in r.bars]
                verdict = f"{sum(b.met is True for b in bars)} of {len(bars)} met" if bars else ""
                out.append(_line(f"{peer} {ours[-1].peer_version}", op, len(ours), f"{min(fast):.3g}x to {max(fast):.3g}x", verdict))
        losses = _losses(rows)
        out += ["", "Where fastee loses:" if losses else "fastee loses nowhere in these rows.", "", *(f"* {line}" for line in losses), ""]
        for peer, mine in by_peer.items():
            for op in dict.fromkeys(r.op for r in mine):
                out += _op(op, [r for r in mine if r.op == op], f"{peer}, {op}")
    return "\n".join(out).rstrip()


def headline(results: Path) -> str:
    """Return the short table of the README, of the machine measured last: every op's bars but the many "not slower than", counted below."""
    rows = next(iter(_machines(results).values()))
    m, least = rows[-1].machine, lambda bar: bar.text.startswith(">= 1x ")
    out = [f"{m.cpu}, {m.cores} cores, one thread, kernels on {m.isa or 'reference only'}, called from Python, medians:", ""]
    out += [_line("what", "target", "met", "measured", "missed at"), _line("---", "---", "---:", "---", "---")]
    targets: dict[tuple[str, str], list[tuple[str, Bar]]] = {}
    for r in rows:
        for b in (b for b in r.bars if not least(b) and not (r.peer and b.text.startswith("ratio"))):
            shape = r.shape + ("" if r.dtype == "fp32" else f" {r.dtype}") + (", cold" if r.regime == "cold" else "")
            targets.setdefault((r.op, b.text), []).append((shape, b))
    for (op, text), found in targets.items():
        timed = {shape for shape, b in found if b.met is not None}  # beside the peer, or in a run without it
        found = [(shape, b) for shape, b in found if b.met is not None or shape not in timed]
        values = sorted(b.value for _, b in found if b.value is not None)
        span = "" if not values else f"{values[0]:.3g}" if len(values) == 1 else f"{values[0]:.3g} to {values[-1]:.3g}"
        missed = "; ".join(shape + (f" ({b.value:.3g})" if b.met is False else " (not measured)") for shape, b in found if not b.met)
        out.append(_line(op, text, f"{sum(b.met is True for _, b in found)} of {len(found)}", span, missed))
    floors = {"torch eager": lambda r, b: b.text == ">= 1x torch", "the peer beside it": lambda r, b: r.peer and least(b)}
    for words, pick in floors.items():
        floor = [(r, b) for r in rows for b in r.bars if pick(r, b)]
        if floor:
            lost = "".join(f"; slower: {r.op} {r.shape} {b.value:.2f}x" for r, b in floor if b.met is False)
            out += ["", f"Never slower than {words}: {sum(b.met is True for _, b in floor)} of {len(floor)} shapes{lost}."]
    return "\n".join(out)


def _between(page: Path, begin: str, end: str, body: str) -> Path:
    text = page.read_text()
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{page}: expected one line {begin!r} and one {end!r}")
    page.write_text(f"{text[: text.index(begin)]}{begin}\n\n{body}\n\n{text[text.index(end) :]}")
    return page


def rewrite(results: Path, page: Path) -> Path:
    """Replace what stands between the markers of `page` by all tables and return its path."""
    _between(page, PEER_BEGIN, PEER_END, peers(results) or "No peer has been measured on these machines.")
    return _between(page, BEGIN, END, tables(results))


def rewrite_headline(results: Path, page: Path) -> Path:
    """Replace what stands between the headline markers of `page` (the README) and return its path."""
    return _between(page, HEAD_BEGIN, HEAD_END, headline(results))

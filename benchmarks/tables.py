"""Writes the tables of docs/benchmarks.md and README.md, between their markers, from the rows in results/ and from nothing else."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from fastee.testing.rows import Bar, Row, latest, read_rows

BEGIN, END = "<!-- tables: begin, written by `python -m benchmarks table` -->", "<!-- tables: end -->"
HEAD_BEGIN, HEAD_END = "<!-- headline: begin, written by `python -m benchmarks table` -->", "<!-- headline: end -->"
PEER_BEGIN, PEER_END = "<!-- peers: begin, written by `python -m benchmarks table` -->", "<!-- peers: end -->"
MAX_SHAPES = 16  # per op; the page says how the others did
MAX_TARGETS = 3  # of one op that differ in a number; more share a line
HEADLINES = (  # what a reader of the README asks, op, target
    ("one exit decided (1x256x8x8 to 10 classes)", "exit_head", "<= 3 us"),
    ("the same for small heads, beside torch eager", "exit_head", ">= 15x torch"),
    ("... beside torch.compile", "exit_head", ">= 5x compile"),
    ("... beside earlyon's check", "exit_head", ">= 20x earlyon"),
    ("exit and who stays, in order", "exit_step", ">= 15x torch"),
    ("exit, who stays and their packing in one call, beside three", "exit_pack", ">= 1.3x separate"),
    ("... beside torch eager", "exit_pack", ">= 10x torch"),
    ("bf16 activations packed without loss, share of their bytes", "pack_planes", "ratio <= 0.72"),
    ("quantised, beside a plain copy", "quantize_rows", ">= 0.5x copy"),
    ("an ONNX Runtime session that leaves early", "session", ">= 1.3x onnxruntime"),
    ("one decision of the scheduler", "decide", "<= 0.25 us"),
    ("exits, cut and codec planned anew", "replan", "p99 <= 5 us"),
    ("VGG-16 split over 4 or 16 devices, planned cold", "spatial_plan", "<= 50 ms"),
    ("100,000 events of 1,000 simulated nodes", "simulate", "<= 50 ms"),
    ("thresholds of 10,000 x 4 with a guarantee", "calibrate", "<= 100 ms"),
    ("64 KB computed elsewhere, beside raw ZeroMQ in C++", "cluster_offload", "ratio <= 2"),
    ("... at the 99th percentile", "cluster_offload", "ratio <= 3"),
    ("time on an emulated link, beside its arithmetic", "cluster_wire", "ratio <= 1.05"),
    ("tasks lost, doubled, wrong or hung, per kind of fault", "faults", "ratio <= 0"),
)


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
    for name, every in _machines(results).items():
        rows = [r for r in every if not r.peer]
        if rows:
            out += [f"### {name}", "", _measured(rows), "", *verdicts(every), ""]
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


def _verdicts(rows: list[Row]) -> dict[tuple[str, str], list[tuple[str, Bar]]]:
    """Return (shape, bar) of every target, by op and target, without the many "not slower than"."""
    found: dict[tuple[str, str], list[tuple[str, Bar]]] = {}
    for r in rows:
        for b in (b for b in r.bars if not _least(b) and not (r.peer and b.text.startswith("ratio"))):
            shape = r.shape + ("" if r.dtype == "fp32" else f" {r.dtype}") + (", cold" if r.regime == "cold" else "")
            found.setdefault((r.op, b.text), []).append((shape, b))
    for key, bars in found.items():
        timed = {shape for shape, b in bars if b.met is not None}  # beside the peer, or in a run without it
        found[key] = [(shape, b) for shape, b in bars if b.met is not None or shape not in timed]
    return found


def _least(bar: Bar) -> bool:
    return bar.text.startswith(">= 1x ")


def _verdict(what: str, target: str, found: list[tuple[str, Bar]]) -> str:
    values = sorted(b.value for _, b in found if b.value is not None)
    missed = "; ".join(shape + (f" ({b.value:.3g})" if b.met is False else " (not measured)") for shape, b in found if not b.met)
    span = " to ".join(dict.fromkeys(format(v, ".3g") for v in values[:: max(len(values) - 1, 1)]))
    return _line(what, target, f"{sum(b.met is True for _, b in found)} of {len(found)}", span, missed)


def verdicts(rows: list[Row]) -> list[str]:
    """Return the table of every target of a machine's rows; targets of one op that differ in their number only (one per shape) share a line."""
    out = [_line("what", "target", "met", "measured", "missed at"), _line("---", "---", "---:", "---", "---")]
    found, merged = _verdicts(rows), {}
    forms = Counter((op, re.sub(r"[\d.]+", "its own", text)) for op, text in found)
    for (op, text), bars in found.items():
        form = re.sub(r"[\d.]+", "its own", text)
        merged.setdefault((op, form if forms[op, form] > MAX_TARGETS else text), []).extend(bars)
    out += [_verdict(op, text, bars) for (op, text), bars in merged.items()]
    floors = {"torch eager": lambda r, b: b.text == ">= 1x torch", "the peer beside it": lambda r, b: r.peer and _least(b)}
    for words, pick in floors.items():
        floor = [(r, b) for r in rows for b in r.bars if pick(r, b)]
        if floor:
            lost = "".join(f"; slower: {r.op} {r.shape} {b.value:.2f}x" for r, b in floor if b.met is False)
            out += ["", f"Never slower than {words}: {sum(b.met is True for _, b in floor)} of {len(floor)} shapes{lost}."]
    return out


def headline(results: Path) -> str:
    """Return the short table of the README, of the machine measured last: the targets in `HEADLINES`, and how many of all were met."""
    rows = next(iter(_machines(results).values()))
    m, found = rows[-1].machine, _verdicts(rows)
    out = [f"{m.cpu}, {m.cores} cores, one thread, kernels on {m.isa or 'reference only'}, called from Python, medians:", ""]
    out += [_line("what", "target", "met", "measured", "missed at"), _line("---", "---", "---:", "---", "---")]
    out += [_verdict(what, target, found[op, target]) for what, op, target in HEADLINES if (op, target) in found]
    bars = [b for group in found.values() for _, b in group]
    return "\n".join([*out, "", f"{sum(b.met is True for b in bars)} of {len(bars)} targets on this machine are met."])


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

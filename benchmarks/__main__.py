"""python -m benchmarks list | run <op>... | compare A.jsonl B.jsonl | plot | table"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from benchmarks import run as runner
from fastee.testing.bench import Context
from fastee.testing.rows import compare, dumps, read_rows


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of fastee beside its peers and the machine's own limits.")
    sub = top.add_subparsers(dest="verb", required=True)
    sub.add_parser("list", help="the ops that can be run")
    p = sub.add_parser("run", help="time ops and append the rows to results/<machine>.jsonl")
    p.add_argument("ops", nargs="+", metavar="op", help="see list; 'all' for every one")
    p.add_argument("--json", action="store_true", help="rows as JSON lines on stdout, everything else on stderr")
    p.add_argument("--quick", action="store_true", help="short timings, compile only for headlines")
    p.add_argument("--instructions", action="store_true", help="also count instructions per call under callgrind")
    p.add_argument("--against", default="torch,compile", help="comma separated: torch, compile, numba, reference (default: torch,compile)")
    p.add_argument("--shapes", default="small", choices=("headline", "small", "all"))
    p.add_argument("--results", type=Path, default=runner.RESULTS, metavar="DIR")
    p.add_argument("--no-save", action="store_true", help="append nothing")
    p = sub.add_parser("compare", help="exit 1 when a provider lost speed relative to the baseline of its own run")
    p.add_argument("old", type=Path)
    p.add_argument("new", type=Path)
    p.add_argument("--tolerance", type=float, default=1.15, help="factor that counts as noise (default 1.15)")
    for verb, text in (("plot", "draw results/plots from the rows"), ("table", "rewrite the tables of docs/benchmarks.md and README.md from the rows")):
        p = sub.add_parser(verb, help=text)
        p.add_argument("--results", type=Path, default=runner.RESULTS, metavar="DIR")
    p = sub.add_parser("_count")  # runs under callgrind, see run.count_all
    p.add_argument("op")
    p.add_argument("shapes")
    return top


def main(argv: list[str] | None = None) -> int:
    a = parser().parse_args(argv)
    err = Console(stderr=True)
    try:
        if a.verb == "list":
            for op in runner.ops():
                print(f"{op:<16}{sys.modules[runner.load(op).__module__].__doc__.splitlines()[0]}")
        elif a.verb == "run":
            names = runner.ops() if a.ops == ["all"] else a.ops
            for name in names:
                runner.load(name)  # a wrong name fails before anything is timed
            ctx = Context(a.quick, a.shapes, tuple(a.against.split(",")))
            emit = (lambda row: print(dumps(row), flush=True)) if a.json else (lambda row: None)
            rows = runner.run(names, ctx, None if a.no_save else a.results, a.instructions, err, emit)
            wide = max(150, err.width)
            runner.show(rows, Console(stderr=True, width=wide) if a.json else Console(width=wide))
        elif a.verb == "compare":
            lines, bad = compare(read_rows(a.old), read_rows(a.new), a.tolerance)
            print("\n".join([*lines, *(f"REGRESSION {b}" for b in bad)]))
            if not lines and not bad:
                raise ValueError(f"{a.old} and {a.new} have no measurement in common")
            return 1 if bad else 0
        elif a.verb == "plot":
            from benchmarks.plot import plot

            print("\n".join(map(str, plot(a.results))))
        elif a.verb == "table":
            from benchmarks.tables import rewrite, rewrite_headline

            root = Path(__file__).parents[1]
            print(rewrite(a.results, root / "docs" / "benchmarks.md"), rewrite_headline(a.results, root / "README.md"), sep="\n")
        else:
            runner.count_all(a.op, a.shapes)
    except (ValueError, OSError) as error:
        err.print(f"[red]error:[/red] {error}", highlight=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

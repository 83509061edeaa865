"""python -m benchmarks (installed: fastee bench) list | run <op>... | compare A.jsonl B.jsonl | peers ... | plot | table"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from fastee.errors import FasteeError, did_you_mean
from fastee.testing.bench import Context
from fastee.testing.rows import Row, append_rows, compare, dumps, read_rows

from . import peers
from . import run as runner

OWN = ("torch", "compile", "numba", "reference")


def parser(prog: str) -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog=prog, description="Benchmarks of fastee beside its peers and the machine's own limits.")
    sub = top.add_subparsers(dest="verb", required=True, metavar="verb")
    results = {"type": Path, "default": runner.RESULTS if runner.RESULTS.exists() else None, "metavar": "DIR"}

    def timed(p: argparse.ArgumentParser) -> None:
        p.add_argument("--json", action="store_true", help="rows as JSON lines on stdout, everything else on stderr")
        p.add_argument("--quick", action="store_true", help="short timings, compile only for headlines")
        p.add_argument("--shapes", default="small", choices=("headline", "small", "all"))
        p.add_argument("--results", **results, help="append the rows to DIR/<machine>.jsonl (a checkout: benchmarks/results)")
        p.add_argument("--no-save", action="store_true", help="append nothing")

    sub.add_parser("list", help="the ops that can be run")
    p = sub.add_parser("run", help="time ops")
    p.add_argument("ops", nargs="+", metavar="op", help="see list; 'all' for every one")
    p.add_argument("--cold", action="store_true", help="inputs from memory: more of them than twice the last-level cache holds")
    p.add_argument("--instructions", action="store_true", help="also count instructions per call under callgrind")
    p.add_argument(
        "--against", default="torch,compile", help=f"comma separated: {', '.join([*OWN, *peers.names()])} (default: torch,compile)"
    )
    timed(p)
    p = sub.add_parser("peers", help="other people's programs beside fastee, each in an environment of its own, .peers/<peer>")
    act = p.add_subparsers(dest="act", required=True)
    act.add_parser("list", help="versions, licences, what they are timed on, whether they are installed")
    for name, text in (("install", "make the environments"), ("run", "time the peers beside fastee")):
        p = act.add_parser(name, help=text)
        p.add_argument("peers", nargs="+", metavar="peer", help="see peers list; 'all' for every one")
    timed(p)
    p = sub.add_parser("compare", help="exit 1 when a provider lost speed relative to the baseline of its own run")
    p.add_argument("old", type=Path)
    p.add_argument("new", type=Path)
    p.add_argument("--tolerance", type=float, default=1.15, help="factor that counts as noise (default 1.15)")
    for verb, text in (
        ("plot", "draw plots from the rows"),
        ("table", "rewrite the tables of docs/benchmarks.md and README.md from the rows"),
    ):
        p = sub.add_parser(verb, help=text)
        p.add_argument("--results", **results)
    p = sub.add_parser("papers", help="the systems of the literature beside ours: list | prepare TASK... | run SYSTEM... | table")
    act = p.add_subparsers(dest="act", required=True)
    act.add_parser("list", help="what can be run")
    act.add_parser("table", help="rewrite docs/papers.md from the rows")
    q = act.add_parser("prepare", help="fine-tune the full size's networks and keep what their exits say (hours; goes on where it stopped)")
    q.add_argument("systems", nargs="+", metavar="task", help="sst2, clinc150, cifar10")
    q.add_argument("--seeds", type=int, help="how many; default 1")
    q = act.add_parser("run", help="train, measure, append the rows to results/papers/papers.jsonl")
    q.add_argument("systems", nargs="+", metavar="system", help="see papers list; 'all' for every one")
    q.add_argument("--full", action="store_true", help="the long size (hours) instead of the quick one (minutes)")
    q.add_argument("--seeds", type=int, help="how many; default: as many as the paper's test asks for")
    p = sub.add_parser("_count")  # runs under callgrind, see run.count_all
    p.add_argument("op")
    p.add_argument("shapes")
    return top


def against(text: str, ops: list[str]) -> tuple[tuple[str, ...], dict[str, list[str]]]:
    """Return fastee's own providers and, per peer, the ops to time it on, of an ``--against`` list, else a ``ValueError``."""
    own, others = [], {}
    for word in text.split(","):
        if word in OWN:
            own.append(word)
        elif word in peers.names():
            others[word] = [op for op in ops if op in peers.module(word).CASES]
            if not others[word]:
                raise ValueError(f"--against: {word} is timed on {', '.join(peers.module(word).CASES)}, not on {', '.join(ops)}")
        else:
            known = [*OWN, *peers.names()]
            raise ValueError(f"--against: got {word!r}, expected some of {', '.join(known)}{did_you_mean(word, known)}")
    return tuple(own), others


def run_peers(which: dict[str, list[str]], a: argparse.Namespace, save: Path | None, emit, err: Console) -> list[Row]:
    """Time every peer on its ops; a peer that cannot be run is an error before any is timed."""
    missing = [why for why in map(peers.unavailable, which) if why]
    if missing:
        raise peers.PeerError("; ".join(missing))
    rows = []
    for name, ops in which.items():
        err.print(f"[bold]{name}[/bold]")
        made = peers.run(
            name,
            [a.shapes, "quick" if a.quick else "full", *ops],
            emit,
            lambda line: err.print(line, markup=False, highlight=False, soft_wrap=True),
        )
        if save and made:
            append_rows(save / f"{made[0].machine.slug}.jsonl", made)
        rows += made
    return rows


def act(a: argparse.Namespace, err: Console) -> int:
    if a.verb == "list":
        for op in runner.ops():
            print(f"{op:<16}{sys.modules[runner.load(op).__module__].__doc__.splitlines()[0]}")
    elif a.verb == "papers":
        from . import papers

        return papers.main(a.act, getattr(a, "systems", []), not getattr(a, "full", False), getattr(a, "seeds", None))
    elif a.verb == "peers" and a.act == "list":
        for name in peers.names():
            module = peers.module(name)
            print(f"{name:<16}{module.PEER.version:<9}{module.PEER.licence:<13}on {', '.join(module.CASES)}")
            print(f"{'':<16}{module.__doc__.splitlines()[0]}\n{'':<16}{peers.unavailable(name) or 'installed'}")
    elif a.verb == "peers" and a.act == "install":
        for name in peers.names() if a.peers == ["all"] else a.peers:
            peers.install(name, lambda line: err.print(line, markup=False, highlight=False, soft_wrap=True))
    elif a.verb in ("run", "peers"):
        save = None if a.no_save else a.results
        emit = (lambda row: print(dumps(row), flush=True)) if a.json else (lambda row: None)
        rows = []
        if a.verb == "run":
            ops = runner.ops() if a.ops == ["all"] else a.ops
            cases = {op: runner.load(op) for op in ops}  # a wrong name fails before anything is timed
            own, which = against(a.against, ops)
            rows = (
                runner.run(
                    cases, Context(a.quick, a.shapes, own, regime="cold" if a.cold else "warm"), save, err, emit, a.command, a.instructions
                )
                if own or not which
                else []
            )
        else:
            which = {name: [*peers.module(name).CASES] for name in (peers.names() if a.peers == ["all"] else a.peers)}
        rows += run_peers(which, a, save, emit, err)
        wide = max(150, err.width)
        runner.show(rows, Console(stderr=True, width=wide) if a.json else Console(width=wide))
    elif a.verb == "compare":
        lines, bad = compare(read_rows(a.old), read_rows(a.new), a.tolerance)
        print("\n".join([*lines, *(f"REGRESSION {b}" for b in bad)]))
        if not lines and not bad:
            raise ValueError(f"{a.old} and {a.new} have no measurement in common")
        return 1 if bad else 0
    elif a.verb == "_count":
        runner.count_all(a.op, a.shapes)
    elif a.results is None:
        raise ValueError("--results: expected the folder of the rows, there is no checkout beside this install")
    elif a.verb == "plot":
        from .plot import plot

        print("\n".join(map(str, plot(a.results))))
    else:
        from .tables import rewrite, rewrite_headline

        root = Path(__file__).parents[1]
        print(rewrite(a.results, root / "docs" / "benchmarks.md"), rewrite_headline(a.results, root / "README.md"), sep="\n")
    return 0


def main(argv: list[str] | None = None, prog: str = "python -m benchmarks") -> int:
    """Run one command line and return its exit code: 0 fine, 1 a regression, 2 an error that the message repairs."""
    argv = sys.argv[1:] if argv is None else argv
    err = Console(stderr=True)
    try:
        a = parser(prog).parse_args(argv)
        a.command = " ".join([prog, *argv])
        return act(a, err)
    except (ValueError, OSError, FasteeError) as error:
        err.print("error:", str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())

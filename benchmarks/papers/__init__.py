"""Every paper's headline tested beside ours: python -m benchmarks papers list | prepare TASK... | run SYSTEM... | table."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.papers.common import append, read
from fastee.errors import FasteeError, did_you_mean

SYSTEMS = ("guarantee", "watch", "saving", "dimee", "mdi_exit", "jei_dnn", "daisy", "hierarchical", "distree", "distredge")
RESULTS = Path(__file__).parent.parent / "results" / "papers" / "papers.jsonl"
DOCS = Path(__file__).parents[2] / "docs" / "papers.md"


def system(name: str):
    """Return the module of a system; raises ``FasteeError`` for an unknown one."""
    if name not in SYSTEMS:
        raise FasteeError(f"papers: expected one of {', '.join(SYSTEMS)}, got {name!r}{did_you_mean(name, SYSTEMS)}")
    return importlib.import_module(f"benchmarks.papers.{name}")


def main(verb: str, names: list[str], quick: bool, seeds: int | None, results: Path = RESULTS) -> int:
    """Run the verb and return the exit code."""
    console = Console(stderr=True, highlight=False)
    if verb == "list":
        for name in SYSTEMS:
            print(f"{name:14} {system(name).TITLE}")
        return 0
    if verb == "prepare":
        from benchmarks.papers import real

        for name in names:
            if name not in real.SETS:
                raise FasteeError(f"papers: expected one of {', '.join(real.SETS)}, got {name!r}{did_you_mean(name, real.SETS)}")
            for seed in range(1 if seeds is None else seeds):
                real.prepare(name, seed, console)
        return 0
    if verb == "run":
        for name in SYSTEMS if names == ["all"] else names:
            module = system(name)
            for seed in range(module.SEEDS if seeds is None else seeds):
                append(results, module.run(seed, quick, console))
        return 0
    from benchmarks.papers.page import write

    write(DOCS, read(results))
    print(DOCS, file=sys.stderr)
    return 0

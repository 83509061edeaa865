"""Runs one peer's cases in its own environment and prints rows, one JSON line each; started by ``benchmarks.peers.run``."""

from __future__ import annotations

import os
import sys

from rich.console import Console

from fastee.testing.bench import Context
from fastee.testing.rows import Row, dumps

from .. import run as runner
from . import module


def main(name: str, shapes: str, quick: str, *ops: str) -> None:
    rows = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a peer prints is not a row
    peer, cases = module(name).PEER, module(name).CASES

    def emit(row: Row) -> None:
        row.peer, row.peer_version = name, peer.version
        print(dumps(row), file=rows)

    ctx = Context(quick == "quick", shapes)
    runner.run(
        {op: cases[op] for op in ops or cases}, ctx, None, Console(stderr=True, width=150), emit, f"python -m benchmarks peers run {name}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

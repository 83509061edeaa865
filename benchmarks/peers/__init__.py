"""Peers side by side: each in an environment of its own, in one process with fastee, timed by the same harness.

A peer's environment, ``.peers/<peer>``, lies over the one that runs this: its packages come first, then the project's own torch, numpy and
all else. So peer and fastee call the same torch on the same inputs, interleaved round by round, and no peer's pins touch the project.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

import msgspec

from fastee.errors import FasteeError, did_you_mean
from fastee.testing.rows import Row

HERE = Path(__file__).parent
HOME = Path(".peers").absolute()
MAX_LINE, MAX_ROWS = 64 << 10, 10_000


class PeerError(FasteeError, RuntimeError):
    """A peer's environment is missing, outdated or broken, or what came out of it are no rows; the message names the repair."""


@dataclass(frozen=True)
class Peer:
    """What a peer is and how it is installed: `pip` holds the arguments of one ``pip install`` each, every package pinned."""

    version: str
    licence: str
    pip: tuple[tuple[str, ...], ...]
    env: dict[str, str] = field(default_factory=dict)  # while installing and running


def names() -> list[str]:
    """Return the peers' names: one per file beside this one."""
    return sorted(p.stem.replace("_", "-") for p in HERE.glob("[!_]*.py") if p.stem != "codec")


def module(name: str):
    """Return the module of peer `name`: docstring, ``PEER`` and ``CASES`` (op -> ``cases(ctx)``), without importing the peer."""
    if name not in names():
        raise ValueError(f"peer: got {name!r}, expected one of {', '.join(names())}{did_you_mean(name, names())}")
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def python(name: str) -> Path:
    """Return the path of the interpreter of a peer's environment, there or not."""
    return HOME / name / "bin" / "python"


def _recipe(peer: Peer) -> str:
    return "\n".join([sys.version.split()[0], *map(" ".join, peer.pip)])


def unavailable(name: str) -> str | None:
    """Return why the peer cannot be run, with the command that repairs it; None when it can."""
    peer, recipe = module(name).PEER, HOME / name / "recipe"
    repair = f"`python -m benchmarks peers install {name}`"
    if not recipe.exists() or not python(name).exists():
        return f"{name} {peer.version} is not installed: {repair}"
    return None if recipe.read_text() == _recipe(peer) else f"{name} was installed by another recipe or Python: {repair}"


def install(name: str, say: Callable[[str], None] = print) -> None:
    """Make the peer's environment anew; ``PeerError`` carries what pip said."""
    peer, at = module(name).PEER, HOME / name
    env = {**os.environ, **peer.env, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def run(*command: str) -> None:
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, env=env)
        if done.returncode:
            raise PeerError(
                f"{name}: `python -m {' '.join(command)}` failed ({done.returncode}):\n{(done.stderr or done.stdout).strip()[-2000:]}"
            )

    say(f"{name} {peer.version} ({peer.licence}) into {at}")
    (at / "recipe").unlink(missing_ok=True)
    run("venv", "--without-pip", "--clear", str(at))
    own = Path(sysconfig.get_path("purelib", vars={"base": str(at), "platbase": str(at)}))
    below = dict.fromkeys(sysconfig.get_path(p) for p in ("purelib", "platlib"))
    own.joinpath("below.pth").write_text("".join(f"import site; site.addsitedir({p!r})\n" for p in below))  # runs their .pth files, too
    for arguments in peer.pip:
        run("pip", "--python", str(python(name)), "install", "--quiet", *arguments)
    (at / "recipe").write_text(_recipe(peer))


def parse(name: str, line: bytes) -> Row:
    """Return the row that a peer's process printed; ``PeerError`` for everything else, since a peer's code ran in that process."""
    try:
        row = msgspec.json.decode(line, type=Row)
    except msgspec.DecodeError as error:
        raise PeerError(f"{name}: expected a benchmark row, got {line[:80]!r}: {error}") from None
    if row.peer != name:
        raise PeerError(f"{name}: expected its own rows, got one of {row.peer!r}")
    if (row.p50_us is None) == (row.skipped is None) or (row.p50_us is not None and not row.p50_us > 0):
        raise PeerError(f"{name}: {row.op} {row.shape}: expected either a time or a reason to skip, got {row.p50_us!r} and {row.skipped!r}")
    return row


def run(
    name: str, options: list[str], emit: Callable[[Row], None], say: Callable[[str], None] = print, command: list[str] | None = None
) -> list[Row]:
    """Time the peer beside fastee in its environment; hand each row to `emit` as it arrives and return all of them.

    `command` replaces ``<the peer's python> -m benchmarks.peers <name> <options>``. What the peer prints goes to `say`, line by line.
    """
    if command is None:
        reason = unavailable(name)
        if reason:
            raise PeerError(reason)
        command = [str(python(name)), "-m", __name__, name, *options]
    rows: list[Row] = []
    env = {**os.environ, **module(name).PEER.env, "PYTHONPATH": ""}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    with child:
        try:
            tail: list[str] = []

            def listen() -> None:
                for line in child.stderr:
                    tail[:] = [line.decode(errors="replace").rstrip()]
                    say(tail[0])

            ear = Thread(target=listen, daemon=True)
            ear.start()
            while line := child.stdout.readline(MAX_LINE):
                rows.append(parse(name, line))
                if len(rows) > MAX_ROWS:
                    raise PeerError(f"{name}: expected at most {MAX_ROWS} rows")
                emit(rows[-1])
            ear.join()
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        raise PeerError(f"{name}: its process ended with {child.returncode}: {tail[-1] if tail else 'it said nothing'}")
    return rows

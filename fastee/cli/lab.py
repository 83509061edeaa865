"""``fastee lab``: a cluster.toml's hosts and links on this machine, and a line-by-line language for their faults."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import typer

from fastee.cluster.config import load_config
from fastee.cluster.lab import Lab
from fastee.errors import ClusterError, FasteeError
from fastee.simulation.capacity import read_capacity

# word -> what follows it
WORDS = {
    "cut": "NODE", "heal": "NODE", "kill": "NODE", "stop": "NODE", "start": "NODE", "freeze": "NODE", "thaw": "NODE", "slow": "NODE SHARE",
    "link": "NODE NODE RATE DELAY", "replay": "NODE NODE TRACE", "wait": "SECONDS", "state": "",
}  # fmt: skip


def words_of(line: str) -> list[str]:
    """Split a line, [] for an empty one or a comment; ``ValueError`` for one that says nothing known."""
    found = [] if line.lstrip().startswith("#") else line.split()
    if found and (found[0] not in WORDS or len(found) - 1 != len(WORDS[found[0]].split())):
        known = ", ".join(f"{word} {follows}".strip() for word, follows in WORDS.items())
        raise ValueError(f"line: got {line.strip()!r}, expected one of: {known}")
    return found


def obey(lab: Lab, line: str) -> str:
    """Carry out one line such as ``link mobile edge 2mbit 20ms`` and return what there is to say; ``ValueError`` for one that cannot be."""
    word, *rest = words_of(line) or [""]
    if word == "wait":
        time.sleep(float(rest[0]))
    elif word == "slow":
        lab.slow(rest[0], float(rest[1]))
    elif word == "link":
        lab.link(rest[0], rest[1], f"{rest[2]} {rest[3]}")
    elif word == "replay":
        lab.replay(rest[0], rest[1], read_capacity(rest[2]))
    elif word == "state":
        return "\n".join(f"{name}: pid {s['pid']}" + "".join(f" {k}" for k in ("alive", "frozen", "cut") if s[k]) for name, s in lab.state().items())
    elif word:
        getattr(lab, word)(rest[0])
    return ""


def run(config: Path, shaper: str, script: Path | None, typed: Iterable[str], command: list[str]) -> int:
    """Build the lab and obey the lines of `script`, else those `typed`; a `command` runs on the client's machine meanwhile. Returns the exit
    status: that of the command. A script is read whole before anything starts and ends at the first line that fails; a person is only told."""
    lines = typed
    if script is not None:
        lines = script.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                words_of(line)
            except ValueError as error:
                raise typer.BadParameter(f"{script.name} line {number}: {error}", param_hint="--script") from None
    with Lab(load_config(config), shaper) as lab, contextlib.suppress(KeyboardInterrupt):
        for name, s in lab.state().items():
            typer.echo(f"lab: {name} runs, pid {s['pid']}", err=True)
        typer.echo(f"lab: {lab.shaper}; clients take --config {lab.config_of('client')}" + (f" --keys {keys}" if (keys := lab.keys_of("client")) else ""), err=True)
        client = lab.popen(lab.names[0], command) if command else None
        try:
            for line in lines:
                try:
                    if said := obey(lab, line):
                        typer.echo(said)
                except (ValueError, OSError, FasteeError) as error:
                    if script is not None:
                        raise ClusterError(f"lab: {line.strip()}: {error}") from error
                    typer.echo(str(error), err=True)
            if client is not None:
                return client.wait()
        finally:
            if client is not None and client.poll() is None:
                client.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    client.wait(5)
                client.kill()
                client.wait()
    return 0

"""SimPy: a general discrete-event simulator; the same queues, service times and exits as one run of ours."""

from __future__ import annotations

from collections.abc import Iterator

from fastee.testing.bench import Context, Group

from ..bench_simulator import cases
from . import Peer

PEER = Peer("4.1.2", "MIT", (("simpy==4.1.2",),))


def beside(ctx: Context) -> Iterator[Group]:
    return (group for group in cases(ctx) if any(case.provider == "simpy" for case in group.cases))


CASES = {"simulator": beside}

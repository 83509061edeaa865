"""A node that says everything twice: ``fastee node`` whose every answer is followed by a copy up to 0.6 s later, and one in ten leaves late itself."""

from __future__ import annotations

import os
import random
import sys
import threading

from fastee.cluster.config import load_config
from fastee.cluster.daemon import serve
from fastee.cluster.frame import NO_DEADLINE, Frame, Kind
from fastee.cluster.native_endpoint import NativeEndpoint

COPY_SECONDS, LATE_SECONDS, LATE_SHARE = 0.6, 0.3, 0.1


def say_twice(seed: int) -> None:
    """From now on answers of this process come twice, some late."""
    put, dice = NativeEndpoint.put, random.Random(seed)

    def twice(self, peer: str, machine: int, frame: Frame, deadline: int = NO_DEADLINE, *, keyed: bool = False) -> bool:
        if frame.kind is not Kind.ANSWER:
            return put(self, peer, machine, frame, deadline, keyed=keyed)
        later(dice.uniform(0, COPY_SECONDS), self, peer, machine, frame, deadline)
        if dice.random() < LATE_SHARE:
            later(dice.uniform(0, LATE_SECONDS), self, peer, machine, frame, deadline, keyed)
            return True
        return put(self, peer, machine, frame, deadline, keyed=keyed)

    def later(seconds: float, self, peer, machine, frame, deadline, keyed: bool = False) -> None:
        timer = threading.Timer(seconds, put, (self, peer, machine, frame, deadline), {"keyed": keyed})
        timer.daemon = True
        timer.start()

    NativeEndpoint.put = twice


if __name__ == "__main__":
    options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    say_twice(sum(options["--name"].encode()))
    status = serve(load_config(options["--config"]), options["--name"], options.get("--keys"), lambda text: print(text, flush=True))
    os._exit(status)

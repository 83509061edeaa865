"""The words of the event log; the numbers are those of csrc/sim."""

from __future__ import annotations

import enum


class Outcome(enum.IntEnum):
    """How a task ended. REJECTED: the scheduler gave up; REFUSED: no admission; EXPIRED: deadline + grace passed; LOST: no node left."""

    PENDING = 0
    ANSWERED = 1
    REJECTED = 2
    REFUSED = 3
    EXPIRED = 4
    LOST = 5


class What(enum.IntEnum):
    """Kinds of log lines; docs/simulator.md says what `a` and `b` mean for each."""

    ARRIVE = 0
    START = 1
    ADMIT = 2
    REFUSE = 3
    DECIDE = 4
    RUN = 5
    RAN = 6
    SEND = 7
    DELIVER = 8
    VANISH = 9
    LOST = 10
    ANSWER = 11
    END = 12
    DUPLICATE = 13
    FAULT = 14
    DOWN = 15
    UP = 16
    THAW = 17


class FaultKind(enum.IntEnum):
    """Elementary faults; what users write (a partition, a flap) is made of these."""

    DEATH = 0
    RESTART = 1
    FREEZE = 2
    SLOW = 3
    LINK_DOWN = 4
    LINK_UP = 5
    LOSS = 6
    DUPLICATE = 7
    CLOCK = 8

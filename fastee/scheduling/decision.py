"""What a scheduler answers: one action per task, packed into one int64 where a whole batch is asked."""

from __future__ import annotations

import enum

# code, from bit 0: action 3 | forced 1 | codec + 1: 8 | node + 1: 12 | 8 unused | wait in microseconds: 31
_FORCED_BIT, _CODEC_BIT, _NODE_BIT, _WAIT_BIT = 3, 4, 12, 32
_WAIT_LIMIT_US = (1 << 31) - 1


class Action(enum.IntEnum):
    """The five things that may happen to a task."""

    EXIT = 0
    CONTINUE = 1
    OFFLOAD = 2
    WAIT = 3
    REJECT = 4


class Decision:
    """One immutable answer of the scheduler.

    `action`; `node` where the task goes on or ends (-1 for REJECT); `codec` index for OFFLOAD, else -1; `forced` is true
    for an EXIT imposed by the deadline; `until` (ns) is set for WAIT, else 0; `code` is the packed int64.

    >>> Decision(Action.OFFLOAD, node=2, codec=1)
    Decision(OFFLOAD, node=2, codec=1)
    >>> Decision.from_code(Decision(Action.EXIT, node=0, forced=True).code).forced
    True
    """

    __slots__ = ("action", "node", "codec", "forced", "until", "code")

    def __init__(self, action: Action, node: int = -1, codec: int = -1, forced: bool = False, wait_us: int = 0, now: int = 0):
        put = super().__setattr__
        put("action", Action(action))
        put("node", node)
        put("codec", codec)
        put("forced", bool(forced))
        put("code", pack(action, node, codec, forced, wait_us))
        put("until", now + (self.code >> _WAIT_BIT) * 1000 if action == Action.WAIT else 0)

    def __setattr__(self, name, value):
        raise AttributeError(f"a Decision is immutable, cannot set {name!r}")

    @classmethod
    def from_code(cls, code: int, now: int = 0) -> Decision:
        """Unpack one int64 of `decide_batch`; `now` (ns) is what a WAIT counts from."""
        code = int(code)
        action, node, codec, forced, wait_us = unpack(code)
        if not 0 <= code < 1 << 63 or action > Action.REJECT:
            raise ValueError(f"from_code: code must be a packed Decision, got {code}")
        return cls(Action(action), node, codec, forced, wait_us, now)

    def __eq__(self, other) -> bool:
        return isinstance(other, Decision) and (self.code, self.until) == (other.code, other.until)

    def __hash__(self) -> int:
        return hash((self.code, self.until))

    def __reduce__(self):
        wait_us = self.code >> _WAIT_BIT
        now = self.until - wait_us * 1000 if self.action == Action.WAIT else 0
        return Decision, (self.action, self.node, self.codec, self.forced, wait_us, now)

    def __repr__(self) -> str:
        parts = [self.action.name, *(f"{k}={getattr(self, k)}" for k in ("node", "codec") if getattr(self, k) >= 0)]
        parts += ["forced=True"] * self.forced + [f"until={self.until}"] * (self.action == Action.WAIT)
        return f"Decision({', '.join(parts)})"


def pack(action: int, node: int, codec: int, forced: bool, wait_us: int = 0) -> int:
    """The int64 code of a decision."""
    wait = min(max(int(wait_us), 0), _WAIT_LIMIT_US) if action == Action.WAIT else 0
    return int(action) | int(forced) << _FORCED_BIT | (codec + 1) << _CODEC_BIT | (node + 1) << _NODE_BIT | wait << _WAIT_BIT


def unpack(code: int) -> tuple[int, int, int, bool, int]:
    """(action, node, codec, forced, wait in microseconds) of an int64 code."""
    return code & 7, (code >> _NODE_BIT & 0xFFF) - 1, (code >> _CODEC_BIT & 0xFF) - 1, bool(code >> _FORCED_BIT & 1), code >> _WAIT_BIT

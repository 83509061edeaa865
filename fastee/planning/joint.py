"""Replanner: the plan in force while links, speeds and exits move."""

from __future__ import annotations

from typing import Any

from fastee.planning.cluster import ClusterSpec
from fastee.planning.problem import core, question
from fastee.scheduling import Profile, QoS


class Replanner:
    """Keeps a joint plan (exits, cuts, codecs) current: prepared tables, one pass per re-plan, a change only when it pays.

    Takes the arguments of `fastee.plan`; exits are chosen where `exit_probability` is given. `hysteresis`: a new plan replaces the one in force when it is
    better by more than this share, or when the one in force breaks a limit. A plan held back by it may lose to any other, "all here" included,
    by at most that share; 0 always takes the best. Nodes, exits and codecs are indices here.

    >>> prof = Profile(nodes=("here", "there"), batch_sizes=(1,), mean=[[[.01], [.001]]] * 2, spread=[[[0], [0]]] * 2, codecs=("raw",),
    ...                wire_bytes=[[1000], [250]], codec_seconds=[[0], [0]], bandwidth=[[0, 1e6], [1e6, 0]], delay=[[0, .001], [.001, 0]])
    >>> r = Replanner(prof)
    >>> r.place, r.set_link(0, 1, 1e4, 0.001), r.replan(), r.place
    ([1, 1], None, True, [0, 0])
    """

    def __init__(
        self, prof: Profile, cluster: ClusterSpec | None = None, qos: QoS | None = None, *, hysteresis: float = 0.1, objective: str = "latency",
        exit_probability: Any = None, exit_loss: Any = None, head_seconds: Any = None, segment_memory: Any = None, weights: Any = None,
        quantile: float | None = None, source: str | int = 0, batch: int = 1, answer_bytes: float = 64,
    ):  # fmt: skip
        if isinstance(hysteresis, bool) or not isinstance(hysteresis, (int, float)):
            raise TypeError(f"Replanner: hysteresis must be a number in [0, 1), got {type(hysteresis).__name__}")
        if not 0 <= hysteresis < 1:
            raise ValueError(f"Replanner: hysteresis must be a number in [0, 1), got {hysteresis}")
        self.question = question(
            prof, cluster, qos, objective=objective, weights=weights, source=source, batch=batch, quantile=quantile, exit_probability=exit_probability,
            exit_loss=exit_loss, head_seconds=head_seconds, segment_memory=segment_memory, answer_bytes=answer_bytes, choose_exits=exit_probability is not None,
        )  # fmt: skip
        self._core = core("Replanner").Replanner(self.question.numbers, float(hysteresis))
        hot = self._core.bind()
        self.set_link = hot["set_link"]  # (src, dst, bandwidth bit/s, delay s); bandwidth 0: the link is down
        self.set_speed = hot["set_speed"]  # (node, factor): its seconds are now the profile's times factor
        self.set_leave = hot["set_leave"]  # (exit, share of the tasks reaching it that it answers)
        self.replan = hot["replan"]  # () -> bool: did the plan in force change

    @property
    def feasible(self) -> bool:
        """Whether the plan in force can be executed; False when nothing can be placed under the limits."""
        return self._core.current()["found"]

    @property
    def place(self) -> list[int]:
        """Node index per segment of the plan in force."""
        return self._core.current()["place"]

    @property
    def codecs(self) -> list[int]:
        """Codec index of the move into each segment, -1 where the carry stays."""
        return self._core.current()["codec"]

    @property
    def exits(self) -> list[bool]:
        """Which exits are on."""
        return self._core.current()["on"]

    @property
    def value(self) -> float:
        """The objective of the plan in force under the numbers of the last `replan`."""
        return self._core.current()["value"]

    @property
    def best_value(self) -> float:
        """The objective of the best plan at the last `replan`."""
        return self._core.best_value()


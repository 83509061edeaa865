"""What to simulate, as plain data: one `Spec` from Python or from a TOML file, checked field by field."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, Literal

import msgspec

_MAX_TOML_BYTES = 16 << 20


class _Base(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Network(_Base, kw_only=True):
    """Costs of the net on a machine of slowdown 1: seconds per segment [S] at batch 1, `batch_cost` relative to it per batch size.

    `spread`: relative standard deviation. `wire_bytes` [S][codecs]: bytes of the carry that enters segment s; 136 bytes of frame are added
    to each and to `answer_bytes`. `codec_seconds` like wire_bytes (default 0). `gain` [K][bins] over `gain_range`: the `Profile`'s gain table.
    """

    seconds: list[float]
    batch_sizes: list[int] = msgspec.field(default_factory=lambda: [1])
    batch_cost: list[float] = msgspec.field(default_factory=lambda: [1.0])
    spread: float = 0.0
    codecs: list[str] = msgspec.field(default_factory=lambda: ["raw"])
    wire_bytes: list[list[float]]
    codec_seconds: list[list[float]] | None = None
    answer_bytes: int = 40
    gain: list[list[float]] | None = None
    gain_range: tuple[float, float] = (0.0, 1.0)


class Machine(_Base, kw_only=True):
    """A node, or `count` equal ones named name0, name1, ...; `batch`: rows taken at once; `price` per second of computing."""

    name: str
    slowdown: float = 1.0
    batch: int = 1
    price: float = 0.0
    count: int = 1


class Connection(_Base, kw_only=True):
    """Links between machines or groups, "20mbit 10ms", in both directions unless `both` is false.

    `pattern` "all": every pair; "ring": each machine with its `degree` nearest in the group. `capacity`: name of a bandwidth trace that
    replaces the rate, started `offset` seconds in (every further link 1 s later). `medium`: a name shared by links that cannot send at
    the same time. `loss`, `duplicate`: chance per message.
    """

    source: str
    target: str
    link: str
    both: bool = True
    pattern: Literal["all", "ring"] = "all"
    degree: int = 2
    capacity: str | None = None
    offset: float = 0.0
    medium: str | None = None
    loss: float = 0.0
    duplicate: float = 0.0


class Capacity(_Base, kw_only=True):
    """A bandwidth trace: a `file` (mahimahi or CSV, relative to the spec), or `synthetic` with a mean `rate` in bit/s."""

    file: str | None = None
    format: Literal["mahimahi", "csv"] | None = None
    synthetic: Literal["lte", "5g", "wifi"] | None = None
    rate: float = 0.0
    seconds: float = 60.0
    seed: int = 0


class Arrivals(_Base, kw_only=True):
    """Tasks per source: "poisson" or "periodic" at `rate` per second; "bursts": Poisson at `rate`, `factor` times that during `on` of every
    `on + off` seconds; "times": the given seconds. `sources`: machines or groups."""

    kind: Literal["poisson", "periodic", "bursts", "times"] = "poisson"
    sources: list[str]
    rate: float = 0.0
    on: float = 1.0
    off: float = 4.0
    factor: float = 5.0
    start: float = 0.0
    times: list[float] | None = None


class Difficulty(_Base, kw_only=True):
    """Scores and correctness per exit: a `file` (.npz with confidence [rows, K], correct [rows, K+1], optional gate, delta, label, pool), or
    made up: `accuracy` per exit and end [K+1], `rows` samples."""

    file: str | None = None
    accuracy: list[float] | None = None
    rows: int = 4096
    seed: int = 0


class FaultSpec(_Base, kw_only=True):
    """One thing that goes wrong `at` a second.

    death (`node`, restarts after `seconds` if given), freeze (`node`, `seconds`), straggler (`node`, `factor`, for `seconds` or for good),
    partition (`nodes` cut from the rest for `seconds`), flap (`source`, `target`: down for half of every `period` during `seconds`), loss and
    duplicate (`source`, `target`, `chance`, for `seconds` or for good), clock (`node`, `offset` seconds, `drift` ppm).
    """

    kind: Literal["death", "freeze", "straggler", "partition", "flap", "loss", "duplicate", "clock"]
    at: float
    node: str | None = None
    nodes: list[str] = []
    source: str | None = None
    target: str | None = None
    seconds: float | None = None
    factor: float = 1.0
    chance: float = 0.0
    period: float = 1.0
    offset: float = 0.0
    drift: float = 0.0


class Promise(_Base, kw_only=True):
    """The fields of `fastee.QoS`; with `money_weight` > 0 the schedulers know the machines' prices and `byte_price`."""

    deadline: float | None = None
    hit_rate: float = 0.99
    max_drop: float | None = None
    cost_weight: float = 0.0
    money_weight: float = 0.0


class Spec(_Base, kw_only=True):
    """A whole simulation. Times in seconds; `detect`: until a silent node counts as down; `grace`: after a deadline, `timeout`: without one;
    `report`: between queue reports; `credit`: tasks under way per peer; `max_neighbours`: peers that one scheduler looks at;
    `byte_price`: cost of a byte on the wire; `params`: of the policy, nodes by name."""

    network: Network
    machines: list[Machine]
    connections: list[Connection] = []
    capacities: dict[str, Capacity] = {}
    arrivals: list[Arrivals]
    difficulty: Difficulty = Difficulty()
    faults: list[FaultSpec] = []
    qos: Promise = Promise()
    policy: str = "deadline"
    params: dict[str, Any] = {}
    thresholds: list[float] | None = None
    tasks: int = 1000
    seed: int = 0
    title: str = ""
    detect: float = 1.0
    grace: float = 0.5
    timeout: float = 60.0
    report: float = 0.1
    stale: float = 1e-3
    credit: int = 8
    max_tasks: int = 256
    max_neighbours: int = 16
    byte_price: float = 0.0
    folder: str = ""


def load_spec(path: str | os.PathLike) -> Spec:
    """Read a SPEC.toml; what is unknown, missing or of a wrong type raises ``ValueError`` naming the field."""
    path = Path(path)
    if path.stat().st_size > _MAX_TOML_BYTES:
        raise ValueError(f"load_spec: {path.name!r} has {path.stat().st_size} bytes, at most {_MAX_TOML_BYTES} are read")
    try:
        spec = msgspec.toml.decode(path.read_bytes(), type=Spec)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ValueError(f"load_spec: {path.name!r} is no simulation: {error}") from None
    return msgspec.structs.replace(spec, folder=str(path.resolve().parent))


def check_numbers(spec: Spec) -> None:
    """Raise ``ValueError`` naming the first number of `spec` that is out of its range."""
    rules = {
        "tasks": (spec.tasks, 1, 1 << 28), "seed": (spec.seed, 0, (1 << 63) - 1), "detect": (spec.detect, 0, 1e6), "grace": (spec.grace, 0, 1e6),
        "timeout": (spec.timeout, 1e-6, 1e6), "report": (spec.report, 0, 1e6), "stale": (spec.stale, 0, 1e6), "credit": (spec.credit, 1, 1 << 30),
        "max_tasks": (spec.max_tasks, 1, 1 << 24), "max_neighbours": (spec.max_neighbours, 0, 1023), "byte_price": (spec.byte_price, 0, 1e12),
        "network.spread": (spec.network.spread, 0, 100), "network.answer_bytes": (spec.network.answer_bytes, 0, 1 << 30),
        "difficulty.rows": (spec.difficulty.rows, 1, 1 << 24), "difficulty.seed": (spec.difficulty.seed, 0, (1 << 63) - 1),
    }  # fmt: skip
    for i, m in enumerate(spec.machines):
        at = f"machines[{i}]"
        rules.update({f"{at}.slowdown": (m.slowdown, 1e-6, 1e9), f"{at}.batch": (m.batch, 1, 4096), f"{at}.price": (m.price, 0, 1e12), f"{at}.count": (m.count, 1, 1024)})
    for i, c in enumerate(spec.connections):
        at = f"connections[{i}]"
        rules.update({f"{at}.loss": (c.loss, 0, 1), f"{at}.duplicate": (c.duplicate, 0, 1), f"{at}.offset": (c.offset, 0, 1e7), f"{at}.degree": (c.degree, 1, 1023)})
    for i, a in enumerate(spec.arrivals):
        at = f"arrivals[{i}]"
        rules.update({f"{at}.rate": (a.rate, 0, 1e9), f"{at}.on": (a.on, 1e-6, 1e6), f"{at}.off": (a.off, 0, 1e6),
                      f"{at}.factor": (a.factor, 0, 1e6), f"{at}.start": (a.start, 0, 1e6)})  # fmt: skip
    for i, f in enumerate(spec.faults):
        at = f"faults[{i}]"
        rules.update({f"{at}.at": (f.at, 0, 1e7), f"{at}.factor": (f.factor, 1e-6, 1e9), f"{at}.chance": (f.chance, 0, 1), f"{at}.period": (f.period, 1e-3, 1e7),
                      f"{at}.offset": (f.offset, -1e6, 1e6), f"{at}.drift": (f.drift, -1e6, 1e6)})  # fmt: skip
        if f.seconds is not None:
            rules[f"{at}.seconds"] = (f.seconds, 0, 1e7)
    for name, (value, low, high) in rules.items():
        if not (math.isfinite(value) and low <= value <= high):
            raise ValueError(f"simulate: {name} must be in {low:g}..{high:g}, got {value}")

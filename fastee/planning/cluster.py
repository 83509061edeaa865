"""What a planner is told about the machines: nodes with memory, speed, price and energy, and the links between them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from fastee.errors import did_you_mean
from fastee.scheduling import Profile, parse_link

_MAX_TOML_BYTES = 16 << 20
_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmg]?i?b?)\s*", re.IGNORECASE | re.ASCII)


def parse_bytes(text: str | int | float) -> float:
    """Return the bytes of a number or of a text such as ``"64MB"`` or ``"1.5GiB"``.

    >>> parse_bytes("64MB"), parse_bytes("1 KiB"), parse_bytes(10)
    (64000000.0, 1024.0, 10.0)
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        return float(text)
    if not isinstance(text, str):
        raise TypeError(f"memory must be a number of bytes or a text such as '64MB', got {type(text).__name__}")
    found = _SIZE.fullmatch(text) if len(text) <= 64 else None
    if found is None or found[2].lower() not in _BYTES:
        raise ValueError(f"memory must be a number of bytes or a text such as '64MB', got {text[:64]!r}")
    return float(found[1]) * _BYTES[found[2].lower()]


@dataclass(frozen=True)
class NodeSpec:
    """One machine.

    `name`; `memory` bytes for segments (number or "64MB"; None: no limit); `speed` > 0 divides the profile's seconds; `price` per second of
    compute; `watts` while computing; `hosts`: indices of the segments it may run (None: all); `like`: the profile's node whose
    measurements it takes (None: the one of its own name).

    >>> NodeSpec("edge", memory="64MB", speed=2.0).memory
    64000000.0
    """

    name: str
    memory: float | str | None = None
    speed: float = 1.0
    price: float = 0.0
    watts: float = 0.0
    hosts: Sequence[int] | None = None
    like: str | None = None

    def __post_init__(self):
        put = lambda name, value: object.__setattr__(self, name, value)
        for name in ("name", "like"):
            value = getattr(self, name)
            if not (isinstance(value, str) or (name == "like" and value is None)):
                raise TypeError(f"NodeSpec: {name} must be a string, got {type(value).__name__}")
        if not self.name:
            raise ValueError("NodeSpec: name must not be empty")
        if self.memory is not None:
            put("memory", parse_bytes(self.memory))
        for name in ("memory", "speed", "price", "watts"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"NodeSpec: {name} of {self.name!r} must be a number, got {type(value).__name__}")
            low = value > 0 if name == "speed" else value >= 0
            if not (math.isfinite(value) and low):
                raise ValueError(f"NodeSpec: {name} of {self.name!r} must be finite and {'> 0' if name == 'speed' else '>= 0'}, got {value}")
            put(name, float(value))
        if self.hosts is not None:
            if isinstance(self.hosts, str) or not isinstance(self.hosts, Sequence):
                raise TypeError(f"NodeSpec: hosts of {self.name!r} must be a sequence of segment indices, got {type(self.hosts).__name__}")
            for s in self.hosts:
                if isinstance(s, bool) or not isinstance(s, int):
                    raise TypeError(f"NodeSpec: hosts of {self.name!r} must hold ints, got {type(s).__name__}")
            put("hosts", tuple(self.hosts))


class _TomlNode(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    memory: str | float | None = None
    speed: float = 1.0
    price: float = 0.0
    watts: float = 0.0
    hosts: list[int] | None = None
    like: str | None = None


class _TomlLink(msgspec.Struct, forbid_unknown_fields=True):
    speed: str
    between: tuple[str, str] | None = None
    source: str | None = msgspec.field(name="from", default=None)
    target: str | None = msgspec.field(name="to", default=None)


class _Toml(msgspec.Struct, forbid_unknown_fields=True):
    node: list[_TomlNode]
    link: list[_TomlLink] = []


@dataclass(frozen=True)
class ClusterSpec:
    """Nodes, and links as texts ("20mbit 10ms") by (source, target) name; None takes the profile's links.

    >>> spec = ClusterSpec([NodeSpec("mobile"), NodeSpec("cloud", speed=2)], {("mobile", "cloud"): "20mbit 10ms", ("cloud", "mobile"): "40mbit 10ms"})
    >>> spec.names
    ('mobile', 'cloud')
    """

    nodes: Sequence[NodeSpec]
    links: Mapping[tuple[str, str], str] | None = None
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self):
        if isinstance(self.nodes, str) or not isinstance(self.nodes, Sequence):
            raise TypeError(f"ClusterSpec: nodes must be a sequence of NodeSpec, got {type(self.nodes).__name__}")
        for node in self.nodes:
            if not isinstance(node, NodeSpec):
                raise TypeError(f"ClusterSpec: nodes must hold NodeSpec, got {type(node).__name__}")
        names = tuple(node.name for node in self.nodes)
        if not names:
            raise ValueError("ClusterSpec: nodes must hold at least one node, got none")
        if len(set(names)) != len(names):
            raise ValueError(f"ClusterSpec: nodes must have different names, got {list(names)}")
        object.__setattr__(self, "nodes", tuple(self.nodes))
        object.__setattr__(self, "names", names)
        if self.links is None:
            return
        if not isinstance(self.links, Mapping):
            raise TypeError(f"ClusterSpec: links must be a mapping of (source, target) to a text such as '20mbit 10ms', got {type(self.links).__name__}")
        for pair, text in self.links.items():
            if not (isinstance(pair, tuple) and len(pair) == 2):
                raise TypeError(f"ClusterSpec: links must map pairs of node names, got {pair!r}")
            for name in pair:
                if name not in names:
                    raise ValueError(f"ClusterSpec: link {pair} names an unknown node {name!r}{did_you_mean(str(name), names)}")
            parse_link(text)
        object.__setattr__(self, "links", dict(self.links))

    @classmethod
    def of(cls, prof: Profile) -> ClusterSpec:
        """Return the profile's own nodes and links, without limits or prices."""
        return cls([NodeSpec(name) for name in prof.nodes])

    @classmethod
    def from_toml(cls, text: str | bytes) -> ClusterSpec:
        """Read ``[[node]]`` tables (name, memory, speed, price, watts, hosts, like) and ``[[link]]`` tables (speed = "20mbit 10ms" and either
        between = ["a", "b"] or from/to); anything else raises ValueError naming the field.

        >>> ClusterSpec.from_toml('[[node]]\\nname = "a"\\n[[node]]\\nname = "b"\\nmemory = "64MB"\\n[[link]]\\nbetween = ["a", "b"]\\nspeed = "1gbit 1ms"').links
        {('a', 'b'): '1gbit 1ms', ('b', 'a'): '1gbit 1ms'}
        """
        if not isinstance(text, (str, bytes)):
            raise TypeError(f"cluster: expected TOML text, got {type(text).__name__}")
        if len(text) > _MAX_TOML_BYTES:
            raise ValueError(f"cluster: TOML must have at most {_MAX_TOML_BYTES} bytes, got {len(text)}")
        try:
            read = msgspec.toml.decode(text, type=_Toml, strict=False)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise ValueError(f"cluster: not a cluster description: {error}") from None
        nodes = [NodeSpec(**msgspec.structs.asdict(node)) for node in read.node]
        links: dict[tuple[str, str], str] = {}
        for link in read.link:
            if (link.between is None) == (link.source is None or link.target is None) or (link.between is not None and (link.source or link.target)):
                raise ValueError("cluster: a link needs either between = [a, b] or both from and to")
            pairs = [link.between, link.between[::-1]] if link.between is not None else [(link.source, link.target)]
            for pair in pairs:
                if pair in links:
                    raise ValueError(f"cluster: link {pair} is given twice")
                links[pair] = link.speed
        return cls(nodes, links if read.link else None)

    @classmethod
    def load(cls, path: str | os.PathLike) -> ClusterSpec:
        """Read a cluster.toml."""
        return cls.from_toml(Path(path).read_bytes())

    def columns(self, prof: Profile) -> list[int]:
        """Return the profile's node index of each node; ValueError names the node that was never measured."""
        columns = []
        for node in self.nodes:
            like = node.name if node.like is None else node.like
            if like not in prof.nodes:
                hint = did_you_mean(like, prof.nodes)
                raise ValueError(f"cluster: node {node.name!r} has no measurements: the profile's nodes are {list(prof.nodes)}, "
                                 f"set like= to one of them{hint}")  # fmt: skip
            columns.append(prof.nodes.index(like))
        return columns

    def network(self, prof: Profile) -> tuple[np.ndarray, np.ndarray]:
        """Return (bandwidth, delay) [N, N]: of `links`, else of the profile between nodes measured under those names."""
        n = len(self.nodes)
        bandwidth, delay = np.zeros((n, n)), np.zeros((n, n))
        if self.links is not None:
            for (source, target), text in self.links.items():
                at = self.names.index(source), self.names.index(target)
                if at[0] != at[1]:
                    bandwidth[at], delay[at] = parse_link(text)
            return bandwidth, delay
        columns = self.columns(prof)
        for a in range(n):
            for b in range(n):
                if a != b and columns[a] != columns[b]:
                    bandwidth[a, b], delay[a, b] = prof.bandwidth[columns[a], columns[b]], prof.delay[columns[a], columns[b]]
        return bandwidth, delay

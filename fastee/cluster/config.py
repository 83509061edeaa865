"""``cluster.toml``: one file for all machines of a cluster, the model, the promise, the nodes, the links."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
from torch import nn

from fastee.cluster.endpoint import check_address
from fastee.cluster.keys import Keys, load_keys, raw_key
from fastee.cluster.link import Link
from fastee.cluster.messages import Ports
from fastee.errors import ClusterError, FingerprintMismatch, did_you_mean
from fastee.nn import EarlyExit
from fastee.nn.checkpoint import load
from fastee.scheduling import QoS

_MAX_BYTES = 1 << 20
_Seconds = Annotated[float, msgspec.Meta(ge=0, lt=1e6)]
_Port = Annotated[int, msgspec.Meta(ge=1, le=65534)]


class ModelTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``[model]``: the backbone as ``package.module:callable`` (importable, or beside the cluster.toml), what ``net.save`` wrote, and the
    fingerprint that the two must give."""

    backbone: str
    checkpoint: str
    fingerprint: Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{32})?$")] = ""


class NodeTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``[[node]]``: an IP address, the control port (bulk is the next one), declared slowness >= 1, CURVE public key, metrics' port (0: none)."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    port: _Port
    host: str = "127.0.0.1"
    slowdown: Annotated[float, msgspec.Meta(ge=1, lt=1e6)] = 1.0
    public_key: str = ""
    metrics_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    metrics_host: str = "127.0.0.1"

    @property
    def at(self) -> Ports:
        """Where the node listens."""
        return Ports(self.port, self.port + 1, self.host)


class LinkTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``[[link]]``: "20mbit 10ms" in both directions ``between`` two nodes or one way ``from`` one ``to`` the other; ``emulate`` shapes it. Links with the same
    ``medium`` are one radio or network card of the node that sends: what it sends over one of them waits for what it sends over the others."""

    speed: str
    between: tuple[str, str] | None = None
    source: str | None = msgspec.field(name="from", default=None)
    target: str | None = msgspec.field(name="to", default=None)
    emulate: bool = False
    medium: Annotated[str, msgspec.Meta(max_length=64)] = ""


class Timeouts(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``[timeouts]`` in seconds: after a deadline, for a task without one, for joining, for what a leaving node has begun."""

    grace: _Seconds = 0.5
    task: _Seconds = 30.0
    start: _Seconds = 60.0
    drain: _Seconds = 30.0


class ClusterConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True, rename={"nodes": "node", "links": "link"}):
    """A whole cluster.toml; made by :func:`load_config`. ``clients`` maps names of clients to the public keys that may connect."""

    model: ModelTable
    nodes: Annotated[list[NodeTable], msgspec.Meta(min_length=1, max_length=64)]
    links: list[LinkTable] = []
    qos: dict[str, float] = {}
    timeouts: Timeouts = Timeouts()
    credit: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 8
    clients: dict[str, str] = {}
    folder: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(node.name for node in self.nodes)

    @property
    def secure(self) -> bool:
        """Whether connections are encrypted and authenticated: the nodes have public keys."""
        return bool(self.nodes[0].public_key)

    def promise(self) -> QoS:
        """Return the ``[qos]`` table as a QoS."""
        return QoS(**self.qos)

    def index(self, name: str) -> int:
        """Return a node's index; raises ``ValueError`` for a name that the file does not list."""
        if name not in self.names:
            raise ValueError(f"name: got {name!r}, expected one of {list(self.names)}{did_you_mean(name, self.names)}")
        return self.names.index(name)

    def declared_links(self, emulated: bool = False) -> dict[tuple[int, int], Link]:
        """Return the Link of every ordered pair of nodes; unshaped where the file says nothing, or with `emulated` where it is not to shape."""
        found = {(a, b): Link() for a in range(len(self.nodes)) for b in range(len(self.nodes)) if a != b}
        for link in self.links:
            speed = link.speed if link.emulate or not emulated else None
            for a, b in _pairs(link):
                found[self.names.index(a), self.names.index(b)] = Link.parse(speed, link.medium)
        return found

    def keys(self, path: str | os.PathLike | None) -> Keys | None:
        """Return this machine's keys, None where the file lists no public keys; raises ``ClusterError`` when they are needed and not given."""
        if not self.secure:
            return None
        if path is None:
            raise ClusterError("cluster: the nodes have public keys, so this process needs its own: pass --keys FILE (`fastee keys FILE` makes one)")
        return load_keys(path)

    def allowed(self) -> dict[str, str]:
        """Return the public keys that may connect -> name."""
        return {**{node.public_key: node.name for node in self.nodes}, **{key: name for name, key in self.clients.items()}} if self.secure else {}

    def network(self) -> EarlyExit:
        """Load the model on this machine; raises ``ClusterError`` naming what cannot be found, ``FingerprintMismatch`` when it is another one."""
        spec = self.model.backbone
        if self.folder not in sys.path:
            sys.path.insert(0, self.folder)
        importlib.invalidate_caches()
        try:
            backbone = pkgutil.resolve_name(spec)
        except (ValueError, ImportError, AttributeError) as error:
            raise ClusterError(
                f"cluster: model.backbone: got {spec!r}, expected package.module:callable, importable here or beside the cluster.toml: {error}"
            ) from error
        if not isinstance(backbone, nn.Module) and callable(backbone):
            backbone = backbone()
        if not isinstance(backbone, nn.Module):
            raise ClusterError(f"cluster: model.backbone: {spec!r} gave a {type(backbone).__name__}, expected a torch module")
        path = Path(self.folder, self.model.checkpoint)
        if not path.is_file():
            raise ClusterError(f"cluster: model.checkpoint: no file {str(path)!r}, expected what net.save() wrote")
        net = load(path, backbone)
        if self.model.fingerprint not in ("", net.fingerprint):
            raise FingerprintMismatch(
                f"cluster: model.fingerprint: {path.name} with {spec} gives {net.fingerprint}, expected {self.model.fingerprint}; "
                "copy the checkpoint that belongs to this cluster.toml, or the cluster.toml that belongs to the checkpoint"
            )
        return net


def _pairs(link: LinkTable) -> list[tuple[str, str]]:
    if link.between is not None:
        return [link.between, link.between[::-1]]
    return [(link.source or "", link.target or "")]


def read_config(text: str | bytes, folder: str | os.PathLike = ".") -> ClusterConfig:
    """Return the checked cluster.toml in `text`; relative paths start at `folder`. Raises ``ClusterError`` naming the key, what was got
    and what was expected.

    >>> config = read_config('''
    ... [model]
    ... backbone = "models:small"
    ... checkpoint = "small.safetensors"
    ... [[node]]
    ... name = "edge"
    ... port = 5600
    ... ''')
    >>> config.names, config.nodes[0].at.bulk
    (('edge',), 5601)
    """
    if len(text) > _MAX_BYTES:
        raise ClusterError(f"cluster.toml: got {len(text)} bytes, expected at most {_MAX_BYTES}")
    try:
        tables: dict[str, Any] = msgspec.toml.decode(text)
        if "folder" in tables:
            raise ValueError("Object contains unknown field `folder`")
        config = msgspec.convert({**tables, "folder": str(Path(folder).resolve())}, ClusterConfig)
        _check(config)
    except (msgspec.MsgspecError, UnicodeError, TypeError, ValueError, RecursionError) as error:
        raise ClusterError(f"cluster.toml: {error}") from None
    return config


def load_config(path: str | os.PathLike) -> ClusterConfig:
    """Read a cluster.toml; see :func:`read_config`. Raises ``FileNotFoundError`` when there is none."""
    return read_config(Path(path).read_bytes(), Path(path).parent)


def _check(config: ClusterConfig) -> None:
    names = config.names
    if len(set(names)) != len(names):
        raise ValueError(f"node.name: got {list(names)}, expected different names")
    known = set(QoS.__dataclass_fields__)
    for key in config.qos:
        if key not in known:
            raise ValueError(f"qos: got {key!r}, expected {sorted(known)}{did_you_mean(key, known)}")
    config.promise()
    for key in (*(n.public_key for n in config.nodes), *config.clients.values()):
        if key:
            raw_key(key)
    if len({bool(n.public_key) for n in config.nodes}) > 1:
        bare = [n.name for n in config.nodes if not n.public_key]
        raise ValueError(f"node.public_key: {bare} have none, expected one for every node or for none (`fastee keys`)")
    taken: dict[tuple[str, int], str] = {}
    for node in config.nodes:
        check_address(node.host, Keys(node.public_key, "") if node.public_key else None)
        for port in (node.port, node.port + 1, *([node.metrics_port] if node.metrics_port else [])):
            if (node.host, port) in taken:
                raise ValueError(f"node.port: {node.host}:{port} is of {taken[node.host, port]!r} and {node.name!r} (a node takes its port and the next)")
            taken[node.host, port] = node.name
    seen = set()
    for link in config.links:
        if (link.between is None) == (link.source is None or link.target is None) or (link.between is not None and (link.source or link.target)):
            raise ValueError("link: expected either between = [a, b] or both from and to")
        Link.parse(link.speed)
        for pair in _pairs(link):
            for name in pair:
                if name not in names:
                    raise ValueError(f"link: got node {name!r}, expected one of {list(names)}{did_you_mean(name, names)}")
            if pair[0] == pair[1] or pair in seen:
                raise ValueError(f"link: {pair} {'joins a node with itself' if pair[0] == pair[1] else 'is given twice'}")
            seen.add(pair)

"""Emulated links: rate and one-way delay of a directed link, kept by the sender in user space (no root, no kernel module)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastee.scheduling.links import parse_link


@dataclass(frozen=True)
class Link:
    """A directed link: ``rate`` in bit/s (inf = unshaped), one-way ``delay`` in seconds; links from one machine with the same name of a
    ``medium`` (a radio, a network card) send one after the other."""

    rate: float = float("inf")
    delay: float = 0.0
    medium: str = ""

    @classmethod
    def parse(cls, text: str | None, medium: str = "") -> Link:
        """Return the link that a text like ``"20mbit 10ms"`` means; None is an unshaped one."""
        return cls(medium=medium) if text is None else cls(*parse_link(text), medium)

    @property
    def up(self) -> bool:
        """False for a link of rate 0, over which nothing travels."""
        return self.rate > 0

    @property
    def shaped(self) -> bool:
        """Whether it has a rate or a delay to keep to."""
        return self.rate < float("inf") or self.delay > 0

    def seconds(self, nbytes: int) -> float:
        """Time one message of `nbytes` needs on the idle link: bytes*8/rate + delay."""
        return nbytes * 8 / self.rate + self.delay if self.up else float("inf")


class LinkShaper:
    """Virtual clock of one directed link: messages leave one after the other at the link's rate and arrive a delay later.

    ``departure = max(now, last departure) + bytes*8/rate``, ``delivery = departure + delay``; times are int64 nanoseconds handed in.

    >>> LinkShaper(Link(8e6, 0.010)).reserve(1000, now=0)      # 1 ms of rate, 10 ms of delay
    11000000
    """

    def __init__(self, link: Link):
        self.link = link
        self._free = 0

    def reserve(self, nbytes: int, now: int, *, urgent: bool = False) -> int:
        """Put a message on the link and return when it arrives; an urgent one (a control connection) does not queue behind bulk."""
        if not self.link.up:
            raise ValueError("link: a link of rate 0 carries nothing")
        spent = round(nbytes * 8 / self.link.rate * 1e9)
        delay = round(self.link.delay * 1e9)
        if urgent:
            return now + spent + delay
        self._free = max(now, self._free) + spent
        return self._free + delay

    def backlog(self, now: int) -> int:
        """Nanoseconds until the link is idle."""
        return max(0, self._free - now)


def media(links: Mapping[tuple[int, int], Link], machine: int) -> list[list[int]]:
    """Return the groups of machines whose links from `machine` share a medium, as ``Scheduler(media=)`` takes them.

    >>> media({(0, 1): Link(medium="radio"), (0, 2): Link(medium="radio"), (0, 3): Link()}, 0)
    [[1, 2]]
    """
    groups: dict[str, list[int]] = {}
    for (a, b), link in sorted(links.items()):
        if a == machine and link.medium:
            groups.setdefault(link.medium, []).append(b)
    return list(groups.values())


def link_table(spec: str | None | Mapping[tuple[int, int], str], nodes: int) -> dict[tuple[int, int], Link]:
    """Return a Link for every ordered pair of `nodes`; a mapping names single directed links, what it leaves out is unshaped."""
    pairs = [(a, b) for a in range(nodes) for b in range(nodes) if a != b]
    if spec is None or isinstance(spec, str):
        link = Link.parse(spec)
        return dict.fromkeys(pairs, link)
    if not isinstance(spec, Mapping):
        raise TypeError(f'link: got {type(spec).__name__}, expected "20mbit 10ms" or a dict {{(source, target): text}}')
    unknown = [pair for pair in spec if pair not in pairs]
    if unknown:
        raise ValueError(f"link: {unknown[0]!r} is not a pair of different nodes in 0..{nodes - 1}")
    return {pair: Link.parse(spec.get(pair)) for pair in pairs}

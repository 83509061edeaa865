"""The shapes every head benchmark runs over: what real exits look like, from one image to a full batch, from 2 to 1000 classes."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """The input of an exit head: x is [B, *dims], pooled by `pool` to D features, C classes."""

    pool: str
    B: int
    dims: tuple[int, ...]
    C: int

    @property
    def D(self) -> int:
        return self.dims[0] if self.pool in ("mean", "none") else self.dims[-1]

    @property
    def read(self) -> int:
        """Elements of x that the pooling must look at."""
        inner = 1
        for d in self.dims:
            inner *= d
        return self.B * (self.D if self.pool in ("cls", "last") else inner)

    def __str__(self) -> str:
        tail = f" {self.pool}" if self.pool not in ("mean", "none") else ""
        return "x".join(map(str, (self.B, *self.dims))) + f"->{self.C}{tail}"


HEADLINE = Shape("mean", 1, (256, 8, 8), 10)

CONV = ((256, 8, 8), (64, 32, 32), (512, 4, 4))
BATCHES = (1, 4, 32, 64, 256)

SMALL = [
    HEADLINE,
    Shape("mean", 32, (256, 8, 8), 10),
    Shape("mean", 1, (64, 32, 32), 10),
    Shape("mean", 32, (64, 32, 32), 10),
    Shape("mean", 1, (512, 4, 4), 100),
    Shape("mean", 32, (512, 4, 4), 100),
    Shape("none", 1, (768,), 2),
    Shape("none", 32, (768,), 2),
    Shape("none", 1, (1024,), 1000),
    Shape("none", 32, (1024,), 1000),
    Shape("mean_tokens", 1, (128, 768), 2),
    Shape("cls", 32, (128, 768), 2),
]

ALL = list(
    dict.fromkeys(
        [
            *SMALL,
            *(Shape("mean", B, dims, C) for dims in CONV for C in (10, 1000) for B in BATCHES),
            *(Shape("none", B, (D,), C) for D in (64, 256, 1024, 4096) for C in (2, 10, 100, 1000) for B in BATCHES),
            *(Shape(pool, B, (128, 768), 2) for pool in ("mean_tokens", "cls", "last") for B in (1, 4, 32, 64)),
        ]
    )
)


def select(which: str) -> list[Shape]:
    """Return the shapes of ``--shapes headline|small|all``."""
    sets = {"headline": [HEADLINE], "small": SMALL, "all": ALL}
    if which not in sets:
        raise ValueError(f"shapes: got {which!r}, expected one of {', '.join(sets)}")
    return sets[which]

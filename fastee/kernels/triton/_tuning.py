"""Tile sizes by GPU. Nothing is tuned while a program runs: `heuristics/<gpu>.json` overrides the defaults below.

No field may depend on the number of rows: a row's sums would then depend on its batch.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path

HERE = Path(__file__).parent / "heuristics"


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Tile sizes, warps and pipeline stages; the defaults fit 160 KB of shared memory (A100 and later)."""

    row_classes: int = 64  # a head of at most so many classes: one program per row, products without tensor cores
    row_elements: int = 8192  # weights that such a program holds at once
    row_warps: int = 4
    tile_rows: int = 64
    tile_classes: int = 32  # 128 programs of 64 x 32 for 256 rows and 1,000 classes: one on each of some 132 multiprocessors
    tile_features: int = 64
    tile_warps: int = 4
    tile_stages: int = 3
    wide_classes: int = 1024  # above it: vocabulary tiles
    bulk_copies: bool = False  # vocabulary tiles through the copy engine of Hopper and later (TMA); unmeasured, hence off
    merge_tiles: int = 64  # more tiles are merged in two levels: one program would merge 64 rows of 501
    vocabulary_classes: int = 256
    vocabulary_features: int = 64
    vocabulary_warps: int = 8
    vocabulary_stages: int = 3
    pooled_bytes: int = 1 << 18  # a program that would pool more than this again for every tile reads pooled features instead
    state_columns: int = 8192  # logits of one row condensed by one program
    group_elements: int = 8192  # longer quantisation groups are read twice
    group_tile: int = 2048  # short groups share a program
    copy_bytes: int = 8192
    compact_block: int = 4096
    step_block: int = 1024  # flags at once where a head's last program compacts: 4,096 cost it 255 registers
    compact_single: int = 16384  # rows that one program compacts; more take a second launch


def slug(name: str) -> str:
    """Return the file stem for a device name: ``NVIDIA H200`` -> ``nvidia-h200``."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


@functools.cache
def tuning(name: str) -> Tuning:
    """Return the heuristics for a device name; unknown devices get the longest file whose name begins theirs, else the defaults."""
    fits = [p for p in HERE.glob("*.json") if slug(name).startswith(p.stem)]
    if not fits:
        return Tuning()
    return Tuning(**json.loads(max(fits, key=lambda p: len(p.stem)).read_text()))

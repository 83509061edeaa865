"""lz4: the fastest general codec, block format, on raw activations."""

from __future__ import annotations

from . import Peer, _codec

PEER = Peer("4.4.5", "BSD-3-Clause", (("lz4==4.4.5",),))


def coders(size: int) -> list[_codec.Coder]:
    import lz4.block

    return [("lz4", lz4.block.compress, lz4.block.decompress)]


CASES = _codec.both(coders)

"""zstandard: a general codec, fast and default levels, on raw activations."""

from __future__ import annotations

from . import Peer, _codec

PEER = Peer("0.25.0", "BSD-3-Clause", (("zstandard==0.25.0",),))


def coders(size: int) -> list[_codec.Coder]:
    import zstandard

    decode = zstandard.ZstdDecompressor().decompress
    return [(f"zstd_{level}".replace("-", "fast"), zstandard.ZstdCompressor(level=level).compress, decode) for level in (1, 3, -5)]


CASES = _codec.both(coders)

"""blosc2: shuffles bytes or bits of the values before a general codec, one thread."""

from __future__ import annotations

from functools import partial

from . import Peer, _codec

PEER = Peer("4.14.1", "BSD-3-Clause", (("blosc2==4.14.1",),))


def coders(size: int) -> list[_codec.Coder]:
    import blosc2

    pick = {
        "blosc2_lz4_shuffle": (blosc2.Codec.LZ4, 5, blosc2.Filter.SHUFFLE),
        "blosc2_lz4_bits": (blosc2.Codec.LZ4, 5, blosc2.Filter.BITSHUFFLE),
        "blosc2_zstd_shuffle": (blosc2.Codec.ZSTD, 1, blosc2.Filter.SHUFFLE),
    }
    return [
        (
            name,
            partial(blosc2.compress2, typesize=size, codec=codec, clevel=level, filters=[*[blosc2.Filter.NOFILTER] * 5, how], nthreads=1),
            partial(blosc2.decompress2, nthreads=1),
        )
        for name, (codec, level, how) in pick.items()
    ]


CASES = _codec.both(coders)

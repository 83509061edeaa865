"""zipnn: separates the exponents of model weights and Huffman-codes them; the nearest peer of pack_planes. One thread."""

from __future__ import annotations

from . import Peer, _codec

PEER = Peer("0.5.4", "MIT", (("zipnn==0.5.4", "zstandard==0.25.0"),))


def coders(size: int) -> list[_codec.Coder]:
    from zipnn import ZipNN

    coder = ZipNN(input_format="byte", bytearray_dtype={2: "bfloat16", 4: "float32"}[size], threads=1)
    # it reorders the bytes of its input in place: a copy is part of its price
    return [("zipnn", lambda data: coder.compress(data.tobytes()), coder.decompress)]


CASES = _codec.both(coders)

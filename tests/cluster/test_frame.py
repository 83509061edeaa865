import struct

import google_crc32c
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastee.cluster import codec as codecs
from fastee.cluster.frame import (
    DTYPES,
    HEADER_BYTES,
    MAX_PAYLOAD,
    NO_DEADLINE,
    VERSION,
    Flag,
    Frame,
    Kind,
    TensorEntry,
    decode,
    encode,
)
from fastee.errors import FingerprintMismatch, FrameError

SHAPES = [(), (0,), (1,), (1, 3), (2, 0, 4), (3, 5), (1, 2, 3, 4)]
FIELDS = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(list(Kind)),
        "task": st.integers(0, 2**64 - 1),
        "sender": st.integers(0, 2**64 - 1),
        "origin": st.integers(0, 2**64 - 1),
        "fingerprint": st.binary(min_size=16, max_size=16),
        "segment": st.integers(0, 65535),
        "exit": st.integers(-1, 32767),
        "codec": st.integers(0, 255),
        "flags": st.sampled_from([Flag.NONE, Flag.EXITS_OFF, Flag.FORCED, Flag.EXITS_OFF | Flag.FORCED]),
        "hops": st.integers(0, 65535),
        "time_left": st.integers(-(2**63), NO_DEADLINE),
        "wire_bytes": st.integers(0, 2**64 - 1),
        "route": st.binary(max_size=64),
    }
)


def tensor(dtype, shape, seed=0):
    """Random bits of a dtype: NaN payloads, -0 and denormals included."""
    count = torch.Size(shape).numel()
    bits = torch.randint(0, 2 if dtype is torch.bool else 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return bits.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def same_bits(a, b):
    raw = lambda t: t.contiguous().reshape(-1).view(torch.uint8)
    return a.dtype == b.dtype and a.shape == b.shape and (not a.numel() or torch.equal(raw(a), raw(b)))


def joined(frame, lead=b""):
    """The frame's bytes in one buffer that starts `len(lead)` bytes in, so that its address is as odd as one wishes."""
    header, payload = encode(frame)
    return memoryview(lead + header + bytes(payload))[len(lead) :]


def sealed(data):
    """`data` with a CRC that is right, so that the checks behind it are reached."""
    data = bytearray(data)
    data[HEADER_BYTES - 4 : HEADER_BYTES] = struct.pack("<I", google_crc32c.value(bytes(data[: HEADER_BYTES - 4] + data[HEADER_BYTES:])))
    return bytes(data)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tensors_round_trip_bit_for_bit_from_any_address(dtype, shape):
    x = tensor(dtype, shape)
    table, payload = codecs.pack((x,))
    for lead in (b"", b"1", b"123"):
        (back,) = codecs.unpack(decode([joined(Frame(Kind.TASK, tensors=table, payload=payload), lead)]))
        assert same_bits(back, x)


def test_a_carry_of_many_tensors_round_trips():
    carry = tuple(tensor(dtype, shape, seed=i) for i, (dtype, shape) in enumerate(zip(DTYPES.values(), SHAPES, strict=False)))
    table, payload = codecs.pack(carry)
    back = codecs.unpack(decode(encode(Frame(Kind.TASK, tensors=table, payload=payload))))
    assert all(same_bits(a, b) for a, b in zip(carry, back, strict=True))


def test_a_strided_tensor_travels_as_its_values():
    x = torch.arange(24.0).reshape(4, 6).t()[::2]
    table, payload = codecs.pack((x,))
    assert torch.equal(codecs.unpack(decode(encode(Frame(Kind.TASK, tensors=table, payload=payload))))[0], x)


@settings(deadline=None, max_examples=50)
@given(fields=FIELDS, payload=st.binary(max_size=300))
def test_every_header_field_round_trips(fields, payload):
    frame = Frame(payload=payload, **fields)
    header, body = encode(frame)
    assert len(header) + len(body) == frame.nbytes
    for parts in ([header, body], [header + body]):
        back = decode(parts)
        assert all(getattr(back, name) == value for name, value in fields.items())
        assert bytes(back.payload) == payload


def valid_bytes():
    table, payload = codecs.pack((torch.randn(2, 3, 4), torch.ones(5, dtype=torch.bool)), "int8")
    return bytes(joined(Frame(Kind.TASK, task=3, segment=1, route=bytes([0, 1, 2]), tensors=table, payload=payload)))


def attempt(data):
    """Decode and unpack; anything but FrameError is a failure of the test."""
    try:
        return codecs.unpack(decode([data]))
    except FrameError as error:
        assert len(str(error)) > 10
        return None


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=400))
def test_random_bytes_are_refused(data):
    assert attempt(data) is None
    attempt(sealed(b"FSTE" + struct.pack("<H", VERSION) + data.ljust(HEADER_BYTES, b"\0")))


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_every_bit_flip_and_truncation_is_refused(data):
    good = valid_bytes()
    assert attempt(good) is not None
    bad = bytearray(good)
    bad[data.draw(st.integers(0, len(good) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert attempt(bytes(bad)) is None
    assert attempt(good[: data.draw(st.integers(0, len(good) - 1))]) is None
    assert attempt(good + b"\0") is None


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_damage_under_a_right_checksum_is_never_another_exception(data):
    bad = bytearray(valid_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        bad[data.draw(st.integers(0, HEADER_BYTES + 60))] = data.draw(st.integers(0, 255))
    attempt(sealed(bad))


@pytest.mark.parametrize(
    ("entry", "payload", "why"),
    [
        (TensorEntry(torch.float32, (2, 3), 0, 20), bytes(20), "needs 24"),
        (TensorEntry(torch.float32, (2, 3), 1, 24), bytes(24), "needs 14"),
        (TensorEntry(torch.float32, (2, 3), 200, 24), bytes(24), "codec id 200"),
        (TensorEntry(torch.int64, (2, 3), 1, 14), bytes(14), "cannot be packed as int8"),
        (TensorEntry(torch.float32, (), 1, 5), bytes(5), "cannot be packed as int8"),
        (TensorEntry(torch.bool, (2,), 0, 2), b"\x01\x02", "bool"),
        (TensorEntry(torch.float32, (4294967295, 4294967295, 0), 0, 0), b"", "beyond the cap"),
        (TensorEntry(torch.uint8, (1 << 30, 1 << 5, 1), 0, 4), bytes(4), "needs 34359738368"),
        (TensorEntry(torch.int8, (1 << 31,), 0, 1 << 31), b"", "payload"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_a_table_that_contradicts_the_payload_is_refused(entry, payload, why):
    with pytest.raises(FrameError, match=why):
        codecs.unpack(decode(encode(Frame(Kind.TASK, tensors=(entry,), payload=payload))))


def test_a_huge_length_is_refused_before_anything_is_allocated():
    data = bytearray(valid_bytes())
    at = HEADER_BYTES - 12
    assert struct.unpack_from("<Q", data, at)[0] < 200  # the field that this test means to damage
    struct.pack_into("<Q", data, at, 1 << 60)
    with pytest.raises(FrameError, match=f"exceeds the cap of {MAX_PAYLOAD}"):
        decode([sealed(data)])


@pytest.mark.parametrize(("at", "value", "why"), [(0, b"X", "magic"), (4, b"\x63", "version 99"), (6, b"\x4d", "77"), (7, b"\x80", "0x80|128"), (55, b"\1", "reserved")])
def test_foreign_headers_are_refused_with_the_reason(at, value, why):
    data = bytearray(valid_bytes())
    data[at : at + 1] = value
    with pytest.raises(FrameError, match=why):
        decode([sealed(data)])


def test_stray_bytes_behind_the_table_are_refused():
    header, payload = encode(Frame(Kind.TASK, tensors=codecs.pack((torch.zeros(3),))[0], payload=bytes(12)))
    data = bytearray(header + b"\0" * 4 + bytes(payload))
    struct.pack_into("<I", data, HEADER_BYTES - 16, len(header) - HEADER_BYTES + 4)
    with pytest.raises(FrameError, match="4 stray bytes"):
        decode([sealed(data)])


def test_another_models_frame_is_refused():
    parts = encode(Frame(Kind.TASK, fingerprint=b"a" * 16))
    assert decode(parts, b"a" * 16).fingerprint == b"a" * 16
    with pytest.raises(FingerprintMismatch, match="load the same net"):
        decode(parts, b"b" * 16)


@pytest.mark.parametrize(
    "frame",
    [
        Frame(Kind.TASK, route=bytes(65)),
        Frame(Kind.TASK, task=-1),
        Frame(Kind.TASK, hops=1 << 16),
        Frame(Kind.TASK, tensors=(TensorEntry(torch.complex64, (1,), 0, 8),), payload=bytes(8)),
        Frame(Kind.TASK, tensors=(TensorEntry(torch.float32, (1,) * 9, 0, 4),), payload=bytes(4)),
    ],
    ids=["route", "task", "hops", "dtype", "dimensions"],
)
def test_what_does_not_fit_a_frame_is_not_sent(frame):
    with pytest.raises(FrameError):
        encode(frame)


@pytest.mark.parametrize("parts", [[], [b"a", b"b", b"c"]])
def test_a_message_has_one_or_two_parts(parts):
    with pytest.raises(FrameError, match="parts"):
        decode(parts)

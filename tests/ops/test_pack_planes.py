"""pack_planes, unpack_planes: bit for bit back, the same bytes from everybody, and no crash on any bytes."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastee import ops, reference
from fastee.kernels import numba

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [0, 1, 7, 63, 64, 65, 511, 512, 1025, 2047, 2048, 2049, 5000]


def bits(x):
    return x.reshape(-1).view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def any_bits(count, dtype, seed=0):
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype)


def activations(count, dtype):
    x = torch.randn(count, generator=torch.Generator().manual_seed(1))
    x[::5] = 0.0
    x[3::97] *= 1e-6 if count % 3 else 1e-3  # escapes far below the others, as bytes, or nearer, as nibbles
    return x.relu().to(dtype) if count % 2 else x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_bytes_are_those_of_the_definition_and_come_back(way, size, dtype):
    for x in (activations(size, dtype), any_bits(size, dtype), torch.zeros(size, dtype=dtype)):
        p = ops.pack_planes(x, backend=way)
        assert torch.equal(p.data, reference.pack_planes(x))
        back = ops.unpack_planes(p, backend=way)
        assert back.dtype == dtype and torch.equal(bits(back), bits(x))
        assert torch.equal(bits(reference.unpack_planes(p.data)), bits(x))


def test_one_packs_another_unpacks(every_isa):
    for dtype in DTYPES:
        x = torch.cat([activations(5000, dtype), any_bits(3000, dtype)])
        packed = every_isa(lambda x=x: ops.pack_planes(x).data)
        for _, data in packed:
            assert torch.equal(data, packed[0][1])
            for isa, back in every_isa(lambda data=data: ops.unpack_planes(data)):
                assert torch.equal(bits(back), bits(x)), isa


def test_shapes_ranges_and_strides(way):
    x = activations(6 * 700, torch.bfloat16).view(6, 700)
    p = ops.pack_planes(x, backend=way)
    assert p.nbytes == p.data.numel() and torch.equal(ops.unpack_planes(p, backend=way), x)
    for start, stop in ((0, 1), (2000, 2070), (2048, 4096), (4199, 4200), (17, 17), (0, 4200)):
        assert torch.equal(bits(ops.unpack_planes(p.data, start, stop, backend=way)), bits(x)[start:stop])
    assert torch.equal(ops.unpack_planes(ops.pack_planes(x.t(), backend=way), backend=way), x.t())
    assert ops.unpack_planes(ops.pack_planes(torch.tensor(1.5), backend=way), backend=way).shape == ()


def test_the_short_way_answers_as_the_checked_one():
    x = activations(6 * 700, torch.bfloat16)
    p = ops.pack_planes(x.view(2, 3, 700))
    gap = torch.stack([p.data, p.data], 1)[:, 0]  # the same bytes, every second one in memory
    parameter = torch.nn.Parameter(x)
    for h in (x, x.view(60, 70).t(), parameter, x[:0], x[:0].view(0, 3), torch.tensor(1.5), x.view(60, 70)[:, ::2]):
        short, checked = ops.pack_planes(h), ops.pack_planes(h, backend="cpu")
        assert torch.equal(short.data, checked.data) and short.shape == checked.shape == tuple(h.shape)
        assert torch.equal(bits(ops.unpack_planes(short)), bits(h.detach())) and ops.unpack_planes(short).shape == h.shape
    for args in ((p,), (p.data,), (gap,), (p._replace(data=gap),), (p, 0, None), (p, 10, 20), (p, 0, 4200), (p, 4200), (p.data, 2047, 2049), (p, 3, 3)):
        short, checked = ops.unpack_planes(*args), ops.unpack_planes(*args, backend="cpu")
        assert short.shape == checked.shape and short.dtype == checked.dtype and torch.equal(bits(short), bits(checked))
    empty = ops.pack_planes(x[:0])
    assert ops.unpack_planes(empty._replace(shape=(1 << 40, 0, 5))).shape == (1 << 40, 0, 5)
    for wrong in (p._replace(shape=(-2, -2100)), empty._replace(shape=(1 << 32, 1 << 32)), p._replace(shape=(4200, 1 << 62, 4))):
        with pytest.raises(ValueError, match="p.shape must hold"):
            ops.unpack_planes(wrong)
    for start, stop in ((-1, None), (0, -1), (5, 4), (0, 4201), (1 << 63, None)):
        with pytest.raises(ValueError, match="start and stop must lie in order"):
            ops.unpack_planes(p, start, stop)


@pytest.mark.parametrize(("reach", "form"), [(0, 2), (15, 2), (16, 1)])
def test_escapes_are_nibbles_up_to_fifteen_apart(way, reach, form):
    exponents = torch.arange(2048) % 7 + 200
    exponents[[5, 900, 2000]] = torch.tensor([10 + reach, 10, 10 + reach])
    x = (exponents << 7).to(torch.int16).view(torch.bfloat16)
    p = ops.pack_planes(x, backend=way)
    block = p.data[24:].tolist()
    assert block[7:12] == [form, 3, 0, 10 if form == 2 else 0, 0]
    assert block[12 + 768 + 2048 :] == ([reach, reach, 0, 0] if form == 2 else [10 + reach, 10, 10 + reach, 0])
    assert torch.equal(bits(ops.unpack_planes(p, backend=way)), bits(x))
    p.data[24 + 10] = 250  # damaged: a lowest exponent so high that the nibbles pass 255 and come round
    assert torch.equal(bits(ops.unpack_planes(p, backend=way)), bits(reference.unpack_planes(p.data)))


def test_it_shrinks_what_looks_like_activations_and_nothing_grows_by_much():
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    for dtype, most in ((torch.bfloat16, 0.70), (torch.float32, 0.85), (torch.float16, 0.89)):
        assert ops.pack_planes(x.relu().to(dtype)).nbytes < most * x.numel() * dtype.itemsize
    noise = any_bits(1 << 16, torch.bfloat16)
    assert ops.pack_planes(noise).nbytes < 1.005 * noise.nbytes


@given(st.binary(max_size=3000), st.sampled_from(DTYPES))
@settings(max_examples=50, deadline=None)
def test_any_bits_survive(raw, dtype):
    x = torch.frombuffer(bytearray(raw + bytes(4 - len(raw) % 4)), dtype=dtype)
    p = ops.pack_planes(x)
    assert torch.equal(bits(ops.unpack_planes(p)), bits(x)) and torch.equal(p.data, reference.pack_planes(x))


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_damaged_bytes_never_crash(data):
    good = ops.pack_planes(activations(data.draw(st.sampled_from([1500, 3000])), data.draw(st.sampled_from(DTYPES)))).data.clone()
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, min(len(good) - 1, data.draw(st.sampled_from([40, 10_000])))))] = data.draw(st.integers(0, 255))
    bad = good[: data.draw(st.integers(0, len(good)))] if data.draw(st.booleans()) else good
    results = []
    for backend in ("cpu", "numba", "reference") if numba.missing() is None else ("cpu", "reference"):
        try:
            results.append(bits(ops.unpack_planes(bad, backend=backend)))
        except ValueError as why:
            assert str(why).startswith("unpack_planes: data holds no packed planes")
            results.append(None)
    assert all((results[0] is None) == (r is None) and (r is None or torch.equal(results[0], r)) for r in results)


def test_bad_input():
    p = ops.pack_planes(torch.zeros(2000))
    for call, error, message in (
        (lambda: ops.pack_planes(torch.zeros(3).double()), TypeError, "pack_planes: h must be float32 or bfloat16 or float16 [...], got float64 [3]"),
        (lambda: ops.unpack_planes(b"FPLN"), TypeError, "unpack_planes: p must be a PackedPlanes or a uint8 tensor [n], got bytes b'FPLN'"),
        (lambda: ops.unpack_planes(p.data.view(2, -1)), ValueError, "unpack_planes: data must be uint8 [n], got uint8 [2"),
        (lambda: ops.unpack_planes(p._replace(shape=(3,))), ValueError, "unpack_planes: p.shape must hold the 2000 packed values, got [3]"),
        (lambda: ops.unpack_planes(p, 5, 2001), ValueError, "unpack_planes: start and stop must lie in order within the 2000 packed values, got 5 and 2001"),
        (lambda: ops.unpack_planes(p.data[:-4]), ValueError, "unpack_planes: data holds no packed planes: "),
        (lambda: ops.unpack_planes(p.data[:3]), ValueError, "unpack_planes: data holds no packed planes: "),
        (lambda: ops.unpack_planes(p.data.flip(0)), ValueError, "unpack_planes: data holds no packed planes: "),
    ):
        with pytest.raises(error, match="^" + re.escape(message)):
            call()

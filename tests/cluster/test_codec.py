import pytest
import torch

from fastee.cluster import codec as codecs
from fastee.cluster.codec import CODECS, Codec, pack, packed_bytes, register, unpack
from fastee.cluster.frame import Frame, Kind, TensorEntry, decode, encode
from fastee.errors import FrameError


def through_the_wire(carry, codec):
    table, payload = pack(carry, codec)
    return unpack(decode(encode(Frame(Kind.TASK, tensors=table, payload=payload))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_int8_keeps_values_within_half_a_step(dtype):
    x = (torch.randn(5, 7, 9) * torch.tensor([1e-3, 1, 10, 100, 1e4]).view(5, 1, 1)).to(dtype)
    (back,) = through_the_wire((x,), "int8")
    assert back.dtype == dtype and back.shape == x.shape
    step = x.float().abs().amax((1, 2), keepdim=True) / 127
    # Half a step of the int8 grid plus one rounding to the tensor's own dtype.
    assert ((back.float() - x.float()).abs() <= step * 0.5001 + x.float().abs() * torch.finfo(dtype).eps).all()


def test_int8_leaves_integers_masks_and_short_rows_exact():
    carry = (torch.randn(2, 3), torch.randint(0, 9, (2, 64)), torch.rand(2, 64) > 0.5, torch.tensor(2.5))
    assert all(torch.equal(a, b) for a, b in zip(carry, through_the_wire(carry, "int8"), strict=True))


def test_bytes_are_counted_with_scales():
    x = torch.randn(4, 100)
    assert packed_bytes((x,), "raw") == 1600
    assert packed_bytes((x,), "int8") == 4 * 4 + 400
    table, payload = pack((x,), "int8")
    frame = Frame(Kind.TASK, tensors=table, payload=payload)
    assert frame.nbytes == sum(len(bytes(p)) for p in encode(frame))


def test_a_carry_may_need_gradients():
    x = torch.randn(2, 16, requires_grad=True)
    assert torch.equal(through_the_wire((x,), "raw")[0], x.detach())


def test_an_unknown_codec_is_named():
    with pytest.raises(ValueError, match="got 'int9'.*did you mean 'int8'"):
        pack((torch.zeros(1),), "int9")
    with pytest.raises(TypeError, match="tensors only"):
        pack((1.5,))


def test_a_new_codec_is_one_entry_and_ids_are_never_reused():
    half = Codec(
        77,
        "half",
        accepts=lambda x: x.dtype is torch.float32,
        size=lambda dtype, shape: codecs._numel(shape) * 2,
        pack=lambda x: [codecs._bytes_of(x.half())],
        unpack=lambda view, entry: codecs._load(view, torch.float16, entry.shape).float(),
    )
    register(half)
    try:
        x = torch.randn(3, 5)
        assert torch.equal(through_the_wire((x,), "half")[0], x.half().float())
        with pytest.raises(ValueError, match="must be free"):
            register(half)
    finally:
        del CODECS["half"], codecs._BY_ID[77]


@pytest.mark.parametrize("codec,step", [("int4", 1 / 14), ("fp8_e4m3", 1 / 16), ("bf16", 1 / 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coarser_codecs_keep_values_within_half_a_step(codec, step, dtype):
    x = torch.randn(5, 3, 9, generator=torch.Generator().manual_seed(1)).to(dtype)
    table, payload = pack((x,), codec)
    assert len(payload) == table[0].nbytes == packed_bytes((x,), codec) == 5 * {"int4": 4 + 14, "fp8_e4m3": 4 + 27, "bf16": 54}[codec]
    (back,) = through_the_wire((x,), codec)
    assert back.dtype == dtype and back.shape == x.shape
    assert ((back - x).abs() <= (step + 1 / 256) * x.abs().flatten(1).amax(1)[:, None, None]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_planes_are_lossless(dtype):
    x = torch.randn(7, 300, generator=torch.Generator().manual_seed(2)).relu().to(dtype)
    x[0, :4] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-40])
    carry = (x, torch.ones(9), torch.arange(400))
    back = through_the_wire(carry, "planes")
    assert all(torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)) for a, b in zip(carry, back, strict=True))
    assert packed_bytes((x,), "planes") < x.numel() * x.itemsize


def test_planes_that_contradict_their_table_are_refused():
    table, payload = pack((torch.randn(4, 256),), "planes")
    for entry, data in (
        (TensorEntry(torch.float32, (4, 255), 5, len(payload)), payload),
        (TensorEntry(torch.float64, (4, 256), 5, len(payload)), payload),
        (TensorEntry(torch.bfloat16, (4, 256), 5, len(payload)), payload),
        (TensorEntry(torch.float32, (4, 256), 5, len(payload) - 8), payload[:-8]),
        (TensorEntry(torch.float32, (4, 256), 5, 8), payload[:8]),
    ):
        with pytest.raises(FrameError):
            unpack(Frame(Kind.TASK, tensors=(entry,), payload=bytes(data)))

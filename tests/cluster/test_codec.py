import pytest
import torch

from fastee.cluster import codec as codecs
from fastee.cluster.codec import CODECS, Codec, pack, packed_bytes, register, unpack
from fastee.cluster.frame import Frame, Kind, decode, encode


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

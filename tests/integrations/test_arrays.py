"""The ops for arrays of any kind: NumPy in, NumPy out; a strange kind through DLPack alone; no copies; the ops' own errors."""

import numpy as np
import pytest
import torch

import fastee
from fastee.integrations import arrays

x, w, b = (np.random.default_rng(3).standard_normal(s).astype("f") for s in ((7, 8, 3, 3), (5, 8), 5))


class Space:
    """The least that the array API asks of a namespace here."""

    @staticmethod
    def from_dlpack(t):
        return Strange(torch.from_dlpack(t))


class Strange:
    def __init__(self, t):
        self.t = t

    def __dlpack__(self, **named):
        return self.t.__dlpack__(**named)

    def __dlpack_device__(self):
        return self.t.__dlpack_device__()

    def __array_namespace__(self):
        return Space


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, lambda a: Strange(torch.from_numpy(a))])
def test_results_are_of_the_kind_that_came_in(kind):
    out = arrays.exit_step(kind(x), kind(w), kind(b), "mean", None, "margin", 0.3, logits=True)
    want = fastee.ops.exit_step(*map(torch.from_numpy, (x, w, b)), "mean", None, "margin", 0.3, logits=True)
    plain = lambda a: np.asarray(a.t if isinstance(a, Strange) else a)
    for name in ("label", "confidence", "exits", "index", "logits"):
        assert type(getattr(out, name)) is type(kind(x)) and np.array_equal(plain(getattr(out, name)), getattr(want, name)), name
    assert out.count == want.count and np.array_equal(plain(out.stats.entropy), want.stats.entropy)
    assert np.array_equal(plain(arrays.pool(kind(x))), fastee.ops.pool(torch.from_numpy(x)))


def locked(a):
    a = a.copy()
    a.flags.writeable = False
    return a


class Fleeting(Strange):
    """Lends memory that dies with the capsule, as a library does that computes when it is asked."""

    def __dlpack__(self, **named):
        return self.t.clone().__dlpack__(**named)


@pytest.mark.skipif(fastee.native.hot is None, reason="native parts are not built")
@pytest.mark.parametrize("kind", [np.asarray, locked, torch.from_numpy, lambda a: Strange(torch.from_numpy(a)), lambda a: Fleeting(torch.from_numpy(a))])
def test_heads_read_arrays_in_place(kind, monkeypatch):
    def never(value):
        raise AssertionError(f"{type(value)} became a tensor")

    monkeypatch.setattr(arrays, "to_torch", never)
    gain = np.linspace(0.5, 1.5, 8, dtype="f")
    want = fastee.ops.exit_step(*map(torch.from_numpy, (x, w, b)), norm=fastee.ops.Norm("layer", torch.from_numpy(gain), None, 1e-5), logits=True)
    out = arrays.exit_step(kind(x), kind(w), kind(b), norm=fastee.ops.Norm("layer", kind(gain), None, 1e-5), logits=True)
    for got, wanted in zip((out.logits, out.index, out.stats.lse, out.stats[2]), (want.logits, want.index, want.stats.lse, want.stats.margin), strict=True):
        got = got.t if isinstance(got, Strange) else got
        assert np.array_equal(got, wanted)
    assert np.array_equal(arrays.exit_head(x[::2], kind(w), pool="mean").label, fastee.ops.exit_head(torch.from_numpy(x[::2]), torch.from_numpy(w)).label)


def test_results_outlive_what_they_were_made_from():
    label = arrays.exit_head(x, w, b).label
    want = label.copy()
    for _ in range(50):
        arrays.exit_head(-x, w, b)
    assert np.array_equal(label, want)


def test_quantised_rows_go_round():
    rows = x.reshape(7, -1)
    q = arrays.quantize_rows(rows, "int8")
    assert isinstance(q.data, np.ndarray) and np.array_equal(arrays.dequantize_rows(q), fastee.ops.dequantize_rows(fastee.ops.quantize_rows(torch.from_numpy(rows), "int8")))
    head = arrays.exit_head(rows, arrays.quantize_rows(np.ones((4, rows.shape[1]), "f")), pool="none")
    assert head.label.tolist() == [0] * 7 and type(head.confidence) is np.ndarray
    packed = arrays.pack_planes(x)
    assert packed.nbytes > 0 and np.array_equal(arrays.unpack_planes(packed), x)
    assert np.array_equal(arrays.gather_rows(rows, np.array([2, 2, 0])), rows[[2, 2, 0]])


def test_memory_is_shared_but_for_what_may_not_be_written():
    assert arrays.to_torch(x).data_ptr() == x.ctypes.data
    locked = x.copy()
    locked.flags.writeable = False
    assert arrays.to_torch(locked).data_ptr() != locked.ctypes.data
    assert np.array_equal(arrays.pool(locked), arrays.pool(x))


@pytest.mark.parametrize("pool, shape", [("mean", (0, 8, 3, 3)), ("cls", (0, 4, 8)), ("none", (0, 8))])
def test_empty_arrays_whatever_their_strides(pool, shape):
    empty = np.random.default_rng(0).standard_normal(shape).astype("f")  # numpy: strides of 0
    assert arrays.exit_step(empty, w, b, pool).label.shape == (0,)


def test_errors_are_the_ops():
    with pytest.raises(TypeError, match="exit_head: x must be .* got int64"):
        arrays.exit_head(np.ones((2, 8), "l"), w, pool="none")
    with pytest.raises(TypeError, match="x: builtins.list has no array namespace"):
        arrays.exit_head([[1.0]], w)

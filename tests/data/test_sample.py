import hashlib
import json

import numpy as np
import pytest
import torch

from fastee import data
from fastee.data import demo, sample
from fastee.errors import CheckpointMismatch

NAME = "fashion_mnist_sample"
SIZES = {"train": 5000, "val": 3000, "test": 2000}


@pytest.mark.parametrize("split", SIZES)
def test_load_gives_normalised_images_and_labels(split):
    images, labels = data.load(NAME, split).tensors
    assert images.shape == (SIZES[split], 1, 28, 28) and images.dtype == torch.float32
    assert labels.shape == (SIZES[split],) and labels.dtype == torch.int64
    assert abs(float(images.mean())) < 0.03 and abs(float(images.std()) - 1) < 0.03


def test_every_split_holds_equally_many_of_each_class():
    for split, size in SIZES.items():
        counts = torch.bincount(data.load(NAME, split).tensors[1], minlength=10)
        assert counts.tolist() == [size // 10] * 10


def test_no_image_stands_in_two_splits_or_twice_in_one():
    seen = [image.numpy().tobytes() for split in SIZES for image in data.load(NAME, split, pixels=True).tensors[0]]
    assert len(set(seen)) == len(seen) == sum(SIZES.values())


def test_pixels_are_the_normalised_images_before_normalisation():
    mean, std = data.normalisation(NAME)
    pixels = data.load(NAME, "test", pixels=True).tensors[0]
    assert pixels.dtype == torch.uint8 and pixels.max() == 255 and pixels.min() == 0
    assert torch.equal((pixels.float() / 255 - mean) / std, data.load(NAME, "test").tensors[0])


def test_loaded_tensors_are_the_callers_own():
    data.load(NAME, "val", pixels=True).tensors[0].zero_()
    assert data.load(NAME, "val", pixels=True).tensors[0].any()


def test_packed_file_is_small_and_has_its_licence():
    assert (sample._FOLDER / f"{NAME}.xz").stat().st_size <= 4_000_000
    assert "MIT License" in (sample._FOLDER / "LICENSE-fashion-mnist").read_text(encoding="utf-8")


def test_pixels_of_known_images():
    """The first image and label of each split, so that a reordered or shifted unpacking cannot pass."""
    found = {}
    for split in SIZES:
        images, labels = data.load(NAME, split, pixels=True).tensors
        found[split] = (hashlib.sha256(images[0].numpy().tobytes()).hexdigest()[:12], int(labels[0]))
    assert found == KNOWN


KNOWN = {'train': ('b7bfcd91a574', 9), 'val': ('f30f3312c0b5', 1), 'test': ('7a9d0083c412', 9)}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("fashion_mnist_sampel", "train"), ValueError, "name must be one of fashion_mnist_sample, got 'fashion_mnist_sampel', did you mean 'fashion_mnist_sample'?"),
        ((NAME, "tset"), ValueError, "split must be one of train, val, test, got 'tset', did you mean 'test'?"),
        ((NAME, 3), TypeError, "split must be a str, got int"),
        ((None, "train"), TypeError, "name must be a str, got NoneType"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error) as raised:
        data.load(*arguments)
    assert str(raised.value) == message


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the packed set in a folder of its own, read instead of the shipped one."""
    for name in (f"{NAME}.xz", f"{NAME}.json"):
        (tmp_path / name).write_bytes((sample._FOLDER / name).read_bytes())
    monkeypatch.setattr(sample, "_FOLDER", tmp_path)
    sample._unpack.cache_clear()
    yield tmp_path
    sample._unpack.cache_clear()


def test_one_changed_byte_is_found(copy):
    packed = bytearray((copy / f"{NAME}.xz").read_bytes())
    packed[1_000_000] ^= 1
    (copy / f"{NAME}.xz").write_bytes(packed)
    with pytest.raises(CheckpointMismatch, match=r"fashion_mnist_sample.xz is damaged: SHA-256 .*; repair: pip install"):
        data.load(NAME, "test")


def test_a_truncated_or_missing_file_is_found(copy):
    packed = (copy / f"{NAME}.xz").read_bytes()
    (copy / f"{NAME}.xz").write_bytes(packed[:-10])
    with pytest.raises(CheckpointMismatch, match="is damaged"):
        data.load(NAME, "test")
    (copy / f"{NAME}.xz").unlink()
    with pytest.raises(CheckpointMismatch, match="cannot be read.*repair"):
        data.load(NAME, "test")


def test_a_broken_sidecar_is_found(copy):
    (copy / f"{NAME}.json").write_text('{"classes": 3}')
    with pytest.raises(CheckpointMismatch, match=r"fashion_mnist_sample.json cannot be read .*classes"):
        data.load(NAME, "test")


def test_a_sidecar_with_wrong_sizes_is_found(copy):
    about = json.loads((copy / f"{NAME}.json").read_text())
    about["splits"]["train"] += 1
    (copy / f"{NAME}.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointMismatch, match=r"holds 7850000 bytes, expected 7850785"):
        data.load(NAME, "test")


def test_row_digests_differ_between_splits():
    assert len({sample.row_digest(NAME, split) for split in SIZES}) == 3


def test_the_network_was_trained_without_the_val_split():
    """The training script names the rows it left out by digest; it refuses to run when they are not the embedded split's."""
    about = data.demo_metadata()
    assert about["left_out_val_rows_sha256"] == sample.row_digest(NAME, "val")
    assert about["training_images"] <= 60_000 - SIZES["val"]


def test_demo_network_is_as_good_as_its_metadata_says():
    net = data.demo_network()
    for split, floor in (("test", 0.90), ("val", 0.90)):
        images, labels = data.load(NAME, split).tensors
        with torch.inference_mode():
            right = np.mean([bool(r) for x, y in zip(images.split(250), labels.split(250), strict=True) for r in net(x).argmax(1) == y])
        assert right >= floor
        assert abs(right - data.demo_metadata()[f"accuracy_{split}"]) <= 0.002


def test_demo_network_reads_pixels():
    images = data.load(NAME, "test").tensors[0][:8]
    pixels = data.load(NAME, "test", pixels=True).tensors[0][:8]
    with torch.inference_mode():
        assert torch.equal(data.demo_network(pixels=True)(pixels), data.demo_network()(images))


def test_demo_network_has_four_named_stages_and_is_in_eval_mode():
    net = data.demo_network()
    assert net.stage_names == ("stage1", "stage2", "stage3", "stage4") and not net.training
    assert [len(getattr(net, name)) for name in net.stage_names] == [1, 3, 4, 4]
    assert demo._FILE.stat().st_size <= 2_000_000


def test_a_damaged_checkpoint_is_found(tmp_path, monkeypatch):
    path = tmp_path / "demo_network.safetensors"
    path.write_bytes(demo._FILE.read_bytes()[:-100])
    monkeypatch.setattr(demo, "_FILE", path)
    with pytest.raises(CheckpointMismatch, match="demo_network.safetensors cannot be read.*repair"):
        data.demo_network()


@pytest.mark.parametrize("shape", [((16,), (1, 2)), ((), ()), ((16, 0), (1, 1))])
def test_network_refuses_shapes_that_make_no_network(shape):
    with pytest.raises(ValueError, match="widths and blocks must be equally many positive numbers"):
        data.networks.SmallResNet(*shape)

"""The embedded data sets: one packed file and one JSON sidecar each, checked against its SHA-256 before use."""

from __future__ import annotations

import hashlib
import lzma
from functools import lru_cache
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch.utils.data import TensorDataset

from fastee.errors import CheckpointMismatch, did_you_mean

_FOLDER = Path(__file__).parent
_NAMES = ("fashion_mnist_sample",)
_REPAIR = "pip install --force-reinstall --no-deps fastee"


class _About(msgspec.Struct, frozen=True):
    """The sidecar of a packed set; `splits` stand in the packed file in this order."""

    classes: tuple[str, ...]
    shape: tuple[int, ...]
    splits: dict[str, int]
    rows_sha256: dict[str, str]
    mean: float
    std: float
    sha256: str


def _about(name: str) -> _About:
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    if name not in _NAMES:
        raise ValueError(f"name must be one of {', '.join(_NAMES)}, got {name!r}{did_you_mean(name, _NAMES)}")
    path = _FOLDER / f"{name}.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=_About)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointMismatch(f"{path.name} cannot be read ({error}); repair: {_REPAIR}") from error


@lru_cache(maxsize=len(_NAMES))
def _unpack(name: str) -> tuple[np.ndarray, np.ndarray]:
    about = _about(name)
    path = _FOLDER / f"{name}.xz"
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise CheckpointMismatch(f"{path.name} cannot be read ({error}); repair: {_REPAIR}") from error
    found = hashlib.sha256(packed).hexdigest()
    if found != about.sha256:
        raise CheckpointMismatch(
            f"{path.name} is damaged: SHA-256 {found[:16]}... instead of {about.sha256[:16]}...; repair: {_REPAIR}"
        )
    data = np.frombuffer(lzma.decompress(packed), np.uint8)
    count = sum(about.splits.values())
    size = int(np.prod(about.shape))
    if data.size != count * (size + 1):
        raise CheckpointMismatch(f"{path.name} holds {data.size} bytes, expected {count * (size + 1)}; repair: {_REPAIR}")
    return data[: count * size].reshape(count, *about.shape), data[count * size :]


def classes(name: str = "fashion_mnist_sample") -> tuple[str, ...]:
    """Return the class names, in the order of the labels."""
    return _about(name).classes


def normalisation(name: str = "fashion_mnist_sample") -> tuple[float, float]:
    """Return (mean, std) of the training pixels on the scale 0..1; ``load`` has applied them."""
    about = _about(name)
    return about.mean, about.std


def splits(name: str = "fashion_mnist_sample") -> dict[str, int]:
    """Return the number of images of each split."""
    return dict(_about(name).splits)


def row_digest(name: str, split: str) -> str:
    """Return the SHA-256 of the sorted rows of the official file that make `split`: names the choice in a few bytes."""
    return _about(name).rows_sha256[split]


def load(name: str = "fashion_mnist_sample", split: str = "train", *, pixels: bool = False) -> TensorDataset:
    """Return ``TensorDataset(images, labels)`` of an embedded set: fp32 [N,1,28,28] normalised, int64 [N].

    `split` is ``"train"`` (5,000), ``"val"`` (3,000; none of them was used to train ``demo_network``) or ``"test"`` (2,000,
    from the official test file); every split holds equally many images of each class. With `pixels` the images are the uint8
    pixels 0..255 as published. Raises ``ValueError`` for an unknown name or split and ``CheckpointMismatch`` for a damaged
    file. Source: Fashion-MNIST, arXiv 1708.07747, MIT licence (LICENSE-fashion-mnist beside this file).

    >>> images, labels = load("fashion_mnist_sample", "test").tensors
    >>> images.shape, images.dtype, labels.dtype
    (torch.Size([2000, 1, 28, 28]), torch.float32, torch.int64)
    """
    about = _about(name)
    if not isinstance(split, str):
        raise TypeError(f"split must be a str, got {type(split).__name__}")
    if split not in about.splits:
        raise ValueError(f"split must be one of {', '.join(about.splits)}, got {split!r}{did_you_mean(split, about.splits)}")
    images, labels = _unpack(name)
    order = list(about.splits)
    start = sum(about.splits[earlier] for earlier in order[: order.index(split)])
    rows = slice(start, start + about.splits[split])
    x = torch.from_numpy(images[rows].copy())
    if not pixels:
        x = (x.float() / 255 - about.mean) / about.std
    return TensorDataset(x, torch.from_numpy(labels[rows].astype(np.int64)))

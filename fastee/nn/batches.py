"""Labelled batches from whatever the user has: a DataLoader, a Dataset, an iterable of (x, y)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

LABELS = ("labels", "label", "y")


def loader_of(loader: Any, name: str = "loader", batch_size: int = 128) -> Iterable:
    """Return an iterable of batches that can be walked more than once; a Dataset is wrapped in a DataLoader."""
    if isinstance(loader, DataLoader):
        return loader
    if isinstance(loader, Dataset):
        return DataLoader(loader, batch_size=batch_size)
    if isinstance(loader, Iterator):
        raise TypeError(f"{name}: an iterator can be walked once only; pass a DataLoader, a Dataset or a list of batches")
    if isinstance(loader, (Tensor, Mapping, str)) or not isinstance(loader, Iterable):
        raise TypeError(f"{name}: expected a DataLoader, a Dataset or a list of (x, y) batches, got {type(loader).__name__}")
    return loader


def labelled(loader: Iterable, num_classes: int, device: torch.device, name: str = "loader") -> Iterator[tuple[Any, Tensor]]:
    """Yield (x, y) batch by batch on `device`: x as the network takes it, y int64 [B] checked to lie in [0, C)."""
    for number, batch in enumerate(loader):
        x, y = _split(batch, name)
        if not isinstance(y, Tensor):
            y = torch.as_tensor(y)
        if y.ndim != 1 or y.dtype.is_floating_point or y.dtype is torch.bool:
            raise TypeError(f"{name}: labels must be integers [B], got {str(y.dtype).removeprefix('torch.')} {list(y.shape)} in batch {number}")
        y = y.to(torch.int64)
        bad = torch.nonzero((y < 0) | (y >= num_classes)).flatten()
        if len(bad):
            row = int(bad[0])
            raise ValueError(f"{name}: label {int(y[row])} (batch {number}, row {row}) is outside 0..{num_classes - 1}")
        first = next(iter(x.values())) if isinstance(x, Mapping) else x[0] if isinstance(x, tuple) else x
        if isinstance(first, Tensor) and first.ndim and first.shape[0] != len(y):
            raise ValueError(f"{name}: batch {number} has {first.shape[0]} rows but {len(y)} labels")
        yield _move(x, device), y.to(device)


def _split(batch: Any, name: str) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        key = next((k for k in LABELS if k in batch), None)
        if key is None:
            raise TypeError(f"{name}: a batch given as a dict needs one of {list(LABELS)}, got {sorted(batch)}")
        return {k: v for k, v in batch.items() if k != key}, batch[key]
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        x = batch[0] if len(batch) == 2 else tuple(batch[:-1])
        return tuple(x) if isinstance(x, list) else x, batch[-1]
    raise TypeError(f"{name}: expected batches (x, y), got {type(batch).__name__}")


def _move(x: Any, device: torch.device) -> Any:
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, Mapping):
        return {k: _move(v, device) for k, v in x.items()}
    return tuple(_move(v, device) for v in x) if isinstance(x, tuple) else x

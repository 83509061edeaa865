"""Run a function whose inputs lie in this machine's memory on a device: the tests' bodies then hold for device kernels unchanged."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastee.ops.results import ExitPackResult


def move(value: Any, device: str, seen: dict | None = None) -> Any:
    """Return `value` with every tensor inside on `device`, of the same strides and offset; tensors that shared memory still do.

    Named tuples and other sequences are rebuilt. `seen` maps the address of a storage to (storage, moved bytes).
    """
    seen = {} if seen is None else seen
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        if storage.data_ptr() not in seen or storage.nbytes() == 0:
            raw = torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage)
            seen[storage.data_ptr()] = storage, raw.to(device, copy=True)
        moved = seen[storage.data_ptr()][1].untyped_storage()
        return torch.empty(0, dtype=value.dtype, device=device).set_(moved, value.storage_offset(), value.size(), value.stride())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(move(v, device, seen) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(move(v, device, seen) for v in value)
    return value


def on_device(function: Callable, device: str = "cuda") -> Callable:
    """Return `function` as seen from this machine's memory: arguments go to `device`, what it wrote into them and its result come back.

    An argument that is returned is returned itself. A result's ``count`` becomes an int.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        seen: dict = {}
        there, options = move(args, device, seen), {k: move(v, device, seen) for k, v in kwargs.items()}
        result = function(*there, **options)
        for storage, raw in seen.values():
            if storage.nbytes():
                torch.empty(0, dtype=torch.uint8).set_(storage).copy_(raw)
        for mine, theirs in zip(args, there, strict=True):
            if result is theirs and isinstance(mine, Tensor):
                return mine
        if hasattr(result, "wire"):  # whose tensors are made when they are read
            result = ExitPackResult(*(getattr(result, name) for name in ExitPackResult._fields))
        result = move(result, "cpu")
        return result._replace(count=int(result.count)) if "count" in getattr(result, "_fields", ()) else result

    return run

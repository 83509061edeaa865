"""Example inputs per op, so that ``fastee explain OP`` needs only a name and sizes."""

from __future__ import annotations

import torch

from fastee import ops


def known() -> list[str]:
    """Return the names of the ops that ``fastee explain`` can be asked about."""
    return list(_EXAMPLES)


def example(op: str, batch: int, features: int, classes: int, spatial: int) -> tuple | None:
    """Return positional arguments for ``fastee.ops.<op>`` at these sizes, zeros everywhere; None for an unknown op."""
    return _EXAMPLES[op](batch, features, classes, spatial) if op in _EXAMPLES else None


def _zeros(*shape: int):
    return torch.zeros(shape)


def _head(b: int, d: int, c: int, s: int) -> tuple:
    return _zeros(b, d, s, s), _zeros(c, d), _zeros(c)


def _rows(b: int, d: int, c: int, s: int) -> tuple:
    return (_zeros(b, d),)


def _index(b: int):
    return torch.arange(b)


_EXAMPLES = {
    "exit_step": _head,
    "exit_head": _head,
    "linear_stats": lambda b, d, c, s: (_zeros(b, d), _zeros(c, d), _zeros(c)),
    "row_stats": lambda b, d, c, s: (_zeros(b, c),),
    "pool": lambda b, d, c, s: (_zeros(b, d, s, s), "mean"),
    "compact": lambda b, d, c, s: (_zeros(b).bool(),),
    "gather_rows": lambda b, d, c, s: (_zeros(b, d), _index(b)),
    "scatter_rows": lambda b, d, c, s: (_zeros(b, d), _index(b), _zeros(b, d)),
    "quantize_rows": lambda b, d, c, s: (_zeros(b, d), "int8"),
    "exit_pack": _head,
    "feature_delta": lambda b, d, c, s: (_zeros(b, d), _zeros(b, d)),
    "mean_entropy": lambda b, d, c, s: (_zeros(b, s, c),),
    "pack_planes": lambda b, d, c, s: (_zeros(b, d),),
    "unpack_planes": lambda b, d, c, s: (ops.pack_planes(_zeros(b, d), backend="reference"),),
    "dequantize_rows": lambda b, d, c, s: (ops.QuantizedRows(_zeros(b, d).char(), _zeros(b)),),
}

"""The torch registration of the ops: what ``torch.compile`` and ``torch.export`` see. Eager calls never pass here."""

from __future__ import annotations

from collections.abc import Callable

import torch

_library = torch.library.Library("fastee", "DEF")


def define(schema: str, run: Callable, fake: Callable) -> None:
    """Register op `schema` with its body on every device and its shape function."""
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastee::{name}", fake, lib=_library)


def rows_like(x: torch.Tensor, *dtypes: torch.dtype) -> list[torch.Tensor]:
    """Return one empty [B] tensor per dtype, B being the rows of `x`."""
    return [x.new_empty(x.shape[0], dtype=dtype) for dtype in dtypes]

"""What the native CPU backend takes: reasons to decline, shared by the ops."""

from __future__ import annotations

from torch import Tensor, bfloat16, float16, float32

from fastee import native

WIDENED = (float32, bfloat16, float16)


def missing() -> str | None:
    return None if native.hot is not None else f"libfastee is not loaded ({native.reason.get('_hot')}): {native.REPAIR}"


def elsewhere(x: Tensor) -> str | None:
    """Decline a tensor that is not in this machine's memory; its dtype does not matter."""
    return f"tensor on {x.device}" if x.device.type != "cpu" else missing()


def plain(*tensors: Tensor | None) -> str | None:
    """Decline what is not a plain fp32 tensor in this machine's memory."""
    for t in tensors:
        if t is not None and t.device.type != "cpu":
            return f"tensor on {t.device}"
        if t is not None and t.dtype != float32:
            return f"dtype {str(t.dtype).removeprefix('torch.')} (this backend computes fp32)"
    return missing()


def floats(*tensors: Tensor | None) -> str | None:
    """Decline what the kernels do not widen on load: they take fp32, bf16 and fp16 in this machine's memory."""
    for t in tensors:
        if t is not None and t.device.type != "cpu":
            return f"tensor on {t.device}"
        if t is not None and t.dtype not in WIDENED:
            return f"dtype {str(t.dtype).removeprefix('torch.')} (this backend computes fp32)"
    return missing()


def contiguous_rows(name: str, x: Tensor | None) -> str | None:
    """Decline a tensor whose rows (all dimensions but the first) are not contiguous."""
    if x is None or x.numel() == 0 or x[0].is_contiguous():
        return None
    return f"{name} has non-contiguous rows (strides {list(x.stride())}); call .contiguous()"


def pooled(x: Tensor, pool: str) -> str | None:
    """Decline layouts that the pools cannot walk: rows must be contiguous, or channels-last for pool='mean'."""
    if x.numel() == 0 or x[0].is_contiguous():
        return None
    if pool == "mean" and x.dim() > 2 and x[0].movedim(0, -1).is_contiguous():
        return None
    if pool in ("cls", "last") and x.stride(-1) == 1:
        return None
    return f"x is neither contiguous nor channels-last within its rows (strides {list(x.stride())}); call .contiguous()"

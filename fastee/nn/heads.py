"""The exit head: pool, norm, linear, and convolutions before them where an early map needs some. Plain torch for training, one fused op for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastee import ops
from fastee.errors import did_you_mean
from fastee.nn.trace import eval_mode
from fastee.reference.pool import pool as pool_features

POOLS = ("mean", "mean_tokens", "cls", "last", "none")
NORMS = ("batch", "layer", "rms")
KINDS = ("linear", "two_layer", "low_rank", "conv")
SMALL = 8  # pixels; a branch of convolutions halves its map no further


def infer_pool(shape: tuple[int, ...], where: str) -> str:
    """Return the pool for an activation of this shape: [B,D] none, [B,T,D] cls, [B,D,*spatial] mean."""
    if len(shape) == 2:
        return "none"
    if len(shape) == 3:
        return "cls"
    if len(shape) in (4, 5):
        return "mean"
    raise ValueError(f"exits: the output of {where!r} has shape {list(shape)}, expected [B,D], [B,T,D] or [B,D,*spatial]")


class ExitHead(nn.Module):
    """An exit's classifier: pool, optional norm, linear (or two layers, or two of low rank) to C classes.

    ``pool``: ``mean`` ([B,D,*spatial]), ``mean_tokens``, ``cls``, ``last`` ([B,T,D]) or ``none`` ([B,D]). ``norm``: ``batch``
    (folded into the linear layer at inference), ``layer``, ``rms`` or None. Weights are fp32 unless moved. ``.gate``: None, or what
    `add_gate` made for the measure ``gate``. ``.temperature`` divides the logits before confidences are taken (never the logits returned);
    `fastee.calibrate(temperature=True)` sets it. ``kind``: ``linear``; ``two_layer:H``, H hidden units with ReLU between; ``low_rank:R``, two products
    that replace a wide one (R (D + C) < D C); without a number min(D, 128). Those two cost a second kernel call per check. ``conv:N`` (N = 2 without a
    number): a branch of N 3x3 convolutions (batch norm, ReLU) before the pool, each of which halves the map and doubles the channels while the map is
    higher than 8 pixels, so that an exit behind the first layers can see more than their mean; `size` is the height and width that it reads. Or a branch
    of your own, a module [B,D,H,W] -> [B,D',h,w] (the last stages of a small trained network, say), which becomes part of the head.

    >>> import torch
    >>> from fastee.nn import ExitHead
    >>> ExitHead(8, 3, pool="mean", norm=None)(torch.zeros(2, 8, 4, 4)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self, features: int, num_classes: int, pool: str = "mean", norm: str | None = "batch", kind: str | nn.Module = "linear",
        size: tuple[int, int] | None = None,
    ):  # fmt: skip
        super().__init__()
        own = kind if isinstance(kind, nn.Module) else None
        kind, number = ("branch", None) if own is not None else (kind, number_of(kind))
        if pool not in POOLS:
            raise ValueError(f"pool: expected one of {list(POOLS)}, got {pool!r}{did_you_mean(str(pool), POOLS)}")
        if norm is not None and norm not in NORMS:
            raise ValueError(f"norm: expected None or one of {list(NORMS)}, got {norm!r}{did_you_mean(str(norm), NORMS)}")
        self.features, self.num_classes, self.pool, self.norm_kind = features, num_classes, pool, norm
        if (own is not None or kind.startswith("conv")) and (size is None or pool != "mean"):
            raise ValueError(f"head: {kind!r} reads maps [B, D, H, W] and takes their mean, got pool {pool!r} and {'no size' if size is None else list(size)}")
        self.branch = convolutions(features, number or 2, size[0]) if kind.startswith("conv") else own
        width, self._branch_macs = (features, 0.0) if self.branch is None else _measured(self.branch, features, size)
        hidden = (number or min(width, 128)) if kind.startswith(("two_layer", "low_rank")) else None
        makers = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "rms": lambda d: nn.RMSNorm(d, eps=1e-5)}
        self.norm = makers[norm](width) if norm else None
        self.kind = kind
        self.hidden = None if hidden is None else nn.Linear(width, hidden)
        self.linear = nn.Linear(hidden or width, num_classes)
        self.gate: nn.Linear | None = None
        self.temperature = 1.0
        self._folded: tuple[Any, Tensor, Tensor] | None = None

    def add_gate(self) -> nn.Linear:
        """Give the head a gate (4 confidence numbers -> 1, see `fastee.nn.history.gate_features`) unless it has one, and return it."""
        if self.gate is None:
            weight = self.linear.weight
            self.gate = nn.Linear(4, 1).to(weight.device, weight.dtype)
        return self.gate

    def pooled(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return what training reads of an activation: the features [B, D] before norm and linear, of a head with a branch the map itself."""
        return x if self.branch is not None else pool_features(x, self.pool, as_mask(mask) if self.pool == "mean_tokens" else None)

    def classify(self, features: Tensor) -> Tensor:
        """Return the logits [B, C] of what `pooled` returned; differentiable."""
        features = features.to(self.linear.weight.dtype)
        if self.branch is not None:
            features = pool_features(self.branch(features), self.pool).to(features.dtype)
        features = features if self.norm is None else self.norm(features)
        return self.linear(features if self.hidden is None else self._activate(self.hidden(features)))

    def _activate(self, hidden: Tensor) -> Tensor:
        return hidden if self.kind.startswith("low_rank") else torch.relu(hidden)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the logits [B, C] in plain torch, for training."""
        return self.classify(self.pooled(x, mask))

    def step(
        self, x: Tensor, measure: str, threshold: float, *, mask: Tensor | None = None, logits: bool = False, backend: str | None = None
    ):
        """Return ``fastee.ops.exit_step`` of this head: label, confidence, exits, index, count; no gradient."""
        weight, bias, norm = self.fused()
        if self.pool != "mean_tokens":
            mask = None
        elif mask is not None:
            mask = as_mask(mask)
        pool = self.pool
        if self._modules.get("branch") is not None:
            with torch.no_grad():
                x = self.branch(x)
        if self._modules.get("hidden") is not None:
            # The hidden layer is a product of our own kernel too: torch's rounds differently from batch to batch.
            first = ops.exit_head(x, weight, bias, pool, norm, mask=mask, logits=True, backend=backend)
            x, weight, bias, pool, norm, mask = self._activate(first.logits), self.linear.weight, self.linear.bias, "none", None, None
        return ops.exit_step(x, weight, bias, pool, norm, measure, threshold, temperature=self.temperature, mask=mask, logits=logits, backend=backend)

    def fused(self) -> tuple[Tensor, Tensor, ops.Norm | None]:
        """Return (weight, bias, norm) of the first layer as the fused op takes them; a batch norm is folded into weight and bias (in fp64)."""
        first = "linear" if self._modules.get("hidden") is None else "hidden"
        linear, norm = self._modules[first]._parameters, self._modules.get("norm")
        weight, bias = linear["weight"], linear["bias"]
        if self.norm_kind is None:
            return weight, bias, None
        if self.norm_kind != "batch":
            shift = getattr(norm, "bias", None)
            return weight, bias, ops.Norm(self.norm_kind, norm.weight, shift, norm.eps)
        gain, shift = norm._parameters["weight"], norm._parameters["bias"]
        mean, var = norm._buffers["running_mean"], norm._buffers["running_var"]
        key = (id(weight), weight.data_ptr(), weight._version, bias._version, gain._version, shift._version, mean._version, var._version)
        if self._folded is None or self._folded[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # the fold outlives an inference_mode block of the caller
                scale = gain.double() / (var.double() + norm.eps).sqrt()
                w = (weight.double() * scale).to(weight.dtype)
                b = (bias.double() + weight.double() @ (shift.double() - mean.double() * scale)).to(bias.dtype)
            self._folded = (key, w, b)
        return self._folded[1], self._folded[2], None

    def _apply(self, fn, recurse=True):
        self._folded = None
        return super()._apply(fn, recurse)

    def __getstate__(self):
        return {**self.__dict__, "_folded": None}

    @property
    def macs(self) -> float:
        """Multiply-adds of one row, pooling aside."""
        return self._branch_macs + float(sum(m.weight.numel() for m in (self.hidden, self.linear) if m is not None))

    def extra_repr(self) -> str:
        return f"pool={self.pool!r}, kind={self.kind!r}"


def convolutions(features: int, count: int, high: int) -> nn.Sequential:
    """Return `count` 3x3 convolutions with batch norm and ReLU; each halves the map and doubles the channels while the map is higher than 8 pixels."""
    layers: list[nn.Module] = []
    for _ in range(count):
        stride = 2 if high > SMALL else 1
        layers += [nn.Conv2d(features, features * stride, 3, stride, 1, bias=False), nn.BatchNorm2d(features * stride), nn.ReLU()]
        features, high = features * stride, -(-high // stride)
    return nn.Sequential(*layers)


def _measured(branch: nn.Module, features: int, size: tuple[int, int]) -> tuple[int, float]:
    """Return the channels that a branch gives and its multiply-adds for one row, from one run."""
    first = next(iter((*branch.parameters(), *branch.buffers(), torch.empty(0))))
    with eval_mode(branch), FlopCounterMode(display=False) as counter:
        shape = branch(torch.zeros(1, features, *size, dtype=first.dtype, device=first.device)).shape
    if len(shape) != 4 or shape[0] != 1:
        raise ValueError(f"head: a branch must give maps [B, D, H, W], got {list(shape)} for one row of {[features, *size]}")
    return shape[1], counter.get_total_flops() / 2


def number_of(kind: str) -> int | None:
    """Return the number in a kind of head such as "two_layer:64", None where it has none; raises ``ValueError`` for an unknown kind."""
    name, colon, number = kind.partition(":") if isinstance(kind, str) else ("", "", "")
    if name not in KINDS or colon and (name == "linear" or not number.isdecimal() or int(number) == 0):
        known = "'linear', 'two_layer', 'two_layer:H', 'low_rank', 'low_rank:R', 'conv' or 'conv:N'"
        raise ValueError(f"head: expected {known}, got {kind!r}{did_you_mean(str(kind), KINDS)}")
    return int(number) if number else None


def as_mask(mask: Tensor | None) -> Tensor | None:
    """Return a token mask in a dtype that the ops take: non-zero means a real token."""
    if mask is None or mask.dtype in (torch.bool, torch.uint8, torch.int64):
        return mask
    return mask != 0

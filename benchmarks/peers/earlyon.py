"""earlyon: early exits by forward hooks. Its check, its wrapper, its batch rule and its threshold search."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Iterator

import torch
from torch import nn

import fastee
from fastee.testing.bench import Case, Context, Group

from ..bench_attach import networks
from ..bench_exit_step import THRESHOLD
from ..bench_search import EXITS, MAX_DROP, heads, scored
from ..shapes import Shape
from . import Peer

PEER = Peer(
    "0.3.0",
    "MIT",
    (
        (
            "--no-deps",
            "earlyon==0.3.0",
            "fvcore==0.1.5.post20221221",
            "iopath==0.1.10",
            "yacs==0.1.8",
            "termcolor==3.3.0",
            "tabulate==0.10.0",
            "portalocker==4.4.2",
            "pyyaml==6.0.3",
            "tqdm==4.70.1",
        ),
    ),
)
SHAPES = [Shape("mean", 1, (256, 8, 8), 10), Shape("none", 1, (64,), 10), Shape("none", 1, (768,), 2), Shape("mean", 1, (512, 4, 4), 100)]


class Head(nn.Module):
    """Pool and linear, as fastee's."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor):
        super().__init__()
        self.linear = nn.Linear(*weight.shape[::-1])
        self.linear.weight.data, self.linear.bias.data = weight, bias

    def forward(self, x):
        return self.linear(x.mean((2, 3)) if x.dim() == 4 else x)


def load():
    """Return (custom_ee, types, thresholds) of earlyon, which imports torchvision for models that are not run here."""
    absent = [name for name in ("torchvision", "torchvision.models") if name not in sys.modules]
    for name in absent:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__getattr__ = lambda attribute: type(attribute, (), {})
        sys.modules[name].__path__ = []
    from earlyon.core import thresholds, wrappers
    from earlyon.models.custom import custom_ee

    for name in absent:
        del sys.modules[name]  # inspect walks over every module and would trip over these
    return custom_ee, wrappers, thresholds


def check(head: nn.Module, feature: torch.Tensor, classes: int):
    """Return earlyon's check alone, the body of its hook: head, softmax, max, item, compare; nothing leaves at a threshold of 1."""
    custom_ee, _, _ = load()
    width = feature.shape[1]
    last = nn.Sequential(*([nn.AdaptiveAvgPool2d(1), nn.Flatten()] if feature.dim() == 4 else []), nn.Linear(width, classes))
    net = custom_ee(nn.Sequential(nn.Identity(), last), exit_layers=["0"], num_classes=classes, input_shape=tuple(feature.shape)).eval()
    net.config.confidence_thresholds[0] = 1.0
    name = net._exits[0][1]
    if head is not None:
        net.exit_heads[name] = head
    net._init_tls()
    net._tls.inference_mode = True
    hook = net._make_hook(0, name)
    return lambda x: hook(None, None, x)


def checks(ctx: Context) -> Iterator[Group]:
    for shape in SHAPES[: 1 if ctx.shapes == "headline" else None]:
        g = torch.Generator().manual_seed(ctx.seed)
        weight, bias = torch.randn(shape.C, shape.D, generator=g) / shape.D**0.5, torch.randn(shape.C, generator=g)
        base = torch.randn(shape.B, *shape.dims, generator=g)
        inputs = ctx.rotate(lambda i, x=base: (x + 0.01 * i,), 4 * base.numel())
        ours = [(x, weight, bias) for (x,) in inputs]
        yield Group(
            "exit_head",
            str(shape),
            "fp32",
            [
                Case("fastee", fastee.ops.exit_head, ours, {"pool": shape.pool, "threshold": THRESHOLD}),
                Case("earlyon", check(None, base, shape.C), inputs, note="its hook with the head it makes, two linear layers; none fires"),
                Case(
                    "same_head", check(Head(weight, bias), base, shape.C), inputs, note="its hook with the one linear layer that fastee has"
                ),
            ],
            baseline="earlyon",
            bytes=4 * (shape.read + weight.numel() + bias.numel()),
            flops=2 * shape.B * shape.D * shape.C + shape.read,
            bars=(">= 20x earlyon", ">= 20x same_head"),
        )


def wrap(backbone: nn.Module, net: fastee.EarlyExit, exits: list[str], classes: int, shape: tuple[int, ...]):
    """Return the backbone wrapped by earlyon, with the heads of `net`."""
    wrapped = load()[0](backbone, exit_layers=exits, num_classes=classes, input_shape=shape).eval()
    for (_, name, _), head in zip(wrapped._exits, net.heads, strict=True):
        wrapped.exit_heads[name] = head
    return wrapped


def wrappers(ctx: Context) -> Iterator[Group]:
    torch.manual_seed(ctx.seed)
    layers = [nn.Linear(64, 64), nn.ReLU()] * 3
    mlp = nn.Sequential(*[type(m)(64, 64) if isinstance(m, nn.Linear) else nn.ReLU() for m in layers], nn.Linear(64, 10)).eval()
    one = [(torch.randn(1, 64),) for _ in range(4)]
    net = fastee.attach(mlp, ["1", "3"], 10, one[0][0]).eval()
    peer = wrap(mlp, net, ["1", "3"], 10, (1, 64))
    for what, ours, enabled, theirs in (
        ("exits off", [math.inf, math.inf], [False, False], [1.0, 1.0]),
        ("two checks, none fires", [2.0, 2.0], [True, True], [1.0, 1.0]),
        ("leaves at the first exit", [0.0, 0.0], [True, True], [0.0, 0.0]),
    ):

        def run(x, ours=ours):
            return net(x)

        def other(x):
            return peer(x, mode="inference")

        yield _settled(
            "attach",
            f"4 linear layers, 1x64, {what}",
            net,
            ours,
            peer,
            enabled,
            theirs,
            run,
            other,
            Case("bare", mlp),
            one,
            (">= 1x earlyon",),
        )

    bare, net = networks()
    peer = wrap(bare, net, ["layer1.0", "layer2"], 10, (1, 3, 32, 32))
    x = torch.randn(32, 3, 32, 32)
    with torch.no_grad():
        halfway = float(net.exit_step(0, net.run_segment(0, (x,))).confidence.sort().values[16])
    inputs = ctx.rotate(lambda i: (x.roll(5 * i, 0),), x.numel() * 4)
    yield _settled(
        "attach",
        "resnet20 32x3x32x32, half are sure at the first exit",
        net,
        [halfway, math.inf],
        peer,
        [True, False],
        [halfway, 1.0],
        net,
        peer.forward_inference_batched,
        Case("bare", bare),
        inputs,
        (">= 1.3x earlyon",),
    )


def _settled(op, shape, net, ours, peer, enabled, theirs, run, other, bare, inputs, bars) -> Group:
    net.set_rule(thresholds=ours)
    peer.config.enabled_exits[:], peer.config.confidence_thresholds[:] = enabled, theirs
    bare.inputs = inputs
    return Group(op, shape, "fp32", [Case("fastee", run, inputs), Case("earlyon", other, inputs), bare], baseline="earlyon", bars=bars)


def search(ctx: Context) -> Iterator[Group]:
    custom_ee, _, thresholds = load()
    logits, targets, cost = heads(ctx.seed)
    backbone = nn.Sequential(*[nn.Linear(10, 10) for _ in range(EXITS + 1)])
    model = custom_ee(backbone, exit_layers=[str(k) for k in range(EXITS)], num_classes=10, input_shape=(1, 10)).eval()
    saved = thresholds.HeadLogits(model.config.head_names, logits, targets, torch.from_numpy(cost))
    thresholds.collect_head_logits = lambda *_: saved

    def theirs():
        return thresholds.calibrate_thresholds(model, None, MAX_DROP)

    def ours(confidence):
        return fastee.calibration.thresholds(*scored(logits, targets), cost, MAX_DROP, confidence)

    def searched():
        return fastee.search_thresholds(*scored(logits, targets), cost, MAX_DROP)

    found = theirs()
    yield Group(
        "search_thresholds",
        f"{len(targets)} x {EXITS}, at most {MAX_DROP:.0%} lost",
        "fp32",
        [
            Case("fastee", searched, note="the drop holds on these rows, as earlyon's; 30 levels, exhaustive", ratio=searched().cost / cost[-1]),
            Case("fastee_calibrated", lambda: ours(None), note="thresholds(confidence=None): the same promise", ratio=ours(None).cost / cost[-1]),
            Case(
                "fastee_guaranteed",
                lambda: ours(0.95),
                note="the drop holds on new rows with probability 0.95",
                ratio=ours(0.95).cost / cost[-1],
            ),
            Case(
                "earlyon",
                theirs,
                note=f"greedy; accuracy {found.baseline_accuracy:.4f} -> {found.final_accuracy:.4f}",
                ratio=found.avg_computation_used,
            ),
        ],
        baseline="earlyon",
        bars=(">= 20x earlyon", f"ratio <= {found.avg_computation_used:.4f}"),
    )


CASES = {"exit_step": checks, "attach": wrappers, "search": search}

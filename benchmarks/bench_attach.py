"""A network with exits beside the bare one: what it costs when they are off, what it saves when half of a batch leaves early."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

import fastee
from fastee.testing.bench import Case, Context, Group


class Block(nn.Module):
    def __init__(self, i: int, o: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.short = nn.Sequential() if stride == 1 and i == o else nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.short(x))


class ResNet20(nn.Module):
    """The CIFAR network of arXiv 1512.03385: three stages of three blocks, 16, 32 and 64 channels, 32 x 32 pixels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.layer1 = nn.Sequential(*[Block(16, 16, 1) for _ in range(3)])
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(self.layer3(self.layer2(self.layer1(self.stem(x)))).mean((2, 3)))


def waiting(net: fastee.EarlyExit, thresholds: list[float]):
    """A batch as most exit code runs it: all rows go on until every one of them is sure."""

    def run(x):
        carry, done, answer = (x,), torch.zeros(len(x), dtype=torch.bool), torch.zeros(len(x), dtype=torch.int64)
        for i, threshold in enumerate(thresholds):
            carry = net.run_segment(i, carry)
            z = net.heads[i](carry[0])
            p, label = F.softmax(z, -1).max(-1)
            answer = torch.where(done, answer, label)
            done |= p >= threshold
            if bool(done.all()):
                return answer
        z = net.run_segment(net.num_exits, carry)[0]
        return torch.where(done, answer, z.argmax(-1))

    return run


def networks() -> tuple[nn.Module, fastee.EarlyExit]:
    bare = ResNet20().eval()
    # eager torch spends most of its time where the maps are large: layer1 takes 2/3 of it with 1/3 of the multiply-adds
    return bare, fastee.attach(bare, ["layer1.0", "layer2"], 10, torch.zeros(1, 3, 32, 32)).eval()


def cases(ctx: Context) -> Iterator[Group]:
    torch.manual_seed(ctx.seed)
    bare, net = networks()
    macs = net.macs["segments"]
    for rows in (1, 32):
        x = torch.randn(rows, 3, 32, 32)
        inputs = ctx.rotate(lambda i, x=x: (x + 0.01 * i,), x.numel() * 4)
        yield Group(
            "attach", f"resnet20 {rows}x3x32x32, exits off", "fp32",
            [Case("fastee", net, inputs, note="EarlyExit, every threshold +inf"), Case("bare", bare, inputs, note="the backbone itself")],
            # no bar in us here: medians of two runs of milliseconds differ by more than 5 us on any shared machine; the tiny network shows it
            baseline="bare", flops=int(2 * rows * sum(macs)), bars=(">= 0.99x bare",),
        )  # fmt: skip

    tiny = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 10)).eval()
    one = [(torch.randn(1, 8),)]
    yield Group(
        "attach", "two linear layers, 1x8, exits off", "fp32",
        [Case("fastee", fastee.attach(tiny, ["1"], 10, one[0][0]).eval(), one, note="the wrapper alone, on a network of 12 us"), Case("bare", tiny, one)],
        baseline="bare", bars=("<= 5 us over bare",),
    )  # fmt: skip

    x = torch.randn(32, 3, 32, 32)
    with torch.no_grad():
        scores = net.exit_step(0, net.run_segment(0, (x,))).confidence.sort().values
    halfway = float(scores[16])
    net.set_rule(thresholds=[halfway, math.inf])
    left = torch.bincount(net(x).exit, minlength=3).tolist()
    if left != [16, 0, 16]:
        raise RuntimeError(f"the rule was to let half of the rows leave at the first exit, rows per exit are {left}")
    inputs = ctx.rotate(lambda i: (x.roll(5 * i, 0),), x.numel() * 4)
    spent = 32 * macs[0] + 16 * (macs[1] + macs[2])
    yield Group(
        "attach", "resnet20 32x3x32x32, half leave at the first exit", "fp32",
        [
            Case("fastee", net, inputs, note="survivors compacted", flops=int(2 * spent)),
            Case("wait_all", waiting(net, [halfway, math.inf]), inputs, note="the same segments and heads; the batch goes on until all rows are sure"),
            Case("bare", bare, inputs, note="the backbone, no exits"),
        ],
        baseline="wait_all", flops=int(2 * 32 * sum(macs)), bars=(">= 1.3x wait_all",),
    )  # fmt: skip

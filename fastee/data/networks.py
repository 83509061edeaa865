"""The residual network of the demo; its weights come from ``tools/train_demo_network.py``."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al., arXiv 1512.03385, basic block): [B,I,H,W] -> [B,O,H/stride,W/stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Pixels(nn.Module):
    """Turn uint8 pixels 0..255 into normalised fp32, so that a cluster can send 1 byte per pixel of the raw input."""

    def __init__(self, mean: float, std: float):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() / 255 - self.mean) / self.std


class SmallResNet(nn.Module):
    """A CIFAR-style residual network with named stages: images [B,1,H,W] -> logits [B,num_classes] fp32.

    `widths` and `blocks` give the channels and the number of residual blocks of ``stage1``, ``stage2``, ...; a stage that is
    wider than the one before halves height and width. With `pixels` = (mean, std) it reads uint8 pixels, else normalised fp32.

    >>> SmallResNet((16, 32), (1, 1))(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (16, 32, 64, 64),
        blocks: tuple[int, ...] = (1, 3, 4, 4),
        num_classes: int = 10,
        pixels: tuple[float, float] | None = None,
    ):
        super().__init__()
        if not widths or len(widths) != len(blocks) or min(*widths, *blocks) < 1:
            raise ValueError(f"widths and blocks must be equally many positive numbers, got {widths!r} and {blocks!r}")
        self.pixels: nn.Module = Pixels(*pixels) if pixels else nn.Identity()
        self.stem = nn.Sequential(nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.stage_names = tuple(f"stage{i + 1}" for i in range(len(widths)))
        before = widths[0]
        for name, width, count in zip(self.stage_names, widths, blocks, strict=True):
            first = Residual(before, width, 2 if width > before else 1)
            setattr(self, name, nn.Sequential(first, *(Residual(width, width, 1) for _ in range(count - 1))))
            before = width
        self.head = nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(self.pixels(x))
        for name in self.stage_names:
            x = getattr(self, name)(x)
        return self.head(x.mean((2, 3)))

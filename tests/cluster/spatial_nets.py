"""Small networks of the three families, as torchvision shapes them: plain, residual with projection, inverted residual with depthwise convolutions."""

import torch
from torch import nn


def conv(i, o, k=3, s=1, groups=1, act=nn.ReLU):
    return nn.Sequential(nn.Conv2d(i, o, k, s, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o), act() if act else nn.Identity())


class Sum(nn.Module):
    """body(x) + skip(x), then an activation."""

    def __init__(self, body, skip=None, act=None):
        super().__init__()
        self.body, self.skip, self.act = body, skip or nn.Identity(), act or nn.Identity()

    def forward(self, x):
        return self.act(self.body(x) + self.skip(x))


def vgg():
    sizes, layers, i = [8, "M", 16, 16, "M", 24, "M"], [], 3
    for o in sizes:
        layers += [nn.MaxPool2d(2)] if o == "M" else [nn.Conv2d(i, o, 3, padding=1), nn.ReLU(inplace=True)]
        i = i if o == "M" else o
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24 * 16, 10))


def resnet():
    block = lambda i, o, s: Sum(nn.Sequential(conv(i, o, 3, s), conv(o, o, act=None)), conv(i, o, 1, s, act=None) if s > 1 else None, nn.ReLU())
    stem = [nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, block(8, 8, 1), block(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def mobilenet():
    def block(i, o, s):
        body = nn.Sequential(conv(i, 4 * i, 1, act=nn.ReLU6), conv(4 * i, 4 * i, 3, s, 4 * i, nn.ReLU6), conv(4 * i, o, 1, act=None))
        return Sum(body) if (i, s) == (o, 1) else body

    return nn.Sequential(conv(3, 8, 3, 2, act=nn.ReLU6), block(8, 8, 1), block(8, 12, 2), block(12, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))


def network(family, seed=0):
    """One of "vgg", "resnet", "mobilenet" with random weights and statistics, and its input [2, 3, 32, 32]."""
    generator = torch.random.fork_rng()
    with generator:
        torch.manual_seed(seed)
        net = {"vgg": vgg, "resnet": resnet, "mobilenet": mobilenet}[family]()
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.running_mean, -0.5, 0.5)
                nn.init.uniform_(m.running_var, 0.5, 2)
        return net.eval(), torch.randn(2, 3, 32, 32)

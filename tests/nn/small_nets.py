"""Small backbones of each family that attach() supports, with exits and inputs of any batch size."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def sequential():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip


class Block(nn.Module):
    def __init__(self, i, o, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.short = nn.Sequential() if stride == 1 and i == o else nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.short(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        w = width
        self.conv1, self.bn1 = nn.Conv2d(3, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w)
        self.layer1 = nn.Sequential(Block(w, w, 1), Block(w, w, 1))
        self.layer2 = nn.Sequential(Block(w, 2 * w, 2), Block(2 * w, 2 * w, 1))
        self.layer3 = nn.Sequential(Block(2 * w, 4 * w, 2), Block(4 * w, 4 * w, 1))
        self.fc = nn.Linear(4 * w, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.avg_pool2d(x, x.size(3))
        return self.fc(x.view(x.size(0), -1))


class Inverted(nn.Module):
    def __init__(self, i, o, stride, expand):
        super().__init__()
        m = i * expand
        self.skip = stride == 1 and i == o
        self.body = nn.Sequential(
            nn.Conv2d(i, m, 1, bias=False), nn.BatchNorm2d(m), nn.ReLU6(inplace=True),
            nn.Conv2d(m, m, 3, stride, 1, groups=m, bias=False), nn.BatchNorm2d(m), nn.ReLU6(inplace=True),
            nn.Conv2d(m, o, 1, bias=False), nn.BatchNorm2d(o),
        )  # fmt: skip

    def forward(self, x):
        return x + self.body(x) if self.skip else self.body(x)


class MobileNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), Inverted(8, 8, 1, 2), Inverted(8, 16, 2, 4), Inverted(16, 16, 1, 4), Inverted(16, 24, 1, 4)
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(24, 10))

    def forward(self, x):
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), (1, 1)).flatten(1))


def layer(norm_first=False):
    return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.1, norm_first=norm_first)


class ViT(nn.Module):
    def __init__(self, container=False):
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, 4)
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, 32)), nn.Parameter(torch.randn(1, 17, 32))
        self.blocks = nn.TransformerEncoder(layer(), 4) if container else nn.Sequential(*[layer() for _ in range(4)])
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x):
        b = x.shape[0]
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(b, -1, -1), x], 1) + self.pos
        return self.head(self.norm(self.blocks(x))[:, 0])


class Encoder(nn.Module):
    """Token ids and an attention mask; `kind`: list of layers, nn.TransformerEncoder, or layers behind a branch on values."""

    def __init__(self, kind="list"):
        super().__init__()
        self.kind = kind
        self.word, self.pos = nn.Embedding(50, 32), nn.Embedding(64, 32)
        self.layers = nn.TransformerEncoder(layer(), 3) if kind == "container" else nn.ModuleList([layer() for _ in range(3)])
        self.head = nn.Linear(32, 10)

    def forward(self, input_ids, attention_mask):
        x = self.word(input_ids) + self.pos(torch.arange(input_ids.shape[1], device=input_ids.device))
        padding = attention_mask == 0
        if self.kind == "branch" and x.shape[1] > 4:
            x = x * 0.5
        if self.kind == "container":
            x = self.layers(x, src_key_padding_mask=padding)
        else:
            for one in self.layers:
                x = one(x, src_key_padding_mask=padding)
        keep = attention_mask.unsqueeze(-1).to(x.dtype)
        return {"logits": self.head((x * keep).sum(1) / keep.sum(1))}


class TwoInputs(nn.Module):
    """A size read on the left of the cut is used on the right of it; the second input is used behind it only."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16 + 4, 10)

    def forward(self, x, side):
        rows = x.size(0)
        h = torch.relu(self.a(x))
        h = torch.tanh(self.b(h))
        return self.head(torch.cat([h.reshape(rows, -1), side.reshape(rows, -1)], 1))


class WithConstant(nn.Module):
    """Uses a tensor made while it runs and one that is a plain attribute."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 10)
        self.scale = torch.linspace(0.5, 1.5, 8)

    def forward(self, x):
        h = torch.relu(self.a(x)) * self.scale
        return self.head(torch.relu(self.b(h)) + torch.arange(8) * 0.1)


def images(rows):
    return torch.randn(rows, 3, 16, 16)


def tokens(rows):
    mask = torch.ones(rows, 9, dtype=torch.int64)
    mask[1::2, 5:] = 0
    return {"input_ids": torch.randint(0, 50, (rows, 9)), "attention_mask": mask}


FAMILIES = {
    "sequential": (sequential, ["1", "4"], images),
    "sequential_before_inplace": (sequential, ["0", "3"], images),
    "resnet": (ResNet, ["layer1", "layer2"], images),
    "resnet_inside_block": (ResNet, ["layer1.0.bn1", "layer2.1.conv1"], images),
    "mobilenet": (MobileNet, ["features.1", "features.3"], images),
    "vit": (ViT, ["blocks.0", "blocks.2"], images),
    "vit_container": (lambda: ViT(container=True), ["blocks.layers.0", "blocks.layers.2"], images),
    "vit_inside_layer": (ViT, ["blocks.0.norm1", "blocks.2"], images),
    "encoder_mask": (Encoder, ["layers.0", "layers.1"], tokens),
    "encoder_container": (lambda: Encoder("container"), ["layers.layers.0", "layers.layers.1"], tokens),
    "encoder_branch": (lambda: Encoder("branch"), ["layers.0", "layers.1"], tokens),
    "two_inputs": (TwoInputs, ["a"], lambda n: (torch.randn(n, 12), torch.randn(n, 4))),
    "constant": (WithConstant, ["a", "b"], lambda n: torch.randn(n, 8)),
}


def rows_of(x, index):
    if isinstance(x, torch.Tensor):
        return x[index]
    return {k: v[index] for k, v in x.items()} if isinstance(x, dict) else tuple(v[index] for v in x)


def logits(answer):
    return answer["logits"] if isinstance(answer, dict) else answer

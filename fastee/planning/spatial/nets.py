"""Layer tables of known CNNs, built from their published shapes: nothing is downloaded and no model package is needed."""

from __future__ import annotations

from fastee.planning.spatial.geometry import Layer, Net, out_rows


class NetBuilder:
    """Collects layers of a square-input CNN; every method returns the index of the layer it added, to be read by later ones.

    >>> b = NetBuilder("two", size=32, channels=3)
    >>> first = b.conv(16, 3, padding=1)
    >>> b.add(first, b.conv(16, 3, padding=1))
    2
    >>> b.build().cut_points
    (0, 1, 3)
    """

    def __init__(self, name: str, size: int, channels: int, element_bytes: int = 4):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"size must be an integer >= 1, got {size!r}")
        self.name, self.element_bytes = name, element_bytes
        self.layers: list[Layer] = []
        self.shapes = {-1: (channels, size, size)}
        self.last = -1

    def _put(self, kind: str, channels: int, out: tuple[int, int], macs: float, inputs: tuple[int, ...], kernel=1, stride=1, padding=0, dilation=1) -> int:
        i = len(self.layers)
        in_h = self.shapes[inputs[0]][1]
        if min(out) < 1:
            raise ValueError(f"{self.name}: layer {i} ({kind}) has no rows left; the input size is too small")
        self.layers.append(Layer(f"{kind}{i}", kind, kernel, stride, padding, dilation, in_h, out[0], channels,
                                 float(channels * out[1] * self.element_bytes), float(macs), inputs))  # fmt: skip
        self.shapes[i], self.last = (channels, *out), i
        return i

    def conv(self, channels: int, kernel: int, stride: int = 1, padding: int = 0, groups: int = 1, dilation: int = 1, source: int | None = None) -> int:
        source = self.last if source is None else source
        c, h, w = self.shapes[source]
        out = tuple(out_rows(n, kernel, stride, padding, dilation) for n in (h, w))
        return self._put("conv", channels, out, out[1] * channels * (c // groups) * kernel * kernel, (source,), kernel, stride, padding, dilation)

    def pool(self, kernel: int, stride: int, padding: int = 0, ceil_mode: bool = False, kind: str = "max_pool", source: int | None = None) -> int:
        source = self.last if source is None else source
        c, h, w = self.shapes[source]
        out = tuple(out_rows(n, kernel, stride, padding, 1, ceil_mode) for n in (h, w))
        return self._put(kind, c, out, 0.0, (source,), kernel, stride, padding)

    def add(self, *sources: int) -> int:
        c, h, w = self.shapes[sources[0]]
        return self._put("add", c, (h, w), 0.0, sources)

    def cat(self, *sources: int) -> int:
        _, h, w = self.shapes[sources[0]]
        return self._put("cat", sum(self.shapes[s][0] for s in sources), (h, w), 0.0, sources)

    def build(self, tail_macs: float = 0.0, tail_layers: int = 0) -> Net:
        c, h, w = self.shapes[-1]
        return Net(self.name, tuple(self.layers), h, float(c * w * self.element_bytes), float(tail_macs), tail_layers)


def vgg16(size: int = 224) -> Net:
    """VGG-16 (Simonyan and Zisserman 2015): 13 convolutions and 5 poolings, three linear layers as tail."""
    b = NetBuilder("vgg16", size, 3)
    for channels, convs in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(convs):
            b.conv(channels, 3, padding=1)
        b.pool(2, 2)
    # The adaptive pooling to 7 x 7 makes the linear layers independent of the input size.
    return b.build(tail_macs=512 * 49 * 4096 + 4096 * 4096 + 4096 * 1000, tail_layers=3)


def _resnet(name: str, size: int, blocks: tuple[int, ...], bottleneck: bool) -> Net:
    b = NetBuilder(name, size, 3)
    b.conv(64, 7, 2, 3)
    x, channels = b.pool(3, 2, 1), 64
    for stage, count in enumerate(blocks):
        width = 64 << stage
        out = width * (4 if bottleneck else 1)
        for i in range(count):
            stride = 2 if stage and i == 0 else 1
            if bottleneck:  # the stride sits in the 3 x 3 convolution (v1.5)
                y = b.conv(width, 1, source=x)
                y = b.conv(width, 3, stride, 1, source=y)
                y = b.conv(out, 1, source=y)
            else:
                y = b.conv(width, 3, stride, 1, source=x)
                y = b.conv(width, 3, 1, 1, source=y)
            skip = b.conv(out, 1, stride, source=x) if stride != 1 or channels != out else x
            x, channels = b.add(y, skip), out
    return b.build(tail_macs=channels * 1000, tail_layers=2)


def resnet18(size: int = 224) -> Net:
    """ResNet-18 (He et al. 2016): basic blocks with their skips; global pooling and one linear layer as tail."""
    return _resnet("resnet18", size, (2, 2, 2, 2), False)


def resnet50(size: int = 224) -> Net:
    """ResNet-50 v1.5: bottleneck blocks with their skips; global pooling and one linear layer as tail."""
    return _resnet("resnet50", size, (3, 4, 6, 3), True)


def mobilenet_v2(size: int = 224) -> Net:
    """MobileNetV2 (Sandler et al. 2018): inverted residuals with depthwise convolutions; global pooling and one linear layer as tail."""
    b = NetBuilder("mobilenet_v2", size, 3)
    x, channels = b.conv(32, 3, 2, 1), 32
    for expand, out, count, first in ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)):
        for i in range(count):
            stride, hidden = first if i == 0 else 1, channels * expand
            y = b.conv(hidden, 1, source=x) if expand != 1 else x
            y = b.conv(hidden, 3, stride, 1, groups=hidden, source=y)
            y = b.conv(out, 1, source=y)
            x = b.add(x, y) if stride == 1 and channels == out else y
            channels = out
    b.conv(1280, 1, source=x)
    return b.build(tail_macs=1280 * 1000, tail_layers=2)


NETS = {"vgg16": vgg16, "resnet18": resnet18, "resnet50": resnet50, "mobilenet_v2": mobilenet_v2}

"""From a torch module to a Net: layers, shapes and multiply-adds by torch.fx, and the same layers run on some of their rows."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from fastee.errors import CannotCut
from fastee.planning.spatial.geometry import Layer, Net, input_rows, part_padding, vsl

# What treats every element, or every channel of every position, on its own
_POINTWISE_MODULES = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Hardswish,
                      nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.BatchNorm2d, nn.Identity, nn.Dropout, nn.Dropout2d)  # fmt: skip
_POINTWISE_FUNCTIONS = {F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid, F.hardtanh, torch.relu, torch.sigmoid, torch.tanh}
_POINTWISE_METHODS = {"relu", "relu_", "sigmoid", "tanh", "contiguous", "clone"}
_ADD = {operator.add, operator.iadd, torch.add}


@dataclass
class SpatialModule:
    """A torch module as a `net` of layers, and the calls that run parts of it: `part`, `tail`, `full`, `run`."""

    net: Net
    graph: fx.GraphModule
    _runs: list[Callable]  # per layer: (inputs, output rows, layer) -> output rows, activations included
    _nodes: list[fx.Node]  # per layer: the node whose value its output is

    @torch.no_grad()
    def part(self, begin: int, end: int, rows: tuple[int, int], x: torch.Tensor) -> torch.Tensor:
        """Output rows [lo, hi) of volume [begin, end) from `x`, the input rows that `vsl` asks for; empty rows give an empty tensor."""
        layers, (need, source) = self.net.layers, vsl(self.net, begin, end, rows)
        if x.shape[2] != source[1] - source[0]:
            raise ValueError(f"part: x must hold input rows [{source[0]}, {source[1]}), got {x.shape[2]} rows")
        if rows[0] >= rows[1]:
            return x.new_zeros(x.shape[0], layers[end - 1].channels, 0, self.width(end - 1, x))
        have = {begin - 1: (source[0], x)}
        for i in range(begin, end):
            if i not in need:
                continue
            lo, hi = input_rows(layers[i], need[i])
            inputs = []
            for u in layers[i].inputs:
                if lo < hi:
                    start, value = have[max(u, begin - 1)]
                    inputs.append(value[:, :, lo - start : hi - start])
                else:  # rows wholly in the padding: their producer may have computed nothing
                    inputs.append(x.new_zeros(x.shape[0], layers[u].channels if u >= 0 else x.shape[1], 0, self.width(u, x)))
            have[i] = need[i][0], self._runs[i](inputs, need[i], layers[i])
        return have[end - 1][1]

    @torch.no_grad()
    def layer(self, i: int, rows: tuple[int, int], inputs: list[torch.Tensor]) -> torch.Tensor:
        """Output rows [lo, hi) of one layer from its `inputs`, cut to the rows that `input_rows` asks for."""
        return self._runs[i](inputs, rows, self.net.layers[i])

    def width(self, layer: int, x: torch.Tensor) -> int:
        """Columns of a layer's output; of `x`, the net's input, for layer -1."""
        return self._nodes[layer].meta["tensor_meta"].shape[3] if layer >= 0 else x.shape[3]

    @torch.no_grad()
    def tail(self, x: torch.Tensor) -> torch.Tensor:
        """The module's answer from the whole output of the last layer."""
        env: dict[fx.Node, torch.Tensor | None] = {}
        for node in self.graph.graph.nodes:
            env[node] = None
            if node is self._nodes[-1]:
                break
        env[self._nodes[-1]] = x
        return fx.Interpreter(self.graph).run(initial_env=env)

    @torch.no_grad()
    def full(self, x: torch.Tensor) -> torch.Tensor:
        """The module's answer, unsplit."""
        return self.graph(x)

    @torch.no_grad()
    def run(self, plan, x: torch.Tensor) -> torch.Tensor:
        """The module's answer computed as `plan` (a SpatialPlan) says: every provider's part from only the rows it needs."""
        if plan.fingerprint != self.net.fingerprint:
            raise ValueError(f"run: the plan is for another net ({plan.net!r}), expected {self.net.name!r} with the same shapes")
        for begin, end, cuts in zip(plan.volumes, plan.volumes[1:], plan.splits, strict=False):
            parts = []
            for lo, hi in zip(cuts, cuts[1:], strict=False):
                source = vsl(self.net, begin, end, (lo, hi))[1]
                parts.append(self.part(begin, end, (lo, hi), x[:, :, source[0] : source[1]]))
            x = torch.cat(parts, dim=2)
        return self.tail(x)


def extract(module: nn.Module, example: torch.Tensor, name: str | None = None) -> SpatialModule:
    """Return the spatial prefix of a CNN in evaluation mode, with what follows it as tail.

    `example` [B, C, H, W] fixes the shapes. Convolutions, pooling, additions, concatenations of channels, batch norm and activations can be
    split by rows. The first thing that cannot (global pooling, flatten, attention, an unknown call) ends the prefix; it and all after it
    run whole. `CannotCut` when nothing comes before it. Macs and bytes are per sample.

    >>> import torch
    >>> net = extract(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)), torch.zeros(1, 3, 8, 8)).net
    >>> [layer.kind for layer in net.layers]
    ['conv', 'max_pool']
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(example, torch.Tensor) or example.ndim != 4:
        raise ValueError(f"example must be a tensor [B, C, H, W], got {list(example.shape) if isinstance(example, torch.Tensor) else type(example).__name__}")
    name = name or type(module).__name__
    graph = fx.symbolic_trace(copy.deepcopy(module).eval())
    with torch.no_grad():
        ShapeProp(graph).propagate(example)
    layers: list[Layer] = []
    runs: list[Callable] = []
    nodes: list[fx.Node] = []
    home: dict[fx.Node, int] = {}  # node -> layer whose output is its value
    fused: list[list[Callable]] = []  # activations behind each layer
    stop = None
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            if home:
                raise CannotCut(f"{name}: a spatial split takes one input, got a second one, {node.name!r}")
            home[node] = -1
            continue
        made = _layer(graph, node, home)
        if made is None:
            stop = node
            break
        kind, sources, run, (kernel, stride, padding, dilation, macs) = made
        if kind == "pointwise" and home[sources[0]] >= 0 and len(sources[0].users) == 1:
            i = home[sources[0]]
            fused[i].append(run)
            nodes[i], home[node] = node, i
            continue
        _, c, h, w = node.meta["tensor_meta"].shape
        bytes_per_row = float(c * w * node.meta["tensor_meta"].dtype.itemsize)
        in_h = sources[0].meta["tensor_meta"].shape[2]
        layers.append(Layer(node.name, kind, kernel, stride, padding, dilation, in_h, h, c, bytes_per_row, float(macs), tuple(home[s] for s in sources)))
        fused.append([])
        runs.append(_with_activations(run, fused[-1], kind == "pointwise"))
        nodes.append(node)
        home[node] = len(layers) - 1
    # The prefix ends at the last bound that a single tensor crosses, what the tail reads included.
    last_use: dict[int, float] = {}
    for i, layer in enumerate(layers):
        for u in layer.inputs:
            last_use[u] = i
    for node, i in home.items():
        if any(user not in home for user in node.users):
            last_use[i] = math.inf
    end = next((p for p in range(len(layers), 0, -1) if all(last_use.get(u, -1) < p for u in range(-1, p - 1))), 0)
    if end == 0:
        raise CannotCut(f"{name}: no layer can be split by rows before {stop.op} {stop.target}" if stop is not None else f"{name}: nothing to split")
    listed = list(graph.graph.nodes)
    tail = [_tail_macs(graph, node) for node in listed[listed.index(nodes[end - 1]) + 1 :]]
    _, c, h, w = example.shape
    net = Net(name, tuple(layers[:end]), h, float(c * w * example.dtype.itemsize), float(sum(tail)), sum(m > 0 for m in tail))
    return SpatialModule(net, graph, runs[:end], nodes[:end])


def _with_activations(run: Callable, stages: list[Callable], pointwise: bool) -> Callable:
    def both(inputs, rows, layer):
        y = run(inputs[0]) if pointwise else run(inputs, rows, layer)
        for stage in stages:
            y = stage(y)
        return y

    return both


def _layer(graph: fx.GraphModule, node: fx.Node, home: dict[fx.Node, int]):
    """(kind, source nodes, run, (kernel, stride, padding, dilation, row macs)) of a node that can be split by rows, else None."""
    sources, meta = list(node.all_input_nodes), node.meta.get("tensor_meta")
    if not sources or any(s not in home for s in sources) or len(getattr(meta, "shape", ())) != 4:
        return None
    if node.op == "call_module":
        m = graph.get_submodule(node.target)
        if isinstance(m, nn.Conv2d) and m.padding_mode == "zeros":
            return _conv(m, sources, meta.shape[3])
        if isinstance(m, nn.MaxPool2d) and not m.return_indices:
            return _max_pool(m, sources)
        if isinstance(m, nn.AvgPool2d):
            return _avg_pool(m, sources)
        return ("pointwise", sources, m, (1, 1, 0, 1, 0)) if isinstance(m, _POINTWISE_MODULES) else None
    if len(sources) == 1 and (node.op == "call_function" and node.target in _POINTWISE_FUNCTIONS or node.op == "call_method" and node.target in _POINTWISE_METHODS):
        return "pointwise", sources, _call(node, sources[0]), (1, 1, 0, 1, 0)
    if node.op != "call_function":
        return None
    shapes = [s.meta["tensor_meta"].shape for s in sources]
    if node.target in _ADD and len(node.args) == 2 == len(sources) and not node.kwargs and shapes[0] == shapes[1]:
        return "add", sources, lambda x, rows, layer: x[0] + x[1], (1, 1, 0, 1, 0)
    if node.target is torch.cat and len({s[2:] for s in shapes}) == 1 and list(node.args[0]) == sources:
        if (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) in (1, -3):
            return "cat", sources, lambda x, rows, layer: torch.cat(x, dim=1), (1, 1, 0, 1, 0)
    return None


def _call(node: fx.Node, source: fx.Node) -> Callable:
    def call(x):
        args = [x if a is source else a for a in node.args]
        kwargs = {k: x if a is source else a for k, a in node.kwargs.items()}
        return getattr(args[0], node.target)(*args[1:], **kwargs) if node.op == "call_method" else node.target(*args, **kwargs)

    return call


def _pair(value) -> tuple[int, int]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _padded(x: torch.Tensor, rows: tuple[int, int], layer: Layer, side: tuple[int, int], fill: float) -> torch.Tensor:
    """The input rows with the padding that this part applies by itself, and the width padded as unsplit."""
    return F.pad(x, (*side, *part_padding(layer, rows)), value=fill)


def _conv(m: nn.Conv2d, sources, out_w: int):
    (kh, kw), (sh, sw), (qh, qw) = m.kernel_size, m.stride, m.dilation
    if m.padding == "same":  # torch puts the odd one at the bottom and right
        ph, left = qh * (kh - 1) // 2, qw * (kw - 1) // 2
        right = qw * (kw - 1) - left
    else:
        ph, left = (0, 0) if m.padding == "valid" else m.padding
        right = left

    def run(x, rows, layer):
        return F.conv2d(_padded(x[0], rows, layer, (left, right), 0.0), m.weight, m.bias, (sh, sw), 0, (qh, qw), m.groups)

    return "conv", sources, run, (kh, sh, ph, qh, out_w * m.out_channels * (m.in_channels // m.groups) * kh * kw)


def _overhang(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """Columns that the last window reaches beyond the padded border: only with ceil_mode."""
    from fastee.planning.spatial.geometry import out_rows

    outs = out_rows(size, kernel, stride, padding, dilation, ceil_mode)
    return max(0, (outs - 1) * stride + dilation * (kernel - 1) + 1 - size - 2 * padding)


def _max_pool(m: nn.MaxPool2d, sources):
    (kh, kw), (sh, sw), (ph, pw), (qh, qw) = _pair(m.kernel_size), _pair(m.stride), _pair(m.padding), _pair(m.dilation)

    def run(x, rows, layer):
        right = pw + _overhang(x[0].shape[3], kw, sw, pw, qw, m.ceil_mode)
        return F.max_pool2d(_padded(x[0], rows, layer, (pw, right), -math.inf), (kh, kw), (sh, sw), 0, (qh, qw))

    return "max_pool", sources, run, (kh, sh, ph, qh, 0)


def _avg_pool(m: nn.AvgPool2d, sources):
    (kh, kw), (sh, sw), (ph, pw) = _pair(m.kernel_size), _pair(m.stride), _pair(m.padding)

    def counts(size: int, outs: range, kernel: int, stride: int, padding: int) -> list[int]:
        # torch's divisor: padding counts or not, what hangs over the padded border never does
        windows = [(o * stride - padding, min(o * stride - padding + kernel, size + padding)) for o in outs]
        return [hi - lo if m.count_include_pad else min(hi, size) - max(lo, 0) for lo, hi in windows]

    def run(x, rows, layer):
        x = x[0]
        width = x.shape[3]
        wide = _padded(x, rows, layer, (pw, pw + _overhang(width, kw, sw, pw, 1, m.ceil_mode)), 0.0)
        total = F.avg_pool2d(wide, (kh, kw), (sh, sw), 0, divisor_override=1)
        if m.divisor_override:
            return total / m.divisor_override
        down = torch.tensor(counts(layer.in_h, range(*rows), kh, sh, ph), dtype=x.dtype, device=x.device)
        along = torch.tensor(counts(width, range(total.shape[3]), kw, sw, pw), dtype=x.dtype, device=x.device)
        return total / (down[:, None] * along[None, :])

    return "avg_pool", sources, run, (kh, sh, ph, 1, 0)


def _tail_macs(graph: fx.GraphModule, node: fx.Node) -> int:
    shape = getattr(node.meta.get("tensor_meta"), "shape", ())
    m = graph.get_submodule(node.target) if node.op == "call_module" else None
    if isinstance(m, nn.Linear):
        return m.weight.numel() * math.prod(shape[1:-1])
    if isinstance(m, nn.Conv2d):
        return m.weight.numel() * shape[2] * shape[3]
    return 0

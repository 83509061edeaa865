"""From a module and an example to one flat graph that knows where every submodule ends."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from fastee.errors import CannotCut


class Inputs:
    """How a backbone is called: one tensor, positional tensors or keyword tensors, always seen as one tuple.

    The batch is dimension 0 of every tensor. Anything else raises ``TypeError`` or ``ValueError`` naming the argument.
    """

    def __init__(self, backbone: nn.Module, example: Any):
        if isinstance(example, torch.Tensor):
            self.kind, values = "single", (example,)
        elif isinstance(example, Mapping):
            self.kind, values = "dict", tuple(example.values())
        elif isinstance(example, (tuple, list)):
            self.kind, values = "tuple", tuple(example)
        else:
            raise TypeError(f"example: expected a tensor, a tuple or a dict of tensors, got {type(example).__name__}")
        self.names = tuple(example) if self.kind == "dict" else _parameter_names(backbone, len(values))
        for name, value in zip(self.names, values, strict=True):
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"example: input {name!r} must be a tensor, got {type(value).__name__}")
            if value.ndim == 0 or value.shape[0] == 0:
                raise ValueError(f"example: input {name!r} needs at least one row on dimension 0, got {list(value.shape)}")
        if len({v.shape[0] for v in values}) != 1:
            sizes = {n: list(v.shape) for n, v in zip(self.names, values, strict=True)}
            raise ValueError(f"example: all inputs must have the same batch size on dimension 0, got {sizes}")
        self.example = values

    def flat(self, x: Any) -> tuple[torch.Tensor, ...]:
        """Return the model's inputs as the tuple that enters segment 0; a mapping is read by name."""
        if isinstance(x, torch.Tensor):
            values = (x,)
        elif isinstance(x, Mapping):
            missing = [n for n in self.names if n not in x]
            unknown = [n for n in x if n not in self.names]
            if missing or unknown:
                raise ValueError(f"x: expected the inputs {list(self.names)}, missing {missing}, unknown {unknown}")
            values = tuple(x[n] for n in self.names)
        elif isinstance(x, (tuple, list)):
            values = tuple(x)
        else:
            raise TypeError(f"x: expected a tensor, a tuple or a dict of tensors, got {type(x).__name__}")
        if len(values) != len(self.names):
            raise ValueError(f"x: expected {len(self.names)} inputs {list(self.names)}, got {len(values)}")
        return values

    def call(self, backbone: nn.Module, values: tuple[Any, ...]) -> Any:
        """Call the backbone as the example was given."""
        return backbone(**dict(zip(self.names, values, strict=True))) if self.kind == "dict" else backbone(*values)

    def batch(self, rows: int) -> tuple[torch.Tensor, ...]:
        """Return the example cut or repeated to `rows` rows; repeated float rows are scaled by 1 - 0.03 r, so that rows differ."""
        out = []
        for v in self.example:
            part = v.detach()[torch.arange(rows, device=v.device) % v.shape[0]]
            if rows > v.shape[0] and part.is_floating_point():
                scale = 1 - 0.03 * torch.arange(rows, device=v.device, dtype=part.dtype)
                part = part * scale.view(-1, *[1] * (part.ndim - 1))
            out.append(part)
        return tuple(out)

    def shrink(self) -> None:
        """Keep one row of the example only."""
        self.example = tuple(v.detach()[:1].clone() for v in self.example)


def _parameter_names(backbone: nn.Module, count: int) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in inspect.signature(backbone.forward).parameters.values() if p.kind in kinds][:count]
    return tuple(names + [f"input_{i}" for i in range(len(names), count)])


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits in a backbone's answer: a tensor, ``.logits``, ``["logits"]`` or the first tensor of a tuple."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if isinstance(getattr(output, "logits", None), torch.Tensor):
        return output.logits
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], torch.Tensor):
        return output[0]
    raise TypeError(f"backbone: its answer must be a tensor or carry .logits, got {type(output).__name__}")


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Run a block with every submodule in eval mode and without gradients, then put each one's own mode back."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in modes:
            m.training = False
        with torch.no_grad():
            yield
    finally:
        for m, training in modes:
            m.training = training


@dataclasses.dataclass
class Trace:
    """A flat graph of the backbone in eval mode.

    ``taps``: module name -> the node of its output (its first tensor). ``calls``: how often each module ran.
    ``constants``: tensors that are no attribute of the backbone. ``at2``/``at3``: what each node gave with 2 and with
    3 rows (see ``describe``). ``macs``: multiply-adds per sample spent up to and including each node.
    """

    graph: fx.Graph
    taps: dict[str, fx.Node]
    calls: dict[str, int]
    constants: dict[str, torch.Tensor]
    how: str
    at2: dict[fx.Node, Any] = dataclasses.field(default_factory=dict)
    at3: dict[fx.Node, Any] = dataclasses.field(default_factory=dict)
    macs: dict[fx.Node, float] = dataclasses.field(default_factory=dict)

    def is_batched(self, node: fx.Node) -> bool:
        """True for a tensor whose dimension 0 follows the batch."""
        a, b = self.at2.get(node), self.at3.get(node)
        return isinstance(a, TensorInfo) and a.shape[:1] == (2,) and b.shape[:1] == (3,)

    def is_batch_size(self, node: fx.Node) -> bool:
        """True for an int that equals the batch size."""
        a, b = self.at2.get(node), self.at3.get(node)
        return type(a) is int and type(b) is int and (a, b) == (2, 3)


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def describe(value: Any) -> Any:
    """Reduce a run-time value to what splitting needs: shapes, plain numbers, type names."""
    if isinstance(value, torch.Tensor):
        return TensorInfo(tuple(value.shape), value.dtype)
    if isinstance(value, torch.SymInt):
        return int(value)
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(describe(v) for v in value)
    return type(value).__name__


class _Tracer(fx.Tracer):
    """torch.fx, but opening those torch.nn containers in which an exit lies, and noting where each module ends."""

    def __init__(self, inputs: Inputs, exits: tuple[str, ...], auto: bool):
        super().__init__()
        self._inputs, self._exits, self._auto = inputs, exits, auto
        self.outputs: dict[str, Any] = {}
        self.calls: dict[str, int] = {}

    def is_leaf_module(self, m: nn.Module, qualname: str) -> bool:
        if any(e.startswith(qualname + ".") for e in self._exits) or (self._auto and type(m) is nn.TransformerEncoder):
            return False
        return super().is_leaf_module(m, qualname)

    def call_module(self, m, forward, args, kwargs):
        name = self.path_of_module(m)
        if type(m) is nn.TransformerEncoder and not self.is_leaf_module(m, name):
            forward = lambda *a, **k: _encoder_forward(m, *a, **k)
        out = super().call_module(m, forward, args, kwargs)
        self.calls[name] = self.calls.get(name, 0) + 1
        self.outputs[name] = out
        return out

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in self._inputs.names]

        def call(root, *values):
            if self._inputs.kind == "dict":
                return _answer(root.forward(**dict(zip(self._inputs.names, values, strict=True))))
            return _answer(root.forward(*values))

        return call, [self.root, *proxies]


def _answer(output: Any) -> Any:
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if not isinstance(output, fx.Proxy) and hasattr(output, "logits"):
        return output.logits
    return output[0] if isinstance(output, (tuple, list)) else output


def _encoder_forward(encoder, src, mask=None, src_key_padding_mask=None, is_causal=None):
    # nn.TransformerEncoder.forward branches on run-time values. Its answer is the layers in turn; its nested-tensor
    # route (padding mask, no attention mask) differs in one visible way: padded positions come out as zero.
    x = src
    for layer in encoder.layers:
        x = layer(x, src_mask=mask, is_causal=bool(is_causal), src_key_padding_mask=src_key_padding_mask)
    if getattr(encoder, "use_nested_tensor", False) and src_key_padding_mask is not None and mask is None:
        x = _zero_padding(x, src_key_padding_mask)
    return x if encoder.norm is None else encoder.norm(x)


@fx.wrap
def _zero_padding(x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    keep = torch.logical_not(padding) if padding.dtype == torch.bool else padding == 0
    left_aligned = bool((keep[:, 1:] <= keep[:, :-1]).all())  # the condition under which torch takes that route
    return x.masked_fill(torch.logical_not(keep).unsqueeze(-1), 0.0) if left_aligned else x


def _first_node(value: Any) -> fx.Node | None:
    if isinstance(value, fx.Proxy):
        return value.node
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return next((n for n in map(_first_node, value) if n is not None), None)
    return None


def _trace_symbolic(backbone: nn.Module, inputs: Inputs, exits: tuple[str, ...], auto: bool) -> Trace:
    tracer = _Tracer(inputs, exits, auto)
    before = set(backbone.__dict__) | set(backbone._buffers)
    constants: dict[str, torch.Tensor] = {}
    try:
        graph = tracer.trace(backbone)
    finally:  # torch.fx parks constants on the root module; the backbone is not ours to change
        for name in [n for n in (*backbone.__dict__, *backbone._buffers) if n not in before]:
            constants[name] = getattr(backbone, name)
            delattr(backbone, name)
    taps = {name: node for name, out in tracer.outputs.items() if (node := _first_node(out)) is not None}
    return Trace(graph, taps, tracer.calls, {k: v for k, v in constants.items() if isinstance(v, torch.Tensor)}, "torch.fx")


_CHECKS = ("_assert", "sym_constrain", "_guards_fn", "_check")


def _trace_export(backbone: nn.Module, inputs: Inputs, exits: tuple[str, ...], auto: bool) -> Trace:
    values = inputs.batch(2)
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    if inputs.kind == "dict":
        args, kwargs = (), dict(zip(inputs.names, values, strict=True))
        shapes: Any = {name: {0: batch} for name in inputs.names}
    else:
        args, kwargs, shapes = values, {}, tuple({0: batch} for _ in values)
    program = torch.export.export(backbone, args, kwargs, dynamic_shapes=shapes, strict=False)
    module = program.module()
    graph = module.graph
    for node in reversed(list(graph.nodes)):
        label = str(node.target)
        dead = not node.users and node.op in ("call_function", "get_attr")
        if not node.users and any(c in label for c in _CHECKS) or dead:
            graph.erase_node(node)

    wanted = {n for n, _ in backbone.named_modules() if n and (auto or n in exits)}
    seen, answer = _watch(backbone, inputs, values, wanted)
    flat, _ = pytree.tree_flatten(answer)
    logits = logits_of(answer)
    slot = next(i for i, v in enumerate(flat) if v is logits)
    out = next(n for n in graph.nodes if n.op == "output")
    nodes, _ = pytree.tree_flatten(out.args[0])
    out.args = (nodes[slot],)
    graph.set_codegen(fx.graph.CodeGen())  # export's own puts the whole answer together again, and logits may be but a part of it

    constants = {}
    for node in graph.nodes:
        if node.op == "get_attr" and not _has(backbone, node.target):
            name = "_constant_" + node.target.replace(".", "_")
            constants[name], node.target = _fetch(module, node.target), name

    run = _Probe(backbone, graph, constants, keep=True)
    run.run(*values)
    taps, calls = {}, {}
    for name, outputs in seen.items():
        calls[name] = len(outputs)
        inside = [n for n in graph.nodes if any(_path(v) == name for v in (n.meta.get("nn_module_stack") or {}).values())]
        node = next((n for n in reversed(inside) if _same(run.kept.get(n), outputs[-1])), None)
        if node is not None:
            taps[name] = node
    return Trace(graph, taps, calls, constants, "torch.export")


def _path(entry: Any) -> str:
    return str(entry[0] if isinstance(entry, tuple) else entry).split("@")[0]


def _same(a: Any, b: Any) -> bool:
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True))


def first_tensor(value: Any) -> torch.Tensor | None:
    """Return the first tensor in a module's output, or None."""
    if isinstance(value, torch.Tensor):
        return value
    return next((t for t in pytree.tree_flatten(value)[0] if isinstance(t, torch.Tensor)), None)


@contextlib.contextmanager
def watching(backbone: nn.Module, names) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Collect the first tensor of the output of each named module, call by call, while the block runs."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    modules, handles = dict(backbone.named_modules()), []

    def hook_for(name):
        def hook(_module, _args, output):
            tensor = first_tensor(output)
            if tensor is not None:
                seen[name].append(tensor)

        return hook

    try:
        for name in names:
            handles.append(modules[name].register_forward_hook(hook_for(name)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _watch(backbone, inputs, values, names):
    with watching(backbone, names) as seen:
        answer = inputs.call(backbone, values)
    return seen, answer


def _fetch(root: Any, path: str) -> Any:
    for atom in path.split("."):
        root = getattr(root, atom)
    return root


def _has(root: Any, path: str) -> bool:
    try:
        _fetch(root, path)
    except AttributeError:
        return False
    return True


class _Probe(fx.Interpreter):
    """Runs a graph against the backbone and notes what every node gave and what it had cost by then."""

    def __init__(self, backbone, graph, constants, keep=False):
        super().__init__(backbone, graph=graph)
        self._constants, self._keep = constants, keep
        self.kept: dict[fx.Node, Any] = {}
        self.seen: dict[fx.Node, Any] = {}
        self.cost: dict[fx.Node, int] = {}
        self.counter: FlopCounterMode | None = None

    def fetch_attr(self, target: str) -> Any:
        return self._constants[target] if target in self._constants else super().fetch_attr(target)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.seen[n] = describe(value)
        if self._keep:
            self.kept[n] = value
        if self.counter is not None:
            self.cost[n] = self.counter.get_total_flops()
        return value


@contextlib.contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Count floating-point operations (two per multiply-add) while the block runs, torch's fused encoder layer switched off."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the flop counter does not know the fused kernel
    try:
        with FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def trace(backbone: nn.Module, inputs: Inputs, exits: tuple[str, ...], auto: bool = False) -> Trace:
    """Trace the backbone as it answers in eval mode: torch.fx first, torch.export where that fails, else ``CannotCut``."""
    reasons = []
    with eval_mode(backbone):
        for how in (_trace_symbolic, _trace_export):
            try:
                found = how(backbone, inputs, exits, auto)
                _probe(backbone, inputs, found)
                missing = [e for e in exits if e not in found.taps and found.calls.get(e, 0) <= 1]
                if missing and how is _trace_symbolic:
                    raise RuntimeError(f"the output of {missing[0]!r} is not in the graph")
                return found
            except Exception as error:  # any failure of a tracer is a reason, and both are reported
                reasons.append(f"{how.__name__.removeprefix('_trace_')}: {type(error).__name__}: {_short(error)}")
    raise CannotCut(
        f"{type(backbone).__name__} cannot be turned into a graph. " + "; ".join(reasons)
        + ". Give exits that lie outside the part that branches on values, or split the module by hand into nn.Sequential."
    )


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def _probe(backbone: nn.Module, inputs: Inputs, found: Trace) -> None:
    with counting() as counter:
        two = _Probe(backbone, found.graph, found.constants)
        two.counter = counter
        two.run(*inputs.batch(2))
    three = _Probe(backbone, found.graph, found.constants)
    three.run(*inputs.batch(3))
    found.at2, found.at3 = two.seen, three.seen
    found.macs = {n: flops / 4 for n, flops in two.cost.items()}  # two rows, two operations per multiply-add
    for name, node in list(found.taps.items()):  # a leaf that answers a tuple: the tap is its first tensor
        while isinstance(found.at2[node], tuple):
            place = next((i for i, v in enumerate(found.at2[node]) if isinstance(v, (TensorInfo, tuple))), None)
            if place is None:
                break
            node = _item(found, node, place)
        if isinstance(found.at2[node], TensorInfo):
            found.taps[name] = node
        else:
            del found.taps[name]


def _item(found: Trace, node: fx.Node, place: int) -> fx.Node:
    for user in node.users:
        if user.op == "call_function" and user.target is operator.getitem and user.args[1] == place:
            return user
    with found.graph.inserting_after(node):
        item = found.graph.call_function(operator.getitem, (node, place))
    found.at2[item], found.at3[item] = found.at2[node][place], found.at3[node][place]
    found.macs[item] = found.macs[node]
    return item

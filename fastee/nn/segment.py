"""Cut a traced backbone into segments: plain functions of the backbone and a carry, sharing every parameter."""

from __future__ import annotations

import dataclasses
import linecache
import re
from typing import Any

import torch
from torch import fx, nn

from fastee.errors import CannotCut
from fastee.nn.trace import Inputs, TensorInfo, Trace, eval_mode, logits_of

_RANDOM = re.compile(r"rand|bernoulli|multinomial|normal_|uniform_|poisson|exponential_")


class Segment:
    """One part of the backbone: ``segment(backbone, constants, carry) -> carry``.

    It holds code only: every parameter and submodule is looked up in the backbone at each call, so ``.to()``,
    ``load_state_dict`` and hooks of leaf modules work. ``source`` is the generated Python, ``origins`` the path of the module in which
    the backbone computes each of its variables. It is pure: a carry entry
    that the code would overwrite in place is copied first.
    """

    def __init__(self, name: str, source: str, bindings: dict[str, Any], constants: tuple[str, ...], targets: tuple[str, ...], origins: dict[str, str]):
        self.name, self.source, self.bindings = name, source, bindings
        self.constants, self.targets, self.origins = constants, targets, origins
        self.copies: tuple[int, ...] = ()
        self._build()

    def _build(self) -> None:
        file = f"<fastee segment {self.name} {abs(hash(self.source)):x}>"
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(True), file)
        space = dict(self.bindings)
        exec(compile(self.source, file, "exec"), space)
        self.function = space["forward"]

    def __call__(self, backbone: nn.Module, constants: nn.Module, carry: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if self.copies:
            carry = tuple(t.clone() if i in self.copies else t for i, t in enumerate(carry))
        if self.constants:
            return self.function(backbone, *[getattr(constants, c) for c in self.constants], *carry)
        return self.function(backbone, *carry)

    def module(self, backbone: nn.Module, constants: nn.Module) -> nn.Module:
        """Return the segment as a module of its own, with only the submodules and parameters it needs (shared)."""
        return SegmentModule(self, backbone, constants)

    def __getstate__(self):
        state = {k: v for k, v in self.__dict__.items() if k != "function"}
        # operator overloads of torch do not pickle (torch 2.13); their names do
        state["bindings"] = {k: _pack(v) for k, v in self.bindings.items()}
        return state

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.bindings = {k: _unpack(v) for k, v in self.bindings.items()}
        self._build()

    def __deepcopy__(self, memo):
        return self  # code only, never changed after attach


def _pack(value: Any) -> Any:
    if isinstance(value, torch._ops.OpOverload):
        return ("fastee.op", str(value))
    return value


def _unpack(value: Any) -> Any:
    if isinstance(value, tuple) and value[:1] == ("fastee.op",):
        found: Any = torch.ops
        for atom in value[1].split("."):
            found = getattr(found, atom)
        return found
    return value


class SegmentModule(nn.Module):
    """A segment as ``nn.Module``: positional tensors in, tuple of tensors out; for ``torch.export`` and deployment."""

    def __init__(self, segment: Segment, backbone: nn.Module, constants: nn.Module):
        super().__init__()
        self._segment = segment
        self.body = nn.Module()
        for target in segment.targets:
            _graft(self.body, backbone, target)
        self.values = nn.Module()
        for name in segment.constants:
            self.values.register_buffer(name, getattr(constants, name), persistent=True)
        self.eval()

    def forward(self, *carry: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._segment(self.body, self.values, carry)


def _graft(into: nn.Module, source: nn.Module, path: str) -> None:
    *parents, last = path.split(".")
    for atom in parents:
        if atom not in into._modules:
            into.add_module(atom, nn.Module())
        into, source = into._modules[atom], getattr(source, atom)
        if type(into) is not nn.Module:
            return  # a whole submodule that already brings this path
    if last in source._buffers:
        into.register_buffer(last, source._buffers[last], persistent=last not in source._non_persistent_buffers_set)
    else:
        setattr(into, last, getattr(source, last))


@dataclasses.dataclass
class Cut:
    """Where the graph is cut: ``place`` (module name), ``index`` of its last node, the ``carry`` nodes, ``tap`` first."""

    place: str
    index: int
    carry: list[fx.Node]


class Splitter:
    """Knows the order of the nodes of a trace and which values live across each place."""

    def __init__(self, trace: Trace, keep: tuple[str, ...] = ()):
        self.trace = trace
        self.nodes = list(trace.graph.nodes)
        self.index = {n: i for i, n in enumerate(self.nodes)}
        self.output = self.nodes[-1]
        self.inputs = [n for n in self.nodes if n.op == "placeholder"]
        self.keep = [n for n in self.inputs if n.target in keep]
        if not isinstance(self.output.args[0], fx.Node):
            raise CannotCut(f"the backbone's answer must be one tensor of logits, got {self.output.args[0]!r}")

    def cut(self, place: str) -> Cut:
        """Return the cut right after the module `place`; ``CannotCut`` when a value that crosses is no batched tensor."""
        tap = self.trace.taps[place]
        at = self.index[tap]
        if tap is self.output.args[0]:
            raise CannotCut(f"cannot cut after {place!r}: its output is the backbone's own answer, nothing follows")
        if not self.trace.is_batched(tap):
            raise CannotCut(f"cannot cut after {place!r}: its output {self._value(tap)} has no batch on dimension 0")
        crossing = [
            n for n in self.nodes[: at + 1]
            if n.op != "get_attr" and any(self.index[u] > at for u in n.users)
        ]
        carry = [tap] + [n for n in crossing if n is not tap and self.trace.is_batched(n)]
        carry += [n for n in self.keep if n not in carry]
        cut = Cut(place, at, carry)
        for n in crossing:
            if n not in carry:
                self._check(n, cut, n)
        return cut

    def _value(self, node: fx.Node) -> str:
        seen = self.trace.at2.get(node)
        return f"'{node.name}' ({seen if isinstance(seen, TensorInfo) else repr(seen)})"

    def _check(self, node: fx.Node, cut: Cut, asked: fx.Node) -> None:
        """Raise unless `node` can be computed again right of the cut from the carry, parameters and constants."""
        if node in cut.carry or node.op == "get_attr" or self.trace.is_batch_size(node):
            return
        why = None
        if self.trace.is_batched(node):
            why = f"it depends on {self._value(node)}, which does not cross"
        elif node.op == "placeholder":
            why = f"the input {node.target!r} has no batch on dimension 0"
        elif _RANDOM.search(str(node.target)):
            why = f"{self._value(node)} is random"
        elif isinstance(self.trace.at2[node], TensorInfo) and self.trace.at2[node] != self.trace.at3[node]:
            why = f"{self._value(node)} changes with the batch but does not have it on dimension 0"
        if why:
            raise CannotCut(
                f"cannot cut after {cut.place!r}: the value {self._value(asked)} crosses the cut, is not a tensor with the batch"
                f" on dimension 0, and cannot be computed again behind it: {why}. Choose another place."
            )
        for source in node.all_input_nodes:
            if _reads_only_device(node, source):
                continue
            self._check(source, cut, asked)

    def build(self, cuts: list[Cut]) -> list[Segment]:
        """Return the K+1 segments between the cuts."""
        segments = []
        for i in range(len(cuts) + 1):
            left = cuts[i - 1] if i else None
            right = cuts[i] if i < len(cuts) else None
            segments.append(self._segment(i, left, right))
        return segments

    def _segment(self, number: int, left: Cut | None, right: Cut | None) -> Segment:
        graph, env = fx.Graph(), {}
        start = left.index + 1 if left else 0
        stop = right.index + 1 if right else self.index[self.output]
        incoming = left.carry if left else self.inputs
        outgoing = right.carry if right else [self.output.args[0]]
        body = [n for n in self.nodes[start:stop] if n.op not in ("placeholder", "get_attr")]
        env_consts: dict[str, fx.Node] = {}
        used = self._constants_of(body, outgoing, set(incoming))
        for name in used:
            env_consts[name] = graph.placeholder(name)
        for n in incoming:
            env[n] = graph.placeholder(n.name if n.op != "placeholder" else str(n.target))
        first = env[incoming[0]]

        def bring(n: fx.Node) -> fx.Node:
            if n in env:
                return env[n]
            if n.op == "get_attr":
                env[n] = env_consts[n.target] if n.target in env_consts else graph.get_attr(n.target)
            elif left is not None and self.index[n] <= left.index and self.trace.is_batch_size(n):
                env[n] = graph.call_method("size", (first, 0))
            elif left is not None and self.index[n] <= left.index and _reads_device(n):
                env[n] = graph.call_function(getattr, (first, "device"))
            else:
                for source in n.all_input_nodes:
                    bring(source)
                env[n] = graph.node_copy(n, lambda a: env[a])
            return env[n]

        for n in body:
            bring(n)
        graph.output(tuple(bring(n) for n in outgoing))
        targets = tuple(dict.fromkeys(str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")))
        code = graph.python_code("self")
        name = f"{number}" + (f" after {left.place}" if left else "")
        # torch.fx registers wrapped functions anew in front of the code; they are bound already, and the registry never forgets
        source = "\n".join(line for line in code.src.splitlines() if not line.startswith("torch.fx._symbolic_trace.wrap(")).strip() + "\n"
        origins = {new.name: _innermost(old) for old, new in env.items()}
        return Segment(name, source, dict(code.globals), tuple(used), targets, origins)

    def _constants_of(self, body, outgoing, given) -> list[str]:
        seen, stack, used = set(given), [*body, *outgoing], []
        while stack:
            n = stack.pop()
            if n in seen:
                continue
            seen.add(n)
            if n.op == "get_attr" and n.target in self.trace.constants and n.target not in used:
                used.append(n.target)
            if n.op != "placeholder":
                stack.extend(n.all_input_nodes)
        return sorted(used)


def _innermost(node: fx.Node) -> str:
    """Return the path of the module in whose forward the node stands, "" for the backbone's own."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).split("@")[0] if stack else ""


def _reads_device(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is getattr and node.args[1] == "device"


def _reads_only_device(node: fx.Node, source: fx.Node) -> bool:
    return _reads_device(node) and node.args[0] is source


def split(backbone: nn.Module, inputs: Inputs, trace: Trace, cuts: list[Cut], splitter: Splitter, constants: nn.Module) -> list[Segment]:
    """Build the segments, mark carries that would be overwritten, and hold them to the backbone's answer at 1 and 3 rows."""
    segments = splitter.build(cuts)
    with eval_mode(backbone):
        for rows in (1, 3):
            values = inputs.batch(rows)
            want = logits_of(inputs.call(backbone, tuple(v.clone() for v in values)))
            carry: tuple[torch.Tensor, ...] = tuple(v.clone() for v in values)
            for i, segment in enumerate(segments):
                place = cuts[i].place if i < len(cuts) else cuts[-1].place if cuts else "the end"
                try:
                    versions = [t._version for t in carry]
                    fresh = tuple(t.clone() for t in carry)
                    out = segment(backbone, constants, carry)
                    touched = tuple(j for j, t in enumerate(carry) if t._version != versions[j])
                    if touched:
                        segment.copies = tuple(sorted({*segment.copies, *touched}))
                        out = segment(backbone, constants, fresh)
                except Exception as error:
                    raise CannotCut(
                        f"segment {segment.name} (cut at {place!r}) fails with {rows} rows: {type(error).__name__}: {error}"
                    ) from error
                carry = out
            got = carry[0]
            scale = float(want.abs().max()) if want.numel() else 0.0
            close = got.shape == want.shape and torch.allclose(got, want, rtol=1e-3, atol=1e-4 * max(scale, 1e-3), equal_nan=True)
            if not close:
                worst = float((got - want).abs().max()) if got.shape == want.shape else None
                raise CannotCut(
                    f"the segments cut at {[c.place for c in cuts]} do not answer like the backbone with {rows} rows:"
                    f" shapes {list(got.shape)} and {list(want.shape)}, largest difference {worst}. Choose other places."
                )
    return segments

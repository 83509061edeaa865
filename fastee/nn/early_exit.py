"""EarlyExit: a backbone, its heads and the runner that lets every row leave as soon as it may."""

from __future__ import annotations

import hashlib
import math
from time import perf_counter_ns
from typing import Any

import torch
from torch import Tensor, nn

from fastee import ops
from fastee.errors import did_you_mean
from fastee.nn import history
from fastee.nn.deadline import check_deadline, make_scheduler, run_deadline
from fastee.nn.heads import ExitHead
from fastee.nn.result import End, ExitResult, Parts, Whole
from fastee.nn.segment import Segment
from fastee.nn.trace import Inputs, eval_mode, logits_of, watching
from fastee.ops.results import ExitStepResult
from fastee.scheduling import Profile, QoS, Scheduler, profile

MEASURES = ("max_prob", "margin", "entropy", "energy", *history.MEASURES)


class Constants(nn.Module):
    """Tensors that the traced code uses and that are no attribute of the backbone; they move with the network."""

    def __init__(self, values: dict[str, Tensor]):
        super().__init__()
        for name, value in values.items():
            self.register_buffer(name, value, persistent=False)


class EarlyExit(nn.Module):
    """A backbone with K exits; made by `fastee.attach`.

    In eval mode ``net(x)`` lets every row leave at the first exit whose score reaches its threshold and answers an
    `ExitResult`; in train mode it returns the K+1 logits of all heads and of the backbone's own end. Weights are the backbone's own,
    not copies. With every threshold at +inf (the state after attach) it calls the backbone itself, bit for bit. The backbone's own
    end is exit K. Forward hooks of leaf modules fire in segments; those of containers that a cut opened do not.
    """

    def __init__(
        self, backbone: nn.Module, segments: list[Segment], heads: list[ExitHead], exit_names: tuple[str, ...], inputs: Inputs,
        constants: dict[str, Tensor], macs: list[float], mask_places: tuple[int | None, ...], num_classes: int, options: dict[str, Any],
    ):  # fmt: skip
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(heads)
        self.constants = Constants(constants)
        self.exit_names, self.num_exits, self.num_segments = tuple(exit_names), len(heads), len(segments)
        self.num_classes, self.inputs = num_classes, inputs
        self.options = options
        self._segments, self._segment_macs, self._mask_places = segments, macs, mask_places
        self._mask_input = next((inputs.names.index(n) for n in (options.get("mask"),) if n is not None), None)
        self._thresholds, self._measure, self._on = [math.inf] * self.num_exits, "max_prob", False
        self._compile_options: dict[str, Any] | None = None
        self._compiled: list[Any] | None = None
        self._profile = self._scheduler = self._digest = self._graphs = None
        self._qos = QoS()
        self.training = backbone.training

    # the rule

    @property
    def thresholds(self) -> list[float]:
        """One threshold per exit on the score; +inf switches an exit off. A copy: change them with `set_rule`."""
        return list(self._thresholds)

    @thresholds.setter
    def thresholds(self, values) -> None:
        self.set_rule(thresholds=values)

    @property
    def measure(self) -> str:
        """The score that the thresholds are compared with."""
        return self._measure

    def set_rule(self, measure: str | None = None, thresholds=None) -> EarlyExit:
        """Set the measure and one threshold per exit (larger score = more confident; +inf = off) and return the network.

        ``max_prob``, ``margin``, ``entropy`` (its negative) and ``energy`` judge one exit's logits; ``patience`` counts the exits before
        that agree, ``gate`` (``fit(method="gated")``, thresholds 0) weighs all exits so far. At the backbone's end the
        confidence of these two is max_prob.

        >>> import fastee, torch
        >>> body = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> net = fastee.attach(body, exits=["1"], num_classes=3, example=torch.zeros(1, 4))
        >>> net.set_rule(measure="margin", thresholds=[0.5]).thresholds
        [0.5]
        """
        if measure is not None:
            if not isinstance(measure, str):
                raise TypeError(f"measure: expected one of {list(MEASURES)}, got {type(measure).__name__} {measure!r}")
            if measure not in MEASURES:
                raise ValueError(f"measure: expected one of {list(MEASURES)}, got {measure!r}{did_you_mean(measure, MEASURES)}")
        if measure == "gate" and any(head.gate is None for head in self.heads):
            raise ValueError("measure: 'gate' needs trained gates; run fastee.fit(net, loader, method='gated') first")
        values = self._thresholds
        if thresholds is not None:
            if isinstance(thresholds, (str, bytes)) or not hasattr(thresholds, "__iter__"):
                raise TypeError(f"thresholds: expected {self.num_exits} numbers, one per exit, got {thresholds!r}")
            try:
                values = [float(t) for t in thresholds]
            except (TypeError, ValueError):
                raise TypeError(f"thresholds: expected {self.num_exits} numbers, one per exit, got {thresholds!r}") from None
            if len(values) != self.num_exits:
                raise ValueError(f"thresholds: expected {self.num_exits} numbers, one per exit {list(self.exit_names)}, got {len(values)}")
            for name, value in zip(self.exit_names, values, strict=True):
                if math.isnan(value):
                    raise ValueError(f"thresholds: the threshold of exit {name!r} is NaN, expected a number or inf")
        self._measure = measure or self._measure
        self._thresholds = values
        self._on = any(t != math.inf for t in values)
        self._scheduler = None
        return self

    # the seams

    def run_segment(self, i: int, carry: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run segment `i` (0..K) on a carry: tensors with the batch on dimension 0, ``carry[0]`` is what head i-1 read.

        Segment 0 takes the tuple of the model's inputs; the last segment returns ``(logits,)``. Pure: the carry is not written.
        Under ``patience`` and ``gate`` the carry ends with what the exits said so far (int32 [B, K]), which `exit_step` fills in.
        """
        if self._measure in history.MEASURES:
            said = carry[-1] if i else history.blank(carry[0].shape[0], self.num_exits, carry[0].device)
            return self._body(i, carry[:-1] if i else carry) + ((said,) if i < self.num_exits else ())
        return self._body(i, carry)

    def _body(self, i: int, carry: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self._compile_options is not None:
            return self._compiled_segment(i)(*carry)
        modules = self._modules
        return self._segments[i](modules["backbone"], modules["constants"], carry)

    def exit_step(
        self, i: int, carry: tuple[Tensor, ...], *, logits: bool = False, measure: str | None = None, threshold: float | None = None
    ):
        """Return the decision of exit `i` (0..K-1) on a carry, with the current measure and threshold unless given; see ``fastee.ops.exit_step``."""
        place = self._mask_places[i]
        head, measure = self._modules["heads"][i], measure or self._measure
        threshold, mask = self._thresholds[i] if threshold is None else threshold, None if place is None else carry[place]
        if measure not in history.MEASURES:
            return head.step(carry[0], measure, threshold, mask=mask, logits=logits)
        if self._measure != measure:
            raise ValueError(f"measure: {measure!r} needs a carry that remembers; set_rule(measure={measure!r}) before segment 0 runs")
        step = head.step(carry[0], "max_prob", math.inf, mask=mask, logits=True)
        score = history.remember(measure, carry[-1], i, step, head.gate)
        exits = score >= threshold
        index, count = ops.compact(~exits)
        return ExitStepResult(step.label, score, exits, step.stats, index, count, step.logits)

    def segment(self, i: int) -> nn.Module:
        """Return segment `i` as a module with only the submodules it needs (shared, not copied), e.g. for ``torch.export``."""
        return self._segments[i].module(self.backbone, self.constants)

    def compile_segments(self, **options: Any) -> EarlyExit:
        """Run every segment through ``torch.compile(**options)`` from now on; the backbone itself is left as it is."""
        self._compile_options, self._compiled = dict(options), None
        return self

    def _compiled_segment(self, i: int):
        if self._compiled is None:
            self._compiled = [torch.compile(self.segment(j), **self._compile_options) for j in range(self.num_segments)]
        return self._compiled[i]

    def capture_segments(
        self, example: Any, *, batch_sizes: tuple[int, ...] | None = None, wait: str = "auto", layer: Any = None
    ) -> EarlyExit:
        """Answer batches like `example`, of up to as many rows, from CUDA graphs from now on, and return the network; None ends that.

        `example`: tensor, tuple or dict on a CUDA device, `batch_sizes` the row counts to capture (default powers of two). `wait`: who
        chooses how a batch goes on behind an exit: ``auto``, ``never``, ``always`` the host (`GraphRunner`), ``device`` one graph that
        skips by itself (`fastee.nn.exit_graph.ExitGraphRunner`). Captured by the first such batch, which raises `RuntimeError` with the
        segment where that fails. Whatever ``graphs.declines`` and calls with a deadline run eagerly. Moving or casting the network ends it.

        >>> import fastee, torch
        >>> body = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
        >>> net = fastee.attach(body, ["0"], num_classes=3, example=torch.zeros(1, 4)).eval().set_rule(thresholds=[0.5])
        >>> net.capture_segments(torch.zeros(8, 4)).graphs.declines((torch.zeros(2, 4),))
        'a tensor on cpu: graphs are captured on CUDA devices'
        """
        from fastee.nn.exit_graph import ExitGraphRunner
        from fastee.nn.graphs import WAITS, GraphRunner

        if wait not in (*WAITS, "device"):
            raise ValueError(f"wait: expected one of {', '.join(WAITS)}, device, got {wait!r}")
        if example is None:
            self._graphs = None
        elif wait == "device":
            self._graphs = ExitGraphRunner(self, example, batch_sizes=batch_sizes, layer=layer)
        else:
            self._graphs = GraphRunner(self, example, batch_sizes=batch_sizes, wait=wait, layer=layer)
        return self

    @property
    def graphs(self) -> Any:
        """The runner that `capture_segments` made, None without one."""
        return self._graphs

    def full(self, x: Any) -> Any:
        """Return the backbone's own answer to `x` (tensor, tuple or dict of the model's inputs), bit for bit."""
        if isinstance(x, Tensor):
            return self.backbone(x)
        return self.backbone(**x) if hasattr(x, "keys") else self.backbone(*x)

    # running

    def forward(self, *x: Any, deadline: float | None = None, **named: Tensor) -> Any:
        """Answer a batch; see the class. `deadline` in seconds from the call: rows that would be late leave at the exit they reached.

        Inputs as the backbone takes them, or one tuple or dict of them. An empty batch gives an empty result. Answers carry no
        gradient while an exit is on. Under a deadline (any number but NaN; <= 0 is late already) the network always answers:
        rows that are late before the first exit are still run up to it and leave there, ``forced``. Without a profile the first such call
        measures one before its clock starts (`ensure_profile`).
        """
        if self.training:
            return self._all_logits(self._gather_inputs(x, named))
        if deadline is None and not self._on and len(x) == 1 and not named and type(x[0]) is Tensor and x[0].shape[0]:
            return ExitResult._of(Whole(self._modules["backbone"](x[0]), self.num_exits, self._measure))
        entry = perf_counter_ns()
        values = self._gather_inputs(x, named)
        rows = values[0].shape[0]
        if deadline is not None:
            return self._run_deadline(values, rows, entry, deadline)
        if rows == 0:
            return self._empty(values[0].device)
        if not self._on:
            return ExitResult._of(Whole(self.inputs.call(self.backbone, values), self.num_exits, self._measure))
        if self._graphs is not None and self._graphs.declines(values) is None:
            return self._graphs.run(values)
        with torch.no_grad():
            return self._run(values, rows)

    def _gather_inputs(self, x: tuple[Any, ...], named: dict[str, Any]) -> tuple[Tensor, ...]:
        if named:
            names = self.inputs.names
            if len(x) > len(names):
                raise ValueError(f"x: expected {len(names)} inputs {list(names)}, got {len(x) + len(named)}")
            twice = [n for n in names[: len(x)] if n in named]
            if twice:
                raise TypeError(f"x: input {twice[0]!r} was given twice")
            values = self.inputs.flat({**dict(zip(names, x, strict=False)), **named})
        else:
            values = self.inputs.flat(x[0] if len(x) == 1 else x)
        for name, value in zip(self.inputs.names, values, strict=True):
            if not isinstance(value, Tensor):
                raise TypeError(f"x: input {name!r} must be a tensor, got {type(value).__name__}")
            if value.ndim == 0 or value.shape[0] != values[0].shape[0]:
                raise ValueError(f"x: input {name!r} must have {values[0].shape[0]} rows like the first input, got {list(value.shape)}")
        return values

    def _empty(self, device) -> ExitResult:
        none = torch.empty(0, dtype=torch.int64, device=device)
        return ExitResult(torch.empty(0, self.num_classes, device=device), none, torch.empty(0, device=device), none.clone())

    def _run(self, carry: tuple[Tensor, ...], total: int) -> ExitResult:
        parts, rows, count = [], None, total
        for i, threshold in enumerate(self._thresholds):
            carry = self.run_segment(i, carry)
            if threshold == math.inf:
                continue
            step = self.exit_step(i, carry, logits=True)
            stay = int(step.count)
            if stay == count:
                continue
            if stay == 0:
                parts.append((i, rows, None, step, None))
                return ExitResult._of(Parts(total, parts))
            index = step.index
            keep, leave = index[:stay], index[stay:]
            parts.append((i, leave if rows is None else rows[leave], leave, step, None))
            carry = tuple(ops.gather_rows(t, keep) for t in carry)
            rows, count = keep if rows is None else rows[keep], stay
        carry = self.run_segment(self.num_exits, carry)
        parts.append((self.num_exits, rows, None, End(carry[0], self._measure), None))
        return ExitResult._of(Parts(total, parts))

    # deadlines

    @property
    def profile(self) -> Profile | None:
        """Measured seconds per segment and batch size that deadlines are held against; None until measured or given."""
        return self._profile

    @profile.setter
    def profile(self, value: Profile | None) -> None:
        if value is not None and not isinstance(value, Profile):
            raise TypeError(f"profile: expected a fastee.Profile or None, got {type(value).__name__}")
        if value is not None:
            value.check(self)
        self._profile, self._scheduler = value, None

    @property
    def qos(self) -> QoS:
        """The promise that ``deadline=`` is held to: hit rate, cost weight, largest drop of an early answer."""
        return self._qos

    @qos.setter
    def qos(self, value: QoS) -> None:
        if not isinstance(value, QoS):
            raise TypeError(f"qos: expected a fastee.QoS, got {type(value).__name__}")
        self._qos, self._scheduler = value, None

    def ensure_profile(self, x: Any = None) -> Profile:
        """Measure the profile of this machine unless there is one, with the rows of `x` (else of the example), and return it.

        Batch sizes 1, 8, 32 up to the rows of `x` and that number itself.
        """
        if self._profile is None:
            values = self.inputs.example if x is None else self._gather_inputs((x,), {})
            rows = values[0].shape[0]
            if rows == 0:
                raise ValueError("x: a profile needs at least one row, got an empty batch")
            sizes = tuple(sorted({1, rows, *(s for s in (8, 32) if s < rows)}))
            self.profile = profile(self, values, batch_sizes=sizes, repeats=7, warmup=2)
        return self._profile

    def scheduler(self, rows: int = 1) -> Scheduler:
        """Return the scheduler of this network with room for `rows` tasks at once; made on first use and after every change."""
        if self._scheduler is None or self._scheduler.max_tasks < rows:
            self._scheduler = make_scheduler(self, self._qos, max(4096, rows))
        return self._scheduler

    def _run_deadline(self, values: tuple[Tensor, ...], rows: int, entry: int, deadline: Any) -> ExitResult:
        check_deadline(deadline)
        if rows == 0:
            return self._empty(values[0].device)
        with torch.no_grad():
            if self._profile is None:
                self.ensure_profile(values if self.inputs.kind != "single" else values[0])
                entry = perf_counter_ns()
            try:
                return run_deadline(self, self.scheduler(rows), values, rows, entry, deadline)
            except BaseException:
                self._scheduler = None  # its open tasks would stay for ever
                raise

    def save(self, path: Any, weights: str = "heads") -> None:
        """Write heads, exits and rule (with ``weights="all"`` the backbone too) to one safetensors file for `fastee.load`."""
        from fastee.nn.checkpoint import save

        save(self, path, weights)

    def _all_logits(self, values: tuple[Tensor, ...]) -> list[Tensor]:
        mask = None if self._mask_input is None else values[self._mask_input]
        with watching(self.backbone, self.exit_names) as seen:
            output = self.inputs.call(self.backbone, values)
        return [head(seen[name][-1], mask) for name, head in zip(self.exit_names, self.heads, strict=True)] + [logits_of(output)]

    def taps(self, *x: Any, **named: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the pooled features [B, D_i] that each head reads and the backbone's logits, in one pass without gradients."""
        values = self._gather_inputs(x, named)
        mask = None if self._mask_input is None else values[self._mask_input]
        with eval_mode(self.backbone), watching(self.backbone, self.exit_names) as seen:
            output = self.inputs.call(self.backbone, values)
            pooled = [h.pooled(seen[n][-1], mask) for n, h in zip(self.exit_names, self.heads, strict=True)]
        return pooled, logits_of(output)

    # identity

    @property
    def macs(self) -> dict[str, list[float]]:
        """Multiply-adds per sample: ``segments`` [K+1] and ``heads`` [K]."""
        return {"segments": list(self._segment_macs), "heads": [h.macs for h in self.heads]}

    @property
    def fingerprint(self) -> str:
        """32 hex digits that change with the architecture, the weights or the exits; the same in every process."""
        tensors = {**self.state_dict()}
        key = tuple((id(t.untyped_storage()), t.data_ptr(), t._version) for t in tensors.values())
        if self._digest is None or self._digest[0] != key:
            digest = hashlib.blake2b(repr((self.exit_names, self.inputs.names, self.num_classes)).encode(), digest_size=16)
            for segment in self._segments:
                digest.update(segment.source.encode())
            for head in self.heads:
                digest.update(f"{head.pool},{head.norm_kind},{head.kind};".encode())
            update_with_tensors(digest, tensors)
            self._digest = (key, digest.hexdigest())
        return self._digest[1]

    def _apply(self, fn, recurse=True):
        self._compiled = self._profile = self._scheduler = self._graphs = None
        return super()._apply(fn, recurse)

    def __getstate__(self):
        return {**self.__dict__, "_compiled": None, "_scheduler": None, "_digest": None, "_graphs": None}

    def extra_repr(self) -> str:
        return f"exits={list(self.exit_names)}, measure={self._measure!r}, thresholds={self._thresholds}"


def update_with_tensors(digest, tensors: dict[str, Tensor]) -> None:
    """Feed names, dtypes, shapes and bytes of tensors to a hash."""
    for name in sorted(tensors):
        t = tensors[name].detach()
        digest.update(f"{name}:{t.dtype}:{list(t.shape)};".encode())
        if t.numel():
            digest.update(t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

"""The benchmark harness: providers of one op on one shape, timed interleaved in one pinned thread beside the roof of the machine.

Method (after the protocols of triton_kernels and Highway): short batches of calls of each provider in turn, the order rotated every
round; inputs rotate inside the batch; percentiles are over batches; ratios are medians over rounds, so that a slow second of a shared
machine hits all providers alike.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import math
import os
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter_ns

import torch

from fastee import native
from fastee.dispatch import explain
from fastee.errors import BackendUnavailable
from fastee.testing.rows import Bar, Machine, Row, now

PERCENTILES = (20, 50, 80, 95, 99)


@dataclass
class Case:
    """One provider: ``fn(*args, **kwargs)`` is called with each tuple of `inputs` in turn; ``fn=None`` with a `note` records a skip.

    `times`: ns of single calls that were taken already, where they cannot be repeated at will (tasks of a stream, under faults); fn is None then.
    """

    provider: str
    fn: Callable | None
    inputs: list[tuple] = field(default_factory=lambda: [()])
    kwargs: dict = field(default_factory=dict)
    note: str = ""
    bytes: int | None = None  # overrides the group's
    flops: int | None = None
    ratio: float | None = None  # what it reaches rather than how fast, see Row.ratio
    times: list[float] | None = None


@dataclass
class Group:
    """Providers of one op on one shape, timed interleaved.

    `bytes` (read + written) and `flops` per call give the physical floor; `roof` is ``read`` or ``copy``. `bars` speak about the first
    case: ``"<= 3 us"``, ``"p99 <= 2 us"``, ``">= 12x torch"``, ``"<= 5 us over bare"``, ``"ratio <= 0.72"``. ``per_call=True`` times single
    calls, for true tail percentiles at the price of the clock's own cost (the row says which share). `threads` native and torch threads run
    on as many cores; the roofs stay those of one core.
    """

    op: str
    shape: str
    dtype: str
    cases: list[Case]
    baseline: str = "torch"
    bytes: int = 0
    flops: int = 0
    roof: str = "read"
    working_set: int = 0
    regime: str = "warm"
    bars: tuple[str, ...] = ()
    per_call: bool = False
    threads: int = 1

    def __post_init__(self):
        names = [c.provider for c in self.cases]
        if len(set(names)) != len(names) or not names:
            raise ValueError(f"cases: expected different providers, got {names}")
        if self.baseline not in names:
            raise ValueError(f"baseline: {self.baseline!r} is none of {names}")
        if self.roof not in ("read", "copy"):
            raise ValueError(f"roof: got {self.roof!r}, expected 'read' or 'copy'")
        for bar in self.bars:
            parse_bar(bar)


_NUMBER = r"(\d+(?:\.\d+)?)"
_BAR = re.compile(rf"(?:(min|p20|p50|p80|p95|p99) )?(<=|>=) {_NUMBER} ?(ns|us|ms|x)(?: (over )?(\S+))?|(ratio) (<=|>=) {_NUMBER}")


def parse_bar(text: str) -> tuple[str, str, float, str, bool, str | None]:
    """Return (statistic, comparison, limit, unit, over, provider) of a bar; ``ValueError`` names a bar that is none."""
    m = _BAR.fullmatch(text)
    if m and m[7]:
        return m[7], m[8], float(m[9]), "", False, None
    if not m or (m[4] == "x") != (m[6] is not None and not m[5]):
        known = "'<= 3 us', 'p99 <= 2 us', '>= 12x torch', '<= 5 us over bare' or 'ratio <= 0.72'"
        raise ValueError(f"bar: got {text!r}, expected such as {known}")
    return m[1] or "p50", m[2], float(m[3]), m[4], bool(m[5]), m[6]


@contextlib.contextmanager
def quiet(threads: int = 1) -> Iterator[None]:
    """Time inside this: one core, `threads` torch and native threads, no gradient, garbage collector off; all restored afterwards."""
    native_before, before, cores = native.get_num_threads(), torch.get_num_threads(), os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    collecting = gc.isenabled()
    try:
        torch.set_num_threads(threads)
        native.set_num_threads(threads)
        if cores:
            os.sched_setaffinity(0, sorted(cores)[-threads:])
        gc.collect()
        gc.disable()
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)
        native.set_num_threads(native_before)
        if cores:
            os.sched_setaffinity(0, cores)
        if collecting:
            gc.enable()


def _loop(case: Case) -> Callable[[list[tuple]], int]:
    """Return ``run(batch) -> ns``: a loop that calls the provider directly, since ``fn(*args, **kwargs)`` would add 60 ns to each call."""
    arity = {len(args) for args in case.inputs}
    if len(arity) != 1:
        raise ValueError(f"inputs of {case.provider}: expected tuples of one length, got lengths {sorted(arity)}")
    names = [f"a{i}" for i in range(arity.pop())]
    call = ", ".join([*names, *(f"{k}=k_{k}" for k in case.kwargs)])
    target = "".join(f"{n}, " for n in names) or "_"
    source = f"def run(batch):\n t = clock()\n for {target} in batch: fn({call})\n return clock() - t"
    scope = {"fn": case.fn, "clock": perf_counter_ns, **{f"k_{k}": v for k, v in case.kwargs.items()}}
    exec(source, scope)
    return scope["run"]


def clock_cost() -> float:
    """Return what one pair of clock reads costs, ns (median)."""
    empty = _loop(Case("empty", None, [()]))
    return statistics.median(empty([]) for _ in range(1001))


def sample(cases: list[Case], seconds: float, warmup: float, per_call: bool = False, target_us: float = 200.0) -> tuple[list[list[float]], list[int]]:
    """Return (ns per call of every round, calls per batch) per case, round-robin; the case that starts a round moves by one each round."""
    loops = [_loop(c) for c in cases]
    batches = []
    for case, loop in zip(cases, loops, strict=True):
        feed, end, per = itertools.cycle(case.inputs), perf_counter_ns() + int(warmup * 1e9), []
        while not per or perf_counter_ns() < end:
            per.append(loop([next(feed)]))
        inner = 1 if per_call else max(1, math.ceil(target_us * 1e3 / max(1.0, statistics.median(per))))
        batches.append((inner, feed))
    out: list[list[float]] = [[] for _ in cases]
    order, end = list(range(len(cases))), perf_counter_ns() + int(seconds * 1e9)
    while len(out[0]) < 5 or perf_counter_ns() < end:
        for i in order:
            inner, feed = batches[i]
            batch = list(itertools.islice(feed, inner))
            out[i].append(loops[i](batch) / inner)
        order.append(order.pop(0))
    return out, [inner for inner, _ in batches]


def percentile(values: list[float], q: float) -> float:
    """Return the q-th percentile, linearly interpolated."""
    s = sorted(values)
    at = (len(s) - 1) * q / 100
    low = int(at)
    return s[low] + (s[min(low + 1, len(s) - 1)] - s[low]) * (at - low)


class Roofs:
    """What this core can do now: read and copy bandwidth by working set, and fp32 matrix product throughput; measured once per run.

    Reading is libc's ``memchr`` for a byte that is not there (vectorised, reads everything, writes nothing); copying is ``memmove`` from one
    half of the working set to the other, bytes counted both ways. The cost of an empty call is taken off.
    """

    def __init__(self, budget: float = 0.05):
        self.budget, self._seen = budget, {}
        libc = ctypes.CDLL(None)
        self._read, self._copy = libc.memchr, libc.memmove
        self._read.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
        self._read.restype = self._copy.restype = ctypes.c_void_p
        self._copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

    def _best(self, fn: Callable, args: tuple) -> float:
        loop, inner, runs = _loop(Case("roof", fn, [args])), 1, []
        while loop([args] * inner) < 50_000:
            inner *= 2
        end = perf_counter_ns() + int(self.budget * 1e9)
        while len(runs) < 5 or perf_counter_ns() < end:
            runs.append(loop([args] * inner) / inner)
        return min(runs)

    def bandwidth(self, kind: str, working_set: int) -> float:
        """Return GB/s of ``read`` or ``copy`` at a working set (4 KiB to 1 GiB, rounded up to an eighth of an octave)."""
        size = int(2 ** (math.ceil(8 * math.log2(min(1 << 30, max(1 << 12, working_set)))) / 8)) & ~63
        if (kind, size) not in self._seen:
            buffer = torch.ones(size, dtype=torch.uint8)
            p = buffer.data_ptr()
            fn, full, none = (self._read, (p, 7, size), (p, 7, 0)) if kind == "read" else (self._copy, (p, p + size // 2, size // 2), (p, p, 0))
            self._seen[kind, size] = size / max(1.0, self._best(fn, full) - self._best(fn, none))
        return self._seen[kind, size]

    def gflops(self) -> float:
        """Return GFLOP/s of a 384 x 384 fp32 product: the better of ``torch.mm`` (BLAS) and a oneDNN linear layer.

        BLAS alone is no roof: on an AMD Zen 5 core it stays at the AVX2 rate, 112 GFLOP/s, where oneDNN reaches 249 (2026-11).
        """
        if "mm" not in self._seen:
            a, b = torch.randn(384, 384), torch.randn(384, 384)
            times = [self._best(torch.mm, (a, b))]
            if torch.backends.mkldnn.is_available():
                times.append(self._best(torch.nn.functional.linear, (a.to_mkldnn(), b)))
            self._seen["mm"] = 2 * 384**3 / min(times)
        return self._seen["mm"]


def llc_bytes() -> int:
    """Return the size of the last-level cache, 32 MiB where the system does not say."""
    import glob

    sizes = [32 << 20]
    for path in glob.glob("/sys/devices/system/cpu/cpu0/cache/index*/size"):
        with open(path) as file:
            text = file.read().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(sizes[1:] or sizes)


@dataclass
class Context:
    """What a bench file's ``cases(ctx)`` may ask: which peers, which shapes, and for inputs that rotate in the warm or the cold regime."""

    quick: bool = False
    shapes: str = "small"
    against: tuple[str, ...] = ("torch", "compile")
    seed: int = 0
    regime: str = "warm"

    def rotate(self, make: Callable[[int], tuple], nbytes: int, regime: str = "") -> list[tuple]:
        """Return input tuples ``make(i)``: 4 of them when warm, more than twice the last-level cache's bytes when cold.

        `regime` stands for this call above the context's.
        """
        count = 4 if (regime or self.regime) == "warm" else max(4, math.ceil(2 * llc_bytes() / max(1, nbytes)))
        return [make(i) for i in range(min(count, 4096))]

    def compiled(self, fn: Callable, inputs: list[tuple], provider: str = "compile") -> Case:
        """Return the case of ``torch.compile(fn)`` in default mode, compiled now for these shapes; a skip with the reason if it cannot be."""
        if provider not in self.against:
            return Case(provider, None, inputs, note="not asked for (--against)")
        import torch._dynamo

        torch._dynamo.reset()  # else the second shape would be compiled with dynamic shapes, which is slower
        try:
            made = torch.compile(fn)
            with quiet():
                made(*inputs[0])
            return Case(provider, made, inputs, note="torch.compile, default mode, static shapes")
        except Exception as error:  # whatever the compiler raises: a missing g++ is a skip, not a crash
            return Case(provider, None, inputs, note=f"torch.compile failed: {type(error).__name__}: {str(error).splitlines()[0][:160]}")

    def usual(self, op: Callable, eager: Callable, inputs: list[tuple]) -> list[Case]:
        """Return what most ops are timed as: fastee, torch eager, ``torch.compile`` on the small set of shapes, fastee's other backends."""
        cases = [Case("fastee", op, inputs, note=explain(op.__name__, *inputs[0]).chosen), Case("torch", eager, inputs, note="eager")]
        if not self.quick and self.shapes == "small":
            cases.append(self.compiled(eager, inputs))
        return cases + self.backends(op, inputs)

    def backends(self, fn: Callable, inputs: list[tuple], kwargs: dict | None = None) -> list[Case]:
        """Return a case of op `fn` for each of its own backends that ``--against`` names: ``numba`` (compiled now), ``reference``."""
        cases = []
        for name in ("numba", "reference"):
            if name in self.against:
                options = {**(kwargs or {}), "backend": name}
                try:
                    fn(*inputs[0], **options)
                    cases.append(Case(name, fn, inputs, options, note=f"fastee, backend={name!r}"))
                except BackendUnavailable as error:
                    cases.append(Case(name, None, inputs, note=str(error)))
        return cases


def _speedup(t: list[float], base: list[float]) -> float:
    """Median over rounds of how many times faster `t` is; of the medians where the two were not timed in the same rounds."""
    return percentile([b / a for a, b in zip(t, base, strict=True)], 50) if len(t) == len(base) else percentile(base, 50) / percentile(t, 50)


def judge(text: str, subject: str, times: dict[str, list[float]], ratio: float | None = None) -> Bar:
    """Return the verdict of a bar from ns per call and round; `met` is None where the other provider was skipped or there is no ratio."""
    stat, comparison, limit, unit, over, other = parse_bar(text)
    pick = lambda t: min(t) if stat == "min" else percentile(t, float(stat[1:]))
    if (other is not None and other not in times) or (stat == "ratio" and ratio is None):
        return Bar(text, None, None)
    if stat == "ratio":
        value = float(ratio)
    elif unit == "x":
        value = _speedup(times[subject], times[other])
    else:
        extra = pick(times[other]) if over else 0.0
        value = (pick(times[subject]) - extra) / {"ns": 1.0, "us": 1e3, "ms": 1e6}[unit]
    return Bar(text, round(value, 4), value <= limit if comparison == "<=" else value >= limit)


def measure(group: Group, roofs: Roofs, machine: Machine, seconds: float = 0.6, warmup: float = 0.2) -> list[Row]:
    """Time the group, `seconds` per case, and return one row per case, skipped ones included; the bars stand in the first case's row."""
    subject, live = group.cases[0].provider, [c for c in group.cases if c.fn is not None]
    times = {c.provider: c.times for c in group.cases if c.times}
    if not {subject, group.baseline} <= {*times, *(c.provider for c in live)}:
        raise ValueError(f"{group.op} {group.shape}: {subject} (the subject) and {group.baseline} (the baseline) cannot be skipped")
    with quiet(group.threads):
        load, clock = os.getloadavg()[0], clock_cost()
        read = roofs.bandwidth(group.roof, group.working_set or group.bytes) if group.bytes else None
        gflops = roofs.gflops() if group.flops else None
        rounds, inner = sample(live, seconds * len(live), warmup, group.per_call) if live else ([], [])
    times |= {c.provider: t for c, t in zip(live, rounds, strict=True)}
    batch = dict.fromkeys(times, 1) | {c.provider: n for c, n in zip(live, inner, strict=True)}
    rows = []
    for case in group.cases:
        row = Row(
            op=group.op, provider=case.provider, shape=group.shape, dtype=group.dtype, regime=group.regime, baseline=group.baseline,
            roof=group.roof, working_set=group.working_set, bytes=group.bytes if case.bytes is None else case.bytes,
            flops=group.flops if case.flops is None else case.flops, ratio=None if case.ratio is None else round(float(case.ratio), 4),
            threads=group.threads, loadavg=load, date=now(), machine=machine,
        )  # fmt: skip
        rows.append(row)
        if case.provider not in times:
            row.skipped = case.note
            continue
        t = times[case.provider]
        row.note, row.inner, row.rounds = case.note, batch[case.provider], len(t)
        row.min_us = round(min(t) / 1e3, 4)
        row.p20_us, row.p50_us, row.p80_us, row.p95_us, row.p99_us = (round(percentile(t, q) / 1e3, 4) for q in PERCENTILES)
        p50 = percentile(t, 50)
        row.speedup = round(_speedup(t, times[group.baseline]), 4)
        row.timer_share = round(clock / (p50 * row.inner), 5)
        if row.bytes or row.flops:
            row.gbps = round(row.bytes / p50, 3)
            row.roof_gbps, row.roof_gflops = read and round(read, 2), gflops and round(gflops, 2)
            floor = max(row.bytes / read if read else 0.0, row.flops / gflops if gflops else 0.0)
            row.floor_us, row.roof_share = round(floor / 1e3, 4), round(floor / p50, 4)
            row.bandwidth_share = read and round(row.bytes / read / p50, 4)
            row.gemm_share = gflops and round(row.flops / gflops / p50, 4)
    rows[0].bars = [judge(text, subject, times, group.cases[0].ratio) for text in group.bars]
    return rows

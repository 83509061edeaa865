"""Backends of an op, best first: who can run this call, who declines and why.

Order: the ``backend=`` argument, then ``FASTEE_BACKEND``, then the op's own order. An automatic choice may step down; an
explicit one that cannot run raises `BackendUnavailable` with the reason. Wrong input never falls back.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastee import native
from fastee.errors import BackendUnavailable, did_you_mean

ORDER = ("cuda", "triton", "cpu", "numba", "reference")
ASKED = os.environ.get("FASTEE_BACKEND") or "auto"  # read once: the direct calls must not pay for a look at the environment


@dataclass(frozen=True)
class Backend:
    """One implementation of an op: `run` takes the op's checked arguments.

    `declines` says why it cannot (None = it can). `yields` says why an automatic choice passes it over although it can.
    """

    name: str
    run: Callable[..., Any]
    declines: Callable[..., str | None] = lambda *args, **kwargs: None
    yields: Callable[..., str | None] = lambda *args, **kwargs: None


@dataclass
class Op:
    name: str
    backends: tuple[Backend, ...]
    check: Callable[..., tuple[tuple, dict]]  # the op's own argument check, returns what backends take


@dataclass
class Explanation:
    """Which backend takes a call and why the others do not; prints as a short table."""

    op: str
    chosen: str
    isa: str | None
    rows: list[tuple[str, str]] = field(default_factory=list)  # (backend, "chosen" or the reason)

    def __str__(self) -> str:
        where = f" ({self.isa})" if self.chosen == "cpu" and self.isa else ""
        return "\n".join([f"{self.op}: {self.chosen}{where}", *(f"  {name:<10} {why}" for name, why in self.rows)])

    __repr__ = __str__


_ops: dict[str, Op] = {}


def register(op: Op) -> Op:
    _ops[op.name] = op
    return op


def direct(name: str) -> Callable:
    """Return the native function that an op may call before any check or choice.

    Where there is none, or another backend is asked for, it is one that hands every call back as the native ones do: with None.
    """
    return getattr(native.hot, name) if native.hot is not None and ASKED in ("auto", "cpu") else lambda *args: None


class function(native.hot.NativeFirst if native.hot is not None else object):
    """An op's public function whose eager calls start in C: a function of Python would cost each of them 0.1 us before anything is done.

    To everything else it is the Python function that it wraps: to Dynamo, which traces `__call__`, to `help`, `inspect` and `pickle`.
    """

    def __init__(self, direct: Callable, checked: Callable):
        functools.update_wrapper(self, checked)

    def __call__(self, *args, **kwargs):
        return self.__wrapped__(*args, **kwargs)

    def __get__(self, owner, kind=None):
        return self if owner is None else types.MethodType(self, owner)

    def __reduce__(self):
        return self.__qualname__

    def __repr__(self):
        return repr(self.__wrapped__)


def native_first(name: str, checked: Callable) -> Callable:
    """Return `checked`, the public function of op `name`, behind the native function of the same signature.

    That one takes a call as the user wrote it, before any check or choice, and hands it back with None. Where there is none, or another
    backend is asked for, this is `checked` itself.
    """
    return function(getattr(native.hot, f"direct_{name}"), checked) if native.hot is not None and ASKED in ("auto", "cpu") else checked


def _backend_name(name: str) -> str:
    if name not in ORDER:
        raise ValueError(f"backend must be one of {', '.join(ORDER)}, got {name!r}{did_you_mean(name, ORDER)}")
    return name


def _reasons(op: Op, args: tuple, kwargs: dict) -> dict[str, str | None]:
    here = {b.name: b for b in op.backends}
    return {n: here[n].declines(*args, **kwargs) if n in here else "not written for this op" for n in ORDER}


def choose(op: Op, args: tuple, kwargs: dict, backend: str | None = None) -> Backend:
    """Return the backend that runs `op` with these checked arguments."""
    asked = backend if backend is not None else ASKED
    here = {b.name: b for b in op.backends}
    if asked != "auto":
        why = _reasons(op, args, kwargs)[_backend_name(asked)]
        if why is not None:
            source = "backend=" if backend is not None else "FASTEE_BACKEND="
            raise BackendUnavailable(f"{op.name}: {source}{asked!r} cannot run: {why}")
        return here[asked]
    return next(b for b in op.backends if b.declines(*args, **kwargs) is None and b.yields(*args, **kwargs) is None)


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend would run ``fastee.ops.<op>(*args, **kwargs)`` and why each other one would not.

    Raises `ValueError` for an unknown op, and what the op itself raises for bad arguments.

    >>> import torch, fastee
    >>> fastee.explain("compact", torch.tensor([True, False])).chosen in ("cpu", "numba", "reference")
    True
    """
    importlib.import_module("fastee.ops")
    if op not in _ops:
        raise ValueError(f"op must be one of {', '.join(sorted(_ops))}, got {op!r}{did_you_mean(op, _ops)}")
    spec = _ops[op]
    backend = kwargs.pop("backend", None)
    checked, options = spec.check(*args, **kwargs)
    reasons = _reasons(spec, checked, options)
    chosen = choose(spec, checked, options, backend).name
    passed = {b.name: f"able, but passed over: {why}" for b in spec.backends if reasons[b.name] is None and (why := b.yields(*checked, **options))}
    rows = [(n, "chosen" if n == chosen else why or passed.get(n, "able, but a better one is chosen")) for n, why in reasons.items()]
    return Explanation(op, chosen, native.isa(), rows)


def doctor() -> dict[str, Any]:
    """Report what is built, which instruction sets and backends run, and the command that repairs what is missing.

    >>> import fastee
    >>> "backends" in fastee.doctor()
    True
    """
    importlib.import_module("fastee.ops")
    cuda = importlib.import_module("fastee.kernels.cuda")

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    needed = ("torch", "numpy", "numba", "safetensors", "msgspec", "pyzmq", "google-crc32c", "cloudpickle", "rich", "typer", "matplotlib", "jinja2")
    versions = {name: version(name) for name in needed}
    problems = [{"what": f"{part} is missing", "why": why, "repair": native.REPAIR} for part, why in native.reason.items()]
    problems += [{"what": f"{n} is missing", "why": "not installed", "repair": f"pip install {n}"} for n, v in versions.items() if v is None]
    tools = {tool: shutil.which(tool) for tool in ("cmake", "c++", "nvcc", "valgrind")}
    torch = importlib.import_module("torch")
    return {
        "fastee": importlib.import_module("fastee").__version__,
        "python": sys.version.split()[0],
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count(), "cpu": _cpu_name()},
        "native": {"libfastee": native.hot is not None, "libfastee_cuda": cuda.missing() or "runs", "scheduler": native.core is not None, "isa": native.isa(), "isas": native.isas()},
        "torch": {
            "version": str(torch.__version__), "cuda": torch.cuda.is_available(), "threads": torch.get_num_threads(),
            "dlpack_exchange": hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
        },
        "backends": {op.name: {b.name: _standing(b.name) for b in op.backends} for op in _ops.values()},
        "versions": versions,
        "tools": tools,
        "environment": {k: v for k, v in os.environ.items() if k.startswith("FASTEE_")},
        "problems": problems,
    }  # fmt: skip


def _standing(backend: str) -> str:
    """Say that a backend runs on this machine, or what it lacks whatever the call."""
    if backend in ("reference", "cpu"):
        return native.reason.get("_hot" if backend == "cpu" else "", "runs")
    why = importlib.import_module(f"fastee.kernels.{backend}").missing()
    if why is None and backend == "triton" and not importlib.import_module("torch").cuda.is_available():
        why = "no CUDA device"
    return why or "runs"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"

"""plan_spatial(): our planner, OSDS and the baselines behind one call; SpatialPlanner keeps what a re-plan needs."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from fastee import native as _native
from fastee.errors import BackendUnavailable, did_you_mean
from fastee.planning.spatial import baselines, twin
from fastee.planning.spatial.cross_entropy import cross_entropy
from fastee.planning.spatial.devices import SYNTHETIC, Device, Links
from fastee.planning.spatial.geometry import Net, check_plan
from fastee.planning.spatial.plan import SpatialPlan

METHODS = ("search", "exact", "osds", "cross_entropy", *baselines.BASELINES)
MAX_PROVIDERS = 256
EFFORT, WARM_EFFORT = 2_400_000, 290_000  # units of work: about 14 ns each
_STARTS = 7_000  # of a re-plan's, per provider: what the baselines and the starts take before the search
_CHUNK = 50_000  # between two looks at the clock
_WINDOW, _SMALL_WINDOW, _WARM_WINDOW = 150_000, 400_000, 60_000  # of the effort, for one window of the search
_SMALL, _SMALL_STEPS = 3, 3_600_000  # up to 3 providers the optimum is often in reach: tried after a quarter of the search, in up to about 35 ms
_FRONT = 4  # finish times kept per cut vector in a first pass over all of them: VGG-16 on pairs came out at most 0.5 % above the optimum, without it 2.6 %
_EXACT_STEPS = 200_000_000


class SpatialPlanner:
    """One net on N providers: its time tables, LC-PSS volumes and latency model, ready to plan and to plan again.

    `devices`: Device objects or names of the synthetic ones. `links`: see `Links.of`. `alpha`, `vectors`: LC-PSS. Not for several threads
    at once. `native`: True forces the C++ model, False the twin (no search), None takes what there is.

    >>> from fastee.planning.spatial import SpatialPlanner, vgg16
    >>> planner = SpatialPlanner(vgg16(64), ["xavier", "nano"], 50e6, native=False)
    >>> planner.plan("aofl").volumes[-1]
    18
    """

    def __init__(self, net: Net, devices: Sequence[Device | str], links, *, alpha: float = 0.75, vectors: int = 100, seed: int = 0,
                 native: bool | None = None):  # fmt: skip
        if not isinstance(net, Net):
            raise TypeError(f"net must be a Net (see vgg16, extract), got {type(net).__name__}")
        if isinstance(devices, (str, Device)) or not isinstance(devices, Sequence):
            raise TypeError(f"devices must be a sequence of Device or names, got {type(devices).__name__}")
        if not 1 <= len(devices) <= MAX_PROVIDERS:
            raise ValueError(f"devices must hold 1..{MAX_PROVIDERS} providers, got {len(devices)}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {alpha}")
        if isinstance(vectors, bool) or not isinstance(vectors, int) or vectors < 1:
            raise ValueError(f"vectors must be an integer >= 1, got {vectors!r}")
        self.net, self.alpha, self.seed = net, float(alpha), seed
        self.devices = tuple(_unique([Device.synthetic(d) if isinstance(d, str) else _device(d) for d in devices]))
        self.providers = len(self.devices)
        tables = [d.table(net) for d in self.devices]
        times, tail = np.stack(tables), [d.tail(net) for d in self.devices]
        if native is None:
            native = _native.core is not None
        elif native and _native.core is None:
            raise BackendUnavailable(f"the compiled model is missing ({_native.reason.get('_C', 'not built')}): {_native.REPAIR}")
        self.native = native
        if native:
            self.model = _native.core.SpatialModel(
                [(x.kernel, x.stride, x.padding, x.dilation, x.in_h, x.out_h) for x in net.layers], [x.inputs for x in net.layers],
                [x.row_bytes for x in net.layers], [x.row_macs for x in net.layers], net.input_h, net.input_row_bytes, times, tail)  # fmt: skip
        else:
            self.model = twin.SpatialModel(net, times, tail)
        ends = np.cumsum([x.out_h + 1 for x in net.layers]) - 1
        self.whole = (times[:, ends].sum(axis=1) + tail).tolist()
        self.up = [True] * self.providers
        self._vectors = np.sort(np.random.default_rng(seed).random((vectors, self.providers - 1)), axis=1)
        self._lcpss: tuple[int, ...] | None = None
        self.set_links(links)

    def set_links(self, links) -> None:
        """Take new access rates; see `Links.of`."""
        self.links = Links.of(links, self.providers)
        self.rates = list(self.links.rates)
        self._tell()

    def _tell(self) -> None:
        requester = math.inf if self.links.requester is None else self.links.requester
        self.model.set_links(self.rates, self.up, requester, self.links.latency, self.links.contention)

    def provider(self, which: str | int) -> int:
        """Return the index of a provider given by name or index."""
        names = [d.name for d in self.devices]
        if isinstance(which, str):
            if which not in names:
                raise ValueError(f"provider {which!r} is none of {', '.join(names)}{did_you_mean(which, names)}")
            return names.index(which)
        if isinstance(which, bool) or not isinstance(which, (int, np.integer)):
            raise TypeError(f"provider must be a name or an index, got {type(which).__name__}")
        if not 0 <= which < self.providers:
            raise ValueError(f"provider must be in 0..{self.providers - 1}, got {which}")
        return int(which)

    def lcpss(self) -> tuple[int, ...]:
        """The volumes of LC-PSS (score form reconstructed); found once, since they depend on shapes alone."""
        if self._lcpss is None:
            self._lcpss = tuple(self.model.lcpss(self._vectors, self.alpha)[0]) if self.providers > 1 else (0, len(self.net.layers))
        return self._lcpss

    def latency(self, volumes: Sequence[int], splits: Sequence[Sequence[int]]) -> float:
        """Seconds of a plan under the recursion of the latency model; +inf when it cannot run, `ValueError` when it is none."""
        return self.model.latency(volumes, [e for cuts in splits for e in cuts])

    @cached_property
    def compute_range(self) -> list[tuple[float, float]]:
        """Per provider: seconds of all layers at one row each, and at all rows, layer by layer; no link matters."""
        pairs = list(zip(self.net.cut_points, self.net.cut_points[1:], strict=False))
        total = lambda d, rows: sum(self.seconds(d, a, b, rows or self.net.height(b)) for a, b in pairs)
        return [(total(d, 1), total(d, 0)) for d in range(self.providers)]

    def seconds(self, provider: int, begin: int, end: int, rows: int) -> float:
        """Seconds of the first `rows` output rows of a volume on a provider."""
        return self.model.part(provider, begin, end, 0, rows)[0]

    def baseline(self, name: str) -> SpatialPlan:
        """The plan of a baseline by name."""
        find = baselines.find(name)
        self._reachable()
        volumes, splits = find(self)
        return self._plan(volumes, splits, name, {})

    def plan(self, method: str = "search", *, effort: int | None = None, budget: float | None = None,
             candidates: Sequence[SpatialPlan] = (), seed: int = 0, **options) -> SpatialPlan:  # fmt: skip
        """Plan from nothing. ``search`` (ours), ``osds`` and ``cross_entropy`` answer with the best of their result, every baseline and
        every candidate; ``exact`` with the optimum of the model (`ValueError` when that is out of reach); a baseline's name with that plan.
        ``search`` for 2 or 3 providers is the optimum, too, where the exact programme proves it in about 35 ms (and no `effort` or `budget` is given).

        `effort`: work units of the search (deterministic). `budget`: seconds after which it stops (then the result depends on the machine).
        `options` go to OSDS.
        """
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}{did_you_mean(str(method), METHODS)}")
        if budget is not None and not 0 <= budget:
            raise ValueError(f"budget must be >= 0 seconds or None, got {budget}")
        if effort is not None and (isinstance(effort, bool) or not isinstance(effort, int) or effort < 0):
            raise ValueError(f"effort must be an integer >= 0 or None, got {effort!r}")
        if options and method != "osds":
            raise TypeError(f"plan: unknown argument {sorted(options)[0]!r}")
        if method in baselines.BASELINES:
            return self.baseline(method)
        began = time.perf_counter()
        self._reachable()
        found = self._compared(candidates)
        if method == "exact":
            return self._exact(found)
        if method == "search" and not self.native:
            method = "cross_entropy"  # what can be done without the compiled search
        if method == "osds":
            from fastee.planning.spatial.osds import train

            found["osds"] = train(self, seed=seed, **options).plan
        elif method == "cross_entropy":
            found["cross_entropy"] = cross_entropy(self, seed)
        if method == "search":
            effort = EFFORT if effort is None else effort
            small = 1 < self.providers <= _SMALL and effort == EFFORT and budget is None
            found["search"] = self._search(found, effort // 4 if small else effort, None if budget is None else began + budget, seed, True)
            if small:
                stop = self.model.work + effort - effort // 4
                if not self._optimum(found, "search", _SMALL_STEPS) and self.model.work < stop:  # out of reach was seen at once
                    found["search"] = self._search(found, stop - self.model.work, None, seed, True)
        return self._best(found, method)

    def replan(self, *, links=None, lost: Sequence[str | int] = (), back: Sequence[str | int] = (), start: SpatialPlan | None = None,
               effort: int | None = None, budget: float | None = None, seed: int = 0) -> SpatialPlan:  # fmt: skip
        """Plan again after changed `links` (None: as before), `lost` or returned (`back`) providers, from `start` (a plan of this planner).

        The rows of a lost provider go to the others in proportion to what they have; rows in flight on it are computed again. The volumes
        of LC-PSS are not searched again. Never worse than any baseline or than `start` so repaired.
        """
        if not self.native:
            raise BackendUnavailable(f"replan needs the compiled search ({_native.reason.get('_C', 'native=False')}): {_native.REPAIR}")
        began = time.perf_counter()
        if links is not None:
            self.links = Links.of(links, self.providers)
            self.rates = list(self.links.rates)
        for which in back:
            self.up[self.provider(which)] = True
        for which in lost:
            self.up[self.provider(which)] = False
        self._tell()
        self._reachable()
        found = self._compared(())
        if start is not None:
            self._check_candidate(start)
            alive = [u and r > 0 for u, r in zip(self.up, self.rates, strict=True)]
            found["before"] = start.volumes, [without(cuts, alive) for cuts in start.splits]
        found["search"] = self._search(found, effort if effort is not None else max(0, WARM_EFFORT - _STARTS * self.providers), None if budget is None else began + budget, seed, start is None)
        return self._best(found, "search")

    def _reachable(self) -> None:
        if not any(u and r > 0 for u, r in zip(self.up, self.rates, strict=True)):
            raise ValueError("no provider is up and reachable (all lost, or all rates are 0)")

    def _check_candidate(self, plan: SpatialPlan) -> None:
        if not isinstance(plan, SpatialPlan):
            raise TypeError(f"candidates must hold SpatialPlan, got {type(plan).__name__}")
        if plan.fingerprint != self.net.fingerprint:
            raise ValueError(f"candidate is a plan for another net ({plan.net!r}), expected {self.net.name!r} with the same shapes")
        if len(plan.devices) != self.providers:
            raise ValueError(f"candidate is a plan for {len(plan.devices)} providers, expected {self.providers}")

    def _compared(self, candidates: Sequence[SpatialPlan]) -> dict[str, tuple]:
        found = {name: plan(self) for name, plan in baselines.BASELINES.items()}
        for i, plan in enumerate(candidates):
            self._check_candidate(plan)
            found[f"candidate{i}"] = check_plan(self.net, self.providers, plan.volumes, plan.splits)
        return found

    def _search(self, found: dict[str, tuple], effort: int, until: float | None, seed: int, beam: bool) -> tuple:
        starts = [(list(volumes), [e for cuts in splits for e in cuts]) for volumes, splits in found.values()]
        window = _WARM_WINDOW if not beam else _WINDOW if self.providers > _SMALL else _SMALL_WINDOW
        search = _native.core.SpatialSearch(self.model, starts, seed, beam, window)
        stop, chunk = self.model.work + effort, effort if until is None else _CHUNK
        while self.model.work < stop and (until is None or time.perf_counter() < until) and search.run(min(stop - self.model.work, chunk)):
            pass
        volumes, cuts, latency = search.best()
        n = self.providers + 1
        volumes, splits = list(volumes), [cuts[i : i + n] for i in range(0, len(cuts), n)]
        for j in range(len(volumes) - 2, 0, -1):  # a bound that gains nothing only costs an exchange
            fewer, kept = volumes[:j] + volumes[j + 1 :], splits[: j - 1] + splits[j:]
            if self.latency(fewer, kept) <= latency:
                volumes, splits, latency = fewer, kept, self.latency(fewer, kept)
        return tuple(volumes), splits

    def _exact(self, found: dict[str, tuple]) -> SpatialPlan:
        if not self.native:
            raise BackendUnavailable(f"method 'exact' needs the compiled planner ({_native.reason.get('_C', 'native=False')}): {_native.REPAIR}")
        found["search"] = self._search(found, EFFORT, None, 0, True)
        if not self._optimum(found, "exact", _EXACT_STEPS):
            raise ValueError(f"method 'exact' is out of reach: {self.net.name!r} on {self.providers} providers needs more than {_EXACT_STEPS} volume steps")
        return self._best(found, "exact")

    def _optimum(self, found: dict[str, tuple], name: str, steps: int) -> bool:
        """Put the optimum under `name` unless something found is one; False when it takes more than `steps`."""
        stop, n = self.model.work + steps, self.providers + 1
        for front in (_FRONT, None):  # a good plan first: its latency bounds the search for the best one
            answer = self.model.exact(min(self.latency(*plan) for plan in found.values()), stop - self.model.work, front)
            if answer is None:
                return False
            volumes, cuts, _ = answer
            if volumes:
                found[name] = tuple(volumes), [cuts[i : i + n] for i in range(0, len(cuts), n)]
        return True

    def _best(self, found: dict[str, tuple], method: str) -> SpatialPlan:
        times = {name: self.latency(*plan) for name, plan in found.items()}
        name = min(times, key=lambda k: (times[k], k != method))
        return self._plan(*found[name], method if name in (method, "search") else f"{method} ({name})", {k: t for k, t in times.items() if k != name})

    def _plan(self, volumes, splits, method: str, compared: dict[str, float]) -> SpatialPlan:
        flat = [e for cuts in splits for e in cuts]
        latency, finish = self.model.finish_times(list(volumes), flat)
        n = self.providers
        return SpatialPlan(
            self.net.name, self.net.fingerprint, tuple(d.name for d in self.devices), tuple(volumes), tuple(tuple(c) for c in splits), latency, method,
            self.model.root, tuple(tuple(finish[i : i + n]) for i in range(0, len(finish), n)), compared, self)  # fmt: skip


def plan_spatial(net: Net, devices: Sequence[Device | str], links, *, method: str = "search", alpha: float = 0.75, vectors: int = 100, seed: int = 0,
                 native: bool | None = None, **options) -> SpatialPlan:  # fmt: skip
    """Split a CNN's rows over providers for the least latency of one inference.

    `net`: a Net (`vgg16()`, `extract(module, example).net`); `devices`: Device objects or synthetic names; `links`: bit/s, ``"50mbit 1ms"``,
    one rate per provider, or `Links`. `method`: see `SpatialPlanner.plan`, which also names the other options (`effort`, `budget`,
    `candidates`, and those of OSDS). DistrEdge (arXiv 2202.01699), algorithms reconstructed.

    >>> from fastee.planning.spatial import vgg16
    >>> plan = plan_spatial(vgg16(64), ["xavier", "nano", "nano"], "50mbit 0ms", effort=100_000)
    >>> plan.latency <= min(plan.compared.values())
    True
    """
    return SpatialPlanner(net, devices, links, alpha=alpha, vectors=vectors, seed=seed, native=native).plan(method, seed=seed, **options)


def _device(device) -> Device:
    if not isinstance(device, Device):
        raise TypeError(f"devices must hold Device or one of {', '.join(SYNTHETIC)}, got {type(device).__name__}")
    return device


def _unique(devices: list[Device]) -> list[Device]:
    """Number devices of equal name, so that each can be told."""
    from dataclasses import replace

    names = [d.name for d in devices]
    return [d if names.count(d.name) == 1 else replace(d, name=f"{d.name}-{names[:i].count(d.name)}") for i, d in enumerate(devices)]


def without(cuts: Sequence[int], alive: Sequence[bool]) -> list[int]:
    """Cuts in which only who is alive has rows, in proportion to what it had; all alike where those had none."""
    rows = [(b - a) if up else 0 for a, b, up in zip(cuts, cuts[1:], alive, strict=False)]
    if sum(rows) == cuts[-1]:
        return list(cuts)
    return baselines.by_weight(cuts[-1], rows if sum(rows) else [float(up) for up in alive])

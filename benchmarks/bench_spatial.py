"""The spatial planner: plans per group and rate beside every baseline, the substitute and OSDS; its times; its gap to the optimum.

FASTEE_BENCH_OSDS=episodes trains OSDS; with FASTEE_BENCH_OSDS_AGENTS=folder the agents are kept there as <group>-<Mbit/s>.pt, and go on from there.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from fastee import native
from fastee.planning.spatial import BASELINES, NetBuilder, SpatialPlanner, resnet50, vgg16
from fastee.testing.bench import Case, Context, Group

GROUPS = {
    "2 xavier 2 nano": ["xavier"] * 2 + ["nano"] * 2,
    "2 tx2 2 nano": ["tx2"] * 2 + ["nano"] * 2,
    "xavier tx2 2 nano": ["xavier", "tx2", "nano", "nano"],
    "4 nano": ["nano"] * 4,
    "xavier nano 2 pi": ["xavier", "nano", "pi", "pi"],
    "4 xavier 4 tx2 8 nano": ["xavier"] * 4 + ["tx2"] * 4 + ["nano"] * 8,
}
RATES = (50e6, 200e6, 300e6)
# Nothing of the search was tuned on these: other groups, other rates, other networks.
HELD_OUT = {
    "xavier 3 pi": ["xavier"] + ["pi"] * 3,
    "2 xavier tx2": ["xavier"] * 2 + ["tx2"],
    "tx2 nano pi": ["tx2", "nano", "pi"],
    "6 nano": ["nano"] * 6,
    "xavier 2 tx2 3 nano": ["xavier"] + ["tx2"] * 2 + ["nano"] * 3,
    "3 xavier 3 tx2 6 pi": ["xavier"] * 3 + ["tx2"] * 3 + ["pi"] * 6,
}
HELD_OUT_RATES = (20e6, 100e6, 500e6)
SAVED = 250  # episodes between two savings of an agent


def vgg11():
    """VGG-11 at 224 (Simonyan and Zisserman 2015)."""
    b = NetBuilder("vgg11", 224, 3)
    for channels, convs in ((64, 1), (128, 1), (256, 2), (512, 2), (512, 2)):
        for _ in range(convs):
            b.conv(channels, 3, padding=1)
        b.pool(2, 2)
    return b.build(tail_macs=512 * 49 * 4096 + 4096 * 4096 + 4096 * 1000, tail_layers=3)


def osds(planner: SpatialPlanner, episodes: int, saved: Path | None = None, seed: int = 0):
    """Return the OSDS agent after `episodes` in all; what `saved` holds counts, and is kept up to date."""
    from fastee.planning.spatial.osds import Osds

    agent = Osds.load(saved, planner) if saved and saved.exists() else Osds(planner, seed)
    while agent.episode < episodes:
        agent.train(min(SAVED, episodes - agent.episode))
        if saved:
            agent.save(saved.with_suffix(".part"))
            saved.with_suffix(".part").replace(saved)
    return agent


def table(osds_episodes: int = 0, seed: int = 0) -> list[dict]:
    """Images per second under the latency model for every group and rate: ours, each baseline, cross-entropy and, if asked, OSDS."""
    rows, agents = [], os.environ.get("FASTEE_BENCH_OSDS_AGENTS")
    for group, devices in GROUPS.items():
        for rate in RATES:
            planner = SpatialPlanner(vgg16(), devices, rate, seed=seed)
            ours = planner.plan("search", seed=seed)
            found = {name: planner.baseline(name).latency for name in BASELINES}
            rest = {"cross_entropy": planner.plan("cross_entropy", seed=seed).latency}
            saved = Path(agents) / f"{group.replace(' ', '_')}-{rate / 1e6:.0f}.pt" if agents else None
            if osds_episodes or saved and saved.exists():
                agent = osds(planner, osds_episodes, saved, seed)
                rest[f"osds ({agent.episode} episodes)"] = agent.best_latency
            best = min(found, key=found.get)
            losers = [name for name, t in {**found, **rest}.items() if t < ours.latency]
            if losers:
                raise RuntimeError(f"{group} at {rate:g} bit/s: slower than {', '.join(losers)}")
            rows.append({"group": group, "mbit": rate / 1e6, "ours": 1 / ours.latency, "ratio": found[best] / ours.latency, "best": best,
                         **{k: 1 / t for k, t in {**found, **rest}.items()}})  # fmt: skip
    return rows


def gap(devices: list[str], rate: float, size: int = 224) -> float:
    """How far the search stays above the exact optimum of the model, as a share."""
    planner = SpatialPlanner(vgg16(size), devices, rate)
    ours = planner.plan("search").latency
    return ours / planner.model.exact(ours, 10**10)[2] - 1


def cases(ctx: Context) -> Iterator[Group]:
    if native.core is None:
        raise RuntimeError(f"the spatial planner's benchmark needs the compiled core: {native.REPAIR}")
    net = vgg16()
    for row in table(int(os.environ.get("FASTEE_BENCH_OSDS", "0"))):
        devices, rate = GROUPS[row["group"]], row["mbit"] * 1e6
        note = f"{row['ours']:.1f} images/s, {row['ratio']:.2f}x the best baseline ({row['best']})"
        cold = lambda devices=devices, rate=rate: SpatialPlanner(net, devices, rate).plan("search")
        entropy = lambda devices=devices, rate=rate: SpatialPlanner(net, devices, rate).plan("cross_entropy")
        others = ", ".join(f"{k} {row[k]:.1f}" for k in row if k in BASELINES or k.startswith("osds"))
        yield Group("spatial_plan", f"vgg16, {row['group']}, {row['mbit']:.0f} Mbit/s", "cold",
                    [Case("fastee", cold, note=note), Case("cross_entropy", entropy, note=f"{row['cross_entropy']:.1f} images/s; {others}")],
                    baseline="cross_entropy", per_call=True, bars=("<= 50 ms",))  # fmt: skip
    for other in (vgg11(), resnet50()):
        for (group, devices), rate in itertools.product(HELD_OUT.items(), HELD_OUT_RATES):
            planner = SpatialPlanner(other, devices, rate)
            plan = planner.plan("search")
            found = {name: planner.baseline(name).latency for name in BASELINES}
            best = min(found, key=found.get)
            cold = lambda other=other, devices=devices, rate=rate: SpatialPlanner(other, devices, rate).plan("search")
            note = f"{1 / plan.latency:.1f} images/s, {found[best] / plan.latency:.2f}x the best baseline ({best})"
            yield Group("spatial_held_out", f"{other.name}, {group}, {rate / 1e6:.0f} Mbit/s", "cold", [Case("fastee", cold, note=note)], baseline="fastee", per_call=True)  # fmt: skip
    for devices in (GROUPS["xavier tx2 2 nano"], GROUPS["4 xavier 4 tx2 8 nano"]):
        planner = SpatialPlanner(net, devices, 100e6)
        plan = planner.plan("search")
        other = [60e6 if d % 2 else 100e6 for d in range(len(devices))]
        rates = lambda which, plan=plan: plan.replan(links=which)
        lost = lambda which, plan=plan: plan.replan(lost=[1] if which else [], back=[] if which else [1])
        fresh = lambda which, devices=devices: SpatialPlanner(net, devices, 100e6).plan("search")
        for what, fn, inputs in (("rates change", rates, [(other,), (100e6,)]), ("provider lost or back", lost, [(True,), (False,)])):
            yield Group("spatial_replan", f"vgg16, {len(devices)} providers, {what}", "warm", [Case("fastee", fn, inputs), Case("cold", fresh, inputs)],
                        baseline="cold", per_call=True, bars=("<= 5 ms",))  # fmt: skip
    planner = SpatialPlanner(net, GROUPS["xavier tx2 2 nano"], 100e6)
    plan, twin = planner.baseline("aofl"), SpatialPlanner(net, GROUPS["xavier tx2 2 nano"], 100e6, native=False)
    flat = [e for cuts in plan.splits for e in cuts]
    args = [(list(plan.volumes), flat)]
    thousand = lambda volumes, cuts: planner.model.latency_repeated(volumes, cuts, 1000)
    yield Group("spatial_latency", "vgg16, 4 providers", "one evaluation", [Case("fastee", planner.model.latency, args, note="C++, called from Python"),
                Case("twin", twin.model.latency, args)], baseline="twin", bars=("<= 5 us",))  # fmt: skip
    yield Group("spatial_latency", "vgg16, 4 providers", "1000 evaluations", [Case("fastee", thousand, args, note="C++, divide by 1000")],
                baseline="fastee", bars=("<= 5 ms",))  # fmt: skip
    for devices, rate in ((["xavier", "nano"], 50e6), (["xavier", "tx2"], 50e6), (["tx2", "nano"], 20e6), (["nano", "nano"], 200e6), (["nano", "nano"], 300e6)):
        share = gap(devices, rate)
        pair = SpatialPlanner(net, devices, rate)
        yield Group("spatial_optimum", f"vgg16, {' '.join(devices)}, {rate / 1e6:.0f} Mbit/s", "cold",
                    [Case("search", lambda pair=pair: pair.plan("search"), note=f"{share:.3%} above the optimum"),
                     Case("exact", lambda pair=pair: pair.plan("exact"), note="optimum of the model over all partitions and cuts")], baseline="exact", per_call=True)  # fmt: skip

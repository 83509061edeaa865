"""Policies on the same traces: `deadline` beside those of the papers, in twelve scenarios, at an equal accuracy floor.

``python -m benchmarks run policies`` writes the rows (a quarter of an hour), ``python -m benchmarks.bench_policies`` prints the table. Every policy is tuned per scenario on two other seeds (a calibration trace and its own
arrivals) over a small grid: of the settings whose mean accuracy reaches the floor, the one with the highest hit rate, then the lowest cost. Then it
runs once on each of ten test seeds. A scenario is won where the mean of the paired differences is above 0 in the hit rate and below 0 in the cost,
each by more than the half-width of its 95 % interval over the seeds. The floor is the accuracy of the network's end minus `DROP`; accuracy counts answered tasks, the hit rate all.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from fastee.simulation import DifficultyTrace, Outcome, Spec, simulate
from fastee.testing.bench import Case, Context, Group

HERE = Path(__file__).resolve().parent
DROP = 0.02
TASKS = 3000
ACCURACY = [0.78, 0.86, 0.90, 0.92]
TUNING_SEEDS, TEST_SEEDS = (101, 103), tuple(range(9101, 9111))  # 1 to 20, 202, 909 and 9001 to 9010 were looked at while the policy was designed
T_95 = 2.262  # Student's t, nine degrees of freedom
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
NET = {"seconds": [0.004] * 4, "batch_sizes": [1, 8, 32], "batch_cost": [1.0, 3.0, 9.0], "spread": 0.1, "codecs": ["raw", "int8"],
       "wire_bytes": [[12288, 3084], [32768, 8200], [16384, 4100], [8192, 2052]], "codec_seconds": [[0.0, 2e-5]] * 4}  # fmt: skip


def radio(kind: str, rate: float) -> dict:
    """A made-up uplink of that mean rate."""
    return {"synthetic": kind, "rate": rate, "seconds": 120.0, "seed": 5}


def recorded(file: str) -> dict:
    """An uplink as recorded, a file of FASTEE_DATA's traces."""
    folder = Path(os.environ.get("FASTEE_DATA", HERE.parents[1] / "shared" / "data")) / "traces"
    return {"file": str(folder / file), "format": "mahimahi" if file.endswith(".up") else "csv"}


def tiers(kind: str, rate: float, load: float, deadline: float, **changes) -> dict:
    """A phone behind a radio, an edge, a cloud."""
    up = [{"source": "phone", "target": t, "link": f"1mbit {ms}ms", "capacity": "air", "both": False, "medium": "radio"} for t, ms in (("edge", 12), ("cloud", 30))]
    down = [{"source": t, "target": "phone", "link": f"30mbit {ms}ms", "both": False} for t, ms in (("edge", 12), ("cloud", 30))]
    fields = dict(
        network=NET, capacities={"air": radio(kind, rate)}, qos={"deadline": deadline, "hit_rate": 0.95},
        machines=[{"name": "phone", "slowdown": 6.0, "price": 0.2}, {"name": "edge", "batch": 8, "price": 1.0}, {"name": "cloud", "slowdown": 0.25, "batch": 32, "price": 6.0}],
        connections=[*up, *down, {"source": "edge", "target": "cloud", "link": "1gbit 18ms"}], arrivals=[{"sources": ["phone"], "rate": load}],
    )  # fmt: skip
    return {**fields, **changes}


def mesh(boards: int, fast: int, load: float, bursts: bool, deadline: float = 0.2, **changes) -> dict:
    """Slow boards in a ring, all linked to some fast machines; every board is a source."""
    arrival = {"sources": ["board"], "rate": load} | ({"kind": "bursts", "factor": 5.0, "on": 1.0, "off": 4.0} if bursts else {})
    fields = dict(
        network=NET, qos={"deadline": deadline, "hit_rate": 0.95}, arrivals=[arrival],
        machines=[{"name": "board", "slowdown": 4.0, "batch": 2, "count": boards, "price": 0.3}, {"name": "fast", "slowdown": 0.7, "batch": 4, "count": fast, "price": 2.0}],
        connections=[{"source": "board", "target": "board", "pattern": "ring", "degree": 4, "link": "54mbit 3ms"}, {"source": "board", "target": "fast", "link": "54mbit 4ms"}],
    )  # fmt: skip
    return {**fields, **changes}


BURSTS = [{"kind": "bursts", "sources": ["phone"], "rate": 40.0, "factor": 6.0, "on": 1.0, "off": 4.0}]
SCENARIOS = {
    "lte, 3 nodes": tiers("lte", 6e6, 60.0, 0.12),
    "lte, 3 nodes, heavy": tiers("lte", 6e6, 180.0, 0.15),
    "lte, 3 nodes, bursts": tiers("lte", 6e6, 0.0, 0.12, arrivals=BURSTS),
    "slow lte, 3 nodes": tiers("lte", 1.9e6, 45.0, 0.2),
    "5g, 3 nodes": tiers("5g", 20e6, 250.0, 0.1),
    "5g, 3 nodes, bursts": tiers("5g", 20e6, 0.0, 0.1, arrivals=BURSTS),
    "lte, edge dies": tiers("lte", 6e6, 100.0, 0.4, detect=0.15, faults=[{"kind": "death", "node": "edge", "at": 8.0, "seconds": 6.0}]),
    "5g, straggler and freeze": tiers("5g", 20e6, 150.0, 0.4, detect=0.15, faults=[{"kind": "straggler", "node": "edge", "at": 2.0, "seconds": 5.0, "factor": 8.0},
                                                                               {"kind": "freeze", "node": "cloud", "at": 9.0, "seconds": 1.0}]),
    "mesh of 10": mesh(8, 2, 30.0, False),
    "mesh of 20, bursts": mesh(16, 4, 15.0, True),
    "mesh of 50, bursts": mesh(40, 10, 15.0, True),
    "mesh of 50, loss and partition": mesh(40, 10, 30.0, False, 0.4, detect=0.15, faults=[{"kind": "loss", "source": "board", "target": "fast", "at": 1.0, "chance": 0.03},
                                                                                       {"kind": "partition", "nodes": ["fast0", "fast1"], "at": 3.0, "seconds": 2.0}]),
}  # fmt: skip
# Where the best paper policy met nearly every deadline there was nothing to compare: there every policy's load is raised by steps of 1.25
# until that one misses one task in fifty on the tuning seeds. `deadline` was not looked at for it.
STEPS = {"lte, 3 nodes": 4, "slow lte, 3 nodes": 2, "5g, 3 nodes": 1, "5g, 3 nodes, bursts": 1, "lte, edge dies": 1, "5g, straggler and freeze": 2,
         "mesh of 10": 5, "mesh of 50, loss and partition": 4}  # fmt: skip
SCENARIOS = {name: {**s, "arrivals": [{**a, "rate": a["rate"] * 1.25 ** STEPS.get(name, 0)} for a in s["arrivals"]]} for name, s in SCENARIOS.items()}
# The same with radios as recorded, their loads as they were before the steps, on other test seeds: LTE uplinks (Verizon 5.9 Mbit/s, AT&T while
# driving 1.9), and of 5G the first files by name of a static and a driving phone. These are downlinks, taken as if they were uplinks:
# no recorded 5G uplink is public.
RECORDED_SEEDS = tuple(range(9201, 9211))
VERIZON, ATT = "mahimahi/Verizon-LTE-short.up", "mahimahi/ATT-LTE-driving-2016.up"
STATIC, DRIVING = "ucc5g/static-B_2019.12.16_13.40.04.csv", "ucc5g/driving-B_2019.12.14_10.16.30.csv"
RECORDED = {
    f"recorded {name}": {**tiers("lte", 6e6, load, deadline, **more), "capacities": {"air": recorded(file)}}
    for name, file, load, deadline, more in (
        ("lte, 3 nodes", VERIZON, 60.0, 0.12, {}), ("lte, 3 nodes, heavy", VERIZON, 180.0, 0.15, {}),
        ("lte, 3 nodes, bursts", VERIZON, 0.0, 0.12, {"arrivals": BURSTS}), ("slow lte, 3 nodes", ATT, 45.0, 0.2, {}),
        ("lte, edge dies", VERIZON, 100.0, 0.4, {"detect": 0.15, "faults": [{"kind": "death", "node": "edge", "at": 8.0, "seconds": 6.0}]}),
        ("5g static, 3 nodes", STATIC, 250.0, 0.1, {}), ("5g driving, 3 nodes", DRIVING, 60.0, 0.15, {}),
    )
}  # fmt: skip


def settings() -> dict[str, list[dict]]:
    """What each policy is tuned over."""
    flat = [{"thresholds": [t] * 3} for t in THRESHOLDS]
    grid = {
        "deadline": [{**s, "money": m, "gain": g} for s in flat for m in (0.0, 0.02, 0.2) for g in (False, True)],
        "threshold": flat,
        "patience": [{"thresholds": [0.0] * 3, "params": {"patience": p}} for p in (1, 2, 3)],
        "distree": [{"thresholds": [0.0] * 3, "params": {"delta": [d], "students": False}} for d in (0.2, 0.4, 0.6)],
        "mdi_exit": [{**s, "params": {"adapt": a}} for s in flat for a in ("none", "threshold")],
        "dimee": [{"thresholds": [0.0] * 3, "params": {"alpha": a}} for a in THRESHOLDS],
        "splitee": [{"thresholds": [0.0] * 3, "params": {"alpha": a}} for a in THRESHOLDS],
        "jei_gate": flat,
    }
    # The deadline rule around every policy takes a place only if it is in time with this probability: tuned for all alike.
    return {policy: [{**s, "promise": h} for s in each for h in (0.6, 0.95)] for policy, each in grid.items()}


def gain_table(trace: DifficultyTrace, bins: int = 10) -> list[list[float]]:
    """Accuracy that the network's end has over exit k, per bin of the exit's score."""
    table = []
    for k in range(trace.num_exits):
        where = np.minimum(bins - 1, (trace.confidence[:, k] * bins).astype(int))
        better = trace.correct[:, -1].astype(float) - trace.correct[:, k]
        table.append([float(better[where == b].mean()) if (where == b).any() else 0.0 for b in range(bins)])
    return table


def play(scenario: dict, policy: str, setting: dict, trace: DifficultyTrace, gain, seed: int, tasks: int) -> dict:
    fields = {**scenario, "thresholds": setting["thresholds"], "params": setting.get("params", {})}
    if policy == "dimee" and any(m["name"] == "phone" for m in scenario["machines"]):
        fields["params"] = {**fields["params"], "tiers": ["phone", "edge", "cloud"]}
    fields["qos"] = {**fields["qos"], "hit_rate": setting["promise"]}
    if setting.get("money"):
        fields["qos"] = {**fields["qos"], "money_weight": setting["money"], "cost_weight": 0.02}
    if setting.get("gain"):
        fields["network"] = {**fields["network"], "gain": gain}
        fields["qos"] = {"cost_weight": 0.02, **fields["qos"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = simulate(msgspec.convert({**fields, "tasks": tasks, "seed": seed}, Spec), trace, policy)
    result.check()
    return {**result.summary(), "latencies": 1e9 * result.latency[result.outcome == Outcome.ANSWERED]}


def compare(name: str, tasks: int) -> list[dict]:
    """One row per policy: its tuned setting and what it reached on each test seed; `latencies` ns of all answered tasks."""
    scenario, seeds = (RECORDED[name], RECORDED_SEEDS) if name in RECORDED else (SCENARIOS[name], TEST_SEEDS)
    tuning = DifficultyTrace.synthetic(ACCURACY, 8000, seed=11)
    tests = {seed: DifficultyTrace.synthetic(ACCURACY, 8000, seed=seed) for seed in seeds}
    gain, floor, rows = gain_table(tuning), float(tuning.correct[:, -1].mean()) - DROP, []
    for policy, grid in settings().items():
        best = None
        for setting in grid:
            runs = [play(scenario, policy, setting, tuning, gain, seed, tasks // 2) for seed in TUNING_SEEDS]
            s = {k: float(np.mean([r[k] or 0.0 for r in runs])) for k in ("accuracy", "hit_rate", "mean_cost")}
            short = max(0.0, floor - s["accuracy"])
            key = (short > 0, short, -round(s["hit_rate"], 3), s["mean_cost"])
            if best is None or key < best[0]:
                best = key, setting
        runs = [play(scenario, policy, best[1], test, gain, seed, tasks) for seed, test in tests.items()]
        rows.append({"scenario": name, "policy": policy, "setting": best[1], "floor": floor, "reached": not best[0][0],
                     "latencies": np.concatenate([r["latencies"] for r in runs]),
                     **{k: [r[k] or 0.0 for r in runs] for k in ("hit_rate", "accuracy", "mean_cost", "useful", "p99")}})  # fmt: skip
    return rows


def difference(ours: dict, theirs: dict, column: str) -> tuple[float, float]:
    """Mean of the paired differences over the seeds, and the half-width of its 95 % interval."""
    d = np.subtract(ours[column], theirs[column])
    return float(d.mean()), float(T_95 * d.std(ddof=1) / len(d) ** 0.5)


def verdict(rows: list[dict]) -> tuple[str, dict, dict]:
    """(word, ours, best paper policy at the floor: highest mean hit rate on the test seeds themselves, then cheapest)."""
    ours = next(r for r in rows if r["policy"] == "deadline")
    others = [r for r in rows if r["policy"] not in ("deadline", "threshold")]
    at_floor = [r for r in others if r["reached"]] or others
    best = min(at_floor, key=lambda r: (-round(float(np.mean(r["hit_rate"])), 3), float(np.mean(r["mean_cost"]))))
    (hit, hit_error), (cost, cost_error) = (difference(ours, best, k) for k in ("hit_rate", "mean_cost"))
    if not ours["reached"]:
        return "below the floor", ours, best
    if hit > hit_error and cost < -cost_error:
        return "better", ours, best
    return "lost" if hit < -hit_error else "dearer" if cost > cost_error else "within the error", ours, best


def groups(name: str, tasks: int) -> Iterator[Group]:
    """The comparison as rows: times are the simulated latencies, the ratio is the share in time, or the cost in thousandths per task."""
    rows = compare(name, tasks)
    word, ours, best = verdict(rows)
    (hit, hit_error), (cost, cost_error) = (difference(ours, best, k) for k in ("hit_rate", "mean_cost"))
    for column, unit, mean in (("in time", 1, "hit_rate"), ("cost", 1e3, "mean_cost")):
        each = []
        for row in rows:
            note = (f"accuracy {np.mean(row['accuracy']):.4f}{'' if row['reached'] else ', below the floor when tuned'} (floor {row['floor']:.4f}); "
                    f"{json.dumps(row['setting'])}")  # fmt: skip
            if row is ours:
                note = (f"{word}: against {best['policy']} {100 * hit:+.2f} +- {100 * hit_error:.2f} points in time, cost "
                        f"{1e3 * cost:+.2f} +- {1e3 * cost_error:.2f} thousandths per task; {note}")  # fmt: skip
            each.append(Case(row["policy"], None, note=note, ratio=unit * float(np.mean(row[mean])), times=row["latencies"].tolist()))
        bar = f"ratio {'>=' if column == 'in time' else '<='} {unit * float(np.mean(best[mean])):.4f}"
        yield Group("policies", name, column, each, baseline=best["policy"], bars=(bar,))


def cases(ctx: Context) -> Iterator[Group]:
    """Every scenario, and with FASTEE_DATA those of recorded radios; with --shapes headline the first alone and fewer tasks, a smoke test."""
    names = [*SCENARIOS, *(name for name, s in RECORDED.items() if Path(s["capacities"]["air"]["file"]).is_file())]
    if ctx.shapes == "headline":
        yield from groups(names[0], 200)
        return
    for name in names:
        yield from groups(name, TASKS)


def main(tasks: int = TASKS, out: Path | None = None, names: Iterable[str] = SCENARIOS) -> None:
    """Print the table of these scenarios, and write the rows as JSON lines when `out` is given."""
    table, wins, start, lines = Table(title=f"deadline against the best paper policy, {tasks:,} tasks x {len(TEST_SEEDS)} seeds, accuracy floor = end - {100 * DROP:.0f} points"), 0, time.perf_counter(), []
    for column in ("scenario", "hit % ours", "theirs", "difference", "cost ours", "theirs", "difference", "accuracy ours", "theirs", "best paper policy", "verdict"):
        table.add_column(column, justify="left" if column in ("scenario", "best paper policy", "verdict") else "right")
    for name in names:
        rows = compare(name, tasks)
        lines += rows
        word, ours, best = verdict(rows)
        wins += word == "better"
        cells = []
        for key, unit, digits in (("hit_rate", 100, 2), ("mean_cost", 1e3, 2)):
            mean, error = difference(ours, best, key)
            cells += [f"{unit * np.mean(r[key]):.{digits}f}" for r in (ours, best)] + [f"{unit * mean:+.{digits}f} ± {unit * error:.{digits}f}"]
        cells += [f"{100 * np.mean(r['accuracy']):.1f}" for r in (ours, best)]
        table.add_row(name, *cells, best["policy"] + ("" if best["reached"] else " (below the floor)"), word)
    Console(width=190).print(table)
    print(f"{wins} of {table.row_count} scenarios: higher hit rate and lower cost, both beyond the error ({time.perf_counter() - start:.0f} s)")
    if out is not None:
        out.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "latencies"}) + "\n" for row in lines), encoding="utf-8")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else TASKS, Path(sys.argv[2]) if len(sys.argv) > 2 else None, sys.argv[3:] or SCENARIOS)

"""``fastee sim``: run a SPEC.toml with a progress bar, print its table, write its log and plots."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastee.simulation import SimulationResult, load_spec, simulate


def run(console: Console, path: Path, policies: list[str], tasks: int | None, seed: int | None, log: bool) -> list[SimulationResult]:
    """Simulate the spec once per policy (its own where none is given); every result is checked for conservation."""
    spec, results = load_spec(path), []
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True)
    with bar:
        for policy in policies or [spec.policy]:
            row = bar.add_task(policy, total=tasks or spec.tasks)
            result = simulate(spec, policy=policy, tasks=tasks, seed=seed, log=log, progress=lambda done, all_, row=row: bar.update(row, completed=done, total=all_))
            bar.update(row, completed=len(result.outcome), total=len(result.outcome))
            result.check()
            results.append(result)
    return results


def write_plots(results: list[SimulationResult], folder: Path) -> list[Path]:
    """Write the PNGs of every result; names carry the policy where there are several."""
    from fastee.report.simulation import simulation_plots

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for result in results:
        for name, png in simulation_plots(result).items():
            paths.append(folder / (f"{name}.png" if len(results) == 1 else f"{name}-{result.policy}.png"))
            paths[-1].write_bytes(png)
    return paths

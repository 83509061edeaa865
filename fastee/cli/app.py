"""Commands and exit codes: 0 fine, 1 failure, 2 usage. Errors say what to do; FASTEE_DEBUG=1 shows the traceback."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

import fastee
from fastee.errors import FasteeError, did_you_mean

_BUG = "this looks like a bug of fastee; `FASTEE_DEBUG=1 fastee ...` shows where it happened, `fastee doctor --json` what to report"
_DOCTOR = "`fastee doctor` shows what is installed and how to repair it"


def _errors() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


class _Guarded(TyperGroup):
    """Turns exceptions of a command into one message and exit code 1."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):  # both are RuntimeErrors
            raise
        except KeyboardInterrupt:
            _errors().print("interrupted")
            raise typer.Exit(130) from None
        except (FasteeError, OSError, ImportError) as error:
            self._show(error, _DOCTOR)
        except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError, AttributeError, AssertionError) as error:
            self._show(error, _BUG)

    @staticmethod
    def _show(error: Exception, advice: str) -> None:
        if os.environ.get("FASTEE_DEBUG", "0") not in ("", "0"):
            raise error
        console = _errors()
        console.print(f"[bold red]error[/bold red] {type(error).__name__}: {escape(str(error))}")
        console.print(escape(advice))
        raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Guarded, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Early exit and split inference that pay."
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"fastee {fastee.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")] = False,
) -> None:
    pass


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer samples: at most 40 s on 2 cores instead of 3 minutes.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout; progress goes to stderr.")] = False,
    out: Annotated[Path, typer.Option("--out", help="Folder for index.html and results.json.")] = Path("demo-report"),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the heads' training and of the order of the samples.")] = 0,
) -> None:
    """A real network, three processes and an emulated slow link: every way of running it, measured on the same images."""
    from fastee.cli.demo import run
    from fastee.report import page, table

    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"{out} is a file, expected a folder; choose another one with --out", param_hint="--out")
    console = Console(stderr=json_, highlight=False, width=None if sys.stdout.isatty() else 140)
    result = run(console, quick=quick, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_bytes(result.to_json())
    (out / "index.html").write_text(page(result), encoding="utf-8")
    exits = len(result.exit_names) + 1
    console.print(table(result.rows, f"The same {result.rows[0].samples} test images, run in each way (emulated cluster)", exits))
    console.print(table(result.local, f"This machine without emulation, {result.local[0].samples} test images, one thread", exits))
    for note in result.notes:
        console.print(f"- {escape(note)}", style="dim", soft_wrap=True)
    console.print(f"\n{escape(result.summary)}\n", style="bold", soft_wrap=True)
    console.print(f"Report: {out / 'index.html'}", soft_wrap=True)
    if json_:
        typer.echo(result.to_json().decode())


@app.command()
def doctor(json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False) -> None:
    """What is built, which instruction sets and backends run, why the others do not, how to repair. Exit code 1 if anything is missing."""
    from fastee.cli.doctor import show

    found = fastee.doctor()
    if json_:
        typer.echo(json.dumps(found, indent=2))
    else:
        show(found, Console(highlight=False))
    if found["problems"]:
        raise typer.Exit(1)


@app.command()
def keys(
    out: Annotated[Path, typer.Argument(help="File to write, readable by its owner only; it must not exist.")],
) -> None:
    """Make the CURVE keys of one machine. Prints the public key, to be listed in the other machines' allow-lists."""
    from fastee.cluster.keys import make_keys, save_keys

    made = make_keys()
    save_keys(made, out)
    typer.echo(f'{json.dumps(out.stem)} = "{made.public}"')


@app.command()
def explain(
    op: Annotated[str, typer.Argument(help="Name of the op, e.g. exit_step.")],
    batch: Annotated[int, typer.Option(min=0, help="B, rows.")] = 1,
    features: Annotated[int, typer.Option(min=1, help="D, features.")] = 256,
    classes: Annotated[int, typer.Option(min=1, help="C, classes.")] = 10,
    spatial: Annotated[int, typer.Option(min=1, help="Height and width of the map that is pooled.")] = 8,
    backend: Annotated[str | None, typer.Option(help="Ask for one backend instead of the best.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the explanation as JSON.")] = False,
) -> None:
    """Which backend would run OP at a shape, and why each other one would not."""
    from fastee.cli.explain import example, known

    inputs = example(op, batch, features, classes, spatial)
    if inputs is None:
        raise typer.BadParameter(f"expected one of {', '.join(known())}, got {op!r}{did_you_mean(op, known())}", param_hint="OP")
    found = fastee.explain(op, *inputs, **({"backend": backend} if backend else {}))
    if json_:
        rows = dict(found.rows)
        typer.echo(json.dumps({"op": found.op, "chosen": found.chosen, "isa": found.isa, "backends": rows}, indent=2))
    else:
        typer.echo(str(found))


_Net = Annotated[str, typer.Argument(help="package.module:name of an EarlyExit, a function that makes one, or with --checkpoint the backbone.")]
_Checkpoint = Annotated[Path | None, typer.Option(help="What net.save() wrote.", exists=True, dir_okay=False)]


@app.command()
def profile(
    net: _Net,
    checkpoint: _Checkpoint = None,
    out: Annotated[Path, typer.Option("--out", help="Where the profile goes.")] = Path("profile.json"),
    batch: Annotated[list[int] | None, typer.Option("--batch", min=1, help="Batch size; may be repeated. Default 1, 8, 32.")] = None,
    node: Annotated[list[str] | None, typer.Option("--node", help="NAME or NAME:SLOWDOWN of a machine; may be repeated. Default: this one.")] = None,
    link: Annotated[str | None, typer.Option("--link", help='Between all machines, e.g. "20mbit 10ms".')] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch while measuring.")] = 1,
    json_: Annotated[bool, typer.Option("--json", help="Print the profile on stdout as well.")] = False,
) -> None:
    """Measure what every segment of NET costs on this machine, and write the profile that planner, scheduler and simulator read."""
    import torch

    from fastee.cli.source import network
    from fastee.report import profile_table

    found = network(net, checkpoint)
    pairs = [n.partition(":") for n in node or ["here"]]
    try:
        slow = [float(f) if colon else 1.0 for _, colon, f in pairs]
    except ValueError:
        raise typer.BadParameter(f"expected NAME or NAME:SLOWDOWN, got {node}", param_hint="--node") from None
    torch.set_num_threads(threads)
    measured = fastee.profile(found, found.inputs.example, [n for n, _, _ in pairs], tuple(batch or (1, 8, 32)), slow, link, progress=sys.stderr.isatty())
    measured.save(out)
    Console(stderr=json_, highlight=False).print(profile_table(measured, found.exit_names))
    typer.echo(f"Profile: {out}", err=json_)
    if json_:
        typer.echo(measured.to_json().decode())


@app.command()
def calibrate(
    net: _Net,
    data: Annotated[str, typer.Argument(help="package.module:name of a DataLoader, Dataset or list of (x, y) batches, held out from training.")],
    checkpoint: _Checkpoint = None,
    max_drop: Annotated[float | None, typer.Option(min=0, max=1, help="Largest loss of accuracy (or agreement).")] = None,
    max_cost: Annotated[float | None, typer.Option(min=0, help="Instead: largest mean cost, 1 = the backbone alone.")] = None,
    confidence: Annotated[float, typer.Option(help="Of the promise, between 0 and 1.")] = 0.95,
    measure: Annotated[str, typer.Option(help="max_prob, margin, entropy, energy, patience or gate.")] = "max_prob",
    risk: Annotated[str, typer.Option(help="accuracy or agreement.")] = "accuracy",
    objective: Annotated[str, typer.Option(help="cost or latency.")] = "cost",
    guarantee: Annotated[str, typer.Option(help="ltt, hoeffding_bentkus or crc.")] = "ltt",
    temperature: Annotated[bool, typer.Option("--temperature", help="Fit one temperature per head first.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write the calibrated network (heads, exits, rule) to this safetensors file.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write a PNG: drop against cost, reliability, rows per exit.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Choose the thresholds of NET on DATA under a budget, with a guarantee. Exit code 1 when no exit could be switched on."""
    from fastee.calibration import calibrate as run
    from fastee.cli.source import named, network
    from fastee.report import calibration_plot, calibration_table

    if max_drop is None and max_cost is None:
        max_drop = 0.003
    if max_drop is not None and max_cost is not None:
        raise typer.BadParameter("give either --max-drop or --max-cost", param_hint="--max-cost")
    if not 0 < confidence < 1:
        raise typer.BadParameter(f"expected a number between 0 and 1, got {confidence}", param_hint="--confidence")
    found = network(net, checkpoint)
    try:
        report = run(found, named(data, "DATA"), max_drop, confidence, measure, risk, objective, guarantee=guarantee, max_cost=max_cost, temperature=temperature)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    console = Console(stderr=json_, highlight=False)
    console.print(calibration_table(report, found.exit_names))
    if out is not None:
        found.save(out)
        console.print(f"Network: {out}", soft_wrap=True)
    if plot is not None:
        plot.write_bytes(calibration_plot(report))
        console.print(f"Plot: {plot}", soft_wrap=True)
    if json_:
        typer.echo(report.to_json().decode())
    if not any(t < float("inf") for t in report.thresholds):
        raise typer.Exit(1)


@app.command()
def plan(
    what: Annotated[str, typer.Argument(metavar="PROFILE", help="A profile.json of `fastee profile`; with --device: vgg16, resnet18, resnet50 or mobilenet_v2.")],
    cluster: Annotated[Path | None, typer.Option("--cluster", help="A cluster.toml; default: the profile's own nodes.", exists=True, dir_okay=False)] = None,
    kind: Annotated[str, typer.Option(help="auto, pipeline, joint or spatial.")] = "auto",
    objective: Annotated[str, typer.Option(help="latency, throughput or cost.")] = "latency",
    deadline: Annotated[float | None, typer.Option(help="Seconds that the expected latency may take.")] = None,
    max_drop: Annotated[float | None, typer.Option(help="Largest expected loss of accuracy.")] = None,
    leave: Annotated[list[float] | None, typer.Option("--leave", help="Share of the tasks that an exit answers; once per exit, in order.")] = None,
    loss: Annotated[list[float] | None, typer.Option("--loss", help="Accuracy that such a task loses; once per exit, in order.")] = None,
    memory: Annotated[list[float] | None, typer.Option("--memory", help="Bytes of a segment; once per segment, in order.")] = None,
    source: Annotated[str | None, typer.Option(help="The node that holds the input. Default: the first.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="One of the profile's batch sizes.")] = 1,
    quantile: Annotated[float | None, typer.Option(help="Plan with every segment at this quantile, e.g. 0.95.")] = None,
    device: Annotated[list[str] | None, typer.Option("--device", help="Spatial: xavier, tx2, nano or pi; once per provider.")] = None,
    link: Annotated[str, typer.Option("--link", help="Spatial: every provider's access.")] = "100mbit 1ms",
    json_: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write the plan as JSON to this file.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write a PNG to this file (not for spatial plans).")] = None,
) -> None:
    """Which node runs what, with which codec and which exits, and why; or with --device, which rows of a CNN."""
    from fastee.planning import ClusterSpec
    from fastee.planning.spatial import NETS
    from fastee.report.planning import plan_plot

    if device or kind == "spatial":
        if what not in NETS:
            raise typer.BadParameter(f"expected one of {', '.join(NETS)}, got {what!r}{did_you_mean(what, NETS)}", param_hint="PROFILE")
        if plot is not None:
            raise typer.BadParameter("a spatial plan has no plot", param_hint="--plot")
        made = fastee.plan(NETS[what](), device or [], kind="spatial", links=link)
    else:
        if not Path(what).is_file():
            raise typer.BadParameter(f"no such file: {what!r}; `fastee profile` writes one", param_hint="PROFILE")
        prof = fastee.Profile.load(what)
        made = fastee.plan(
            prof, None if cluster is None else ClusterSpec.load(cluster), fastee.QoS(deadline=deadline, max_drop=max_drop), kind, objective=objective,
            exit_probability=leave or None, exit_loss=loss or None, segment_memory=memory or None, source=0 if source is None else source, batch=batch,
            quantile=quantile)  # fmt: skip
    typer.echo(made.to_json().decode() if json_ else made.explain())
    if out is not None:
        made.save(out)
    if plot is not None:
        plot.write_bytes(plan_plot(made))


@app.command()
def sim(
    spec: Annotated[Path, typer.Argument(help="A SPEC.toml; examples/sim has some.", exists=True, dir_okay=False, readable=True)],
    policy: Annotated[list[str] | None, typer.Option("--policy", help="Instead of the spec's own; may be repeated to compare.")] = None,
    tasks: Annotated[int | None, typer.Option("--tasks", min=1, help="Instead of the spec's own number.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Instead of the spec's own.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the summaries as JSON lines on stdout; the rest goes to stderr.")] = False,
    log: Annotated[Path | None, typer.Option("--log", help="Write the event log as JSON lines to this file.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write PNG plots into this folder.")] = None,
) -> None:
    """Simulate a cluster: the live schedulers on a virtual clock, with links, bursts and faults from SPEC.toml."""
    from fastee.cli.sim import run, write_plots
    from fastee.report.simulation import simulation_table

    if log is not None and policy is not None and len(policy) > 1:
        raise typer.BadParameter("a log holds one run, give one --policy", param_hint="--log")
    console = Console(stderr=json_, highlight=False, width=None if sys.stdout.isatty() else 150)
    results = run(console, spec, policy or [], tasks, seed, log is not None)
    first = results[0]
    console.print(simulation_table(results, f"{spec.name}: {len(first.outcome):,} tasks on {len(first.nodes)} nodes, {first.totals['now'] * 1e-9:,.1f} s of virtual time"))
    events = sum(r.totals["events"] for r in results)
    wall = sum(r.wall for r in results)
    console.print(f"{events:,} events in {wall:.2f} s ({events / max(wall, 1e-9) / 1e6:.2f} million a second); every task ended exactly once", style="dim")
    if log is not None:
        first.save_log(log)
        console.print(f"Log: {log}", soft_wrap=True)
    if plot is not None:
        for path in write_plots(results, plot):
            console.print(f"Plot: {path}", soft_wrap=True)
    if json_:
        for result in results:
            typer.echo(json.dumps(result.summary()))


_Config = Annotated[Path, typer.Option("--config", help="The cluster.toml.", exists=True, dir_okay=False)]
_Keys = Annotated[Path | None, typer.Option("--keys", help="This machine's file of `fastee keys`.", exists=True, dir_okay=False)]


@app.command()
def node(
    config: _Config,
    name: Annotated[str, typer.Option("--name", help="Which of the file's nodes this machine is.")],
    keys: _Keys = None,
) -> None:
    """Serve as one node of a cluster until SIGTERM, which lets it finish what it has."""
    from fastee.cluster.config import load_config
    from fastee.cluster.daemon import serve

    read = load_config(config)
    if name not in read.names:
        raise typer.BadParameter(f"got {name!r}, expected one of {', '.join(read.names)}{did_you_mean(name, read.names)}", param_hint="--name")
    status = serve(read, name, keys, lambda text: print(text, flush=True))
    sys.stderr.flush()
    os._exit(status)  # as the workers: neither a thread inside torch nor the interpreter's clean-up may delay the end


@app.command()
def run(
    config: _Config,
    input_: Annotated[Path, typer.Option("--input", help="An .npz: one array per input of the model, rows first.", exists=True, dir_okay=False)],
    deadline: Annotated[float | None, typer.Option(help="Seconds per row.")] = None,
    keys: _Keys = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write logits, label, confidence, exit, node and latency to this .npz.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON line per row.")] = False,
) -> None:
    """Answer the rows of a file on the running nodes. Exit code 1 when a row got no answer."""
    from fastee.cli.run import run as ask

    raise typer.Exit(ask(config, input_, deadline, keys, out, json_))


@app.command()
def up(
    config: _Config,
    ray: Annotated[bool, typer.Option("--ray", help="Let Ray place the nodes; without it start `fastee node` on every machine.")] = False,
    keys: Annotated[Path | None, typer.Option("--keys", help="Folder on the nodes' machines with NAME.toml of `fastee keys`.")] = None,
    address: Annotated[str, typer.Option(help="Of the Ray cluster.")] = "auto",
) -> None:
    """Start every node of a cluster.toml on a Ray cluster and start those again that die, until ctrl-C. Exit code 1 when one is lost for good."""
    from fastee.cluster.ray import serve

    if not ray:
        raise typer.BadParameter("nothing else can place nodes yet; without Ray start `fastee node` on every machine", param_hint="--ray")
    raise typer.Exit(serve(config, keys, address, lambda text: print(text, flush=True)))


@app.command(context_settings={"allow_interspersed_args": False})
def lab(
    config: _Config,
    shaper: Annotated[str, typer.Option(help="namespaces (root, vde2), relay (anywhere) or auto.")] = "auto",
    script: Annotated[Path | None, typer.Option("--script", help="Lines to obey instead of those on stdin.", exists=True, dir_okay=False)] = None,
    command: Annotated[list[str] | None, typer.Argument(metavar="[-- COMMAND...]", help="Run this on the client's machine; its end ends the lab. FASTEE_LAB_CONFIG names the client's cluster.toml.")] = None,
) -> None:
    """Run all nodes of a cluster.toml here, with its links emulated and faults by the line: cut, heal, kill, start, freeze, slow, link, replay..."""
    from fastee.cli.lab import run

    raise typer.Exit(run(config, shaper, script, () if command else sys.stdin, command or []))


@app.command()
def top(
    config: _Config,
    keys: _Keys = None,
    once: Annotated[bool, typer.Option("--once", help="Print the state once and leave.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the state once as JSON and leave.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Show the running nodes: queues, service times, links, exits, deadlines. Ctrl-C leaves."""
    from fastee.cli.top import watch

    watch(Console(highlight=False, width=None if sys.stdout.isatty() else 140), config, keys, once, json_, every)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Time the kernels on this machine: list | run OP... | compare OLD NEW | peers ...; `fastee bench run --help` says more."""
    from fastee.cli.bench import run

    raise typer.Exit(run(context.args))


@app.command()
def serve(
    net: _Net,
    checkpoint: _Checkpoint = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")] = 8000,
    name: Annotated[str, typer.Option(help="The model's name in the URL.")] = "net",
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are answered 429.")] = 64,
    max_bytes: Annotated[int, typer.Option(min=1, help="The largest body; larger ones are answered 413.")] = 16 << 20,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch. Default: all cores but one, which reads and writes.")] = None,
) -> None:
    """Answer HTTP requests (KServe V2) with NET, under the deadline of each, until ctrl-C or SIGTERM."""
    from fastee.cli.source import network
    from fastee.integrations import serve as http

    http.serve(network(net, checkpoint), host, port, threads=threads, name=name, queue=queue, max_bytes=max_bytes)


def main() -> None:
    """Run the command line and leave with its exit code."""
    app(prog_name="fastee")

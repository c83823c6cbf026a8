"""Commands of the command line: each parses its options, calls the library and returns an exit code.

    0 done, verdict passed    1 verdict failed      2 pipeline or command line wrong   3 a stage failed
    4 file missing or corrupt 5 runtime unavailable 6 verdict inconclusive             70 a bug
    130 interrupted

Whatever imports torch is imported inside the commands that need it, so that `--help` and `validate` stay quick.
"""

import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.console import Console
from compress.cli.exits import guarded, package_version, raise_outcome
from compress.errors import ConfigError

if TYPE_CHECKING:
    from compress.config.load import Pipeline
    from compress.engine.resources import Resources
    from compress.model.artifacts import Verdict
    from compress.storage.remote import Remote

app = typer.Typer(
    name="compress",
    help="From a trained CNN to a smaller, faster ONNX model you can trust.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

PipelineFile = Annotated[Path, typer.Argument(metavar="PIPELINE", help="The pipeline file (YAML).")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value, as in stages.prune.target.macs=0.4; repeatable."),
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Takes the place of the file's seed.")]
RunsDir = Annotated[Path, typer.Option("--runs-dir", metavar="FOLDER", help="Where run folders are kept.")]
StoreUrl = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        envvar="COMPRESS_STORE",
        help="Share finished stages with other hosts, as in s3://BUCKET/FOLDER.",
    ),
]
ForeignTable = Annotated[
    bool, typer.Option("--accept-foreign-table", help="Use deploy.table although another machine made it.")
]
Junit = Annotated[Path | None, typer.Option("--junit", metavar="FILE.xml", help="Write the checks as JUnit XML.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE.json", help="Write the verdict as JSON; - is standard output.")
]
Summary = Annotated[
    bool, typer.Option("--github-summary", help="Add the verdict to the summary of a GitHub Actions job.")
]
Jobs = Annotated[
    int | None, typer.Option("--jobs", metavar="N", min=1, help="Runs at the same time, each in a process of its own.")
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray", metavar="ADDRESS|local", help="Run on a Ray cluster: HOST:PORT, auto, or local for a new one."
    ),
]
Cpus = Annotated[float | None, typer.Option("--cpus", metavar="N", min=0.0, help="Cores of each run, with --ray.")]
Gpus = Annotated[float | None, typer.Option("--gpus", metavar="N", min=0.0, help="GPUs of each run, with --ray.")]
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="NAME", help="Measure latency on nodes with resource device:NAME, with --ray."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings, errors and the verdict.")]


def main() -> None:
    """Run the command line; the entry point of the `compress` program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that lacks a character gets "?", not a crash
            stream.reconfigure(errors="replace")
    app(prog_name="compress")


def _print_version(wanted: bool) -> None:
    if wanted:
        Console().say(f"compress {package_version()}")
        raise typer.Exit


def _open_store(url: str | None) -> "Remote | None":
    """Return the remote store at a URL; None where no URL is given."""
    if not url:
        return None
    from compress.storage.remote import open_remote  # imports fsspec

    return open_remote(url)


@app.callback()
def _options(
    version: Annotated[  # read by its callback
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """From a trained CNN to a smaller, faster ONNX model you can trust."""


@app.command()
@guarded
def run(
    pipeline: PipelineFile,
    overrides: Overrides = None,
    seed: Seed = None,
    quiet: Quiet = False,
    runs_dir: RunsDir = Path("runs"),
    store: StoreUrl = None,
    accept_foreign_table: ForeignTable = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write training curves to the run folder, for TensorBoard to draw.")
    ] = False,
    until: Annotated[
        str | None,
        typer.Option("--until", metavar="STAGE", help="Stop before this stage, and lay out the slim network."),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", metavar="FILE", help="Trained weights of the slim network, in place of finetune."),
    ] = None,
    junit: Junit = None,
    json_file: JsonFile = None,
    github_summary: Summary = False,
) -> None:
    """Run a pipeline; what is done already is not repeated."""
    from compress.config.load import load_pipeline

    accepted = ["deploy.accept_foreign_table=true"] if accept_foreign_table else []
    trained = [] if weights is None else [f"stages.finetune.trained={weights.absolute()}"]
    loaded = load_pipeline(pipeline, [*(overrides or ()), *accepted, *trained], seed)
    if until is not None:
        _run_until(loaded, runs_dir, until, Console(quiet), _open_store(store))
        return
    from compress.cli.ci import require_places, write_for_ci

    require_places(junit, json_file, github_summary)
    if "WORLD_SIZE" in os.environ:  # torch warns in each process that networks may have unused parameters
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    remote = _open_store(store)
    from compress.engine.runner import run_with_others  # imports torch; a wrong pipeline file is refused before that

    console, started = _console(quiet, json_file), time.monotonic()
    outcome = run_with_others(loaded, runs_dir, console, tensorboard, remote)
    if outcome is None:  # another process runs the pipeline, this one has helped
        return
    console.print_verdict(outcome.verdict)
    seconds = time.monotonic() - started
    write_for_ci(outcome.verdict, loaded.config.name, junit, json_file, github_summary, seconds)
    _annotate(outcome.verdict, loaded.config.name, github_summary, console)
    for label, name in (("ONNX file", "model.onnx"), ("Report", "report.html")):
        path = outcome.folder / name
        if path.exists():
            console.note(f"{label}: {path}")
    raise_outcome(outcome.verdict.outcome)


def _run_until(loaded: "Pipeline", runs_dir: Path, until: str, console: Console, remote: "Remote | None") -> None:
    from compress.engine.runner import run_until  # imports torch

    folder = run_until(loaded, runs_dir, until, console, remote)
    console.say(f"Slim network: {folder / 'slim'}")
    console.say(f"Load it, train it and save its state dict: {folder / 'load_slim.py'}")
    console.say(f"Continue: compress run {loaded.path} --weights trained.pt")


@app.command()
@guarded
def plan(
    pipeline: PipelineFile,
    overrides: Overrides = None,
    seed: Seed = None,
    runs_dir: RunsDir = Path("runs"),
    store: StoreUrl = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Time some batches, and estimate minutes and disk space of each stage.")
    ] = False,
) -> None:
    """Show which stages would run, and why."""
    from compress.config.load import load_pipeline

    loaded = load_pipeline(pipeline, overrides or (), seed)
    remote = _open_store(store)
    from compress.engine.runner import plan as plan_stages  # as in run

    console, planned = Console(), plan_stages(loaded, runs_dir, remote)
    if remote is not None and remote.failure is not None:
        console.warn(f"Remote store '{remote.url}' is out of reach: {remote.failure}.")
    console.print_plan([(row.stage, row.status, ", ".join(row.reasons)) for row in planned])
    _print_device(loaded, console)
    if estimate:
        _print_estimate(loaded, [row.status == "run" for row in planned], console)


def _print_device(loaded: "Pipeline", console: Console) -> None:
    """Print the command that a run executes on this machine to time files on a device."""
    deploy = loaded.config.deploy
    if deploy is None or deploy.command is None:
        return
    console.say(f"Device '{deploy.device}' is timed by this command, which a run executes on this machine:")
    console.say(f"  {shlex.join(deploy.command)}")
    console.say(f"  in {deploy.command_folder}")


def _print_estimate(loaded: "Pipeline", runs: Sequence[bool], console: Console) -> None:
    from compress.engine.estimate import estimate_run  # imports torch

    found = [one for one, is_run in zip(estimate_run(loaded, console), runs, strict=True) if is_run]
    rows = [(one.stage, f"{one.seconds / 60:.1f}", f"{one.megabytes:.1f}") for one in found]
    console.print_table("estimate", ("stage", "minutes", "MB"), rows)
    minutes, megabytes = sum(one.seconds for one in found) / 60, sum(one.megabytes for one in found)
    console.say(
        f"About {minutes:.1f} minutes (right to a factor of two) and {megabytes:,.0f} MB. Own training is not counted."
    )


@app.command()
@guarded
def profile(
    pipeline: PipelineFile,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.json", help="Where to write the latency table.")],
    overrides: Overrides = None,
    quiet: Quiet = False,
    runs_dir: RunsDir = Path("runs"),
    store: StoreUrl = None,
) -> None:
    """Time a network's layers on this machine, for a latency target here or, with deploy.table, elsewhere."""
    from compress.config.load import load_pipeline

    loaded = load_pipeline(pipeline, overrides or ())
    from compress.storage.files import require_output

    require_output("--out", out, "latency table")
    remote = _open_store(store)
    from compress.engine.runner import profile as profile_pipeline  # imports torch

    console = Console(quiet)
    table = profile_pipeline(loaded, runs_dir, console, remote)
    table.write(out)
    console.say(f"{out}: {len(table.samples)} variants, {table.conditions.machine}, {table.conditions.runtime}.")


@app.command()
@guarded
def sweep(
    pipeline: PipelineFile,
    budgets: Annotated[
        str, typer.Option("--budgets", metavar="A,B,...", help="Values for the pipeline's target, as in 0.8,0.6,0.5.")
    ],
    seeds: Annotated[
        str | None,
        typer.Option("--seeds", metavar="A,B,...", help="Run each budget with each seed, and show mean and deviation."),
    ] = None,
    overrides: Overrides = None,
    seed: Seed = None,
    quiet: Quiet = False,
    runs_dir: RunsDir = Path("runs"),
    store: StoreUrl = None,
    jobs: Jobs = None,
    ray: RayAddress = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    device: Device = None,
) -> None:
    """Run a pipeline at several budgets and put the results side by side."""
    values, several = _parse_budgets(budgets), _parse_seeds(seeds, seed)
    resources = _parse_resources(jobs, ray, cpus, gpus, device)
    from compress.config.load import load_pipeline

    load_pipeline(pipeline, overrides or (), seed)
    _open_store(store)
    from compress.engine.executors import open_executor  # imports torch; a wrong pipeline file is refused before that
    from compress.engine.sweep import Grid
    from compress.engine.sweep import sweep as sweep_pipeline
    from compress.report.sweep import describe_potential

    console = Console(quiet)
    with open_executor(resources, runs_dir, console) as executor:
        outcome = sweep_pipeline(
            pipeline, Grid(values, several), runs_dir, overrides or (), seed, console, store, executor
        )
    results = outcome.sweep
    console.print_table(f"Budgets of {results.quantity}", results.columns, results.rows)
    if results.comparison is not None:
        console.note(results.comparison.describe())
    if results.potential is not None:
        console.say(describe_potential(results.potential))
    console.note(f"Report: {outcome.folder / 'sweep.html'}")
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)


@app.command()
@guarded
def search(
    pipeline: PipelineFile,
    between: Annotated[
        str | None,
        typer.Option("--between", metavar="LOW,HIGH", help="Range of the target's value; 0.1,1 for shares by default."),
    ] = None,
    most_runs: Annotated[int, typer.Option("--runs", min=1, help="Largest number of runs.")] = 7,
    within: Annotated[
        float, typer.Option("--within", min=0.001, help="Stop when the answer is known up to this share.")
    ] = 0.05,
    overrides: Overrides = None,
    seed: Seed = None,
    quiet: Quiet = False,
    runs_dir: RunsDir = Path("runs"),
    store: StoreUrl = None,
    junit: Junit = None,
    json_file: JsonFile = None,
    github_summary: Summary = False,
    jobs: Jobs = None,
    ray: RayAddress = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    device: Device = None,
    pareto: Annotated[
        bool, typer.Option("--pareto", help="Search cost and metric over budget and settings, by Optuna.")
    ] = False,
    trials: Annotated[
        int | None, typer.Option("--trials", metavar="N", min=1, help="Runs of --pareto, earlier ones included; 20.")
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option("--vary", metavar="KEY=[A,B]|LOW..HIGH", help="Setting that --pareto varies; repeatable."),
    ] = None,
    also: Annotated[
        list[Path] | None,
        typer.Option("--also", metavar="PIPELINE", help="Another pipeline that --pareto may choose; repeatable."),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option("--storage", metavar="FILE|URL", help="Trials of --pareto: a journal, or a database's URL."),
    ] = None,
) -> None:
    """Find the smallest budget at which a pipeline passes its gates, by bisection; or a Pareto front."""
    limits = _parse_range(between)
    resources = _parse_resources(jobs, ray, cpus, gpus, device)
    ci = _ForCi(junit, json_file, github_summary)
    common = _Common(pipeline, tuple(overrides or ()), seed, runs_dir, store, _console(quiet, json_file), resources)
    if pareto:
        _search_pareto(common, limits, trials or 20, vary or (), also or (), storage, ci)
        return
    given_options = {"--trials": trials, "--vary": vary, "--also": also, "--storage": storage}
    if wrong := next((name for name, value in given_options.items() if value), None):
        raise ConfigError(f"{wrong} needs --pareto, it is not given.")
    _search_budget(common, limits, most_runs, within, ci)


@dataclass(frozen=True)
class _Common:
    """Options that both searches have."""

    pipeline: Path
    overrides: tuple[str, ...]
    seed: int | None
    runs_dir: Path
    store: str | None
    console: Console
    resources: "Resources"


@dataclass(frozen=True)
class _ForCi:
    """Files for CI systems."""

    junit: Path | None
    json_file: Path | None
    summary: bool

    def require(self) -> None:
        from compress.cli.ci import require_places

        require_places(self.junit, self.json_file, self.summary)

    def write(self, verdict: "Verdict | None", name: str, seconds: float, console: Console) -> None:
        from compress.cli.ci import write_for_ci

        if verdict is not None:
            write_for_ci(verdict, name, self.junit, self.json_file, self.summary, seconds)
            _annotate(verdict, name, self.summary, console)


def _search_budget(
    common: _Common, limits: tuple[float, float] | None, most_runs: int, within: float, ci: _ForCi
) -> None:
    from compress.config.load import load_pipeline

    name = load_pipeline(common.pipeline, common.overrides, common.seed).config.name
    ci.require()
    _open_store(common.store)
    from compress.engine.budget_search import SearchLimits, search_budget  # imports torch
    from compress.engine.executors import open_executor

    console, started = common.console, time.monotonic()
    given = SearchLimits(limits, most_runs, within)
    resources = replace(common.resources, jobs=common.resources.jobs or 1)  # bisection gains little from more
    with open_executor(resources, common.runs_dir, console) as executor:
        outcome = search_budget(
            common.pipeline, given, common.runs_dir, common.overrides, common.seed, console, common.store, executor
        )
    tried = outcome.tried
    console.print_table(f"Budgets of {tried.quantity}", tried.columns, tried.rows)
    if outcome.best is None:
        console.say(f"No budget of {tried.quantity} up to {max(one.budget for one in tried.runs):g} passes.")
    else:
        known = "" if outcome.failing is None else f"; {outcome.failing:g} does not pass"
        console.say(f"Smallest that passes: {tried.quantity} {outcome.best.budget:g} ({outcome.best.run}){known}.")
    ci.write(outcome.verdict, name, time.monotonic() - started, console)
    console.note(f"Report: {outcome.folder / 'search.html'}")
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)


def _search_pareto(
    common: _Common,
    limits: tuple[float, float] | None,
    trials: int,
    vary: Sequence[str],
    also: Sequence[Path],
    storage: str | None,
    ci: _ForCi,
) -> None:
    from compress.config.load import load_pipeline
    from compress.engine.search_space import Space, parse_choices

    choices = parse_choices(vary)
    name = load_pipeline(common.pipeline, common.overrides, common.seed).config.name
    for path in also:
        load_pipeline(path, common.overrides, common.seed)
    ci.require()
    from compress.catalog import require_packages

    require_packages(["optuna"], "--pareto (the extra 'search' of this project)")
    _open_store(common.store)
    from compress.engine.executors import open_executor  # imports torch
    from compress.engine.pareto_search import search_pareto

    console, started = common.console, time.monotonic()
    space = Space(limits, choices, tuple(also), storage)
    with open_executor(common.resources, common.runs_dir, console) as executor:
        outcome = search_pareto(
            common.pipeline,
            space,
            trials,
            common.runs_dir,
            common.overrides,
            common.seed,
            console,
            common.store,
            executor,
        )
    tried = outcome.tried
    console.print_table(f"Trials by {tried.quantity}", tried.columns, tried.rows)
    if tried.comparison is not None:
        console.note(tried.comparison.describe())
    if outcome.front:
        console.say(f"Pareto front: {', '.join(run.run for run in outcome.front)}.")
    else:
        console.say("No trial passes its gates.")
    ci.write(outcome.verdict, name, time.monotonic() - started, console)
    console.note(f"Report: {outcome.folder / 'search.html'}")
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)


@app.command()
@guarded
def validate(
    pipelines: Annotated[list[Path], typer.Argument(metavar="PIPELINE...", help="Pipeline files (YAML).")],
    overrides: Overrides = None,
    seed: Seed = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Open data, weights, network and runtimes as well, and run two images.")
    ] = False,
) -> None:
    """Check pipeline files without running anything."""
    from compress.config.load import load_pipeline

    console, codes = Console(), [0]
    for path in pipelines:
        try:
            loaded = load_pipeline(path, overrides or (), seed)
        except ConfigError as error:
            console.print_error(error)
            codes.append(error.exit_code)
        else:
            code = _validate_deeply(loaded, console) if deep else 0
            codes.append(code)
            if code == 0:
                console.say(f"{path}: valid, {' -> '.join(stage.stage for stage in loaded.config.stages)}.")
    if code := max(codes, key=bool):
        raise typer.Exit(code)


def _validate_deeply(loaded: "Pipeline", console: Console) -> int:
    """Print every problem that can be found before a run; return the exit code of the first error, or 0."""
    from compress.engine.preflight import find_problems

    findings = find_problems(loaded, console)
    for one in findings:
        text = f"{loaded.path}: {one.section}: {one.text}" + (f"\nHint: {one.hint}" if one.hint else "")
        if one.kind == "warning":
            console.warn(text)
        else:
            console.print_failure(text)
    return next((one.exit_code for one in findings if one.kind == "error"), 0)


@app.command()
@guarded
def verify(
    model: Annotated[Path, typer.Argument(metavar="FILE.onnx", help="The file to check.")],
    pipeline: Annotated[
        Path | None,
        typer.Option("--pipeline", metavar="PIPELINE", help="Says data, preprocessing, runtime and gates."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DATA", help="Images and labels: an .npz with x and y, or a folder of classes."),
    ] = None,
    gates: Annotated[
        Path | None,
        typer.Option("--gates", metavar="GATES.yaml", help="Gates, conditions and preprocessing, with --data."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="BASELINE.onnx", help="Baseline for drop and speed-up.")
    ] = None,
    overrides: Overrides = None,
    quiet: Quiet = False,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.html", help="Write a page on what was found.")
    ] = None,
    junit: Junit = None,
    json_file: JsonFile = None,
    github_summary: Summary = False,
) -> None:
    """Hold any ONNX classifier to gates: those of a pipeline, or of a file of their own."""
    if (pipeline is None) == (data is None and gates is None):
        raise ConfigError(
            "verify takes either --pipeline, or --data and --gates, which say on what the file is measured.",
            hint="compress verify model.onnx --against baseline.onnx --data test.npz --gates gates.yaml",
        )
    from compress.config.gates_file import load_gates
    from compress.config.load import load_pipeline

    settings = (
        load_gates(gates, data, overrides or ()) if pipeline is None else load_pipeline(pipeline, overrides or ())
    )
    from compress.cli.ci import require_place, require_places, write_for_ci

    require_places(junit, json_file, github_summary)
    require_place("--report", report, ".html", "page of a verdict")
    from compress.engine.verify_file import verify_file  # imports ONNX Runtime

    console, started = _console(quiet, json_file), time.monotonic()
    verdict = verify_file(model, settings, against, console)
    console.print_verdict(verdict)
    write_for_ci(verdict, model.name, junit, json_file, github_summary, time.monotonic() - started)
    _annotate(verdict, model.name, github_summary, console)
    if report is not None:
        from compress.report.build import write_verdict_page  # imports matplotlib

        write_verdict_page(model.name, verdict, report)
    raise_outcome(verdict.outcome)


@app.command()
@guarded
def bundle(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder, such as runs/NAME.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE.zip", help="What to write; by default NAME.zip here.")
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", metavar="N", min=1, max=10_000, help="Evaluation images that go with it.")
    ] = 16,
    sign: Annotated[
        Path | None, typer.Option("--sign", metavar="KEY.pem", help="Sign the manifest with this Ed25519 key.")
    ] = None,
    allow_failed: Annotated[
        bool,
        typer.Option(
            "--allow-failed", help="Bundle a run that did not pass its verification; model.json records that."
        ),
    ] = False,
    license_text: Annotated[
        str | None, typer.Option("--license", metavar="TEXT", help="Licence of the model, such as Apache-2.0.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier bundle.")] = False,
) -> None:
    """Pack a run's model with what proves it on the device: samples, metrics, digests, a check."""
    from compress.bundle.write import write_bundle  # imports ONNX Runtime

    path = write_bundle(
        folder, out, samples=samples, key_file=sign, allows_failed=allow_failed, licence=license_text, force=force
    )
    Console().say(f"{path} is written, {path.stat().st_size:,} bytes; next: compress check {path}")


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    add_help_option=False,
)
@guarded
def check(context: typer.Context) -> None:
    """Check a bundle, a .zip or its folder: whole, right, and fast enough here."""
    from compress.bundle.check import main as check_bundle  # the program that lies in every bundle

    code = check_bundle(context.args, "compress check")
    if code:
        raise typer.Exit(code)


@app.command()
@guarded
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or their report.json files.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FOLDER|FILE.html", help="Where the page goes."),
    ] = None,
) -> None:
    """Compare runs side by side on one page, comparison.html; of one run, write its report.html anew."""
    from compress.report.reading import write_pages

    write_pages(runs, out, Console())


@app.command()
@guarded
def inspect(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="Pipeline, FILE.onnx, resnet18 (torchvision), timm:NAME, file.py:build, best.pt."
        ),
    ],
    input_shape: Annotated[
        str | None,
        typer.Option("--input", "--input-shape", metavar="C,H,W", help="Input of one image, where it is not known."),
    ] = None,
    latency: Annotated[
        bool, typer.Option("--latency", help="Measure the least latency that can be reached, in ONNX Runtime.")
    ] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Show every layer, too.")] = False,
    second_opinion: Annotated[
        bool, typer.Option("--second-opinion", help="Compare the channel groups with those of torch-pruning.")
    ] = False,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Of a pipeline: measure the loss over the width of each group.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.svg", help="Draw the curves of --sensitivity.")
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE.json", help="Write what was found as JSON; - is standard output."),
    ] = None,
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """List prunable and excluded channel groups of a network, and its least MACs and latency."""
    shape = None if input_shape is None else _parse_input(input_shape)
    from compress.cli.ci import require_place

    require_place("--json", json_file, ".json", "JSON overview")
    console = _console(quiet, json_file)
    if sensitivity or plot is not None:
        _inspect_sensitivity(target, overrides or (), plot, json_file, console)
        return
    from compress.inspection.overview import inspect_target  # imports torch

    overview = inspect_target(target, shape, tuple(overrides or ()), latency, console, second_opinion)
    for title, columns, rows in overview.tables(layers):
        console.print_table(title, columns, rows)
    if json_file is not None:
        _write_stamped(overview.to_dict(), json_file)


def _inspect_sensitivity(
    target: str, overrides: Sequence[str], plot: Path | None, json_file: Path | None, console: Console
) -> None:
    from compress.cli.ci import require_place
    from compress.config.load import load_pipeline

    if Path(target).suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--sensitivity needs a pipeline file, whose images the loss is measured on, got '{target}'.")
    require_place("--plot", plot, ".svg", "picture")
    loaded = load_pipeline(Path(target), overrides)
    from compress.inspection.sensitivity import sensitivity_of_pipeline  # imports torch

    found = sensitivity_of_pipeline(loaded, console)
    for title, columns, rows in found.tables():
        console.print_table(title, columns, rows)
    if plot is not None:
        plot.write_text(found.to_svg(), encoding="utf-8")
    if json_file is not None:
        _write_stamped(found.to_dict(), json_file)


def _console(quiet: bool, json_file: Path | None) -> Console:
    """Return the console of a command; with `--json -`, standard output is left to the JSON."""
    return Console(quiet, stdout=sys.stderr if json_file == Path("-") else None)


def _annotate(verdict: "Verdict", name: str, wanted: bool, console: Console) -> None:
    """Print GitHub annotations of the checks that keep a verdict from passing."""
    from compress.cli.ci import github_annotations

    for line in github_annotations(verdict, name) if wanted else ():
        console.say(line)


def _write_stamped(values: dict[str, Any], json_file: Path) -> None:
    from compress.report.build import write_json
    from compress.report.stamp import stamp

    write_json({**values, "made": stamp()}, json_file)


@app.command()
@guarded
def doctor(
    threads: Annotated[
        int, typer.Option("--threads", metavar="N", min=1, help="Threads of the noise measurement.")
    ] = 1,
    runs_dir: RunsDir = Path("runs"),
    quiet: Quiet = False,
) -> None:
    """Describe this machine: versions, execution providers, instruction sets, noise of latency."""
    from compress.inspection.machine import describe_machine, judge_noise, measure_noise  # imports torch

    console = Console(quiet)
    console.print_table("machine", ("item", "value"), describe_machine(runs_dir))
    noise = measure_noise(threads, console)
    (console.warn if noise.is_high else console.say)(judge_noise(noise))


@app.command()
@guarded
def clean(
    runs_dir: RunsDir = Path("runs"),
    store: Annotated[
        str | None, typer.Option("--store", metavar="URL", help="Clean this remote store, not the local one.")
    ] = None,
    older_than: Annotated[
        float | None, typer.Option("--older-than", metavar="DAYS", min=0, help="Leave younger files alone.")
    ] = None,
    max_size: Annotated[
        float | None,
        typer.Option("--max-size", metavar="GB", min=0, help="Remove the oldest until the store has this size."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove them; without it they are only listed.")] = False,
) -> None:
    """List, or remove, stored stages that no run uses, and the state of killed ones; or old ones of a remote store."""
    from compress.engine.cleaning import Limits, find_leftovers, find_old, remove, remove_remote

    console = Console()
    limits = Limits(older_than, None if max_size is None else int(max_size * 1e9))
    if store is None:
        found = find_leftovers(runs_dir, limits)
    else:
        limits.require_some()
        remote = _open_store(store)
        found = [] if remote is None else find_old(remote, limits)
    rows = [(one.kind, one.label[:12], f"{one.size_bytes / 1e6:.1f}", f"{one.age_days:.1f}") for one in found]
    if not found:
        console.say("Nothing to remove.")
        return
    console.print_table("leftovers", ("kind", "key", "MB", "days"), rows)
    what = "folders" if store is None else "files"
    total = sum(one.size_bytes for one in found) / 1e6
    if not yes:
        console.say(f"{len(found)} {what}, {total:,.1f} MB; --yes removes them.")
        return
    removed = remove(found, runs_dir) if store is None else remove_remote(found, remote, console)
    console.say(f"{len(removed)} {what} removed, {sum(one.size_bytes for one in removed) / 1e6:,.1f} MB.")


@app.command("list")
@guarded
def list_names(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="[criteria|methods|ranks|stages|networks|datasets|tasks|runtimes]",
            help="What to list; all by default.",
        ),
    ] = None,
) -> None:
    """List the names that a pipeline file may use."""
    from compress.catalog import CRITERIA, METHODS, NETWORKS, RANKS, RUNTIMES, SOURCES, STAGES, TASKS, closest

    summary = ("name", "what it does")
    stages = [(entry.name, entry.consumes, entry.produces, entry.summary) for entry in STAGES.values()]
    tables: dict[str, tuple[Sequence[str], Sequence[Sequence[str]]]] = {
        "criteria": (summary, [(name, CRITERIA.summary(name)) for name in CRITERIA]),
        "methods": (summary, [(name, METHODS.summary(name)) for name in METHODS]),
        "ranks": (("name", "setting", "what it does"), [(name, *said) for name, said in RANKS.items()]),
        "stages": (("name", "needs", "yields", "what it does"), stages),
        "networks": (("key", "what it names"), list(NETWORKS.items())),
        "datasets": (("key", "what it reads"), list(SOURCES.items())),
        "tasks": (summary, [(name, TASKS.summary(name)) for name in TASKS]),
        "runtimes": (summary, [(name, RUNTIMES.summary(name)) for name in RUNTIMES]),
    }
    if kind is not None and kind not in tables:
        raise ConfigError(f"list takes one of {', '.join(tables)}, got '{kind}'.", hint=closest(kind, list(tables)))
    console = Console()
    for name in tables if kind is None else [kind]:
        columns, rows = tables[name]
        console.print_table(name, columns, rows)


@app.command()
@guarded
def schema() -> None:
    """Print the JSON Schema of pipeline files."""
    import json

    from compress.config.json_schema import json_schema

    Console().say(json.dumps(json_schema(), indent=2))


@app.command()
@guarded
def init(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Folder with train/ and test/, or of class folders, of images, or of images/ and masks/; .npz files; "
            "files of MNIST; a torchvision data set.",
        ),
    ],
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="resnet18 (torchvision), timm:NAME, file.py:build, m.onnx, or a checkpoint best.pt."
        ),
    ],
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="FILE", help="Checkpoint, where MODEL names a network.")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE.yaml", help="The file to write.")] = Path(
        "pipeline.yaml"
    ),
    target_macs: Annotated[
        float, typer.Option("--target-macs", metavar="RATIO", help="Kept share of the MACs, in (0, 1].")
    ] = 0.5,
    input_shape: Annotated[
        str | None, typer.Option("--input-shape", metavar="C,H,W", help="Input of one image; by default of the data.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Look at data and a checkpoint, and write a commented pipeline file that runs."""
    from compress.scaffold.template import Scaffold, write_pipeline

    shape = None if input_shape is None else _parse_shape(input_shape)
    console = Console()
    written = write_pipeline(out, Scaffold(data, model, weights, target_macs, shape), force, console)
    for sentence in written.found:
        console.say(f"{sentence}.")
    for warning in written.warnings:
        console.warn(f"{warning.rstrip('.')}.")
    console.say(f"{out} is written. Change the budget there if you like; next: compress run {out}")


def _parse_budgets(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value < float("inf") for value in values):
        raise ConfigError(f"--budgets must be numbers above 0, such as 0.8,0.6,0.5, got '{text}'.")
    return values


def _parse_seeds(text: str | None, seed: int | None) -> list[int]:
    """Read "0,1,2"; [] where it is not given.

    Raises:
        ConfigError: It is not a list of whole numbers, or there is a single seed as well.
    """
    if text is None:
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and int(part) < 2**63 for part in parts):
        raise ConfigError(f"--seeds must be whole numbers of at least 0, such as 0,1,2, got '{text}'.")
    if seed is not None:
        raise ConfigError("--seed and --seeds exclude each other.")
    return [int(part) for part in parts]


def _parse_resources(
    jobs: int | None, ray: str | None, cpus: float | None, gpus: float | None, device: str | None
) -> "Resources":
    """Return the resources of runs.

    Raises:
        ConfigError: An option for Ray is given without --ray.
    """
    given = {"--cpus": cpus, "--gpus": gpus, "--device": device}
    if ray is None and (extra := [name for name, value in given.items() if value is not None]):
        raise ConfigError(f"{extra[0]} needs --ray, it is not given.", hint="--ray local, or the address of a cluster")
    from compress.engine.resources import Resources

    return Resources(jobs, ray or None, 1.0 if cpus is None else cpus, gpus or 0.0, device)


def _parse_range(text: str | None) -> tuple[float, float] | None:
    """Read "0.2,0.9"; None stays None.

    Raises:
        ConfigError: It is not two positive numbers, the smaller one first.
    """
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low = high = 0.0
    if not 0 < low < high < float("inf"):
        raise ConfigError(f"--between must be two numbers above 0, the smaller one first, got '{text}'.")
    return low, high


def _parse_input(text: str) -> tuple[int, ...]:
    """Read "3,32,32", or the sizes of an input with fewer or more axes.

    Raises:
        ConfigError: It is not one or more positive whole numbers.
    """
    sizes = _positive_sizes(text)
    if not sizes:
        raise ConfigError(f"--input must be positive whole numbers, got '{text}'.", hint="such as 3,224,224")
    return sizes


def _positive_sizes(text: str) -> tuple[int, ...]:
    """Return the numbers in "3,32,32"; () where one of them is no positive whole number."""
    parts = [part.strip() for part in text.split(",")]
    fits = all(part.isascii() and part.isdecimal() and len(part) < 10 and int(part) > 0 for part in parts)
    return tuple(map(int, parts)) if fits else ()


def _parse_shape(text: str) -> tuple[int, int, int]:
    """Read "3,32,32".

    Raises:
        ConfigError: It is not three positive whole numbers, or has no 1 or 3 channels.
    """
    sizes = _positive_sizes(text)
    if len(sizes) == 3 and sizes[0] in (1, 3):
        return sizes[0], sizes[1], sizes[2]
    raise ConfigError(
        f"--input-shape must be channels (1 or 3), height and width, got '{text}'.", hint="such as 3,32,32"
    )

"""Comparison of all criteria, training-time methods and rank allocations at the same budget.

    python benchmarks/methods.py a                                quickstart, 0.4 of its MACs, no training and 2 epochs
    python benchmarks/methods.py b --weights resnet20-12fca82f.th ResNet-20, 0.5 and 0.3, no training and 2 epochs
    python benchmarks/methods.py c --weights resnet56-4bfd9763.th ResNet-56, 0.5, no training
    ... --write docs/methods/README.md      puts the tables between their markers
    ... --only greedy lasso     some rows        --seeds 0 1 2      mean of several        --list     names of all rows
    ... --no-run                tables of what is in the results file, nothing is measured
    ... --fresh                 results of another source of the package do not count

Each row is a pipeline of the repository with something changed; the file that comes out is judged on the whole
evaluation split. Rows of criteria are cut at once and get all epochs of training afterwards. Methods that train get
half of the epochs, with the settings of finetune, and finetune the rest; without training they have no row. Baselines:
random channels at the widths of the default, filter norms, the same share of each group, and the default's structure
trained from random weights.

Every finished run is appended to the results file, JSON lines with the seed, the date and the digest of the package's
source. A row that is in it is not measured again, so that a table can be made in several sittings and by several
processes beside each other; a table says with which sources its rows were measured. With `--set` the file is not used.

Intervals are Wilson's at 95 % over the images of one run, or the range of the seeds where that is wider. A row is "not
told apart" where its interval overlaps that of the best row.
"""

import argparse
import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from made import source_digest, write_marked
from rows import ROOT, Row, flow, measure

from compress.catalog import CRITERIA
from compress.cli.console import Console
from compress.config.load import load_pipeline

AT_ONCE: dict[str, dict[str, Any]] = {
    "default (reconstruction)": {},
    **{name: {"criterion": name} for name in CRITERIA if name not in ("random", "l1", "reconstruction")},
    "reconstruction, errors": {"criterion": "reconstruction", "damage": "errors"},
    "greedy, shared error": {"criterion": "greedy", "allocation": "shared_error"},
    "pfp, shared error": {"criterion": "pfp", "allocation": "shared_error"},
    "sensitivity": {"damage": "sensitivity"},
    "whole networks": {"whole_networks": 24},
    "blocks: auto": {"blocks": "auto"},
    "blocks: joint": {"blocks": "joint"},
}
BASELINES: dict[str, dict[str, Any]] = {
    "l1": {"criterion": "l1"},
    "random channels": {"order": "shuffled"},
    "uniform widths": {"allocation": "uniform"},
    "random scores": {"criterion": "random"},
}
TRAINED: dict[str, dict[str, Any]] = {
    "gsm": {},
    "gates": {},
    "greg": {},
    "increg": {},
    "csgd": {},
    "grda": {},
    "regrow": {},
    "tpp": {},
}
RANKS: dict[str, dict[str, Any]] = {
    "low_rank, shared error": {"allocation": "shared_error"},
    "low_rank, alds": {"allocation": "alds"},
    "low_rank, energy": {"allocation": "energy"},
    "trp": {"method": "trp"},
}
FROM_SCRATCH = "random weights"
UNMEASURED: dict[str, Any] = {"robustness": None, "resources": None}
NOT_WHILE_LEARNING = (
    "stage", "weights", "epochs", "steps", "ema", "average_ratio", "probe", "norms", "rewind_to", "rewind_epoch",
    "rewind_schedule", "own", "kwargs", "trained", "quantization_aware",
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        pipeline: File name.
        kept: Shares of the MACs.
        epochs: Of training; 0 is none.
        has_methods: Whether training-time methods have rows.
        title: One line.
    """

    pipeline: str
    kept: tuple[float, ...]
    epochs: tuple[int, ...]
    has_methods: bool
    title: str


TABLES = {
    "a": Table("quickstart.yaml", (0.4,), (0, 2), True, "Quickstart network (MNIST)"),
    "b": Table("resnet20_cifar10.yaml", (0.5, 0.3), (0, 2), True, "Published ResNet-20 (CIFAR-10)"),
    "c": Table("resnet56_cifar10.yaml", (0.5,), (0,), False, "Published ResNet-56 (CIFAR-10)"),
}


def rows(values: dict[str, Any], epochs: int, has_methods: bool) -> list[Row]:
    """Return every row, for a pipeline whose values are given; with 0 epochs those without training alone."""
    stages = {stage["stage"]: stage for stage in values["stages"]}
    place = next(index for index, stage in enumerate(values["stages"]) if stage["stage"] == "prune")
    whole = () if epochs == 0 else (f"stages.finetune.epochs={epochs}",)
    found = [
        Row(name, (*whole, *(f"stages.prune.{key}={flow(value)}" for key, value in changes.items())))
        for name, changes in (AT_ONCE | BASELINES).items()
    ]
    target = {"macs": stages["prune"]["target"]["macs"]}
    for name, changes in RANKS.items():
        if not changes.get("method"):
            found.append(
                Row(name, (*whole, f"stages.{place}={flow({'stage': 'low_rank', 'target': target} | changes)}"))
            )
    if epochs == 0:
        return found
    found.append(Row(FROM_SCRATCH, (*whole, "stages.finetune.weights=random")))
    if not has_methods:
        return found
    learning = max(1, epochs // 2)
    training = {
        key: value for key, value in stages["finetune"].items() if key not in NOT_WHILE_LEARNING and value is not None
    }
    trained, rest = {**training, "epochs": learning}, f"stages.finetune.epochs={epochs - learning}"
    for name, changes in TRAINED.items():
        settings = {"method": name, "residual": "cut", **changes}
        overrides = [f"stages.prune.{key}={flow(value)}" for key, value in settings.items()]
        found.append(Row(name, (rest, f"stages.prune.training={flow(trained)}", *overrides)))
    learned = {"stage": "low_rank", "target": target, **RANKS["trp"], "training": trained}
    found.append(Row("trp", (f"stages.{place}={flow(learned)}", rest)))
    return found


def pipeline_file(table: Table, kept: float, epochs: int, overrides: Sequence[str], folder: Path) -> Path:
    """Write a pipeline of the repository with its budget changed, without finetune where nothing is trained."""
    budget = f"stages.prune.target={flow({'macs': kept})}"
    values = load_pipeline(ROOT / "pipelines" / table.pipeline, [*overrides, budget]).resolved
    stages = [stage for stage in values["stages"] if epochs or stage["stage"] != "finetune"]
    for stage in stages:
        if stage["stage"] == "verify":
            stage |= {"gates": {"parity": 0.001}, "warmup": 1, "repeats": 5}
    stages = [_plain(stage) | (UNMEASURED if stage["stage"] == "verify" else {}) for stage in stages]
    name = f"{Path(table.pipeline).stem}-{kept:g}-{epochs}"
    path = folder / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**_plain(values), "stages": stages, "name": name}))
    return path


def _plain(value: Any) -> Any:
    """Return values as they may stand in a pipeline file, without settings that are not given."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items() if one is not None}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Result:
    """A row's runs.

    Attributes:
        name: Of the row.
        refused: The message, where it could not be run.
        before: Validation loss after the cut, before the repair; None where there was none.
        after: Validation loss after the repair.
        top1: Of the file, for each seed.
        images: It was measured on.
        macs: How many times fewer.
        seconds: Of the stage that cuts, for each seed.
        sources: Digests of the package's source, of all runs.
    """

    name: str
    refused: str | None = None
    before: float | None = None
    after: float | None = None
    top1: tuple[float, ...] = ()
    images: int = 1
    macs: float = 1.0
    seconds: tuple[float, ...] = ()
    sources: frozenset[str] = frozenset()

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval at 95 % of the mean, or the range of the seeds where that is wider."""
        mean, z, n = statistics.mean(self.top1), 1.96, self.images
        middle = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return min(middle - half, *self.top1), max(middle + half, *self.top1)


@dataclass(frozen=True)
class Run:
    """One line of the results file: one row, measured with one seed.

    Attributes:
        table: Letter.
        kept: Share of the MACs.
        epochs: Of training.
        row: Name.
        seed: Of the pipeline.
        source: Digest of the package's source.
        made: Date.
        refused: The message, where it could not be run; all that follows is None then.
        before: Validation loss after the cut, before the repair; None where there was none.
        after: Validation loss after the repair.
        top1: Of the file, on the whole evaluation split.
        images: It was measured on.
        macs: How many times fewer.
        seconds: Of the stage that cuts.
    """

    table: str
    kept: float
    epochs: int
    row: str
    seed: int
    source: str
    made: str
    refused: str | None = None
    before: float | None = None
    after: float | None = None
    top1: float | None = None
    images: int | None = None
    macs: float | None = None
    seconds: float | None = None


def measured(report: Any) -> dict[str, Any]:
    """Return what a `Run` keeps of a report, or of the message of a run that was refused."""
    if isinstance(report, str):
        return {"refused": report}
    stage = next(stage for stage in report["stages"] if stage["stage"] in ("prune", "low_rank"))
    before, after = _losses(stage["record"])
    return {
        "before": before,
        "after": after,
        "top1": report["slim"]["quality"]["top1"],
        "images": report["details"]["evaluation"]["images"] if "evaluation" in report["details"] else 10_000,
        "macs": report["baseline"]["macs"] / report["slim"]["macs"],
        "seconds": stage["seconds"],
    }


def read_runs(path: Path) -> list[Run]:
    """Return the runs of a results file; none where there is no file."""
    if not path.is_file():
        return []
    return [Run(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line]


def append_run(path: Path, run: Run) -> None:
    """Append a run to a results file in one write, so that several processes may do so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, (json.dumps(asdict(run)) + "\n").encode())
    finally:
        os.close(handle)


def result(name: str, runs: Sequence[Run]) -> Result:
    """Return what the runs of a row say; of several with one seed the last counts."""
    last = list({run.seed: run for run in runs}.values())
    sources = frozenset(run.source for run in last)
    if refused := [run.refused for run in last if run.refused is not None]:
        return Result(name, refused=refused[0], sources=sources)
    return Result(
        name,
        None,
        _mean(run.before for run in last),
        _mean(run.after for run in last),
        tuple(run.top1 for run in last if run.top1 is not None),
        max(run.images or 0 for run in last),
        _mean(run.macs for run in last) or 1.0,
        tuple(run.seconds for run in last if run.seconds is not None),
        sources,
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _losses(record: dict[str, Any]) -> tuple[float | None, float | None]:
    """Return the validation loss after the cut, and after the repair."""
    repairs = record.get("repairs") or []
    if not repairs:
        return None, record.get("validation_loss_after")
    kept = [one["loss_after"] for one in repairs if one["is_kept"]]
    return repairs[0]["loss_before"], kept[-1] if kept else repairs[0]["loss_before"]


def markdown(results: Sequence[Result], title: str) -> str:
    """Return a table, the best row first."""
    known = sorted((one for one in results if one.refused is None), key=lambda one: -statistics.mean(one.top1))
    lines = [
        title,
        "",
        "| what decides | top-1 of the file (95 %) | loss, cut → repaired | MACs | seconds | next to the best |",
        "|---|---|---|---|---|---|",
    ]
    best = known[0].interval[0] if known else 0.0
    for place, one in enumerate(known):
        low, high = one.interval
        seeds = "" if len(one.top1) == 1 else f", {len(one.top1)} seeds"
        losses = " → ".join("–" if value is None else f"{value:.3f}" for value in (one.before, one.after))
        told = "best" if place == 0 else "not told apart" if high >= best else "worse"
        top1 = f"{100 * statistics.mean(one.top1):.2f} % ({100 * low:.2f} to {100 * high:.2f}{seeds})"
        seconds = f"{statistics.mean(one.seconds):.0f}"
        lines.append(f"| {one.name} | {top1} | {losses} | {one.macs:.2f}× fewer | {seconds} | {told} |")
    lines += [f"| {one.name} | – | – | – | – | {one.refused} |" for one in results if one.refused is not None]
    sources = sorted(set().union(*(one.sources for one in results)))
    if len(sources) > 1:
        lines += ["", f"Measured with the sources {', '.join(sources)}."]
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, run what is missing, print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=sorted(TABLES))
    parser.add_argument("--weights", help="published weights, where the pipeline's own are not to be used")
    parser.add_argument("--kept", type=float, nargs="+", help="shares of the MACs; those of the table by default")
    parser.add_argument("--epochs", type=int, nargs="+", help="of training; those of the table by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="names of rows")
    parser.add_argument("--list", action="store_true", help="print the names of the rows, and stop")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--runs-dir", type=Path, default=ROOT / "runs")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "experiments" / "methods.jsonl")
    parser.add_argument("--no-run", action="store_true", help="measure nothing; tables of the results file")
    parser.add_argument("--fresh", action="store_true", help="results of another source of the package do not count")
    parser.add_argument("--write", type=Path, help="Markdown file with the markers methods-a, methods-b, methods-c")
    arguments = parser.parse_args()
    table, console, texts = TABLES[arguments.table], Console(), []
    overrides = [*arguments.overrides, *([f"stages.load.weights={arguments.weights}"] if arguments.weights else [])]
    source = source_digest()
    latest = source  # of the runs in the tables
    folder, has_file = arguments.runs_dir / f"methods-{source}", not arguments.overrides
    for kept in arguments.kept or table.kept:
        for epochs in table.epochs if arguments.epochs is None else arguments.epochs:
            path = pipeline_file(table, kept, epochs, overrides, folder)
            every = rows(load_pipeline(path, []).resolved, epochs, table.has_methods)
            known = {row.name for row in every} | ({*TRAINED, FROM_SCRATCH, "trp"} if epochs == 0 else set())
            if unknown := set(arguments.only or ()) - known:
                parser.error(f"rows are {', '.join(row.name for row in every)}; got {', '.join(sorted(unknown))}")
            if arguments.list:
                print("\n".join(row.name for row in every))
                continue
            found = []
            for row in every:
                if arguments.only and row.name not in arguments.only:
                    continue
                place = (arguments.table, kept, epochs, row.name)
                runs = [
                    run
                    for run in (read_runs(arguments.results) if has_file else [])
                    if (run.table, run.kept, run.epochs, run.row) == place
                    and (run.source == source or not arguments.fresh)
                ]
                for seed in arguments.seeds:
                    if arguments.no_run or seed in {run.seed for run in runs}:
                        continue
                    report = measured(measure("methods", path, row, (), seed, folder, console))
                    runs.append(Run(*place, seed, source, date.today().isoformat(), **report))
                    if has_file:
                        append_run(arguments.results, runs[-1])
                if not runs:
                    continue
                latest = runs[-1].source
                found.append(result(row.name, runs))
                console.note(markdown(found[-1:], row.name).splitlines()[4])
            if not found:
                continue
            training = f"{epochs} epochs" if epochs else "no training"
            texts.append(markdown(found, f"{table.title}, {kept:g} of its MACs, {training}."))
    text = "\n\n".join(texts)
    if arguments.write is not None and texts:
        given = [f" --weights {Path(arguments.weights).name}"] if arguments.weights else []
        for name in ("kept", "epochs", "seeds"):
            values = getattr(arguments, name)
            given += [f" --{name} {' '.join(f'{value:g}' for value in values)}"] if values not in (None, [0]) else []
        given += [" --epochs 0"] if arguments.epochs == [0] else []
        command = f"python benchmarks/methods.py {arguments.table}{''.join(given)}"
        write_marked(arguments.write, text, f"methods-{arguments.table}", command, source=latest)
    print(text)


if __name__ == "__main__":
    main()

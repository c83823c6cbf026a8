"""What are the methods worth, at the same budget and the same epochs of training in all?

    python benchmarks/methods.py                                   the quickstart network, 4 epochs each
    python benchmarks/methods.py pipelines/resnet20_cifar10.yaml --set data.array_folder=FOLDER --epochs 6
    ... --only gsm gates      some of them       --write docs/methods/README.md      puts the table between its markers
    ... --seeds 0 1 2         mean of several

The pipeline must have one prune and one finetune stage. Methods that train get two thirds of the epochs, with the
settings of finetune, and finetune the rest; the others finetune for all of them. Rows with `random` are there to
compare with: channels at random at the widths of the first row, and its structure trained from scratch. Finished runs
are not repeated.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from results import write_between_markers
from rows import ROOT, Row, flow, measure, named, row_parser

from compress.config.load import load_pipeline
from compress.console import Console

HEADER = (
    "| what decides | MACs | params | blocks gone | validation top-1, cut | top-1 of the file | time |",
    "|---|---|---|---|---|---|---|",
)
AT_ONCE = {
    "scores (default)": {},
    "scores, taylor alone": {"prune.criterion": "taylor"},
    "filter norms (l2)": {"prune.criterion": "l2"},
    "the same share of each group": {"prune.allocation": "uniform"},
    "channels at random": {"prune.order": "random"},
    "random weights, trained from scratch": {"finetune.weights": "random"},
    "blocks: auto": {"prune.blocks": "auto"},
}
TRAINED = {
    "gsm": {},
    "gates": {},
    "gates, blocks: auto": {"blocks": "auto"},
    "greg, variant 1": {"greg": {"variant": 1}},
    "greg, variant 2": {},
    "increg": {},
    "csgd": {},
    "grda": {},
    "regrow": {},
    "tpp": {},
}
RANKS = ("low_rank", "trp")
NOT_WHILE_LEARNING = ("stage", "weights", "epochs", "steps", "ema", "average_ratio", "probe", "norms")


def rows(values: dict[str, Any], epochs: int) -> list[Row]:
    """Return every way to decide, for a pipeline whose values are given."""
    stages = {stage["stage"]: stage for stage in values["stages"]}
    learning = max(1, round(epochs * 2 / 3))
    training = {
        key: value for key, value in stages["finetune"].items() if key not in NOT_WHILE_LEARNING and value is not None
    }
    whole, rest = f"stages.finetune.epochs={epochs}", f"stages.finetune.epochs={epochs - learning}"
    trained = flow({**training, "epochs": learning})
    found = [
        Row(name, (whole, *(f"stages.{key}={value}" for key, value in changes.items())))
        for name, changes in AT_ONCE.items()
    ]
    for name, changes in TRAINED.items():
        settings = {"method": name.partition(",")[0], **changes}
        overrides = [f"stages.prune.{key}={flow(value)}" for key, value in settings.items()]
        found.append(Row(name, (rest, f"stages.prune.training={trained}", *overrides)))
    target = {name: value for name, value in stages["prune"]["target"].items() if value is not None}
    if set(target) <= {"macs", "params"} and len(target) == 1:
        place = next(index for index, stage in enumerate(values["stages"]) if stage["stage"] == "prune")
        plain = {"stage": "low_rank", "target": target}
        learned = {**plain, "method": "trp", "training": {**training, "epochs": learning}}
        found.append(Row(RANKS[0], (f"stages.{place}={flow(plain)}", whole)))
        found.append(Row(RANKS[1], (f"stages.{place}={flow(learned)}", rest)))
    return found


def line(row: Row, reports: Sequence[Any]) -> str:
    """Return one row of the table: means over seeds."""
    if refused := [report for report in reports if isinstance(report, str)]:
        return f"| {row.name} | {refused[0]} | | | | | |"
    fewer = [statistics.mean(one["baseline"][key] / one["slim"][key] for one in reports) for key in ("macs", "params")]
    cut = [
        next(stage["record"] for stage in one["stages"] if stage["stage"] in ("prune", "low_rank")) for one in reports
    ]
    blocks = statistics.mean(len(one.get("removed_blocks") or []) for one in cut)
    before, after = (statistics.mean(_around(one)[when] for one in cut) for when in (0, 1))
    top1 = [one["slim"]["quality"]["top1"] for one in reports]
    spread = f" ± {100 * statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
    seconds = statistics.mean(sum(stage["seconds"] for stage in one["stages"]) for one in reports)
    return (
        f"| {row.name} | {fewer[0]:.2f}× fewer | {fewer[1]:.2f}× fewer | {blocks:g} | {before:.2%} → {after:.2%} | "
        f"{100 * statistics.mean(top1):.2f}{spread} % | {seconds:.0f} s |"
    )


def _around(record: dict[str, Any]) -> tuple[float, float]:
    """Return validation top-1 just before and just after the cut; of scores that is with the repair."""
    learned = record.get("method")
    if learned:
        return learned["top1_before_cut"], learned["top1_after_cut"]
    return record["validation_top1_before"], record["validation_top1_after"]


def main() -> None:
    """Parse the command line, run what is missing, print or write the table."""
    parser = row_parser(__doc__, ROOT / "pipelines" / "quickstart.yaml")
    parser.add_argument("--epochs", type=int, default=4, help="of training in all, at least 2")
    arguments = parser.parse_args()
    if arguments.epochs < 2:
        parser.error(f"--epochs must be at least 2, got {arguments.epochs}")
    values = load_pipeline(arguments.pipeline, arguments.overrides).resolved
    every = rows(values, arguments.epochs)
    console, lines = Console(), list(HEADER)
    for row in named(every, arguments.only, parser):
        reports = [
            measure("methods", arguments.pipeline, row, arguments.overrides, seed, arguments.runs_dir, console)
            for seed in arguments.seeds
        ]
        lines.append(line(row, reports))
        console.note(lines[-1])
    text = "\n".join(lines)
    if arguments.write is not None:
        write_between_markers(arguments.write, text, "comparison")
    print(text)


if __name__ == "__main__":
    main()

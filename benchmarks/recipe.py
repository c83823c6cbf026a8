"""What is each ingredient of the recipe worth, on the same cut network and in the same epochs?

    python benchmarks/recipe.py --set data.array_folder=FOLDER              ResNet-20 at half of its MACs, 2 epochs
    ... pipelines/quickstart.yaml     another network       --seeds 0 1 2      mean of several, with its spread
    ... --only default "plain SGD"    some rows             --epochs 20        longer

The pipeline must have one prune and one finetune stage. Each row changes one thing of its recipe; "plain SGD" is what
one would do without it: one-cycle to 0.05, weight decay 5e-4, no teacher. The cut is made once for each seed and is
the same in every row but "without repair". Validation top-1 is what a recipe may be chosen by; top-1 is of the file
over the evaluation split. Finished runs are not repeated.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from results import write_between_markers
from rows import ROOT, Row, flow, measure, named, row_parser

from compress.cli.console import Console

HEADER = (
    "| recipe | MACs | validation top-1 | top-1 of the file | next to the first row |",
    "|---|---|---|---|---|",
)
CHANGES: dict[str, dict[str, Any]] = {
    "default": {},
    "plain SGD": {"learning_rate": 0.05, "weight_decay": 5e-4, "schedule": "one_cycle", "distillation": None},
    "without distillation": {"distillation": None},
    "without feature maps": {"distillation.features": 0.0},
    "peak 0.05": {"learning_rate": 0.05},
    "peak 0.005": {"learning_rate": 0.005},
    "one-cycle": {"schedule": "one_cycle"},
    "EMA 0.99": {"ema": 0.99},
    "average of the last 30 %": {"average_ratio": 0.3},
    "label smoothing 0.1": {"label_smoothing": 0.1},
    "batches of 64": {"batch_size": 64},
    "AdamW, peak 0.001": {"optimizer": "adamw", "learning_rate": 0.001},
}
ROWS = (
    *(Row(name, tuple(f"stages.finetune.{key}={flow(value)}" for key, value in change.items()))
      for name, change in CHANGES.items()),
    Row("without repair", ("stages.prune.repair=[]",)),
)  # fmt: skip


def line(row: Row, reports: Sequence[Any], first: float | None) -> tuple[str, float | None]:
    """Return one row of the table, and its mean top-1; means are over seeds."""
    if refused := [report for report in reports if isinstance(report, str)]:
        return f"| {row.name} | {refused[0]} | | | |", None
    fewer = statistics.mean(one["baseline"]["macs"] / one["slim"]["macs"] for one in reports)
    chosen = statistics.mean(_chosen_top1(one) for one in reports)
    top1 = [one["slim"]["quality"]["top1"] for one in reports]
    mean = statistics.mean(top1)
    spread = f" ± {100 * statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
    against = "" if first is None else f"{100 * (mean - first):+.2f}"
    return f"| {row.name} | {fewer:.2f}× fewer | {chosen:.2%} | {100 * mean:.2f}{spread} % | {against} |", mean


def _chosen_top1(report: dict[str, Any]) -> float:
    """Return validation top-1 of the weights that were kept."""
    record = next(stage["record"] for stage in report["stages"] if stage["stage"] == "finetune")
    if record["is_averaged"]:
        return float(record["averaged_top1"])
    return float(record["epochs"][record["chosen_epoch"] - 1]["validation_top1"])


def main() -> None:
    """Parse the command line, run what is missing, print the table."""
    parser = row_parser(__doc__, ROOT / "pipelines" / "resnet20_cifar10.yaml")
    parser.add_argument("--epochs", type=float, help="of fine-tuning; by default as in the pipeline")
    arguments = parser.parse_args()
    table, overrides = "recipe", list(arguments.overrides)
    if arguments.epochs is not None:
        table = f"recipe-{arguments.epochs:g}"
        overrides.append(f"stages.finetune.epochs={arguments.epochs}")
    console, lines, first = Console(), list(HEADER), None
    for row in named(ROWS, arguments.only, parser):
        reports = [
            measure(table, arguments.pipeline, row, overrides, seed, arguments.runs_dir, console)
            for seed in arguments.seeds
        ]
        text, mean = line(row, reports, first)
        first = mean if first is None else first
        lines.append(text)
        console.note(text)
    text = "\n".join(lines)
    if arguments.write is not None:
        write_between_markers(arguments.write, text, "recipe")
    print(text)


if __name__ == "__main__":
    main()

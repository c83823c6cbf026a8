"""Allocations of ranks at the same budget: validation loss and top-1 after `low_rank`, without training.

    python benchmarks/rank_allocations.py pipelines/quickstart.yaml
    python benchmarks/rank_allocations.py pipelines/resnet20_cifar10.yaml --set stages.load.weights=resnet20-12fca82f.th
    ... --kept 0.5 0.7     shares of MACs and of params to keep       --multiple-of 1 8

The pipeline gives data and network; its other stages are not run. Every row repairs the batch norms, as the stage does.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.cli.console import Console
from compress.config.load import load_pipeline
from compress.config.schema.low_rank import LowRankConfig
from compress.config.schema.model import LoadConfig
from compress.data.from_config import Splits
from compress.errors import StageError
from compress.model.artifacts import TorchModel
from compress.progress import SilentProgress
from compress.search.context import StageContext
from compress.stages.load import LoadStage
from compress.stages.low_rank import LowRankStage
from compress.training.evaluate import evaluate_loss

SLICES, ALL = ("nc", "nc2", "nc4", "svd"), ("nc", "vh", "tucker2", "svd", "nc2", "nc4")
ROWS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("shared_error", ("nc", "vh", "tucker2", "svd")),
    ("energy", ("nc", "vh", "tucker2", "svd")),
    ("energy", ALL),
    ("shared_error", SLICES),
    ("energy", SLICES),
    ("alds", SLICES),
    ("shared_error", ("nc", "svd")),
    ("energy", ("nc", "svd")),
    ("alds", ("nc", "svd")),
)
EVALUATED = 500  # images that `load` measures the baseline on; no row uses them
HEADER = (
    "| budget | multiple of | allocation | schemes | MACs | params | schemes chosen | validation loss | top-1 |",
    "|---|---|---|---|---|---|---|---|---|",
)


def row(model: TorchModel, ctx: StageContext, metric: str, kept: float, multiple_of: int, which: int) -> str:
    """Return one row of the table: one allocation at one budget."""
    allocation, schemes = ROWS[which]
    values = {"target": {metric: kept}, "allocation": allocation, "schemes": schemes, "multiple_of": multiple_of}
    head = f"| {kept:g} of {metric} | {multiple_of} | {allocation} | {', '.join(schemes)} |"
    with tempfile.TemporaryDirectory(dir=ctx.folder) as folder:
        here = StageContext(Path(folder), ctx.seed, ctx.data, ctx.progress)
        try:
            slim, record = LowRankStage(LowRankConfig.model_validate({"stage": "low_rank", **values})).run(model, here)
        except StageError as error:
            return f"{head} {error.message} | | | | |"
    loss = evaluate_loss(slim.module, ctx.data.validation, progress=ctx.progress)
    chosen = [layer.scheme for layer in record.layers]
    counts = ", ".join(f"{chosen.count(name)} {name}" for name in dict.fromkeys(chosen))
    macs, params = record.macs_after / record.macs_before, record.params_after / record.params_before
    return f"{head} {macs:.3f} | {params:.3f} | {counts} | {loss:.4f} | {record.validation_after:.2%} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of a network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="as in compress run")
    parser.add_argument("--of", nargs="+", choices=("macs", "params"), default=["macs", "params"])
    parser.add_argument("--kept", type=float, nargs="+", default=[0.5])
    parser.add_argument("--multiple-of", type=int, nargs="+", default=[8])
    given = parser.parse_args(arguments)
    config: Any = load_pipeline(given.pipeline, given.overrides).config
    load = next(stage for stage in config.stages if isinstance(stage, LoadConfig))
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        splits = Splits(config.data)
        splits.evaluation = splits.evaluation.first(EVALUATED)
        ctx = StageContext(Path(folder), config.seed, splits, SilentProgress())
        model, _ = LoadStage(load).run(None, ctx)
        loss = evaluate_loss(model.module, ctx.data.validation)
        console.say(f"validation loss of the whole network: {loss:.4f}")
        console.say("\n".join(HEADER))
        for kept in given.kept:
            for metric in given.of:
                for multiple_of in given.multiple_of:
                    for which in range(len(ROWS)):
                        console.say(row(model, ctx, metric, kept, multiple_of, which))


if __name__ == "__main__":
    main()

"""Runs of `prune` alone on the quickstart network, without a baseline's file and without a verdict, for short trials.

    python benchmarks/method_runs.py --epochs 2 grda regrow "gsm: {frozen_ratio: 0.4}"
    python benchmarks/method_runs.py --epochs 2 --after 1 gsm none       none: scores decide at once, no training before
    ... --set "learning_rate: 0.005"        settings of the training     --macs 0.4     the budget

Each row has the validation loss before and after the cut and after the repair; after `--after` epochs of fine-tuning,
with the same settings, it also has top-1 on validation and on the 10,000 test images. Epochs of rows with `none` are
all spent after the cut. "Removed as in the first row": the channels that both remove, as a share of those that either
does.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from rows import ROOT

from compress.cli.console import Console
from compress.config.load import load_pipeline
from compress.config.schema.prune import PruneConfig
from compress.config.schema.training import FinetuneConfig
from compress.cost.macs import count_macs, count_params
from compress.data.from_config import Splits
from compress.model.artifacts import Baseline, FactorySpec, ModelMetrics, Signature, TensorSpec, TorchModel
from compress.model.recipe import Recipe, RemoveChannels
from compress.search.context import StageContext
from compress.stages.finetune import FinetuneStage
from compress.stages.load import load_network
from compress.stages.prune import PruneStage
from compress.training.evaluate import evaluate_loss, evaluate_quality

SIGNATURE = Signature((TensorSpec("images", ("batch", 1, 28, 28)),), (TensorSpec("logits", ("batch", 10)),))
HEADER = (
    "| method | settings | validation loss before the cut | after it | after the repair | after fine-tuning | "
    "validation top-1 | test top-1 | removed as in the first row | seconds |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def quickstart(folder: Path) -> tuple[TorchModel, Splits, dict[str, Any]]:
    """Return the network, its data and the settings of its fine-tuning."""
    loaded = load_pipeline(ROOT / "pipelines" / "quickstart.yaml", [])
    stages = {stage.stage: stage for stage in loaded.config.stages}
    load = stages["load"]
    spec = FactorySpec("factory", load.model.factory, {})
    module = load_network(spec, load.weights)
    data = Splits(loaded.config.data)
    image = torch_example()
    figures = ModelMetrics(count_macs(module, image), count_params(module), 0, {}, {})
    baseline = Baseline(figures, folder / "baseline.onnx", Path(load.weights))
    model = TorchModel(module, spec, Recipe(), SIGNATURE, data.preprocessing, (), baseline)
    given = stages["finetune"].model_dump(exclude_unset=True)
    return (
        model,
        data,
        {name: value for name, value in given.items() if name not in ("stage", "epochs", "weights", "norms")},
    )


def torch_example() -> Any:
    """Return one empty image."""
    import torch

    return torch.zeros(1, 1, 28, 28)


def measure(row: str, arguments: argparse.Namespace, first: set[tuple[str, int]], console: Console) -> str:
    """Run one row and return it as a line of the table; `first` is filled by the first row with what it removes."""
    given = yaml.safe_load(row)
    method, settings = (given, {}) if isinstance(given, str) else next(iter(given.items()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data, training = quickstart(folder)
        training = {**training, **(yaml.safe_load(arguments.settings) or {})}
        ctx = StageContext(folder, arguments.seed, data, console)
        values: dict[str, Any] = {"stage": "prune", "target": {"macs": arguments.macs}}
        epochs = arguments.after
        if method == "none":
            values |= settings
            epochs = arguments.epochs + arguments.after
        else:
            values |= {"method": method, "training": {**training, "epochs": arguments.epochs}}
            values |= {method: settings} if settings else {}
        started = time.perf_counter()
        slim, record = PruneStage(PruneConfig.model_validate(values)).run(model, ctx)
        learned = record.method
        losses = [None, None] if learned is None else [learned.loss_before_cut, learned.loss_after_cut]
        losses.append(evaluate_loss(slim.module, data.validation))
        losses.append(None)
        if epochs:
            finetune = FinetuneConfig.model_validate({**training, "stage": "finetune", "epochs": epochs})
            (folder / "finetune").mkdir()
            slim, _ = FinetuneStage(finetune).run(slim, replace(ctx, folder=folder / "finetune"))
            losses[-1] = evaluate_loss(slim.module, data.validation)
        seconds = time.perf_counter() - started
        shown = " | ".join("" if loss is None else f"{loss:.4f}" for loss in losses)
        top1 = [evaluate_quality(slim.module, split) for split in (data.validation, data.evaluation)]
        (edit,) = [edit for edit in slim.recipe.edits if isinstance(edit, RemoveChannels)]
        removed = {(group, channel) for group, channels in edit.removed.items() for channel in channels}
        first |= set() if first else removed
        overlap = len(first & removed) / len(first | removed)
        console.note(f"metrics of {method}: {learned and learned.metrics}; MACs {record.reached_ratio:.3f}")
    said = ", ".join(f"{key}: {value}" for key, value in settings.items())
    return f"| {method} | {said} | {shown} | {top1[0]:.2%} | {top1[1]:.2%} | {overlap:.2f} | {seconds:.0f} |"


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", metavar="METHOD", help='a name, or "name: {setting: value}"')
    parser.add_argument("--epochs", type=float, default=2, help="while the method decides")
    parser.add_argument("--after", type=float, default=0, help="of fine-tuning after the cut")
    parser.add_argument("--macs", type=float, default=0.4, help="share of the MACs that is kept")
    parser.add_argument("--set", dest="settings", default="", help="settings of the training, as YAML")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    console, lines, first = Console(), list(HEADER), set[tuple[str, int]]()
    for row in arguments.rows:
        lines.append(measure(row, arguments, first, console))
        console.note(lines[-1])
    print("\n".join(lines))


if __name__ == "__main__":
    main()

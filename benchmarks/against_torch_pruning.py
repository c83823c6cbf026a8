"""How do our networks compare with torch-pruning's, at the same measured latency and after the same training?

    python benchmarks/against_torch_pruning.py pipelines/resnet20_latency.yaml
    ... --set stages.load.weights=FILE --set data.array_folder=FOLDER      as for compress run
    ... --published FILE       also times torch-pruning's published ResNet-56 (a state dict), as it is
    ... --also RUN             also times the network of a finished run, next to that run's own baseline

The pipeline must have a finetune stage and a stage with a target of `latency`. It is run as it is. torch-pruning
(magnitude and Taylor, widths in multiples of 8 and as they come) cuts the same network: of the ratios tried the
mildest that is within the budget as measured, or the fastest where none is. Those networks are trained by the
pipeline's finetune stage, exported by our exporter with the same rewrites, and in the end all files are timed in turn,
in one run. The networks' residual streams cannot be cut by torch-pruning where shortcuts are zero-padded, so it gets
the groups that we get.
"""

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import torch_pruning
from torch import Tensor, nn

from compress.artifacts import Signature, TensorSpec, TorchModel
from compress.building import example_input
from compress.config.digest import digest_value
from compress.config.load import Pipeline, load_pipeline
from compress.config.schema import CutConfig, FinetuneConfig, LoadConfig
from compress.console import Console
from compress.cost.macs import COUNTED, count_macs
from compress.data.batches import evaluation_batches
from compress.data.opening import Splits
from compress.data.preprocessing import Preprocessing
from compress.data.splits import Split
from compress.exporting.torch_onnx import export_onnx
from compress.pruning.trial import find_cuttable
from compress.runner import run
from compress.stages.context import StageContext
from compress.stages.exporting import OPSET, conditions_of, export_present
from compress.stages.finetune import train
from compress.stages.load import LoadStage
from compress.verification.latency import measure_latency
from compress.verification.measuring import latency_inputs, measure_onnx, measure_ratio
from compress.verification.runtimes.base import Runtime

RATIOS = np.arange(0.05, 0.95, 0.05)
WITHIN = 1.03
CALLS = 400
FULL_WIDTHS = (16, 32, 64)


@dataclass(frozen=True)
class Row:
    """One network of the table.

    Attributes:
        name: What made it.
        path: Its ONNX file.
        reference: The file it is compared with.
        macs: Times fewer than the reference.
        before: Top-1 before training; None where it was not measured.
        top1: On the evaluation split.
    """

    name: str
    path: Path
    reference: Path
    macs: float
    before: float | None
    top1: float


def ours(pipeline: Pipeline, runs: Path, reference: Path, console: Console) -> Row:
    """Run the pipeline."""
    outcome = run(pipeline, runs, console)
    slimmed = next(stage["stage"] for stage in outcome.report["stages"] if stage["stage"] in ("prune", "slim"))
    return _row(f"compress ({slimmed})", outcome.report, outcome.folder / "model.onnx", reference)


def finished(run_folder: Path, folder: Path, console: Console) -> Row:
    """Return the network of a run that ended before, and its baseline."""
    pipeline = load_pipeline(run_folder / "pipeline.yaml", [])
    folder = folder / run_folder.name
    folder.mkdir(exist_ok=True)
    load = pipeline.config.stages[0]
    assert isinstance(load, LoadConfig)
    model, _ = LoadStage(load).run(None, context(pipeline, folder, console))
    report = json.loads((run_folder / "report.json").read_text(encoding="utf-8"))
    return _row(f"compress, {run_folder.name}", report, run_folder / "model.onnx", model.baseline.onnx_path)


def _row(name: str, report: dict[str, Any], path: Path, reference: Path) -> Row:
    before, after = report["baseline"], report["slim"]
    finetune = next(stage["record"] for stage in report["stages"] if stage["stage"] == "finetune")
    top1_before = finetune["validation_top1_before"]
    return Row(name, path, reference, before["macs"] / after["macs"], top1_before, after["quality"]["top1"])


def theirs(model: TorchModel, budget: float, config: FinetuneConfig, ctx: StageContext) -> Iterator[Row]:
    """Cut with torch-pruning within the budget, train, export."""
    conditions = conditions_of(ctx.deploy)
    for criterion in ("magnitude", "taylor"):
        for multiple in (8, None):
            name = f"torch-pruning ({criterion}, {'multiples of 8' if multiple else 'unaligned'})"
            path = ctx.folder / f"{criterion}-{multiple}.onnx"
            done = path.with_suffix(".json")
            if done.is_file():  # a benchmark that was stopped goes on
                yield Row(name, path, model.baseline.onnx_path, **json.loads(done.read_text(encoding="utf-8")))
                continue
            tried: list[tuple[float, TorchModel]] = []
            for ratio in RATIOS:
                slim = replace(model, module=cut(model, criterion, multiple, float(ratio), ctx.data.calibration))
                export_present(slim, path, ctx)
                share = measure_ratio(path, model.baseline.onnx_path, ctx.data.calibration, conditions)
                ctx.progress.note(f"{name}, ratio {ratio:.2f}: {share:.3f} of the baseline's latency")
                tried.append((share, slim))
                if share <= budget * WITHIN:
                    break
            share, slim = min(tried, key=lambda one: one[0])
            if share > budget * WITHIN:
                ctx.progress.warn(
                    f"{name}: no ratio is within {budget} of the baseline's latency; the fastest is taken."
                )
            trained, record = train(slim, config, ctx, f"{criterion}-{multiple}.pt")
            export_present(trained, path, ctx)
            figures = measure_onnx(path, ctx.data.evaluation, conditions, progress=ctx.progress)
            figures_of_row = {
                "macs": model.baseline.figures.macs / count_macs(trained.module, example_input(model.signature)),
                "before": record["validation_top1_before"],
                "top1": figures.quality["top1"],
            }
            done.write_text(json.dumps(figures_of_row), encoding="utf-8")
            ctx.progress.note(f"{name}: top-1 {figures.quality['top1']:.2%}")
            yield Row(name, path, model.baseline.onnx_path, **figures_of_row)


def cut(model: TorchModel, criterion: str, multiple: int | None, ratio: float, split: Split) -> nn.Module:
    """Return a copy cut by torch-pruning, one ranking over all groups."""
    example = example_input(model.signature)
    groups, _ = find_cuttable(model.module, example)
    allowed = {producer.layer for group in groups.values() for producer in group.producers}
    slim = copy.deepcopy(model.module)
    ignored = [part for name, part in slim.named_modules() if isinstance(part, COUNTED) and name not in allowed]
    importance = {
        "magnitude": torch_pruning.importance.GroupMagnitudeImportance(p=2),
        "taylor": torch_pruning.importance.GroupTaylorImportance(),
    }[criterion]
    if criterion == "taylor":
        for images, labels in evaluation_batches(split, 128):
            F.cross_entropy(slim(images), labels).backward()  # type: ignore[no-untyped-call]
    pruner = torch_pruning.pruner.BasePruner(
        slim, example, importance, pruning_ratio=ratio, global_pruning=True, ignored_layers=ignored, round_to=multiple
    )
    pruner.step()
    for parameter in slim.parameters():
        parameter.grad = None
    return slim.eval()


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the stride is 2."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Identity()
            if stride == 1
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.downsample(x))


class ProjectedResNet56(nn.Module):
    """ResNet-56 with projection shortcuts, of any widths, named as in torch-pruning's published file.

    Args:
        stream: Channels between blocks, for each of the three layers.
        inner: Channels inside the nine blocks of each layer.
    """

    def __init__(self, stream: Sequence[int], inner: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, stream[0], 3, 1, 1, bias=False), nn.BatchNorm2d(stream[0])
        inputs = stream[0]
        for number, (outputs, widths) in enumerate(zip(stream, inner, strict=True), start=1):
            blocks: list[nn.Module] = []
            for width in widths:
                stride = 2 if number > 1 and not blocks else 1
                blocks.append(_Block(inputs, width, outputs, stride))
                inputs = outputs
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.fc = nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Turn (N, 3, 32, 32) images into (N, 10) logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        for layer in (self.layer1, self.layer2, self.layer3):
            x = layer(x)  # type: ignore[operator]
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def published(weights: Path, data: Splits, ctx: StageContext) -> Row:
    """Return torch-pruning's published ResNet-56 as it is, next to the same network with all its channels."""
    state = torch.load(weights, weights_only=True)
    inner = [[len(state[f"layer{n}.{i}.conv1.weight"]) for i in range(9)] for n in (1, 2, 3)]
    slim = ProjectedResNet56([len(state[f"layer{n}.0.conv2.weight"]) for n in (1, 2, 3)], inner)
    slim.load_state_dict(state)
    dense = ProjectedResNet56(FULL_WIDTHS, [[width] * 9 for width in FULL_WIDTHS])
    preprocessing = Preprocessing(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
    signature = Signature((TensorSpec("images", ("batch", 3, 32, 32)),), (TensorSpec("logits", ("batch", 10)),))
    paths = {name: ctx.folder / f"published-{name}.onnx" for name in ("slim", "dense")}
    for name, network in (("slim", slim), ("dense", dense)):
        export_onnx(network.eval(), signature, paths[name], opset=OPSET, preprocessing=preprocessing)
    evaluation = replace(data.evaluation, preprocessing=preprocessing)
    figures = measure_onnx(paths["slim"], evaluation, conditions_of(ctx.deploy), progress=ctx.progress)
    example = torch.zeros(1, 3, 32, 32)
    macs = count_macs(dense, example) / count_macs(slim, example)
    return Row("torch-pruning, published ResNet-56", paths["slim"], paths["dense"], macs, None, figures.quality["top1"])


def speedups(rows: Sequence[Row], split: Split, ctx: StageContext) -> list[float]:
    """Return how many times as fast as its reference each file is; all are timed in turn, in one run."""
    conditions = conditions_of(ctx.deploy)
    paths = dict.fromkeys(path for row in rows for path in (row.path, row.reference))
    with ExitStack() as stack:
        sessions: dict[str, Runtime] = {str(path): stack.enter_context(conditions.open(path)) for path in paths}
        inputs = {name: latency_inputs(session, split, conditions.batch_size) for name, session in sessions.items()}
        samples = measure_latency(sessions, inputs, conditions.warmup, CALLS, ctx.progress)
    return [samples[str(row.reference)].p50 / samples[str(row.path)].p50 for row in rows]


def draw(rows: Sequence[Row], times_faster: Sequence[float], path: Path) -> None:
    """Draw top-1 over measured speed-up."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for row, speedup in zip(rows, times_faster, strict=True):
        axes.scatter(speedup, 100 * row.top1, s=60, label=row.name)
    axes.set_xlabel("times as fast as its baseline, measured")
    axes.set_ylabel("top-1 on the ONNX file (%)")
    axes.grid(alpha=0.3)
    axes.margins(0.1)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def context(pipeline: Pipeline, folder: Path, console: Console) -> StageContext:
    """Return what the stages that are called here get."""
    config = pipeline.config
    return StageContext(folder, config.seed, Splits(config.data), console, config.deploy, folder / "tables")


def main() -> None:
    """Parse the command line, make the networks, time them, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--published", type=Path, metavar="FILE")
    parser.add_argument("--also", type=Path, action="append", default=[], metavar="RUN")
    parser.add_argument("--picture", type=Path, default=Path("against_torch_pruning.svg"))
    arguments = parser.parse_args()
    pipeline, console = load_pipeline(arguments.pipeline, arguments.overrides), Console()
    stages = pipeline.config.stages
    budget = next((stage.target.latency for stage in stages if isinstance(stage, CutConfig)), None)
    finetune = next((stage for stage in stages if isinstance(stage, FinetuneConfig)), None)
    if budget is None or finetune is None or not isinstance(stages[0], LoadConfig):
        parser.error("the pipeline must have a prune or slim stage with a target of latency, and a finetune stage")
    key = digest_value(pipeline.to_yaml())[:12]
    folder = arguments.runs_dir / f"{pipeline.config.name}-against-torch-pruning-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    ctx = context(pipeline, folder, console)
    model, _ = LoadStage(stages[0]).run(None, ctx)
    rows = [ours(pipeline, arguments.runs_dir, model.baseline.onnx_path, console)]
    rows += [finished(run_folder, folder, console) for run_folder in arguments.also]
    rows += theirs(model, budget, finetune, ctx)
    if arguments.published is not None:
        rows.append(published(arguments.published, ctx.data, ctx))
    times_faster = speedups(rows, ctx.data.calibration, ctx)
    print("\n| network | MACs | measured | speed-up over MACs | top-1 before training | top-1 |")
    print("|---|---|---|---|---|---|")
    for row, speedup in zip(rows, times_faster, strict=True):
        before = "-" if row.before is None else f"{row.before:.2%}"
        print(
            f"| {row.name} | {row.macs:.2f}x fewer | {speedup:.2f}x faster | {speedup / row.macs:.2f} | {before} | "
            f"{row.top1:.2%} |"
        )
    draw(rows, times_faster, arguments.picture)
    print(f"\nPicture: {arguments.picture}")


if __name__ == "__main__":
    main()

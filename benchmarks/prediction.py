"""How well does a latency table predict a network's time at random widths?

    python benchmarks/prediction.py                               ResNet-20, ResNet-56, ResNet-18 and MobileNetV2
    python benchmarks/prediction.py resnet20 --variants 20        one of them

For each network a table is made as `prune` makes it; then networks with random widths are predicted by the table and
timed as whole networks, in turn with the untouched one. Weights are random: time does not depend on them. Nothing else
should run on the machine.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from compress.allocation.widths import Limits, width_levels
from compress.artifacts import Baseline, FactorySpec, Figures, Signature, TensorSpec, TorchModel
from compress.building import build_module
from compress.config.schema import DeployConfig
from compress.console import Console
from compress.cost.macs import count_macs, count_params
from compress.data.preprocessing import Preprocessing
from compress.data.sources import ArraySource
from compress.data.splits import Split
from compress.exporting.torch_onnx import export_onnx
from compress.progress import Progress
from compress.pruning.costs import build_cost, layer_axes
from compress.pruning.trial import find_cuttable
from compress.recipe import Recipe
from compress.stages.context import StageContext
from compress.stages.latency import model_latency
from compress.stages.surveying import MEASURED_LEVELS

CIFAR = f"{Path(__file__).parents[1] / 'models' / 'cifar_resnet' / 'model.py'}:resnet"
NETWORKS = {
    "resnet20": (FactorySpec("factory", CIFAR, {"depth": 20, "num_classes": 10}), 32),
    "resnet56": (FactorySpec("factory", CIFAR, {"depth": 56, "num_classes": 10}), 32),
    "resnet18": (FactorySpec("torchvision", "resnet18", {}), 224),
    "mobilenet_v2": (FactorySpec("torchvision", "mobilenet_v2", {}), 224),
}


@dataclass(frozen=True)
class RandomImages:
    """Stands in for the splits of a pipeline: speed does not depend on what is in an image."""

    calibration: Split


def measure(name: str, variants: int, seed: int, folder: Path, progress: Progress) -> str:
    """Return one row of the table."""
    spec, size = NETWORKS[name]
    module = build_module(spec).eval()
    example = torch.zeros(1, 3, size, size)
    classes = module(example).shape[1]
    shape = ("batch", 3, size, size)
    signature = Signature((TensorSpec("images", shape),), (TensorSpec("logits", ("batch", classes)),))
    path = folder / f"{name}.onnx"
    rewrites = ("padded_shortcuts",)
    export_onnx(module, signature, path, opset=18, rewrites=rewrites)
    figures = Figures(count_macs(module, example), count_params(module), path.stat().st_size, {}, {})
    baseline = Baseline(figures, path, folder)
    model = TorchModel(module, spec, Recipe(), signature, Preprocessing(), (), baseline, rewrites)
    random = np.random.default_rng(seed)
    images = ArraySource(random.integers(0, 256, (8, size, size, 3), np.uint8), np.zeros(8, np.int64))
    data = RandomImages(Split("calibration", images, np.arange(8), Preprocessing()))
    deploy = DeployConfig()
    ctx = StageContext(folder, seed, data, progress, deploy, folder / "tables")  # type: ignore[arg-type]

    groups, _ = find_cuttable(module, example)
    levels = {
        name: width_levels(group.width, group.parts, Limits(multiple_of=8), MEASURED_LEVELS)
        for name, group in groups.items()
    }
    started = time.perf_counter()
    macs = build_cost(module, example, groups, "macs").at
    latency = model_latency(model, layer_axes(module, groups), levels, deploy, ctx, macs)
    table_s = time.perf_counter() - started
    errors = []
    for number in range(variants):
        widths = {group: int(random.choice(allowed)) for group, allowed in levels.items()}
        predicted, measured = latency.predict_ratio(widths), latency.time_ratio(widths)
        errors.append(predicted / measured - 1)
        progress.note(f"{name} {number + 1}: predicted {predicted:.3f}, measured {measured:.3f} of the untouched time")
    middle, worst = np.median(np.abs(errors)), np.max(np.abs(errors))
    return (
        f"| {name} | {latency.reference_ms:.3g} ms | {table_s:.0f} s | {middle:.1%} | {worst:.1%} | "
        f"{np.mean(errors):+.1%} | {latency.table.spread:.0%} |"
    )


def main() -> None:
    """Parse the command line, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}; all by default")
    parser.add_argument("--variants", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if unknown := set(arguments.networks) - set(NETWORKS):
        parser.error(f"networks are {', '.join(NETWORKS)}, got {', '.join(sorted(unknown))}")
    console, rows = Console(), []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.networks or NETWORKS:
            rows.append(measure(name, arguments.variants, arguments.seed, Path(folder), console))
    print("\n| network | untouched | table made in | median error | worst | mean | scatter of single calls |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()

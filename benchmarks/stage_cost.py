"""What does pruning to a latency cost in time and memory, part by part?

    python benchmarks/stage_cost.py                       ResNet-50 at 224 x 224
    python benchmarks/stage_cost.py resnet20 resnet56 resnet110       how it grows with depth

Each network is pruned to half of its latency twice, each time in its own process: cold, then with the table of before.
Weights and images are random: time does not depend on them. 256 images for scores, 256 for the repair; validation,
which grows with the user's split, has 64. Nothing else should run on the machine.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import compress.search.survey as survey
from compress.checkpoint.rebuild import build_module
from compress.cli.console import Console
from compress.config.schema.prune import PruneConfig
from compress.config.schema.targets import TargetConfig
from compress.config.schema.verify import DeployConfig
from compress.cost.macs import count_macs, count_params
from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.errors import CompressError
from compress.exporting.settings import ExportSettings
from compress.exporting.torch_onnx import export_onnx
from compress.model.artifacts import Baseline, FactorySpec, ModelMetrics, Signature, TensorSpec, TorchModel
from compress.model.recipe import Recipe
from compress.progress import SilentProgress, Task
from compress.search.context import StageContext
from compress.stages.prune import PruneStage

CIFAR = f"{Path(__file__).parents[1] / 'models' / 'cifar_resnet' / 'model.py'}:resnet"
NETWORKS = {
    **{f"resnet{depth}": (FactorySpec("factory", CIFAR, {"depth": depth}), 32) for depth in (20, 32, 44, 56, 110)},
    "resnet50": (FactorySpec("torchvision", "resnet50", {}), 224),
    "resnet18": (FactorySpec("torchvision", "resnet18", {}), 224),
    "mobilenet_v2": (FactorySpec("torchvision", "mobilenet_v2", {}), 224),
}
IMAGES, VALIDATION = 256, 64
PARTS = {
    "table": ("time variants",),
    "scores": ("score channels",),
    "order of channels": ("what layers read", "order of channels"),
    "allocation": ("allocation",),
    "timing of the choice": ("latency",),
    "repair": ("least squares", "bias folding", "batch-norm statistics"),
}


class Stopwatch(SilentProgress):
    """Adds up what the tasks of a stage take, by their labels."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        """Time a task."""
        started = time.perf_counter()
        with super().task(label, total) as task:
            yield task
        self.add(label, started)

    def add(self, label: str, started: float) -> None:
        """Add the time since `started`."""
        self.seconds[label] = self.seconds.get(label, 0.0) + time.perf_counter() - started

    def timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose calls are added up."""

        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.add(label, started)

        return call


@dataclass(frozen=True)
class RandomImages:
    """Stands in for the splits of a pipeline."""

    calibration: Split
    validation: Split


def load(name: str, folder: Path) -> tuple[TorchModel, RandomImages]:
    """Return a network with random weights whose outputs are finite, and images."""
    spec, size = NETWORKS[name]
    torch.manual_seed(0)
    module = build_module(spec)
    _settle_norms(module.train(), size)
    module.eval()
    example = torch.zeros(1, 3, size, size)
    classes = module(example).shape[1]
    shape = ("batch", 3, size, size)
    signature = Signature((TensorSpec("images", shape),), (TensorSpec("logits", ("batch", classes)),))
    path, rewrites = folder / "baseline.onnx", ("padded_shortcuts",)
    export_onnx(module, signature, path, ExportSettings(opset=18, rewrites=rewrites))
    figures = ModelMetrics(count_macs(module, example), count_params(module), path.stat().st_size, {}, {})
    baseline = Baseline(figures, path, folder)
    model = TorchModel(module, spec, Recipe(), signature, Preprocessing(), (), baseline, rewrites)
    random = np.random.default_rng(0)
    count = IMAGES + VALIDATION
    images = ArraySource(random.integers(0, 256, (count, size, size, 3), np.uint8), random.integers(0, 10, count))
    return model, RandomImages(
        Split("calibration", images, np.arange(IMAGES), Preprocessing()),
        Split("validation", images, np.arange(IMAGES, count), Preprocessing()),
    )


def _settle_norms(module: nn.Module, size: int) -> None:
    with torch.no_grad():
        for _ in range(3):
            module(torch.rand(8, 3, size, size))


def measure(name: str, folder: Path, latency: float) -> dict[str, Any]:
    """Prune a network and return the seconds of each part, the peak memory and what was reached."""
    model, data = load(name, folder)
    watch = Stopwatch()
    survey.select_channels = watch.timed("allocation", survey.select_channels)  # type: ignore[assignment]
    ctx = StageContext(folder, 0, data, watch, DeployConfig(), folder / "tables")  # type: ignore[arg-type]
    config = PruneConfig(stage="prune", target=TargetConfig(latency=latency), score_images=IMAGES)
    started = time.perf_counter()
    try:
        _, record = PruneStage(config).run(model, ctx)
        ratio, fewer = record.latency.measured_ratio, record.macs_before / record.macs_after
        reached = f"{ratio:.3f} | {fewer:.2f}x | {1 / ratio / fewer:.2f}"
    except CompressError as error:
        reached = f"{error.message} | |"
    seconds = time.perf_counter() - started
    parts = {
        part: sum(took for label, took in watch.seconds.items() if label.startswith(labels))
        for part, labels in PARTS.items()
    }
    parts["rest"] = seconds - sum(parts.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"parts": parts, "seconds": seconds, "peak": peak, "reached": reached}


def main() -> None:
    """Parse the command line, run each network in processes of its own, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}; resnet50 by default")
    parser.add_argument("--latency", type=float, default=0.5, help="kept share of the latency")
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.networks) - set(NETWORKS):
        parser.error(f"networks are {', '.join(NETWORKS)}, got {', '.join(sorted(unknown))}")
    if arguments.folder is not None:
        print(json.dumps(measure(arguments.networks[0], arguments.folder, arguments.latency)))
        return
    console, rows = Console(), []
    for name in arguments.networks or ["resnet50"]:
        with tempfile.TemporaryDirectory() as folder:
            for table in ("cold", "cached table"):
                command = [sys.executable, __file__, name, "--latency", str(arguments.latency), "--in", folder]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode != 0:
                    raise SystemExit(done.stderr)
                found = json.loads(done.stdout.splitlines()[-1])
                console.note(f"{name}, {table}: {found['seconds']:.0f} s")
                parts = " | ".join(f"{found['parts'][part]:.1f}" for part in [*PARTS, "rest"])
                rows.append(
                    f"| {name}, {table} | {parts} | {found['seconds']:.0f} | {found['peak'] / 1e9:.1f} | "
                    f"{found['reached']} |"
                )
    print(
        f"\n| seconds | {' | '.join(PARTS)} | rest | in all | peak memory (GB) | share of the latency reached | "
        "fewer MACs | speed-up / fewer MACs |"
    )
    print(f"|{'---|' * (len(PARTS) + 7)}")
    print("\n".join(rows))


if __name__ == "__main__":
    main()

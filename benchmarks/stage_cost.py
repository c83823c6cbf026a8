"""Time and memory of `prune` to a latency, by part of the stage, with effort normal and quick.

    python benchmarks/stage_cost.py                       ResNet-50 at 224 x 224
    python benchmarks/stage_cost.py resnet20 resnet56 resnet110       growth with depth

Each network is pruned to half of its latency, each time in its own process and with a latency table made before; with
`--macs 0.5` to half of its MACs, where nothing is timed. Each
part has processor seconds, wall seconds, and its share of the stage's processor seconds. Weights and images are random:
the time of a part does not depend on them. Calibration has 256 images, validation 64. Processor seconds compare
revisions on a busy machine. Wall seconds need a machine on which nothing else runs.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import compress.search.survey as survey
from compress.checkpoint.rebuild import build_module
from compress.config.defaults import with_effort
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
EFFORTS = ("normal", "quick")
TABLE = "latency table, once"
PARTS = {
    "channel groups": ("find and try channel groups",),
    "scores and reader statistics": ("score channels", "what layers read"),
    "order of channels": ("order of channels",),
    "allocation": ("allocation",),
    "timing of the choice": ("latency",),
    "least squares": ("least squares",),
    "bias folding": ("bias folding", "mean outputs"),
    "batch-norm statistics": ("batch-norm statistics",),
    "validation": ("loss on", "top1 on", "top-1 on"),
    "Jacobian singular values": ("Jacobian singular values",),
}


@dataclass(frozen=True)
class Seconds:
    """Processor and wall seconds."""

    cpu: float = 0.0
    wall: float = 0.0

    @classmethod
    def now(cls) -> "Seconds":
        """Return the seconds of this process up to now."""
        return cls(time.process_time(), time.perf_counter())

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.cpu + other.cpu, self.wall + other.wall)

    def __sub__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.cpu - other.cpu, self.wall - other.wall)


class Stopwatch(SilentProgress):
    """Adds up the seconds of the tasks of a stage by their labels."""

    def __init__(self) -> None:
        self.seconds: dict[str, Seconds] = {}

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        """Time a task."""
        started = Seconds.now()
        with super().task(label, total) as task:
            yield task
        self.add(label, started)

    def add(self, label: str, started: Seconds) -> None:
        """Add the time since `started`."""
        self.seconds[label] = self.seconds.get(label, Seconds()) + (Seconds.now() - started)

    def timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose calls are added up."""

        def call(*args: Any, **kwargs: Any) -> Any:
            started = Seconds.now()
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


def measure(name: str, effort: str, tables: Path, target: TargetConfig) -> dict[str, Any]:
    """Prune a network once its latency table exists; return the seconds of each part, peak memory and reached values.

    Args:
        name: Name of the network.
        effort: Effort of the pipeline.
        tables: Folder of the latency tables.
        target: Target of the stage, a share of the latency or of the MACs.
    """
    with tempfile.TemporaryDirectory() as folder:
        model, data = load(name, Path(folder))
        watch = Stopwatch()
        survey.select_channels = watch.timed("allocation", survey.select_channels)  # type: ignore[assignment]
        prune = PruneConfig(stage="prune", target=target)
        config, deploy = with_effort(prune, effort), with_effort(DeployConfig(), effort)
        ctx = StageContext(Path(folder), 0, data, watch, deploy, tables)  # type: ignore[arg-type]
        started = Seconds.now()
        if target.needs_latency:
            PruneStage(config).profile(model, ctx)
        table = Seconds.now() - started
        watch.seconds.clear()
        started = Seconds.now()
        try:
            _, record = PruneStage(config).run(model, ctx)
            reached = f"{record.macs_before / record.macs_after:.2f}x fewer MACs"
            if target.needs_latency:
                reached += f", {record.latency.measured_ratio:.3f} of the latency"
        except CompressError as error:
            reached = error.message
        whole = Seconds.now() - started
    found = {part: _total(watch.seconds, labels) for part, labels in PARTS.items()}
    found["rest"] = whole - sum(found.values(), start=Seconds())
    rows = {part: asdict(seconds) for part, seconds in {**found, "in all": whole, TABLE: table}.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"rows": rows, "peak": peak, "reached": reached}


def _total(seconds: dict[str, Seconds], labels: tuple[str, ...]) -> Seconds:
    return sum((took for label, took in seconds.items() if label.startswith(labels)), start=Seconds())


def show(found: dict[str, dict[str, Any]]) -> str:
    """Return the table of one network: parts down, efforts across."""
    lines = ["|  | " + " | ".join(f"{effort}: CPU s | wall s | share" for effort in found) + " |"]
    lines.append(f"|---|{'---|' * (3 * len(found))}")
    for part in [*PARTS, "rest", "in all", TABLE]:
        cells = []
        for one in found.values():
            cpu, wall = one["rows"][part]["cpu"], one["rows"][part]["wall"]
            share = "–" if part == TABLE else f"{cpu / one['rows']['in all']['cpu']:.0%}"
            cells.append(f"{cpu:.1f} | {wall:.1f} | {share}")
        lines.append(f"| {part} | {' | '.join(cells)} |")
    lines += ["", *(f"{effort}: {one['reached']}, peak {one['peak'] / 1e9:.1f} GB" for effort, one in found.items())]
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, run each network and effort in its own process, print one table for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}; resnet50 by default")
    parser.add_argument("--latency", type=float, default=0.5, help="kept share of the latency")
    parser.add_argument("--macs", type=float, help="kept share of the MACs, in place of a latency: nothing is timed")
    parser.add_argument(
        "--effort", nargs="*", choices=EFFORTS, default=EFFORTS, help="efforts to compare; by default both"
    )
    parser.add_argument("--tables", type=Path, help="folder of latency tables, kept for the next call")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.networks) - set(NETWORKS):
        parser.error(f"networks are {', '.join(NETWORKS)}, got {', '.join(sorted(unknown))}")
    target = TargetConfig(macs=arguments.macs) if arguments.macs else TargetConfig(latency=arguments.latency)
    if arguments.one:
        name, effort = arguments.networks[0], arguments.effort[0]
        print(json.dumps(measure(name, effort, arguments.tables, target)))
        return
    with tempfile.TemporaryDirectory() as folder:
        tables = arguments.tables or Path(folder)
        for name in arguments.networks or ["resnet50"]:
            found = {effort: _in_own_process(name, effort, tables, target) for effort in arguments.effort}
            print(f"\n{name}, {torch.get_num_threads()} thread(s)\n\n{show(found)}", flush=True)


def _in_own_process(name: str, effort: str, tables: Path, target: TargetConfig) -> dict[str, Any]:
    options = ["--one", "--effort", effort, "--tables", str(tables)]
    options += [text for unit, share in target.given().items() for text in (f"--{unit}", str(share))]
    done = subprocess.run([sys.executable, __file__, name, *options], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()

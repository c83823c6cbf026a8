"""Latency tables against whole networks: predictions at random widths, and a target met by the search of `prune`.

    python benchmarks/prediction.py                               ResNets, MobileNetV2 and three concat networks
    python benchmarks/prediction.py densenet121 --variants 20     one of them
    python benchmarks/prediction.py yolo_like --folder runs/x     goes on where it was stopped

For each network a table is made as `prune` makes it. Networks with random widths are then predicted by the table and
timed as whole networks, in turn with the baseline. With a target (`--latency 0.7`) widths are chosen as `prune` chooses
them, the network is cut and exported, and the file is timed, several times over. Weights are random: time does not
depend on them. Nothing else should run on the machine.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.catalog import CRITERIA
from compress.checkpoint.rebuild import build_module
from compress.cli.console import Console
from compress.config.schema.prune import PruneConfig
from compress.config.schema.targets import TargetConfig
from compress.config.schema.verify import DeployConfig
from compress.cost.macs import count_macs, count_params
from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.errors import BudgetUnreachable
from compress.exporting.settings import ExportSettings
from compress.exporting.torch_onnx import export_onnx
from compress.model.artifacts import Baseline, FactorySpec, ModelMetrics, Signature, TensorSpec, TorchModel
from compress.model.recipe import Recipe, RemoveChannels
from compress.networks.normalize import prepare
from compress.progress import Progress
from compress.pruning.ranking.selection import Selection, find_candidates, score_groups
from compress.pruning.surgery import remove_channels
from compress.search.context import StageContext
from compress.search.export import conditions_of
from compress.search.survey import Survey, survey
from compress.verification.measurement import measure_ratio

ROOT = Path(__file__).resolve().parents[1]
CIFAR = f"{ROOT / 'models' / 'cifar_resnet' / 'model.py'}:resnet"
YOLO = f"{ROOT / 'benchmarks' / 'yolo_like.py'}:yolo_like"
NETWORKS = {
    "resnet20": (FactorySpec("factory", CIFAR, {"depth": 20, "num_classes": 10}), 32),
    "resnet56": (FactorySpec("factory", CIFAR, {"depth": 56, "num_classes": 10}), 32),
    "resnet18": (FactorySpec("torchvision", "resnet18", {}), 224),
    "mobilenet_v2": (FactorySpec("torchvision", "mobilenet_v2", {}), 224),
    "densenet121": (FactorySpec("torchvision", "densenet121", {}), 224),
    "googlenet": (FactorySpec("torchvision", "googlenet", {}), 224),
    "yolo_like": (FactorySpec("factory", YOLO, {}), 320),
}
SITTINGS = 5
REWRITES = ("padded_shortcuts",)
HEADER = (
    "network",
    "baseline",
    "table made in",
    "median error",
    "worst",
    "mean",
    "scatter of single calls",
    "asked",
    "reached in the search",
    "reached by the file",
)


@dataclass(frozen=True)
class RandomImages:
    """Stands in for the splits of a pipeline: speed does not depend on what is in an image."""

    calibration: Split


@dataclass
class Trial:
    """One network under measurement.

    Attributes:
        name: In NETWORKS.
        size: Height and width of its images.
        folder: Of this network alone; what was measured is kept there.
        seed: Decides the random widths.
        progress: Told about everything.
        repeats: Timed calls, as `deploy.repeats`.
        deploy: Target runtime; ONNX Runtime on this machine by default.
    """

    name: str
    size: int
    folder: Path
    seed: int
    progress: Progress
    repeats: int
    deploy: DeployConfig | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._kept = self.folder / "measured.json"
        self.measured: dict[str, Any] = json.loads(self._kept.read_text()) if self._kept.is_file() else {}

    def keep(self) -> None:
        """Write what was measured so far."""
        self._kept.write_text(json.dumps(self.measured, indent=1))

    @cached_property
    def model(self) -> TorchModel:
        """The network with random weights, exported."""
        spec, shape = NETWORKS[self.name][0], ("batch", 3, self.size, self.size)
        torch.manual_seed(0)
        module = prepare(build_module(spec).eval(), self.example)
        found = module(self.example)
        outputs: tuple[Tensor, ...] = (found,) if isinstance(found, Tensor) else tuple(found)
        specs = tuple(TensorSpec(f"out{i}", ("batch", *one.shape[1:])) for i, one in enumerate(outputs))
        signature = Signature((TensorSpec("images", shape),), specs)
        path = self.folder / f"{self.name}.onnx"
        export_onnx(module, signature, path, ExportSettings(opset=18, rewrites=REWRITES))
        figures = ModelMetrics(count_macs(module, self.example), count_params(module), path.stat().st_size, {}, {})
        baseline = Baseline(figures, path, self.folder)
        return TorchModel(module, spec, Recipe(), signature, Preprocessing(), (), baseline, REWRITES)

    @property
    def example(self) -> Tensor:
        """One input."""
        return torch.zeros(1, 3, self.size, self.size)

    @cached_property
    def ctx(self) -> StageContext:
        """What a stage would be given."""
        random = np.random.default_rng(self.seed)
        images = random.integers(0, 256, (8, self.size, self.size, 3), np.uint8)
        split = Split("calibration", ArraySource(images, np.zeros(8, np.int64)), np.arange(8), Preprocessing())
        deploy = self.deploy or DeployConfig(repeats=self.repeats)
        tables = self.folder / "tables"
        return StageContext(self.folder, self.seed, RandomImages(split), self.progress, deploy, tables)  # type: ignore[arg-type]

    def survey(self, latency: float) -> Survey:
        """Find the groups and make the table, or read it."""
        config = PruneConfig(stage="prune", target=TargetConfig(latency=latency), multiple_of=8, criterion="l2")
        started = time.perf_counter()
        found = survey(self.model, config, None, self.ctx)
        self.measured.setdefault("table_s", time.perf_counter() - started)
        self.keep()
        return found

    def predict(self, surveyed: Survey, count: int) -> None:
        """Predict and time networks of random widths, as far as that was not done."""
        latency, done = surveyed.targets.latency, self.measured.setdefault("variants", [])
        if latency is None:
            raise AssertionError("a latency target needs a latency model")
        random = np.random.default_rng(self.seed)
        for number in range(count):
            widths = random_widths(surveyed, number, random)
            if number < len(done):
                continue
            predicted, measured = latency.predict_ratio(widths), latency.time_pair(widths).ratio
            done.append({"predicted": predicted, "measured": measured})
            self.keep()
            self.progress.note(
                f"{self.name} {number + 1}: predicted {predicted:.3f}, measured {measured:.3f} of the baseline"
            )

    def reach(self, surveyed: Survey) -> None:
        """Choose widths for the target, cut, export, and time the file."""
        asked = surveyed.targets.latency_ratio
        key = f"reached {asked:g}"
        if key not in self.measured:
            criterion = CRITERIA.get("l2")(seed=self.seed)
            scores = score_groups(surveyed.groups, criterion, None)
            candidates = find_candidates(surveyed.groups, scores, surveyed.levels, criterion.comparable)
            started = time.perf_counter()
            try:
                selection, timed = surveyed.choose_timed(candidates, self.progress)
            except BudgetUnreachable as error:
                self.measured[key] = {"asked": asked, "refused": str(error)}
                self.keep()
                return
            ratio = next(one.ratio for one in reversed(timed) if one.widths == selection.widths)
            rounds = [[one.predicted, one.ratio] for one in timed]
            took_s = time.perf_counter() - started
            self.measured[key] = {
                "asked": asked, "search": ratio, "rounds": rounds, "search_s": took_s, "file": [],
                "widths": dict(selection.widths),
            }  # fmt: skip
            self._export(selection)
            self.keep()
        sittings = self.measured[key].get("file")
        while sittings is not None and len(sittings) < SITTINGS:
            conditions, split = conditions_of(self.ctx.deploy), self.ctx.data.calibration
            path, baseline = self.folder / "slim.onnx", self.model.baseline.onnx_path
            sittings.append(measure_ratio(path, baseline, split, conditions, self.progress))
            self.keep()

    def _export(self, selection: Selection) -> None:
        slim: nn.Module = remove_channels(self.model.module, RemoveChannels(selection.removed), self.example)
        export_onnx(slim, self.model.signature, self.folder / "slim.onnx", ExportSettings(opset=18, rewrites=REWRITES))

    def row(self, surveyed: Survey) -> str:
        """Return one row of the table."""
        latency, found = surveyed.targets.latency, self.measured
        if latency is None:
            raise AssertionError("a latency target needs a latency model")
        errors = np.asarray([one["predicted"] / one["measured"] - 1 for one in found.get("variants", [])])
        cells = [self.name, f"{latency.reference_ms:.3g} ms", f"{found['table_s']:.0f} s"]
        cells += [f"{np.median(np.abs(errors)):.1%}", f"{np.max(np.abs(errors)):.1%}", f"{np.mean(errors):+.1%}"]
        cells.append(f"{latency.table.spread:.0%}")
        reached = found.get(f"reached {surveyed.targets.latency_ratio:g}")
        if reached is None or "refused" in reached:
            cells += ["–", "–", "–"] if reached is None else [f"{reached['asked']:g}", "refused", "–"]
        else:
            low, high = min(reached["file"]), max(reached["file"])
            cells += [f"{reached['asked']:g}", f"{reached['search']:.3f} ({len(reached['rounds'])} rounds)"]
            cells.append(f"{statistics.median(reached['file']):.3f} ({low:.3f} to {high:.3f})")
        return f"| {' | '.join(cells)} |"


def random_widths(surveyed: Survey, number: int, random: np.random.Generator) -> dict[str, int]:
    """Return widths of a random network.

    Every other network is narrowed about as much everywhere: sums over many independent widths all come out alike.
    """
    levels = surveyed.levels
    if number % 2:
        return {group: int(random.choice(allowed)) for group, allowed in levels.items()}
    share = random.uniform(0.1, 1.0)
    near = {group: allowed[-1] * float(np.clip(random.normal(share, 0.15), 0, 1)) for group, allowed in levels.items()}
    return {group: min(allowed, key=lambda width: abs(width - near[group])) for group, allowed in levels.items()}


def main() -> None:
    """Parse the command line, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}; all by default")
    parser.add_argument("--variants", type=int, default=20, help="networks of random widths")
    parser.add_argument("--latency", type=float, default=0.7, help="target, a share of the baseline's latency")
    parser.add_argument("--no-target", action="store_true", help="predict only")
    parser.add_argument("--size", type=int, help="height and width of images; each network's usual one by default")
    parser.add_argument("--repeats", type=int, default=100, help="timed calls, as deploy.repeats")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "prediction", help="what was measured is kept")
    arguments = parser.parse_args()
    if unknown := set(arguments.networks) - set(NETWORKS):
        parser.error(f"networks are {', '.join(NETWORKS)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    rows = []
    for name in arguments.networks or NETWORKS:
        size = arguments.size or NETWORKS[name][1]
        folder = arguments.folder / f"{name}-{size}-seed{arguments.seed}"
        trial = Trial(name, size, folder, arguments.seed, Console(), arguments.repeats)
        surveyed = trial.survey(arguments.latency)
        trial.predict(surveyed, arguments.variants)
        if not arguments.no_target:
            trial.reach(surveyed)
        rows.append(trial.row(surveyed))
    print(f"\n| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    print("\n".join(rows))


if __name__ == "__main__":
    main()

"""Compare our networks with torch-pruning's at the same measured latency and after the same training.

    python benchmarks/against_torch_pruning.py pipelines/resnet20_latency.yaml --folder FOLDER --write docs/results.md
    ... --set stages.load.weights=FILE    as for compress run
    ... --phase cut                       one of ours, cut, train, before, time, table; by default all, in this order
    ... --published FILE                  also times torch-pruning's published ResNet-56 (a state dict), as it is

The pipeline must have a finetune stage and a stage with a target of `latency`.

ours    The pipeline, at each seed, with and without its finetune stage. Kept by the digest of the package's source.
cut     torch-pruning cuts the same network in every setting (`torch_pruning_cuts.every_setting`): the mildest ratio
        within the budget as measured, found by bisection, or the fastest that was tried.
train   The best setting of each family by validation top-1 is trained as the pipeline says, from its cut with new
        statistics. The best of those by validation, and the same cut with our repair, are trained at every seed.
before  Top-1 of every cut on the evaluation split before training: as it comes, with batch-norm statistics measured
        again, and with our repair.
time    All files are timed in turn. Run it while the machine does nothing else.
table   The tables and the picture, of all that is there.

Every step is kept in FOLDER and done once: a run that is killed goes on with the step it was at. Nothing is chosen by
the evaluation split. In training mode a batch norm does not read its running statistics, so a cut as it comes trains
as one with new statistics does; it is not trained twice.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from made import source_digest, write_marked
from published_resnet56 import export_published
from torch_pruning_cuts import Setting, every_setting
from torch_pruning_steps import STARTS, Bench, ModelMetrics, best_of_families, once
from torch_pruning_table import Network, Row, Timing, cuts_table, draw, main_table, time_networks

from compress.cli.console import Console
from compress.config.load import Pipeline, load_pipeline
from compress.config.schema.prune import CutConfig
from compress.config.schema.training import FinetuneConfig
from compress.engine.runner import run
from compress.search.export import conditions_of
from compress.storage.files import write_atomic

COMMAND = "python benchmarks/against_torch_pruning.py pipelines/resnet20_latency.yaml"
PHASES = ("ours", "cut", "train", "before", "time", "table")


@dataclass(frozen=True)
class Comparison:
    """All that is compared.

    Attributes:
        benches: One for each seed.
        settings: Of torch-pruning.
        published: Its published ResNet-56, or None.
    """

    benches: Sequence[Bench]
    settings: Sequence[Setting]
    published: Path | None = None

    @property
    def first(self) -> Bench:
        """The bench of the first seed, at which settings are chosen."""
        return self.benches[0]

    @property
    def timing_path(self) -> Path:
        """Where measured speed-ups are kept."""
        return self.first.folder / self.first.key / "timing.json"

    def cut(self) -> None:
        """Cut with every setting and measure top-1 before training."""
        for setting in self.settings:
            self.first.validation(setting, "batch_norm")

    def measure_before(self) -> None:
        """Measure top-1 of every cut before training, on the evaluation split; first of those that are trained."""
        for setting in dict.fromkeys((*self.chosen(), *self.settings)):
            for start in STARTS:
                self.first.before_training(setting, start)

    def chosen(self) -> dict[Setting, list[str]]:
        """Return the best setting of each family on validation."""
        return best_of_families(self.first, self.settings)

    def best(self) -> Setting:
        """Return the setting with the highest validation top-1 after training, of those that were chosen."""
        return max(self.chosen(), key=lambda one: float(self.first.trained(one, "batch_norm")["validation"]))

    def train(self) -> None:
        """Train the best of each family, then at every seed the best of them with and without our repair."""
        for setting in self.chosen():
            self.first.trained(setting, "batch_norm")
        best = self.best()
        for bench in self.benches:
            for start in ("repaired", "batch_norm"):
                bench.before_training(best, start)
                bench.trained(best, start)

    def rows(self) -> list[Row]:
        """Return the rows of the table, of all networks that are trained."""
        ours = [network for bench in self.benches if (network := our_network(bench)) is not None]
        rows = [Row("compress", tuple(ours))] if ours else []
        for setting, families in self.chosen().items():
            rows += self._row(setting, "batch_norm", f"torch-pruning, best of {', '.join(families)}")
        rows += [row for one in self.chosen() for row in self._row(one, "repaired", "torch-pruning's cut, our repair")]
        if self.published is not None:
            folder, published = self.first.folder / self.first.key / "published", self.published
            figures = once(folder / "slim.json", lambda: export_published(published, folder, self.first.context))
            network = Network(folder / "slim.onnx", folder / "dense.onnx", **figures)
            rows.append(Row("torch-pruning, published ResNet-56", (network,), on_target=False))
        return rows

    def _row(self, setting: Setting, start: str, name: str) -> list[Row]:
        networks = []
        for bench in self.benches:
            path = bench.trained_path(setting, start)
            if path.with_suffix(".json").is_file():
                trained, before = bench.trained(setting, start), bench.before_training(setting, start)
                reference = bench.base.baseline.onnx_path
                networks.append(Network(path, reference, trained["macs"], trained["top1"], before))
        return [Row(f"{name}: {setting.name}", tuple(networks))] if networks else []

    def time(self) -> None:
        """Time every file in turn."""
        networks = [network for row in self.rows() for network in row.networks]
        timing = time_networks(networks, self.first.context.data.calibration, conditions_of(self.first.context.deploy))
        write_atomic(self.timing_path, json.dumps(timing.to_dict(), indent=1))

    def timing(self) -> Timing:
        """Return measured speed-ups."""
        if not self.timing_path.is_file():
            raise SystemExit("No file has been timed yet: --phase time, while the machine does nothing else.")
        return Timing(**json.loads(self.timing_path.read_text(encoding="utf-8")))


def run_ours(bench: Bench) -> None:
    """Run the pipeline with and without training, as far as this source has not done it."""
    folder, name = bench.folder / f"ours-{source_digest()}", f"ours-seed{bench.seed}"
    trained = load_pipeline(bench.pipeline.path, (*bench.overrides, f"name={name}"), bench.seed)
    report = run(trained, folder, bench.console).report
    values = trained.resolved | {"name": f"{name}-untrained"}
    values["stages"] = [stage for stage in values["stages"] if stage["stage"] != "finetune"]
    path = folder / f"{name}-untrained.yaml"
    write_atomic(path, Pipeline(trained.config, path, values).to_yaml())
    untrained = run(load_pipeline(path), folder, bench.console).report
    macs = report["baseline"]["macs"] / report["slim"]["macs"]
    top1, before = report["slim"]["quality"]["top1"], untrained["slim"]["quality"]["top1"]
    once(folder / f"{name}.json", lambda: {"macs": macs, "top1": top1, "before": before})


def our_network(bench: Bench) -> Network | None:
    """Return our network of this source at a seed; None where the pipeline has not run."""
    folder, name = bench.folder / f"ours-{source_digest()}", f"ours-seed{bench.seed}"
    if not (folder / f"{name}.json").is_file():
        return None
    figures: ModelMetrics = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return Network(folder / name / "model.onnx", bench.base.baseline.onnx_path, **figures)


def do(comparison: Comparison, phases: Sequence[str], arguments: Any) -> None:
    """Go through phases.

    Args:
        comparison: What to do them with.
        phases: Of `PHASES`.
        arguments: Of the command line: where tables and picture go.
    """
    if "ours" in phases:
        for bench in comparison.benches:
            run_ours(bench)
    if "cut" in phases:
        comparison.cut()
    if "train" in phases:
        comparison.train()
    if "before" in phases:
        comparison.measure_before()
    if "time" in phases:
        comparison.time()
    if "table" in phases:
        rows, timing = comparison.rows(), comparison.timing()
        table = main_table(rows, timing, comparison.first.budget)
        draw(rows, timing, arguments.picture)
        folder = arguments.write.parent if arguments.write else Path()
        table += f"\n\n![top-1 over measured speed-up]({os.path.relpath(arguments.picture, folder)})"
        cuts = cuts_table(comparison.first, comparison.settings)
        for path, text, name in ((arguments.write, table, "torch-pruning"), (arguments.write_cuts, cuts, "cuts")):
            print(f"\n{text}")
            if path is not None:
                write_marked(path, text, name, COMMAND, timing.made, timing.source)


def main() -> None:
    """Parse the command line and go through the phases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--folder", type=Path, default=Path("runs/against-torch-pruning"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--phase", choices=PHASES, action="append", metavar="PHASE", help=f"of {', '.join(PHASES)}")
    parser.add_argument("--published", type=Path, metavar="FILE")
    parser.add_argument("--picture", type=Path, default=Path("docs/assets/against_torch_pruning.svg"))
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="puts the table between its markers")
    parser.add_argument("--write-cuts", type=Path, metavar="FILE.md", help="puts the table of all cuts there")
    arguments = parser.parse_args()
    pipeline, console = load_pipeline(arguments.pipeline, arguments.overrides), Console()
    stages = pipeline.config.stages
    has_budget = any(isinstance(stage, CutConfig) and stage.target.latency is not None for stage in stages)
    if not has_budget or not any(isinstance(stage, FinetuneConfig) for stage in stages):
        parser.error("the pipeline must have a prune or slim stage with a target of latency, and a finetune stage")
    overrides = tuple(arguments.overrides)
    benches = [Bench(pipeline, arguments.folder, seed, console, overrides) for seed in arguments.seeds]
    do(Comparison(benches, every_setting(), arguments.published), arguments.phase or PHASES, arguments)


if __name__ == "__main__":
    main()

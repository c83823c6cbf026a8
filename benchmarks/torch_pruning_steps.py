"""Steps of the comparison with torch-pruning, each kept on disk: cuts, repairs, sparse training, training.

A step that is done is never done again, so a run that was killed loses one step. Networks are `TorchModel` folders,
everything else is JSON.
"""

import copy
import hashlib
import json
import shutil
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from made import source_digest
from torch_pruning_cuts import Cutter, GroupNormHooks, Removed, Setting, cut, trained_weights, with_plain_shortcuts

from compress.checkpoint.layout import load_torch_model, save_torch_model
from compress.checkpoint.rebuild import example_input
from compress.cli.console import Console
from compress.config.load import Pipeline
from compress.config.schema.model import LoadConfig
from compress.config.schema.prune import CutConfig
from compress.config.schema.training import FinetuneConfig
from compress.cost.macs import count_macs
from compress.data.from_config import Splits
from compress.model.artifacts import FactorySpec, TorchModel
from compress.pruning.groups import kept_outputs
from compress.search.context import StageContext
from compress.search.export import conditions_of, export_present
from compress.search.hooked_training import train_with_hooks
from compress.search.repairs import apply_repairs, batch_norm_repair, repairs_towards
from compress.search.training import train
from compress.search.validation import validation_quality
from compress.stages.load import LoadStage, factory_spec
from compress.storage.files import write_atomic
from compress.verification.measurement import measure_onnx, measure_ratio

RATIOS = tuple(round(0.05 * step, 3) for step in range(1, 19))
WITHIN = 1.03
MAX_SHARE_OF_MACS = 1.1  # of the budget; no network here ran in a smaller share of its time than of its MACs
STARTS = {"as_it_comes": "as it comes", "batch_norm": "statistics measured again", "repaired": "our repair"}
ModelMetrics = dict[str, Any]


def once(path: Path, make: Callable[[], Any]) -> Any:
    """Return the content of a JSON file, made when it is missing."""
    if not path.is_file():
        write_atomic(path, json.dumps(make(), indent=1))
    return json.loads(path.read_text(encoding="utf-8"))


def network_once(folder: Path, factory: FactorySpec, make: Callable[[], TorchModel]) -> TorchModel:
    """Return the network of a folder, made when it is missing; its factory may have moved since."""
    if not folder.is_dir():
        model, part = make(), folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_torch_model(model, part)
        part.rename(folder)
    return load_torch_model(folder, factory)


@dataclass(frozen=True)
class Bench:
    """One pipeline at one seed, and where its steps are kept.

    Attributes:
        pipeline: Has a stage with a target of `latency`, and a finetune stage.
        folder: Of the comparison.
        seed: Of splits and training.
        console: Told about progress.
        overrides: With which the pipeline was loaded.
    """

    pipeline: Pipeline
    folder: Path
    seed: int
    console: Console
    overrides: tuple[str, ...] = ()

    @property
    def load_config(self) -> LoadConfig:
        """The load stage."""
        return next(stage for stage in self.pipeline.config.stages if isinstance(stage, LoadConfig))

    @property
    def cut_config(self) -> CutConfig:
        """The stage that has the target."""
        return next(stage for stage in self.pipeline.config.stages if isinstance(stage, CutConfig))

    @property
    def recipe(self) -> FinetuneConfig:
        """How every network is trained."""
        return next(stage for stage in self.pipeline.config.stages if isinstance(stage, FinetuneConfig))

    @property
    def budget(self) -> float:
        """Share of the baseline's latency."""
        budget = self.cut_config.target.latency
        assert budget is not None
        return budget

    @cached_property
    def key(self) -> str:
        """Digest of all that trained networks depend on besides this file; no paths are in it."""
        config, data = self.pipeline.config, self.context.data
        digest = hashlib.sha256(Path(str(self.load_config.weights)).read_bytes())
        for split in (data.train, data.evaluation):
            digest.update(np.ascontiguousarray(split.source.read(split.indices[:256])).tobytes())
        settings = {
            "finetune": self.recipe.model_dump(mode="json", exclude_unset=True),
            "budget": self.budget,
            "preprocessing": config.data.preprocessing.model_dump(mode="json", exclude_unset=True),
            "sizes": [len(data.train), len(data.calibration), len(data.validation), len(data.evaluation)],
        }
        digest.update(json.dumps(settings, sort_keys=True).encode())
        return digest.hexdigest()[:12]

    @cached_property
    def place(self) -> Path:
        """Folder of the steps."""
        return self.folder / self.key / f"seed{self.seed}"

    @cached_property
    def context(self) -> StageContext:
        """What stages that are called here get."""
        work, config = self.folder / f"work{self.seed}", self.pipeline.config
        work.mkdir(parents=True, exist_ok=True)
        return StageContext(work, self.seed, Splits(config.data), self.console, config.deploy, work / "tables")

    @cached_property
    def base(self) -> TorchModel:
        """The baseline."""
        return self._network("base", lambda: LoadStage(self.load_config).run(None, self.context)[0])

    def before_cut(self, setting: Setting) -> TorchModel:
        """Return the network that a setting cuts: the baseline, or the baseline after sparse training."""
        return self.sparse(setting.streams) if setting.sparse else self.base

    def recipe_of(self, setting: Setting) -> FinetuneConfig:
        """Return the recipe after the cut: sparse training takes half of the epochs."""
        return _halved(self.recipe) if setting.sparse else self.recipe

    def sparse(self, streams: bool) -> TorchModel:
        """Return the baseline after group-norm sparse training for half of the epochs."""

        def make() -> TorchModel:
            twin, base = with_plain_shortcuts(self.base.module), self.base
            hooks = GroupNormHooks(self.cutter(Setting()), twin, streams)
            state = self.context.folder / f"sparse-{streams}.pt"
            train_with_hooks("group_norm", twin, base, _halved(self.recipe), hooks, state, self.context)
            return replace(base, module=trained_weights(base.module, twin))

        return self._network(f"sparse-{'streams' if streams else 'inside'}", make)

    def _network(self, name: str, make: Callable[[], TorchModel]) -> TorchModel:
        return network_once(self.place / name, factory_spec(self.load_config.model), make)

    def cutter(self, setting: Setting) -> Cutter:
        """Return torch-pruning on the network that a setting cuts."""
        name = f"sparse-{setting.streams}" if setting.sparse else "base"
        if name not in self._cutters:
            images = self.context.data.calibration.first(self.cut_config.score_images)
            self._cutters[name] = Cutter(self.before_cut(setting), images)
        return self._cutters[name]

    @cached_property
    def _cutters(self) -> dict[str, Cutter]:
        return {}

    def cut(self, setting: Setting) -> ModelMetrics:
        """Return the mildest cut found within the budget as measured, or the fastest cut where none is.

        The ratio is found by bisection, which takes for granted that a higher ratio is not slower.

        Returns:
            {"ratio", "removed", "share" of the baseline's latency, "macs" times fewer}.
        """
        return once(self.place / "cuts" / f"{setting.slug}.json", lambda: self._search(setting))  # type: ignore[no-any-return]

    def _search(self, setting: Setting) -> ModelMetrics:
        cutter = self.cutter(setting)
        tried: list[ModelMetrics] = []

        def attempt(ratio: float) -> bool:
            removed = cutter.removed(setting, ratio)
            slim = cut(cutter.model, removed)
            fewer = self.base.baseline.metrics.macs / count_macs(slim.module, cutter.example)
            if 1 / fewer > self.budget * MAX_SHARE_OF_MACS:
                return False
            share = self.share(slim, removed)
            self.console.note(f"{setting.name}, ratio {ratio:g}: {share:.3f} of the baseline's latency, {fewer:.2f}x")
            tried.append({"ratio": ratio, "removed": removed, "share": share, "macs": fewer})
            return share <= self.budget * WITHIN

        place = bisect_left(RATIOS, True, key=attempt)
        if place < len(RATIOS):
            attempt(round(RATIOS[place] - 0.025, 3))  # between the last two
        if not tried:
            raise RuntimeError(f"torch-pruning ({setting.name}) reaches no ratio near the budget.")
        within = [one for one in tried if one["share"] <= self.budget * WITHIN]
        return min(within, key=lambda one: one["ratio"]) if within else min(tried, key=lambda one: one["share"])

    def share(self, slim: TorchModel, removed: Removed) -> float:
        """Return the latency as a share of the baseline's; networks of the same widths are measured once."""
        widths = {name: len(indices) for name, indices in sorted(removed.items())}
        name = hashlib.sha256(json.dumps(widths).encode()).hexdigest()[:16]

        def make() -> float:
            path = self.context.folder / "timed.onnx"
            export_present(slim, path, self.context)
            reference, conditions = self.base.baseline.onnx_path, conditions_of(self.context.deploy)
            return float(measure_ratio(path, reference, self.context.data.calibration, conditions, self.console))

        return float(once(self.folder / self.key / "shares" / f"{name}.json", make))

    def started(self, setting: Setting, start: str) -> TorchModel:
        """Return the cut network as training starts from it.

        Args:
            setting: Of torch-pruning.
            start: "as_it_comes"; "batch_norm", with statistics measured again; "repaired", as our cuts are.
        """

        def make() -> TorchModel:
            whole, removed = self.cutter(setting).model, _as_removed(self.cut(setting)["removed"])
            slim, ctx = cut(whole, removed), self.context
            example = example_input(whole.signature)
            if start == "batch_norm":
                batch_norm_repair(ctx)[1](slim.module)
            elif start == "repaired":
                kept = kept_outputs(removed, self.cutter(setting).groups)
                wanted = repairs_towards(whole.module, slim.module, kept, self.cut_config.repair, example, ctx)
                apply_repairs(slim.module, wanted, ctx)
            return slim

        return self._network(f"networks/{setting.slug}-{start}", make)

    def validation(self, setting: Setting, start: str) -> float:
        """Return top-1 of the cut network on the validation split, by which settings are chosen."""
        path = self.place / "validation" / f"{setting.slug}-{start}.json"
        return float(once(path, lambda: validation_quality(self.started(setting, start).module, self.context)))

    def before_training(self, setting: Setting, start: str) -> float:
        """Return top-1 of the cut network's file on the evaluation split; nothing is chosen by it."""
        path = self.context.folder / "before.onnx"
        return float(
            once(self._before_path(setting, start), lambda: self.file_top1(self.started(setting, start), path))
        )

    def _before_path(self, setting: Setting, start: str) -> Path:
        return self.place / "before" / f"{setting.slug}-{start}.json"

    def has_before(self, setting: Setting) -> bool:
        """Whether top-1 before training was measured from every start."""
        return all(self._before_path(setting, start).is_file() for start in STARTS)

    def trained(self, setting: Setting, start: str) -> ModelMetrics:
        """Return {"top1", "validation", "macs", "source"} of a trained network; its file lies at `trained_path`."""

        def make() -> ModelMetrics:
            slim, name = self.started(setting, start), f"{setting.slug}-{start}"
            model, record = train(copy.copy(slim), self.recipe_of(setting), self.context, f"{name}.pt")
            top1 = self.file_top1(model, self.trained_path(setting, start))
            self.console.note(f"torch-pruning ({setting.name}), {STARTS[start]}, seed {self.seed}: {top1:.2%}")
            validation = record.validation_after
            macs = self.base.baseline.metrics.macs / count_macs(model.module, example_input(model.signature))
            return {"top1": top1, "validation": validation, "macs": macs, "source": source_digest()}

        return once(self.trained_path(setting, start).with_suffix(".json"), make)  # type: ignore[no-any-return]

    def trained_path(self, setting: Setting, start: str) -> Path:
        """Return where the file of a trained network lies."""
        return self.place / "trained" / f"{setting.slug}-{start}.onnx"

    def file_top1(self, model: TorchModel, path: Path) -> float:
        """Export a network and return the top-1 of the file on the evaluation split."""
        path.parent.mkdir(parents=True, exist_ok=True)
        export_present(model, path, self.context)
        conditions = conditions_of(self.context.deploy)
        return float(
            measure_onnx(path, self.context.data.evaluation, conditions, progress=self.console).quality["top1"]
        )


def best_of_families(bench: Bench, settings: Sequence[Setting]) -> dict[Setting, list[str]]:
    """Return the best setting of each family and the families it is best in.

    The best has the highest validation top-1 after its batch-norm statistics were measured again, among those within
    the budget, or among all where none is.
    """
    found: dict[Setting, list[str]] = {}
    for family in dict.fromkeys(name for setting in settings for name in setting.families):
        members = [setting for setting in settings if family in setting.families]
        within = [one for one in members if bench.cut(one)["share"] <= bench.budget * WITHIN]
        best = max(within or members, key=lambda one: bench.validation(one, "batch_norm"))
        found.setdefault(best, []).append(family)
    return found


def _halved(config: FinetuneConfig) -> FinetuneConfig:
    """Return a recipe of half of the epochs, or steps."""
    update = {"epochs": config.epochs / 2} if config.steps is None and config.epochs else {}
    return config.model_copy(update=update or {"steps": max(1, (config.steps or 2) // 2)})


def _as_removed(values: Mapping[str, Sequence[int]]) -> Removed:
    return {name: tuple(indices) for name, indices in values.items()}

"""Sensitivity curves: rise of the loss over the width of each channel group, the other groups at full width."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from compress.config.load import Pipeline
from compress.config.schema.prune import PruneConfig
from compress.config.schema.targets import TargetConfig
from compress.cost.macs import count_macs, count_params
from compress.data.from_config import Splits
from compress.errors import ConfigValueError
from compress.model.adapter import example_input
from compress.model.artifacts import Baseline, ModelMetrics, TorchModel
from compress.progress import Progress
from compress.report.plots import plot_sensitivity
from compress.report.svg import to_standalone
from compress.search.block_removal import shorten, take_shortened
from compress.search.context import StageContext
from compress.search.pruner import Pruner
from compress.stages.load import LoadStage
from compress.tasks.from_config import open_task

SHARES = (0.75, 0.5, 0.25)  # of the full width, in the table
Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]


@dataclass(frozen=True)
class SensitivityCurve:
    """Rise of the loss over the width of one channel group.

    Attributes:
        name: Name of the group.
        widths: Numbers of channels, ascending; the last is the full width.
        rises: Mean rise of the loss at each width after refitting the readers; 0 at the full width.
        errors: Standard errors of the means over images.
    """

    name: str
    widths: tuple[int, ...]
    rises: tuple[float, ...]
    errors: tuple[float, ...]

    def at(self, share: float) -> float | None:
        """Return the rise at the smallest width of at least `share` of the full width; None at the full width."""
        place = next(number for number, width in enumerate(self.widths) if width >= share * self.widths[-1])
        return None if place == len(self.widths) - 1 else self.rises[place]


@dataclass(frozen=True)
class Sensitivity:
    """Sensitivity curves of a network, the most sensitive group first.

    Attributes:
        curves: One for each prunable group.
        images: Validation images that the loss was measured on.
    """

    curves: tuple[SensitivityCurve, ...]
    images: int

    def tables(self) -> list[Table]:
        """Return one table: the rise of the loss of each group at some shares of its width."""
        rows = [
            (
                one.name,
                str(one.widths[-1]),
                *("–" if (rise := one.at(share)) is None else f"{rise:.4g}" for share in SHARES),
            )
            for one in self.curves
        ]
        columns = ("channel group", "width", *(f"rise at {share:.0%}" for share in SHARES))
        return [(f"sensitivity (loss, {self.images:,} validation images)", columns, rows)]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def to_svg(self) -> str:
        """Return the curves as a picture."""
        return to_standalone(str(plot_sensitivity("sensitivity", [asdict(one) for one in self.curves])))

    def _repr_html_(self) -> str:
        """Return the picture for a notebook."""
        return f"<div>{self.to_svg()}</div><p>{escape(f'{self.images:,} validation images')}</p>"


def measure_sensitivity(model: TorchModel, config: PruneConfig, ctx: StageContext) -> Sensitivity:
    """Measure the loss of each channel group at each of its widths, after refitting the readers.

    Args:
        model: The network; left unchanged.
        config: Criterion, limits and numbers of images; its target does not matter.
        ctx: Splits, folder and listener.

    Raises:
        UntraceableModel: No channel graph could be built.
        UnsupportedLayer: The criterion cannot score a group.

    Source: Li et al. 2017, "Pruning Filters for Efficient ConvNets", arXiv:1608.08710, whose curves are without refits.
    """
    measuring = config.model_copy(update={"damage": "sensitivity", "blocks": 0})
    pruner = Pruner(measuring, ctx)
    networks = shorten(model, config.score_images, config.repair, ctx, config.refit_images)
    prepared = pruner.prepare(take_shortened(networks, 0))
    curves = [
        SensitivityCurve(
            one.name,
            one.levels,
            tuple(one.damages.tolist()),
            tuple((one.damages * 0 if one.errors is None else one.errors).tolist()),
        )
        for one in prepared.candidates
    ]
    ordered = sorted(curves, key=lambda one: -(one.at(0.5) or one.rises[0]))
    return Sensitivity(tuple(ordered), min(len(ctx.data.validation), config.score_images))


def sensitivity_of_pipeline(pipeline: Pipeline, progress: Progress) -> Sensitivity:
    """Measure the sensitivity of a pipeline's baseline with the settings of its first stage `prune`.

    Raises:
        ConfigValueError: The pipeline has no stage `prune`.
        CompressError: Data or network cannot be opened, as in a run.
    """
    stage = next((one for one in pipeline.config.stages if isinstance(one, PruneConfig)), None)
    if stage is None:
        raise ConfigValueError(
            f"'{pipeline.path}' must have a stage prune, whose settings the curves are measured with."
        )
    config = pipeline.config
    load: Any = config.stages[0]
    data = Splits(config.data, open_task(config.task))
    with tempfile.TemporaryDirectory() as folder:
        ctx = StageContext(Path(folder), config.seed, data, progress)
        opened = LoadStage(load).open(ctx)
        metrics = ModelMetrics(
            count_macs(opened.module, example_input(opened.signature)), count_params(opened.module), 0, {}, {}
        )
        baseline = Baseline(metrics, Path(folder) / "baseline.onnx", Path(folder) / "baseline.safetensors")
        model = TorchModel(
            opened.module, opened.spec, opened.recipe, opened.signature, data.preprocessing, data.classes, baseline
        )
        return measure_sensitivity(model, stage.model_copy(update={"target": TargetConfig(macs=0.5)}), ctx)

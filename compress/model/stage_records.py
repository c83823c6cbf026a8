"""Records of the stages: frozen dataclasses whose dump is the entry of a stage in `report.json`.

    RecordPart      base of every part of a record; `to_dict` is its dump
    StageRecord     base of the record that a stage returns, with one subclass for each stage
    StoredRecord    a record that was read from disk, as its plain values

A field's key in the dump is its name. Keys of the primary metric are named after it: the field `validation_before` is
"validation_top1_before" there. A field marked `OPTIONAL` has no key for None. `compress.report.records` reads the
dumps, those of earlier versions included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from compress.allocation.factors import Fit
from compress.tasks.base import Metric
from compress.tasks.classification import CLASSIFICATION

TOP1 = CLASSIFICATION.main
OPTIONAL = {"is_optional": True}


def _key(template: str) -> dict[str, str]:
    """Return the metadata of a field whose key holds the name of the primary metric in place of {}."""
    return {"key": template}


@dataclass(frozen=True)
class RecordPart:
    """Part of a record, in named values."""

    def to_dict(self, metric: Metric = TOP1) -> dict[str, Any]:
        """Return JSON-ready values.

        Args:
            metric: Primary metric, which keys are named after.
        """
        found = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None or "is_optional" not in one.metadata:
                found[one.metadata.get("key", one.name).format(metric.name)] = _plain(value, metric)
        return found


def _plain(value: Any, metric: Metric) -> Any:
    if isinstance(value, RecordPart):
        return value.to_dict(metric)
    if isinstance(value, Metric):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(entry, metric) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, metric) for entry in value]
    return value


@dataclass(frozen=True, kw_only=True)
class StageRecord(RecordPart):
    """Record of a stage."""


@dataclass(frozen=True)
class StoredRecord(StageRecord):
    """Record of a stage that was read from disk, perhaps written by an earlier version."""

    values: Mapping[str, Any]

    def to_dict(self, metric: Metric = TOP1) -> dict[str, Any]:
        """Return the stored values."""
        return dict(self.values)


@dataclass(frozen=True, kw_only=True)
class MetricRecord(StageRecord):
    """Record with values of the primary metric."""

    metric: Metric

    def to_dict(self, metric: Metric = TOP1) -> dict[str, Any]:
        """Return JSON-ready values, with keys of the record's own metric; top-1, the default, is not described."""
        values = super().to_dict(self.metric)
        if self.metric.name == TOP1.name:
            del values["metric"]
        return values


@dataclass(frozen=True, kw_only=True)
class QualityRecord(MetricRecord):
    """Record with the primary metric on the validation split, before and after the stage."""

    validation_before: float = field(metadata=_key("validation_{}_before"))
    validation_after: float = field(metadata=_key("validation_{}_after"))


@dataclass(frozen=True, kw_only=True)
class EditRecord(QualityRecord):
    """Record of a stage that changes the structure."""

    macs_before: int
    macs_after: int
    params_before: int
    params_after: int


@dataclass(frozen=True, kw_only=True)
class Rewrite(RecordPart):
    """A rewrite of the graph that fits the network."""

    rewrite: str
    places: int
    speedup: float | None  # of the baseline; None where it was not measured
    is_kept: bool


@dataclass(frozen=True, kw_only=True)
class LoadRecord(MetricRecord):
    """Record of `load`."""

    macs: int
    params: int
    size_bytes: int
    quality: float = field(metadata=_key("{}"))  # primary metric on the evaluation split
    metrics: tuple[str, ...]
    layers: int
    is_untrained: bool
    rewrites: tuple[Rewrite, ...]
    unread: tuple[str, ...]  # modules that no output reads
    narrow: Mapping[str, int] | None = field(default=None, metadata=OPTIONAL)  # channel group -> missing channels
    import_error: float | None = field(default=None, metadata=OPTIONAL)  # of the largest output
    rounding_error: float | None = field(default=None, metadata=OPTIONAL)  # of a quantised file, likewise
    validation: float | None = field(default=None, metadata=_key("validation_{}") | OPTIONAL)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EpochRecord(RecordPart):
    """Result of one epoch.

    Attributes:
        epoch: Counted from 1.
        loss: Mean training loss.
        validation: The primary metric on the validation split; for a classifier top-1, in [0, 1].
        learning_rate: Learning rate at the end of the epoch.
        images_per_second: Training speed, without validation.
    """

    epoch: int
    loss: float
    validation: float = field(metadata=_key("validation_{}"))
    learning_rate: float
    images_per_second: float


@dataclass(frozen=True, kw_only=True)
class Probe(RecordPart):
    """A peak learning rate that was tried for an epoch; without `validation` the training diverged."""

    learning_rate: float
    validation: float | None = field(metadata=_key("validation_{}"))


@dataclass(frozen=True, kw_only=True)
class Isometry(RecordPart):
    """Mean singular value of the input-output Jacobian at several points of a stage.

    Attributes:
        values: Point, such as "before" -> mean singular value; None where there is no network.
        images: Number of images.
        directions: Largest number of output directions.
        skipped: Reason why nothing was measured; None otherwise.
    """

    values: Mapping[str, float | None] = field(default_factory=dict)
    images: int = 0
    directions: int = 0
    skipped: str | None = None

    def to_dict(self, metric: Metric = TOP1) -> dict[str, Any]:
        """Return JSON-ready values by point, or the reason why there are none."""
        if self.skipped is not None:
            return {"skipped": self.skipped}
        return {**self.values, "images": self.images, "directions": self.directions}


@dataclass(frozen=True, kw_only=True)
class TrainingRecord(QualityRecord):
    """Record of a training."""

    isometry: Isometry
    epochs: tuple[EpochRecord, ...]
    chosen_epoch: int  # whose weights were kept; 0 where training was rolled back
    averaged: float | None = field(metadata=_key("averaged_{}"))  # primary metric of the average of the last steps
    is_averaged: bool
    is_unfolded: bool
    peak_learning_rate: float
    gradient_clip: float | None
    probed_learning_rates: tuple[Probe, ...]
    batch_size: int
    steps: int
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FinetuneRecord(TrainingRecord):
    """Record of `finetune`."""

    weights: str  # "inherited", "rewound" or "random"
    rewind_epoch: float | None
    rewind_schedule: str | None


@dataclass(frozen=True, kw_only=True)
class OwnTrainingRecord(QualityRecord):
    """Record of `finetune` where the user's code or another program has trained."""

    own: str | None
    weights: str
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class MethodRecord(MetricRecord):
    """Record of a training-time method; `..._cut` is the trained network before and after the removal of channels."""

    name: str
    metrics: Mapping[str, Any] = field(default_factory=dict)  # values of the method itself
    cause: str = ""  # of a loss that rises by the removal
    validation_before: float = field(metadata=_key("validation_{}_before"))
    epochs: tuple[EpochRecord, ...]
    chosen_epoch: int
    steps: int
    peak_learning_rate: float
    batch_size: int
    loss_before_cut: float
    quality_before_cut: float = field(metadata=_key("{}_before_cut"))
    loss_after_cut: float | None = None  # None until the channels are removed
    quality_after_cut: float | None = field(default=None, metadata=_key("{}_after_cut"))


@dataclass(frozen=True)
class RepairedBlock(RecordPart):
    """Result of the training of one block.

    Attributes:
        name: Name of the block.
        error_before: Mean squared error relative to the variance of the targets, on held-out images.
        error_after: The same after training.
        is_kept: Whether the trained weights are kept: the error fell.
    """

    name: str
    error_before: float
    error_after: float
    is_kept: bool


@dataclass(frozen=True, kw_only=True)
class Repair(RecordPart):
    """A repair after a cut, and the validation loss around it; `blocks` for block reconstruction only."""

    repair: str
    loss_before: float
    loss_after: float
    is_kept: bool
    blocks: tuple[RepairedBlock, ...] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class Round(RecordPart):
    """Measured latency of a complete network, as shares of the baseline's latency."""

    predicted: float
    measured: float
    baseline_ms: float | None  # of the baseline in the same measurement


@dataclass(frozen=True, kw_only=True)
class LatencyRecord(RecordPart):
    """Predicted and measured latency under a latency budget; ratios are shares of the baseline's latency."""

    reference_ms: float  # of the baseline, by the table
    predicted_ratio: float
    measured_ratio: float | None  # None if it was not timed
    rounds: tuple[Round, ...]


@dataclass(frozen=True, kw_only=True)
class Variant(RecordPart):
    """A network in the latency table."""

    predicted_ms: float
    measured_ms: float


@dataclass(frozen=True, kw_only=True)
class Step(RecordPart):
    """Latency of the network at one width of a channel group."""

    width: int
    ms: float


@dataclass(frozen=True, kw_only=True)
class Stairs(RecordPart):
    """Latency of the network over the width of one channel group, the other widths as chosen."""

    name: str
    chosen: int
    steps: tuple[Step, ...]


@dataclass(frozen=True, kw_only=True)
class LayerLatency(RecordPart):
    """Latency of one layer by the latency table."""

    layer: str
    ms_before: float
    ms_after: float


@dataclass(frozen=True, kw_only=True)
class WidthLatencyRecord(LatencyRecord):
    """Latency of the chosen widths."""

    fixed_ms: float  # of all that no width changes
    table_error: float | None  # median relative error on the variants
    scatter: float | None  # of single calls, relative
    variants: tuple[Variant, ...]
    stairs: tuple[Stairs, ...]
    layers: tuple[LayerLatency, ...]
    device: str | None = field(default=None, metadata=OPTIONAL)  # that a command timed complete variants on
    device_runtime: str | None = field(default=None, metadata=OPTIONAL)  # as the command prints it
    entry_error: float | None = field(
        default=None, metadata=OPTIONAL
    )  # median standard error of the time of a layer, of the network's


@dataclass(frozen=True, kw_only=True)
class RankLatencyRecord(LatencyRecord):
    """Latency of the chosen ranks."""

    asked_ratio: float
    is_optimal: bool

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RankLatencyRecord:
        """Return the record that `to_dict` has dumped."""
        return cls(**{**values, "rounds": tuple(Round(**one) for one in values["rounds"])})


@dataclass(frozen=True, kw_only=True)
class CutRecord(EditRecord):
    """Values that `prune` and `low_rank` have in common."""

    repairs: tuple[Repair, ...]
    method: MethodRecord | None = None  # training that chose the channels, or led towards low rank


@dataclass(frozen=True, kw_only=True)
class GroupWidth(RecordPart):
    """Width of a channel group."""

    name: str
    width_before: int
    width_after: int
    damage: float  # rise of the loss, or score
    damage_error: float | None  # standard error; None for an estimate


@dataclass(frozen=True, kw_only=True)
class ExcludedGroup(RecordPart):
    """A channel group that is not prunable."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class BlockTrial(RecordPart):
    """A tried number of removed residual blocks; validation `loss` within the budget, or the `reason` for none."""

    blocks: int
    loss: float | None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class StreamTrial(RecordPart):
    """A tried factor of damage along residual streams, and the validation loss."""

    factor: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class TriedNetwork(RecordPart):
    """A candidate network that was cut, repaired quickly and scored by its validation loss."""

    source: str  # of its prices
    blocks: int
    removed: tuple[str, ...]
    loss: float | None
    predicted_loss: float | None


@dataclass(frozen=True, kw_only=True)
class WholeNetworks(RecordPart):
    """Search among candidate networks."""

    count: int
    correction: float  # of the latency limit
    block_damages: Mapping[str, float]
    tried: tuple[TriedNetwork, ...]
    finalists: tuple[BlockTrial, ...]
    fit: Fit | None


@dataclass(frozen=True, kw_only=True)
class PruneRecord(CutRecord):
    """Record of `prune`."""

    target: Mapping[str, float]
    asked_ratio: float  # of the first target
    reached_ratio: float
    asked: Mapping[str, float]  # target -> share of the baseline's cost, MB or ms
    reached: Mapping[str, float]
    criterion: str | None  # None where a method decides
    is_optimal: bool
    damage: str | None
    groups: tuple[GroupWidth, ...]
    shortfall: str | None  # sentence on a target that was not met closely
    removed_blocks: tuple[str, ...]
    merged_blocks: tuple[str, ...]
    excluded: tuple[ExcludedGroup, ...]
    latency: WidthLatencyRecord | None
    block_trials: tuple[BlockTrial, ...] = ()
    residual_trials: tuple[StreamTrial, ...] = ()
    whole_networks: WholeNetworks | None = None
    isometry: Isometry = Isometry()


@dataclass(frozen=True, kw_only=True)
class FactorizedLayer(RecordPart):
    """A layer that was replaced by a product of smaller ones."""

    layer: str
    scheme: str
    ranks: tuple[int, ...]
    relative_error: float
    macs_before: int
    macs_after: int


@dataclass(frozen=True, kw_only=True)
class DenseLayer(RecordPart):
    """A layer that was not factorised."""

    layer: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class LowRankRecord(CutRecord):
    """Record of `low_rank`."""

    layers: tuple[FactorizedLayer, ...]
    dense: tuple[DenseLayer, ...]
    shared_relative_error: float | None
    allocation: str
    largest_bound: float | None  # of the error of a layer, operator norm
    latency: RankLatencyRecord | None


@dataclass(frozen=True, kw_only=True)
class SlimTrial(RecordPart):
    """A split of a budget: `share` of it by ranks; validation `loss` within the budget, or the `reason` for none."""

    share: float
    loss: float | None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class SlimStep(RecordPart):
    """One step of `slim`, with the records of the stages it is made of; None for a stage without work."""

    trials: tuple[SlimTrial, ...] = ()
    prune: StageRecord | None = None
    low_rank: StageRecord | None = None
    training: StageRecord | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SlimStep:
        """Return the step that `to_dict` has dumped, with stored records."""
        trials = tuple(SlimTrial(**one) for one in values["trials"])
        names = [name for name in ("prune", "low_rank", "training") if values[name] is not None]
        return cls(trials=trials, **{name: StoredRecord(values[name]) for name in names})


@dataclass(frozen=True, kw_only=True)
class SlimRecord(EditRecord):
    """Record of `slim`."""

    target: Mapping[str, float]
    moves: tuple[str, ...]
    steps: tuple[SlimStep, ...]


@dataclass(frozen=True, kw_only=True)
class ExportRecord(StageRecord):
    """Record of `export`, and result of every other export.

    Attributes:
        nodes_before: Number of nodes in torch's export.
        nodes_after: Number of nodes in the file.
        simplified: True where the file holds the graph that onnxslim made.
        simplify_note: Reason why it does not, or "".
        opset: Version of the default operator set.
        size_bytes: Bytes of all files together.
        files: Names of the files, the .onnx file first.
        denormals_flushed: Weights too small for a normal float32 that were set to zero.
        rewrites: Rewrite -> number of times it was applied.
        formats: Further format -> names of its files.
    """

    nodes_before: int
    nodes_after: int
    simplified: bool
    simplify_note: str
    opset: int
    size_bytes: int
    files: tuple[str, ...]
    denormals_flushed: int
    rewrites: Mapping[str, int]
    formats: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class QuantizeRecord(StageRecord):
    """Record of `quantize`: settings and result."""

    images: int  # for calibration
    method: str
    per_channel: bool
    reduce_range: bool
    activation_type: str
    weight_type: str
    exclude: tuple[str, ...]
    format: str  # "qdq" or "qoperator"
    format_ratio: float | None  # latency of the QOperator file / latency of the QDQ file; None if not measured
    layers: int
    float_layers: tuple[str, ...]
    agreement: float  # share of the calibration images with the class of the float file
    size_bytes_before: int
    size_bytes_after: int
    files: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class VerifyRecord(StageRecord):
    """Record of `verify`: empty, as the verdict holds its results."""

"""Typed records of the stages in `report.json`, and base classes of all parts of the report.

    Mirror   base of every part: frozen, unknown keys ignored, NaN and infinity refused
    Change   a value before and after: of a stage, or of the baseline and the slim network
    Record   values that any stage may state, with one subclass for each stage in `RECORDS`

Reports of earlier versions lack keys: a missing list is empty, any other missing value is None. A key that holds the
name of the primary metric ("validation_top1_after") is read under a neutral name ("validation").
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from compress.tasks.base import Metric
from compress.tasks.classification import CLASSIFICATION

TOP1 = CLASSIFICATION.main

Size = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]


class Mirror(BaseModel):
    """Part of a report.

    Null is read as missing. A field of type `Change` called "macs" is read from "macs_before" and "macs_after".
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _normalize(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        known = {key: value for key, value in values.items() if value is not None}
        for name, field in cls.model_fields.items():
            pair = {end: known[f"{name}_{end}"] for end in ("before", "after") if f"{name}_{end}" in known}
            if field.annotation is Change and pair:
                known[name] = pair
        return known


class Change(Mirror):
    """A value of the baseline and of the slim network, or before and after a stage; either may be unknown."""

    before: float | None = Field(None, validation_alias=AliasChoices("before", "baseline"))
    after: float | None = Field(None, validation_alias=AliasChoices("after", "slim"))

    def scaled(self, factor: float) -> Change:
        """Return both values times `factor`."""
        before, after = (None if value is None else factor * value for value in (self.before, self.after))
        return Change(before=before, after=after)

    @property
    def is_known(self) -> bool:
        """Return whether either value is known."""
        return self.before is not None or self.after is not None

    @property
    def difference(self) -> float | None:
        """After - before; None where either is unknown."""
        return None if self.before is None or self.after is None else self.after - self.before


def rename(values: Any, names: dict[str, str]) -> Any:
    """Return a mapping with some keys renamed; other values unchanged."""
    return {names.get(key, key): value for key, value in values.items()} if isinstance(values, dict) else values


class Exclusion(Mirror):
    """A channel group that was not prunable, or a layer that was not factorised."""

    name: str = Field("", validation_alias=AliasChoices("name", "layer"))
    reason: str | None = None


class Isometry(Mirror):
    """Mean singular value of the input-output Jacobian of a network at several points of a stage."""

    baseline: float | None = None
    before: float | None = None
    after: float | None = None
    after_cut: float | None = None
    after_repair: float | None = None
    skipped: str | None = None  # reason why nothing was measured


class Record(Mirror):
    """Values that any stage may state; `validation` is the primary metric on the validation split."""

    metric: Metric = TOP1
    validation: Change = Change()
    isometry: Isometry = Isometry()
    shortfall: str | None = None  # sentence on a target that was not met closely
    excluded: tuple[Exclusion, ...] = ()
    dense: tuple[Exclusion, ...] = ()
    warnings: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _rename_metric(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        stated = values.get("metric")
        name = stated.get("name") if isinstance(stated, dict) else TOP1.name
        neutral = {
            **{f"validation_{name}_{end}": f"validation_{end}" for end in ("before", "after")},
            **{f"{name}_{end}_cut": f"cut_quality_{end}" for end in ("before", "after")},
            **{f"loss_{end}_cut": f"cut_loss_{end}" for end in ("before", "after")},
            f"averaged_{name}": "averaged",
        }
        renamed: dict[str, Any] = rename(values, neutral)
        for key in ("epochs", "probed_learning_rates"):
            if isinstance(renamed.get(key), (list, tuple)):
                renamed[key] = [rename(entry, {f"validation_{name}": "validation"}) for entry in renamed[key]]
        return renamed


class Rewrite(Mirror):
    """A rewrite of the graph that was tried for the target runtime."""

    rewrite: str | None = None
    places: Count | None = None
    speedup: float | None = None  # of the baseline; None where it was not measured
    is_kept: bool = False


class LoadRecord(Record):
    """Record of `load`."""

    rewrites: tuple[Rewrite, ...] = ()
    unread: tuple[str, ...] = ()  # modules that no output reads
    narrow: dict[str, Count] = Field(default_factory=dict)  # channel group -> channels fewer than the factory builds


class Epoch(Mirror):
    """One epoch of a training; `validation` is the primary metric on the validation split."""

    epoch: Count | None = None  # from 1
    loss: float | None = None
    validation: float | None = None
    learning_rate: float | None = None  # at its end
    images_per_second: float | None = None


class Probe(Mirror):
    """A peak learning rate that was tried for an epoch; without `validation` the training diverged."""

    learning_rate: float | None = None
    validation: float | None = None


class TrainingRecord(Record):
    """Record of `finetune`, and of any other training."""

    epochs: tuple[Epoch, ...] = ()
    chosen_epoch: Count | None = None  # whose weights were kept; 0 where training was rolled back
    averaged: float | None = None  # primary metric of the average of the last steps
    is_averaged: bool = False  # whether the average was kept
    peak_learning_rate: float | None = None
    probed_learning_rates: tuple[Probe, ...] = ()
    weights: str | None = None  # "inherited", "rewound" or "random"
    rewind_epoch: float | None = None
    rewind_schedule: str | None = None  # "tail" or "whole" of the original schedule
    batch_size: Count | None = None
    steps: Count | None = None

    @property
    def reached(self) -> float | None:
        """Primary metric of the chosen epoch."""
        return {epoch.epoch: epoch.validation for epoch in self.epochs}.get(self.chosen_epoch)


class MethodRecord(TrainingRecord):
    """Record of a training-time method; `cut_...` is the trained network before and after the removal of channels."""

    name: str | None = None
    # values of its own; "..._ratio" is a share
    metrics: dict[str, float | None] = Field(
        default_factory=dict,
        validation_alias=AliasChoices("metrics", "figures"),  # latter: earlier revisions
    )
    cut_loss: Change = Change()
    cut_quality: Change = Change()


class Round(Mirror):
    """Measured latency of a complete network, as shares of the baseline's latency."""

    predicted: Size = 0.0
    measured: Size = 0.0
    baseline_ms: Size | None = None  # of the baseline in the same measurement


class Variant(Mirror):
    """A network in the latency table."""

    predicted_ms: Size | None = None
    measured_ms: Size | None = None


class Step(Mirror):
    """Latency of the network at one width of a channel group."""

    width: Count
    ms: Size


class Stairs(Mirror):
    """Latency of the network over the width of one channel group, the other widths as chosen."""

    name: str
    chosen: Count
    steps: tuple[Step, ...] = ()


class LayerLatency(Mirror):
    """Latency of one layer by the latency table."""

    layer: str
    ms: Change = Change()


class LatencyBudget(Mirror):
    """Predicted and measured latency under a latency budget; ratios are shares of the baseline's latency."""

    reference_ms: Size | None = None  # of the baseline, by the table
    predicted_ratio: Size | None = None  # of the choice, by the table
    measured_ratio: Size | None = None  # None if it was not timed
    table_error: float | None = None  # median relative error on the variants
    scatter: float | None = None  # of single calls, relative
    rounds: tuple[Round, ...] = ()
    variants: tuple[Variant, ...] = ()
    stairs: tuple[Stairs, ...] = ()
    layers: tuple[LayerLatency, ...] = ()
    device: str | None = None  # that a command timed complete variants on
    device_runtime: str | None = None  # as the command prints it
    entry_error: float | None = None  # median standard error of the time of a layer, of the network's


class BlockTrial(Mirror):
    """A tried number of removed residual blocks; validation `loss` within the budget, or the `reason` for none."""

    blocks: Count | None = None
    loss: float | None = None
    reason: str | None = None


class TriedNetwork(Mirror):
    """A candidate network that was cut, repaired quickly and scored by its validation loss."""

    source: str | None = None  # criterion of the choice
    blocks: Count | None = None  # removed
    loss: float | None = None
    predicted_loss: float | None = None


class WholeNetworks(Mirror):
    """Candidate networks that damages were estimated from."""

    tried: tuple[TriedNetwork, ...] = ()


class RepairedBlock(Mirror):
    """A block that was trained to return what it returned before the cut; errors are relative to the variance."""

    name: str = ""
    error: Change = Change()
    is_kept: bool = False


class Repair(Mirror):
    """A repair after a cut, and the validation loss around it."""

    repair: str | None = None
    loss: Change = Change()
    is_kept: bool = False
    blocks: tuple[RepairedBlock, ...] = ()


class EditRecord(Record):
    """Record of a stage that changes the structure."""

    macs: Change = Change()
    params: Change = Change()


class CutRecord(EditRecord):
    """Values that `prune` and `low_rank` have in common."""

    method: MethodRecord | None = None  # training that chose the removed channels
    repairs: tuple[Repair, ...] = ()
    latency: LatencyBudget | None = None
    block_trials: tuple[BlockTrial, ...] = ()
    whole_networks: WholeNetworks = WholeNetworks()


class Group(Mirror):
    """Width of a channel group."""

    name: str = ""
    width: Change = Change()
    damage: float | None = None  # rise of the loss
    damage_error: float | None = None  # standard error; None for an estimate


class PruneRecord(CutRecord):
    """Record of `prune`."""

    criterion: str | None = None  # None where a method decided
    target: dict[str, float | None] = Field(default_factory=dict)
    asked: dict[str, float | None] = Field(default_factory=dict)  # target -> share of the baseline's cost, MB or ms
    reached: dict[str, float | None] = Field(default_factory=dict)
    asked_ratio: float | None = None  # of the first target: all that old reports state
    reached_ratio: float | None = None
    damage: str | None = None  # "sensitivity" where damages were measured
    groups: tuple[Group, ...] = ()  # in definition order
    removed_blocks: tuple[str, ...] = ()
    merged_blocks: tuple[str, ...] = ()

    @property
    def targets(self) -> dict[str, Change]:
        """Target -> requested value and reached value."""
        asked = self.asked or dict.fromkeys(self.target, self.asked_ratio)
        reached = self.reached or dict.fromkeys(asked, self.reached_ratio)
        return {name: Change(before=value, after=reached.get(name)) for name, value in asked.items()}


class FactorizedLayer(Mirror):
    """A layer that was replaced by a product of smaller ones."""

    layer: str | None = None
    scheme: str | None = None
    ranks: tuple[Count, ...] = ()
    relative_error: float | None = None
    macs: Change = Change()


class LowRankRecord(CutRecord):
    """Record of `low_rank`."""

    layers: tuple[FactorizedLayer, ...] = ()
    allocation: str | None = None
    largest_bound: float | None = None  # of the error of a layer, operator norm


class SlimTrial(Mirror):
    """A split of a budget: `share` of it by ranks; validation `loss` within the budget, or the `reason` for none."""

    share: float | None = None
    loss: float | None = None
    reason: str | None = None


class SlimStep(Mirror):
    """One step of `slim`."""

    trials: tuple[SlimTrial, ...] = ()
    prune: PruneRecord | None = None
    low_rank: LowRankRecord | None = None
    training: TrainingRecord | None = None


class SlimRecord(EditRecord):
    """Record of `slim`."""

    moves: tuple[str, ...] = ()
    steps: tuple[SlimStep, ...] = ()


class ExportRecord(Record):
    """Record of `export`."""

    opset: Count | None = None
    size_bytes: Count | None = None
    nodes: Change = Change()  # as exported, and in the file
    simplified: bool | None = None
    files: tuple[str, ...] = ()


class QuantizeRecord(Record):
    """Record of `quantize`."""

    layers: Count | None = None
    float_layers: tuple[str, ...] = ()
    method: str | None = None
    images: Count | None = None  # for calibration
    format: str = "qdq"
    per_channel: bool | None = None
    weight_type: str | None = None
    reduce_range: bool = False  # whether weights have 7 bits
    activation_type: str | None = None
    agreement: float | None = None  # share of the calibration images with the class of the float file
    size_bytes: Change = Change()


RECORDS: dict[str, type[Record]] = {
    "load": LoadRecord,
    "prune": PruneRecord,
    "slim": SlimRecord,
    "low_rank": LowRankRecord,
    "finetune": TrainingRecord,
    "export": ExportRecord,
    "quantize": QuantizeRecord,
}

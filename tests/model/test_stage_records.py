"""Records of stages: their dumps have the keys that the mirror of the report reads, for any primary metric."""

import collections.abc
import json
import types
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from importlib import import_module
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from compress.catalog import STAGES
from compress.model import stage_records
from compress.model.stage_records import (
    Isometry,
    LowRankRecord,
    MetricRecord,
    PruneRecord,
    RankLatencyRecord,
    RecordPart,
    SlimStep,
    StageRecord,
    StoredRecord,
    TrainingRecord,
    VerifyRecord,
)
from compress.report import records as mirror
from compress.tasks.base import Metric

METRICS = [Metric("top1"), Metric("miou")]
VALUES = {bool: True, int: 3, float: 0.5, str: "some", Any: 0.5, type(None): None}
WRITTEN = {
    "load": stage_records.LoadRecord,
    "prune": PruneRecord,
    "slim": stage_records.SlimRecord,
    "low_rank": LowRankRecord,
    "finetune": stage_records.FinetuneRecord,
    "export": stage_records.ExportRecord,
    "quantize": stage_records.QuantizeRecord,
}
NO_CHOICE = {"shortfall", "excluded", "dense"}
NO_METRIC = {"metric", "validation", "isometry", "warnings", *NO_CHOICE}
UNREAD = {  # of the values that any stage may state
    "load": {"isometry", "validation", *NO_CHOICE},
    "prune": {"dense", "warnings"},
    "slim": {"isometry", "warnings", *NO_CHOICE},
    "low_rank": {"shortfall", "excluded", "isometry", "warnings", "block_trials", "whole_networks"},
    "finetune": NO_CHOICE,
    "export": NO_METRIC,
    "quantize": NO_METRIC,
}


def sample(kind: Any, metric: Metric) -> Any:
    """Return a value of a type; a record has a value in each field."""
    arguments = get_args(kind)
    if kind is Metric:
        return metric
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        given = {one.name: sample(hints[one.name], metric) for one in fields(kind)}
        if kind is SlimStep:
            given |= {name: sample(of, metric) for name, of in STEP.items()}
        if "skipped" in given:
            given |= {"skipped": None, "values": {"before": 1.0}}
        return kind(**given)
    if get_origin(kind) is tuple:
        return (sample(arguments[0], metric),)
    if get_origin(kind) is collections.abc.Mapping or get_origin(kind) is dict:
        return {"name": sample(arguments[1], metric)}
    if isinstance(kind, types.UnionType):
        return sample(arguments[0], metric)
    return VALUES[kind]


STEP = {"prune": PruneRecord, "low_rank": LowRankRecord, "training": TrainingRecord}
PARTS = [one for one in vars(stage_records).values() if isinstance(one, type) and issubclass(one, RecordPart)]


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
@pytest.mark.parametrize("stage", mirror.RECORDS)
def test_the_mirror_reads_every_field_from_the_dump(stage: str, metric: Metric) -> None:
    record = sample(WRITTEN[stage], metric)
    dumped = json.loads(json.dumps(record.to_dict(), allow_nan=False))
    read = mirror.RECORDS[stage].model_validate(dumped)
    missing = type(read).model_fields.keys() - read.model_fields_set
    assert missing - {"metric"} == UNREAD[stage] - {"metric"}
    if isinstance(record, MetricRecord):
        assert read.metric.name == metric.name
        assert (stage == "load") or read.validation == mirror.Change(before=0.5, after=0.5)
    changes = [getattr(read, one) for one in read.model_fields_set if isinstance(getattr(read, one), mirror.Change)]
    assert all(one.before is not None and one.after is not None for one in changes)
    for nested in ("method", "latency", "whole_networks"):
        part = getattr(read, nested, None)
        assert part is None or part != type(part)() or nested in UNREAD[stage]


def test_keys_hold_the_name_of_the_primary_metric() -> None:
    for metric in METRICS:
        dumped = sample(stage_records.FinetuneRecord, metric).to_dict()
        name = f"validation_{metric.name}"
        assert {f"{name}_before", f"{name}_after", f"averaged_{metric.name}"} <= dumped.keys()
        assert ("metric" in dumped) == (metric.name != "top1")
        assert name in dumped["epochs"][0]
        assert dumped["probed_learning_rates"] == [{"learning_rate": 0.5, name: 0.5}]
        method = sample(PruneRecord, metric).to_dict()["method"]
        assert {f"{name}_before", f"{metric.name}_before_cut", f"{metric.name}_after_cut"} <= method.keys()


def test_keys_without_a_value_are_left_out_where_the_field_is_optional() -> None:
    load = replace(sample(stage_records.LoadRecord, METRICS[0]), narrow=None, import_error=None, validation=None)
    assert not {"narrow", "import_error", "validation_top1"} & load.to_dict().keys()
    repair = replace(sample(stage_records.Repair, METRICS[0]), blocks=None)
    assert repair.to_dict().keys() == {"repair", "loss_before", "loss_after", "is_kept"}
    assert replace(sample(PruneRecord, METRICS[0]), latency=None).to_dict()["latency"] is None
    assert Isometry(skipped="too long").to_dict() == {"skipped": "too long"}
    measured = Isometry(values={"before": 1.0, "after": None}, images=6, directions=4)
    assert measured.to_dict() == {"before": 1.0, "after": None, "images": 6, "directions": 4}
    assert VerifyRecord().to_dict() == {}


@pytest.mark.parametrize("kind", [SlimStep, RankLatencyRecord])
def test_what_is_read_back_is_dumped_as_before(kind: type[SlimStep] | type[RankLatencyRecord]) -> None:
    dumped = json.loads(json.dumps(sample(kind, METRICS[1]).to_dict()))
    assert kind.from_dict(dumped).to_dict() == dumped
    empty = SlimStep().to_dict()
    assert empty == {"trials": [], "prune": None, "low_rank": None, "training": None}
    assert SlimStep.from_dict(empty) == SlimStep()


@pytest.mark.parametrize("kind", PARTS, ids=lambda kind: kind.__name__)
def test_records_are_frozen(kind: type[RecordPart]) -> None:
    part = StoredRecord({"a": 1}) if kind is StoredRecord else sample(kind, METRICS[0])
    for one in fields(kind):
        with pytest.raises(FrozenInstanceError, match="cannot assign to field"):
            setattr(part, one.name, None)


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_returns_a_record(name: str) -> None:
    place, _, stage = STAGES[name].place.partition(":")
    returned = get_args(get_type_hints(getattr(import_module(place), stage).run)["return"])[1]
    kinds = get_args(returned) or (returned,)
    assert all(issubclass(kind, StageRecord) and kind is not StageRecord for kind in kinds)

"""The mirror of `report.json`: leaves, neutral names of the metric, reports of earlier versions, refusals."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from page import Page
from pydantic import ValidationError
from report_samples import CONFIG, ENVIRONMENT, finetune_record, passing_verdict, prune_record, sample_stages

from compress.errors import ArtifactError
from compress.model.artifacts import Verdict
from compress.report.build import StageRun, build_report
from compress.report.model import Report, read_report
from compress.report.page import render_report
from compress.report.records import Change, LowRankRecord, PruneRecord, QuantizeRecord, SlimRecord, TrainingRecord
from compress.tasks.base import Metric

EARLIER = Path(__file__).parents[1] / "e2e" / "earlier" / "run" / "report.json"


def plain(stages: list[StageRun] | None = None) -> dict[str, Any]:
    runs = sample_stages() if stages is None else stages
    return build_report("demo", passing_verdict(), runs, CONFIG, ENVIRONMENT, {"data": {"evaluation": "2" * 64}})


def test_every_leaf_has_its_type_and_pairs_are_changes() -> None:
    report = read_report(plain())
    assert report.change("macs") == Change(before=40_551_424, after=20_447_232)
    assert report.latency("p95") == Change(before=1.498, after=0.934)
    assert report.quality() == Change(before=0.9173, after=0.9104)
    assert [stage.record.__class__.__name__ for stage in report.stages] == [
        "LoadRecord", "PruneRecord", "TrainingRecord", "LowRankRecord", "ExportRecord", "Record",
    ]  # fmt: skip
    prune, training = report.stages[1].record, report.stages[2].record
    assert isinstance(prune, PruneRecord)
    assert isinstance(training, TrainingRecord)
    assert prune.groups[2].width == Change(before=16, after=8)
    assert prune.validation == Change(before=0.921, after=0.571)
    assert prune.targets == {"macs": Change(before=0.5, after=0.5042)}
    assert prune.excluded[0].name == "conv1"
    assert training.reached == 0.912
    assert report.details.runtime.cold_start_ms == Change(before=33.9, after=21.4)
    assert report.provenance is not None
    assert report.provenance.data.evaluation == "2" * 64
    with pytest.raises(ValidationError, match="frozen"):
        report.name = "other"  # type: ignore[misc]


def test_pairs_do_not_shadow_plain_values() -> None:
    assert QuantizeRecord.model_validate({"size_bytes_before": 3, "size_bytes_after": 2}).size_bytes.after == 2
    export = read_report(plain()).stages[4].record
    assert export.size_bytes == 571_208  # type: ignore[attr-defined]


def test_another_metric_is_read_under_the_same_names() -> None:
    metric = Metric("miou", label="mIoU").to_dict()
    record = {
        **finetune_record(),
        "metric": metric,
        "validation_miou_before": 0.5,
        "averaged_miou": 0.7,
        "epochs": [{"epoch": 1, "validation_miou": 0.6, "validation_top1": 0.1}],
        "chosen_epoch": 1,
        "probed_learning_rates": [{"learning_rate": 0.1, "validation_miou": 0.4}],
    }
    values = plain([StageRun("finetune", "ran", 1.0, record)])
    values["details"] = {
        "quality": {"task": "segmentation", "metric": metric},
        "robustness": {"distributions": [{"name": "fog 1", "miou": 0.4, "baseline_miou": 0.5, "top1": 0.1}]},
        "shares": [{"stage": "slimming", "miou_before": 0.6, "miou_after": 0.5}],
    }
    report = read_report(values)
    training = report.stages[0].record
    assert isinstance(training, TrainingRecord)
    assert (training.validation.before, training.averaged, training.reached) == (0.5, 0.7, 0.6)
    assert training.probed_learning_rates[0].validation == 0.4
    assert report.metric == Metric("miou", label="mIoU")
    assert report.details.robustness.distributions[0].quality == Change(before=0.5, after=0.4)
    assert report.details.shares[0].quality == Change(before=0.6, after=0.5)


def test_steps_of_slim_and_trainings_of_methods_are_parts() -> None:
    steps = [{"prune": prune_record(), "low_rank": None, "training": finetune_record()}]
    method = {"name": "gates", "top1_before_cut": 0.9, "top1_after_cut": 0.8, "figures": {"x_before": 1.0}}
    report = read_report(
        plain([StageRun("slim", "ran", 1.0, {"steps": steps}), StageRun("low_rank", "ran", 1.0, {"method": method})])
    )
    assert [(part.place, part.stage, part.is_repeated) for part in report.parts] == [
        (1, "slim", False),
        (1, "prune", False),
        (1, "finetune", True),
        (2, "low_rank", False),
        (2, "finetune", True),
    ]
    slim, low_rank = report.stages[0].record, report.stages[1].record
    assert isinstance(slim, SlimRecord)
    assert isinstance(low_rank, LowRankRecord)
    assert low_rank.method is not None
    assert low_rank.method.cut_quality == Change(before=0.9, after=0.8)
    assert low_rank.method.metrics == {"x_before": 1.0}, "names of a method's own are left as they are"


def test_the_least_report_is_read_and_shown() -> None:
    report = read_report({"verdict": {"checks": []}})
    assert report == Report.model_validate({"name": "", "verdict": {"outcome": "failed", "checks": []}})
    assert "Failed" in render_report(report)


def test_a_report_of_an_earlier_revision_is_read_to_the_leaves() -> None:
    values = json.loads(EARLIER.read_text(encoding="utf-8"))
    report = read_report(values)
    assert report.verdict.outcome == "passed"
    assert report.slim is not None
    assert report.slim.model_dump() == values["slim"]
    assert report.verdict.model_dump()["checks"] == tuple(values["verdict"]["checks"])
    assert [stage.stage for stage in report.stages] == [stage["stage"] for stage in values["stages"]]
    assert "<title>" in render_report(report)


def test_every_value_that_a_run_states_of_its_measurements_is_mirrored() -> None:
    """What the bundle copies from the report must be what the run wrote."""
    values = plain()
    report = read_report(values)
    stated = values["details"]["quality"]["changes"]
    assert {name: one.model_dump(exclude={"images"}) for name, one in report.details.quality.changes.items()} == stated
    assert report.environment.to_settings() == values["environment"]
    assert report.config == values["config"]


def test_what_an_environment_states_beside_is_kept() -> None:
    values = plain() | {"environment": {"cpu": "A", "gpu": "B", "versions": {"onnx": None}}}
    report = read_report(values)
    assert report.environment.others == {"gpu": "B"}
    assert report.environment.to_settings() == {"cpu": "A", "gpu": "B", "versions": {"onnx": None}}
    text = Page(render_report(report)).text
    assert "gpuB" in text
    assert "onnxnot installed" in text


def test_null_is_missing() -> None:
    values = plain()
    values["stages"][2]["record"] |= {"epochs": None, "is_averaged": None, "isometry": None}
    values["details"]["latency"] = values["provenance"] = values["baseline"] = None
    report = read_report(values)
    assert report.stages[2].record.epochs == ()  # type: ignore[attr-defined]
    assert report.details.latency.runtime is None
    assert (report.baseline, report.provenance, report.speedup) == (None, None, None)


@pytest.mark.parametrize(
    ("place", "value", "fault"),
    [
        (("stages", 1, "record", "groups", 0, "width_before"), "x", "record.groups[0].width.before' must be a number"),
        (("stages", 1, "record"), 3, "'stages[1].record' must be an object, got 3."),
        (("stages", 1, "record", "excluded"), {}, "'stages[1].record.excluded' must be a list, got {}."),
        (("details", "latency", "threads"), 1.5, "'details.latency.threads' must be a whole number, got 1.5."),
        (("details", "latency", "ratio", "value"), 0, "'details.latency.ratio.value' must be greater than 0, got 0."),
        (("details", "quality", "classes", 0), 3, "'details.quality.classes[0]' must be a text, got 3."),
        (("verdict", "outcome"), "good", "'verdict.outcome' must be 'passed', 'failed' or 'inconclusive', got 'good'."),
        (("name",), ["x"], "'name' must be a text, got ['x']."),
    ],
)
def test_a_value_of_a_wrong_kind_is_refused_with_its_place(place: tuple[Any, ...], value: Any, fault: str) -> None:
    values = copy.deepcopy(plain())
    inner: Any = values
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(ArtifactError, match=r"^'here' is not as a run writes it: ") as refusal:
        read_report(values, "'here'")
    assert fault in refusal.value.message


def test_a_verdict_alone_is_a_report() -> None:
    values = build_report("file", Verdict((), ("parity",), None, None), [], {}, {})
    assert read_report(values).verdict.required == ("parity",)

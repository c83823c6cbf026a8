"""Typed mirror of `report.json`, and its reader.

    report.json --read_report--> Report --> pages, plots, comparison, sweep, bundle

All code that reads a report reads this mirror; only the writer (`build.py`) and the reader handle plain values. The
reader refuses a value of a wrong kind, and fills in keys that reports of earlier versions lack (see `records.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import (
    Field,
    JsonValue,
    StrictBool,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from compress.errors import ArtifactError
from compress.model.artifacts import Outcome, Status
from compress.report.details import Details
from compress.report.records import RECORDS, Change, Count, CutRecord, Mirror, Record, Size, SlimRecord
from compress.tasks.base import Metric

_EXPECTED = {
    "model_type": "an object",
    "dict_type": "an object",
    "tuple_type": "a list",
    "string_type": "a text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "greater_than_equal": "at least 0",
    "bool_type": "true or false",
}
_KINDS = {"noise": "noise", "corruptions": "corruption"}  # name of a mean -> kind of its distributions


class Check(Mirror):
    """Result of one check, with the fields of `CheckResult`."""

    name: str = ""
    status: Status = "skipped"
    value: float | None = None
    limit: float | None = None
    unit: str = ""
    detail: str = ""
    remedy: str = ""


class RecordedVerdict(Mirror):
    """Outcome of a verification; early reports state only whether it passed."""

    passed: StrictBool = False
    outcome: Outcome = "failed"
    required: tuple[str, ...] = ()
    checks: tuple[Check, ...]

    @model_validator(mode="before")
    @classmethod
    def _derive_outcome(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("outcome") is None:
            return {**values, "outcome": "passed" if values.get("passed") is True else "failed"}
        return values

    def is_open(self, check: Check) -> bool:
        """Return whether a check keeps the verdict from passing."""
        is_missing = check.status == "skipped" and check.name in self.required
        return check.status in ("fail", "inconclusive") or is_missing

    @property
    def open_checks(self) -> list[Check]:
        """Checks that keep the verdict from passing: failed, inconclusive, or required and skipped."""
        return [check for check in self.checks if self.is_open(check)]

    @property
    def ordered_checks(self) -> list[Check]:
        """All checks, the open ones first."""
        return sorted(self.checks, key=lambda check: not self.is_open(check))

    @property
    def made(self) -> int:
        """Number of checks that were made."""
        return sum(check.status != "skipped" for check in self.checks)


class Network(Mirror):
    """Size, quality and latency of the baseline or of the slim network, as `ModelMetrics`."""

    macs: Count | None = None
    params: Count | None = None
    size_bytes: Count | None = None
    quality: dict[str, float | None] = Field(default_factory=dict)  # metric -> value
    latency_ms: dict[str, Size | None] = Field(default_factory=dict)  # "p50" -> milliseconds


class Environment(Mirror):
    """Machine and library versions; None for a library that is not installed."""

    cpu: str | None = None
    cores: Count | None = None
    memory_bytes: Count | None = None
    platform: str | None = None
    python: str | None = None
    versions: dict[str, str | None] = Field(default_factory=dict)
    others: dict[str, JsonValue] = Field(default_factory=dict)  # stated by another version

    @model_validator(mode="before")
    @classmethod
    def _gather_others(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "others" in values:
            return values
        return {**values, "others": {key: value for key, value in values.items() if key not in cls.model_fields}}

    def to_settings(self) -> dict[str, JsonValue]:
        """Return the known properties by name."""
        stated: dict[str, JsonValue] = self.model_dump(exclude={"others"})
        return {key: value for key, value in {**stated, **self.others}.items() if value not in (None, {})}


class DataDigests(Mirror):
    """Digests of the images."""

    train: str | None = None
    evaluation: str | None = None


class Commit(Mirror):
    """Commit of a repository, and whether tracked files differed from it."""

    commit: str
    modified: bool = False


class Commits(Mirror):
    """Commits of the pipeline file and of the model's factory; None outside of a repository."""

    pipeline: Commit | None = None
    model: Commit | None = None


class Licences(Mirror):
    """Licences as the model's card states them."""

    model: str | None = None
    data: str | None = None
    data_name: str | None = None


class Provenance(Mirror):
    """Origin of a result: digests, commits and licences."""

    files: dict[str, str] = Field(default_factory=dict)  # name in the run folder -> sha256
    data: DataDigests = DataDigests()
    weights: str | None = None
    factory: str | None = None
    git: Commits = Commits()
    licence: Licences = Licences()


class Stage(Mirror):
    """One stage of a run, with a record of the class in `RECORDS`."""

    stage: str = ""
    status: str = ""
    seconds: Size | None = None
    record: Record = Field(default_factory=Record, validate_default=True)

    @field_validator("record", mode="wrap")
    @classmethod
    def _read_record(cls, values: Any, _: Any, info: ValidationInfo) -> Record:
        kind = RECORDS.get(info.data.get("stage", ""), Record)
        return kind() if isinstance(values, Record) else kind.model_validate(values)


@dataclass(frozen=True, slots=True)
class Part:
    """Part of a run that has a section of its own on the page.

    Attributes:
        place: Position of the stage in the pipeline, from 1.
        stage: Name of the stage, a key of `RECORDS`; a step of `slim` is listed as its component stages.
        record: Record of the stage.
        is_repeated: Whether another part has the same stage.
    """

    place: int
    stage: str
    record: Record
    is_repeated: bool = False

    @property
    def has_section(self) -> bool:
        """Return whether the record of this part has any content to show."""
        return self.stage in RECORDS and self.record != type(self.record)()


class Report(Mirror):
    """Content of a `report.json`; the report of a verdict alone has no stages, environment and config."""

    name: str = ""
    verdict: RecordedVerdict
    baseline: Network | None = None
    slim: Network | None = None
    stages: tuple[Stage, ...] = ()
    environment: Environment = Environment()
    config: dict[str, JsonValue] = Field(default_factory=dict)  # resolved pipeline
    provenance: Provenance | None = None
    details: Details = Details()
    non_finite: tuple[str, ...] = ()  # key paths of numbers that were NaN or infinite

    @property
    def metric(self) -> Metric:
        """Primary metric."""
        return self.details.quality.metric

    @property
    def parts(self) -> list[Part]:
        """Stages in order, a `slim` stage followed by its steps, a stage with a training method by that training."""
        parts = [part for place, stage in enumerate(self.stages, start=1) for part in _list_parts(place, stage)]
        counts = Counter(part.stage for part in parts)
        return [replace(part, is_repeated=counts[part.stage] > 1) for part in parts]

    def change(self, name: str) -> Change:
        """Return "macs", "params" or "size_bytes" of both networks."""
        before, after = (None if one is None else getattr(one, name) for one in (self.baseline, self.slim))
        return Change(before=before, after=after)

    def latency(self, name: str = "p50") -> Change:
        """Return a percentile of the latency of both networks."""
        before, after = (None if one is None else one.latency_ms.get(name) for one in (self.baseline, self.slim))
        return Change(before=before, after=after)

    def quality(self, name: str | None = None) -> Change:
        """Return a metric of both networks, the primary one by default.

        The baseline's mean over noise or corruptions is taken from the single distributions.
        """
        name = self.metric.name if name is None else name
        before, after = (None if one is None else one.quality.get(name) for one in (self.baseline, self.slim))
        if before is None and name in _KINDS:
            each = [one.quality.before for one in self.details.robustness.of_kind(_KINDS[name])]
            known = [value for value in each if value is not None]
            before = sum(known) / len(known) if known and len(known) == len(each) else None
        return Change(before=before, after=after)

    @property
    def quality_names(self) -> list[str]:
        """Metrics known for either network, in order of appearance."""
        return list(
            dict.fromkeys(name for one in (self.baseline, self.slim) if one is not None for name in one.quality)
        )

    @property
    def latency_names(self) -> list[str]:
        """Latency percentiles known for either network, in order of appearance."""
        return list(dict.fromkeys(name for one in self._networks for name in one.latency_ms))

    @property
    def _networks(self) -> list[Network]:
        return [one for one in (self.baseline, self.slim) if one is not None]

    @property
    def seconds(self) -> float | None:
        """Time of all stages in seconds; None if it is not known."""
        known = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(known) if known else None

    @property
    def speedup(self) -> float | None:
        """Speed-up measured in turn, which gates limit; in early reports, the quotient of the medians."""
        ratio, medians = self.details.latency.ratio, self.latency()
        if ratio is not None:
            return 1 / ratio.value
        return medians.before / medians.after if medians.before and medians.after else None


def _list_parts(place: int, stage: Stage) -> Iterator[Part]:
    record = stage.record
    yield Part(place, stage.stage, record)
    if isinstance(record, SlimRecord):
        for step in record.steps:
            parts = {"prune": step.prune, "low_rank": step.low_rank, "finetune": step.training}
            yield from (Part(place, name, one) for name, one in parts.items() if one is not None)
    if isinstance(record, CutRecord) and record.method is not None:
        yield Part(place, "finetune", record.method)


def read_report(values: Mapping[str, Any], where: str = "The report") -> Report:
    """Return the mirror of a report's plain values.

    Args:
        values: Content of `report.json`, or result of `describe_verdict`.
        where: Name of the report in messages.

    Raises:
        ArtifactError: A value has a type that runs do not write; the message names its key path.
    """
    try:
        return Report.model_validate(values)
    except ValidationError as error:
        found = error.errors()[0]
        place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in found["loc"]).lstrip(".")
        must = _EXPECTED.get(found["type"]) or found["msg"].removeprefix("Input should be ")
        fault = f"must be {must}, got {ascii(found['input'])[:60]}" if found["type"] != "missing" else "is missing"
        raise ArtifactError(
            f"{where} is not as a run writes it: '{place}' {fault}.",
            hint="Run the pipeline to write it anew; stages that are done are not repeated.",
        ) from error

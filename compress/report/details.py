"""Typed mirror of the measurements behind a verdict, `details` in `report.json`."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from compress.report.records import TOP1, Change, Count, Mirror, Size, rename
from compress.tasks.base import Metric

PNG_BYTES_AT_MOST = 64_000  # 64 x 64 pixels take at most 13,000
_PNG = b"\x89PNG\r\n\x1a\n"


class Estimate(Mirror):
    """A value with its 95 % interval, if it is known."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    detail: str = ""
    images: Count | None = None


def keep_png(content: Any) -> str:
    """Return base64 of a small PNG unchanged, and "" for other content, which must not enter a page."""
    if not isinstance(content, str) or len(content) > PNG_BYTES_AT_MOST * 4 // 3 or not content.isascii():
        return ""
    try:
        return content if base64.b64decode(content, validate=True).startswith(_PNG) else ""
    except binascii.Error:
        return ""


class WorstImage(Mirror):
    """Evaluation image that the ONNX file classifies wrongly."""

    label: Count | None = None
    predicted: Count | None = None
    index: Count | None = None  # position in the data
    image: Annotated[str, BeforeValidator(keep_png)] = ""  # base64 of a PNG, or ""


class Quality(Mirror):
    """Quality of both networks; by class for a classifier."""

    task: str = "classification"
    metric: Metric = TOP1
    is_labelled: bool = True
    classes: tuple[str, ...] = ()
    images_by_class: tuple[Count, ...] = ()
    slim: dict[str, Estimate] = Field(default_factory=dict)
    baseline: dict[str, Estimate] = Field(default_factory=dict)
    changes: dict[str, Estimate] = Field(default_factory=dict)  # "drop.top1", "churn", ... against the baseline
    slim_by_class: tuple[float | None, ...] = ()
    baseline_by_class: tuple[float | None, ...] = ()
    worst_images: tuple[WorstImage, ...] = ()

    def name_class(self, index: int | None, prefix: str = "class ") -> str:
        """Return the name of a class, or `prefix` and its number if it has no name."""
        return f"{prefix}{index}" if index is None or index >= len(self.classes) else self.classes[index]

    def class_quality(self, index: int) -> Change:
        """Return top-1 of a class by both networks."""
        before, after = (
            shares[index] if index < len(shares) else None for shares in (self.baseline_by_class, self.slim_by_class)
        )
        return Change(before=before, after=after)


class Distribution(Mirror):
    """Primary metric of both networks on one kind of images."""

    name: str = ""
    kind: str = ""  # "nominal", "noise", "corruption" or "shifted"
    quality: Change = Change()
    changes: dict[str, Estimate] = Field(default_factory=dict)


class RobustnessSettings(Mirror):
    """Settings of the robustness measurements."""

    images: Count | None = None
    noise: str | None = None
    noise_levels: tuple[float, ...] = ()
    seed: int | None = None


class Robustness(Mirror):
    """Quality under noise, corruptions and distribution shift."""

    wanted: RobustnessSettings | None = None
    distributions: tuple[Distribution, ...] = ()

    def of_kind(self, kind: str) -> list[Distribution]:
        """Return the distributions of a kind, in order."""
        return [one for one in self.distributions if one.kind == kind]


class LatencyRatio(Mirror):
    """Latency of the slim network over that of the baseline, timed in turn, with its 95 % interval."""

    value: Annotated[float, Field(gt=0)]
    low: Annotated[float, Field(gt=0)] | None = None
    high: Annotated[float, Field(gt=0)] | None = None
    error: float | None = None
    sittings: Count | None = None
    control: LatencyRatio | None = None  # the baseline over itself, in the same sittings


class Latency(Mirror):
    """Timed calls of both networks, and the conditions."""

    baseline_ms: tuple[Size | None, ...] = ()
    slim_ms: tuple[Size | None, ...] = ()
    runtime: str | None = None
    provider: str | None = None
    device: str | None = None  # that a command timed the files on; runtime and provider are then the device's
    command: str | None = None
    threads: Count | None = None
    batch_size: Count | None = None
    warmup: Count | None = None
    io_binding: bool = False  # whether inputs and outputs stay on the device
    baseline_file: str | None = None  # "int8": the baseline's INT8 file was timed
    ratio: LatencyRatio | None = None


class Throughput(Mirror):
    """Images per second at one batch size."""

    batch_size: Count | None = None
    baseline: Size | None = None
    slim: Size | None = None


class Resources(Mirror):
    """Start, memory, throughput and energy of both networks."""

    cold_start_ms: Change = Change()
    peak_memory_bytes: Change = Change()
    energy_joules: Change = Change()
    throughput: tuple[Throughput, ...] = ()


class Providers(Mirror):
    """Nodes by execution provider; `fell_back` are nodes that the requested provider did not take."""

    asked: str | None = None
    nodes: dict[str, Count] = Field(default_factory=dict)
    fell_back: tuple[str, ...] = ()


class Parity(Mirror):
    """Differences between the file and the PyTorch network."""

    samples: Count | None = None
    max_abs: float | None = None
    mean_abs: float | None = None
    quantiles: dict[str, float | None] = Field(default_factory=dict)
    top1_agreement: float | None = None


class Contribution(Mirror):
    """Effect of one part of the pipeline on the primary metric, evaluation split."""

    stage: str | None = None  # "slimming" or "quantize"
    quality: Change = Change()
    points: float | None = None


class OtherRuntime(Mirror):
    """Result of opening the file in another runtime."""

    label: str | None = None
    status: str | None = None
    p50_ms: Size | None = None
    shipping_p50_ms: Size | None = None  # of the shipping runtime, timed in turn
    max_abs: float | None = None
    reason: str = ""


class Evaluation(Mirror):
    """Evaluation split."""

    images: Count | None = None


class Details(Mirror):
    """Measurements behind a verdict."""

    quality: Quality = Quality()
    robustness: Robustness = Robustness()
    latency: Latency = Latency()
    runtime: Resources = Resources()
    providers: Providers = Providers()
    parity: Parity = Parity()
    evaluation: Evaluation = Evaluation()
    shares: tuple[Contribution, ...] = ()
    also: tuple[OtherRuntime, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _rename_metric(cls, values: Any) -> Any:
        """Read the primary metric of distributions and contributions under a neutral name."""
        if not isinstance(values, dict):
            return values
        quality, robustness = values.get("quality"), values.get("robustness")
        stated = quality.get("metric") if isinstance(quality, dict) else None
        name = str(stated.get("name")) if isinstance(stated, dict) else TOP1.name
        both = {name: "quality_after", f"baseline_{name}": "quality_before"}
        around = {f"{name}_{end}": f"quality_{end}" for end in ("before", "after")}
        values = {**values, "shares": _rename_each(values.get("shares"), around)}
        if isinstance(robustness, dict):
            distributions = _rename_each(robustness.get("distributions"), both)
            values["robustness"] = {**robustness, "distributions": distributions}
        return values


def _rename_each(values: Any, names: dict[str, str]) -> Any:
    return [rename(entry, names) for entry in values] if isinstance(values, (list, tuple)) else values

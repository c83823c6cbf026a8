"""Schema of `verify`: gates, robustness, resources; and of `deploy`."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer

from compress.catalog import (
    CORRUPTIONS,
    RUNTIMES,
)
from compress.config.schema.base import (
    BatchSize,
    Calls,
    Count,
    Floats,
    Limit,
    Names,
    OptionalPath,
    Positive,
    Section,
    Threads,
    registered,
    to_names,
    to_tuple,
)
from compress.config.schema.data import PreprocessingConfig, Source
from compress.config.schema.device_command import check_command, unused_settings
from compress.config.schema.task import DEFAULT_TASK, TaskConfig


class GatesConfig(Section):
    """Limits of the verdict; each one given is checked."""

    max_drop: dict[str, Limit] = Field(
        {}, description="largest decrease against the baseline; 0.01 is one percentage point"
    )
    max_rise: dict[str, Limit] = Field(
        {}, description="largest increase against the baseline; excess_error: additional error under corruptions"
    )
    min: dict[str, Limit] = Field({}, description="smallest value")
    max: dict[str, Limit] = Field(
        {}, description="largest value; churn is the share of predictions that differ from the baseline's"
    )
    max_drop_on: dict[str, Limit] = Field(
        {}, description="largest decrease on a distribution, such as jpeg 3 or a shifted data set"
    )
    max_ratio: dict[
        Literal["macs", "params", "size", "p50", "p90", "p95", "p99", "cold_start", "memory", "energy"], Positive
    ] = Field({}, description="largest ratio to the baseline")
    judge_by: Literal["estimate", "bound", "significant"] = Field(
        "estimate",
        description="estimate: the measured value must meet the limit; bound: the whole 95 % interval must meet it; "
        "significant: as estimate, but fails only if the whole interval exceeds the limit",
    )
    min_speedup: float | None = Field(None, gt=0, description="baseline latency / slim latency, medians")
    max_latency_ms: float | None = Field(None, gt=0, description="median latency")
    max_quantile_ms: dict[Literal["p90", "p95", "p99"], Positive] = Field({}, description="quantiles of the latency")
    max_macs: int | None = Field(None, gt=0, description="multiply-accumulates for one image")
    max_params: int | None = Field(None, gt=0, description="scalars in parameters")
    max_cold_start_ms: float | None = Field(None, gt=0, description="time until a session is ready, in a new process")
    max_memory_mb: float | None = Field(None, gt=0, description="memory of the session, in 10^6 bytes")
    min_images_per_second: float | None = Field(None, gt=0, description="throughput at the best batch size")
    max_size_mb: float | None = Field(None, gt=0, description="all files of the model, in 10^6 bytes")
    parity: float = Field(
        1e-3,
        gt=0,
        description="largest absolute difference from torch on real samples; without torch, between repeated runs and "
        "runtimes",
    )
    max_fallback_nodes: int | None = Field(
        None, ge=0, description="nodes that run on another execution provider than the one given"
    )


class RobustnessConfig(Section):
    """Noise, corruptions and shifted data sets for the comparison with the baseline."""

    images: Count = Field(1000, description="number of images, spread evenly over the evaluation split")
    noise: Literal["uniform", "gaussian"] = Field(
        "uniform", description="distribution of noise added to the input of the network"
    )
    noise_levels: Floats = Field(
        (0.1, 0.2, 0.3, 0.4, 0.5), description="amplitudes in units of the network's input; [] for none"
    )
    corruptions: Names = Field(CORRUPTIONS, description=f"of {', '.join(CORRUPTIONS)}; [] for none")
    severities: Annotated[tuple[Annotated[int, Field(ge=1, le=5)], ...], BeforeValidator(to_tuple)] = Field(
        (3,), min_length=1, description="1 to 5"
    )
    shifted: dict[str, Source] = Field({}, description="data sets with the same classes, by a name of your choice")

    def _check_rules(self) -> None:
        for name in self.corruptions:
            if name not in CORRUPTIONS:
                raise ValueError(f"corruptions must be of {', '.join(CORRUPTIONS)}; '{name}' is not")
        if any(level <= 0 for level in self.noise_levels):
            raise ValueError("noise_levels must be above 0")
        if not self.noise_levels and not self.corruptions and not self.shifted:
            raise ValueError("must hold noise_levels, corruptions or shifted")


class ResourcesConfig(Section):
    """Cold start, memory, and throughput at several batch sizes."""

    batch_sizes: Annotated[tuple[BatchSize, ...], BeforeValidator(to_tuple)] = Field(
        (1, 8, 32), min_length=1, description="batch sizes of the throughput measurement"
    )


class AlsoConfig(Section):
    """Another runtime for the same file, compared with the deployed one and timed beside it."""

    runtime: Annotated[str, registered(RUNTIMES)] = Field("onnxruntime", description="runtime that opens the file")
    provider: str = Field("CPUExecutionProvider", description="execution provider")
    threads: Threads | None = Field(None, description="intra-op threads; by default those of verify")
    required: bool = Field(False, description="true: the verdict fails if this runtime is not available")

    @property
    def label(self) -> str:
        """Name in checks: provider or runtime, and threads."""
        name = self.provider if self.runtime == "onnxruntime" else self.runtime
        return name if self.threads is None else f"{name}.{self.threads}"


class VerifyConfig(Section):
    """Measure the file in its target runtime and check the gates."""

    stage: Literal["verify"]
    runtime: Annotated[str, registered(RUNTIMES)] = Field("onnxruntime", description="runtime that opens the file")
    provider: str = Field("CPUExecutionProvider", description="execution provider; checked to be in use")
    threads: Threads = Field(1, description="intra-op threads of the latency measurement")
    batch_size: BatchSize = Field(1, description="batch size of the latency measurement")
    warmup: Calls = Field(10, description="calls before the measurement")
    repeats: Calls = Field(
        100, description="timed calls of each model, in several sessions; up to five times as many for fast models"
    )
    parity_samples: int = Field(64, ge=1, description="number of images for the comparison with torch")
    robustness: RobustnessConfig | None = Field(None, description="noise and corruptions; by default none")
    resources: ResourcesConfig | None = Field(
        ResourcesConfig(), description="cold start, memory and throughput; null leaves them out"
    )
    second_opinion: bool = Field(
        False, description="true: the ONNX reference evaluator must agree; for tiny networks it is always compared"
    )
    also: Annotated[tuple[AlsoConfig, ...], BeforeValidator(to_tuple)] = Field(
        (), description="further runtimes and providers"
    )
    gates: GatesConfig = GatesConfig()

    def _check_rules(self) -> None:
        labels = [one.label for one in self.also]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"also must name each runtime once; {label} is listed {labels.count(label)} times")


class GatesFile(VerifyConfig):
    """File for `compress verify --gates`: settings of a `verify` stage, task and data."""

    stage: Literal["verify"] = "verify"
    seed: int = Field(0, ge=0, lt=2**63, description="seed of noise and corruptions")
    task: TaskConfig = Field(DEFAULT_TASK, description="task of the network")
    evaluation: Source | None = Field(None, description="images and labels; --data has precedence")
    preprocessing: PreprocessingConfig | None = Field(
        None, description="preprocessing of images; by default that in the metadata of the file"
    )


_OF_COMMAND = ("device", "timeout_s", "attempts", "variants", "command_folder")


class DeployConfig(Section):
    """Target runtime of the model, which latency budgets and the verdict are measured on."""

    runtime: Annotated[str, registered(RUNTIMES)] = Field("onnxruntime", description="runtime that opens the file")
    provider: str = Field("CPUExecutionProvider", description="execution provider")
    threads: Threads = Field(1, description="intra-op threads")
    batch_size: BatchSize = Field(1, description="batch size")
    repeats: Calls = Field(100, description="timed calls of each variant, fewer for slow ones, more on a noisy machine")
    precision: Literal["fp32", "fp16", "int8"] = Field(
        "fp32",
        description="precision of the files; fp16 needs a provider that computes in it, int8 a quantize stage: "
        "latencies are then those of INT8 files, the baseline's included",
    )
    table: OptionalPath = Field(
        None, description="latency table of `compress profile`; by default measured on this machine"
    )
    accept_foreign_table: bool = Field(False, description="true: use a table of another machine")
    command: Annotated[tuple[str, ...], BeforeValidator(to_names)] | None = Field(
        None,
        description="command that times an ONNX file on a device and prints milliseconds: a list of arguments with "
        "{model} or {stdin}, and {threads}, {batch_size}, {repeats}; no shell reads it",
    )
    device: str | None = Field(None, description="name of the device that the command times on")
    timeout_s: float = Field(600.0, gt=0, le=86400, description="seconds after which a command is stopped")
    attempts: int = Field(3, ge=1, le=100, description="attempts at a command that fails, as where a connection drops")
    variants: int = Field(
        96, ge=8, le=10_000, description="most variants of the network to time where nodes cannot be timed"
    )
    command_folder: OptionalPath = Field(
        None, description="folder that the command starts in; by default that of the pipeline file"
    )

    def _check_rules(self) -> None:
        if self.command is None:
            can_time_nodes = (self.runtime, self.provider) == (_default("runtime"), _default("provider"))
            for name in _OF_COMMAND:
                is_of_fitted_table = name == "variants" and not can_time_nodes
                if getattr(self, name) != _default(name) and not is_of_fitted_table:
                    raise ValueError(f"{name} must be left out without a command that times files on a device")
            return
        check_command(self.command)
        if self.device is None or not self.device.strip():
            raise ValueError("device must be the name of the device that the command times on")
        for name in ("runtime", "provider"):
            if getattr(self, name) != _default(name):
                raise ValueError(f"{name} must be left out beside a command, which opens files in a runtime of its own")
        changed = [name for name in ("threads", "batch_size") if getattr(self, name) != _default(name)]
        for name in unused_settings(self.command, changed):
            raise ValueError(f"{name} must be left out, or stand in the command as {{{name}}}")

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the settings of a command that is not given, as files of earlier versions do."""
        values: dict[str, Any] = dump(self)
        if self.command is None:
            absent = {"command"} | {name for name in _OF_COMMAND if getattr(self, name) == _default(name)}
            values = {key: value for key, value in values.items() if key not in absent}
        return values


def _default(name: str) -> Any:
    return DeployConfig.model_fields[name].default

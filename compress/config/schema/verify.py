"""Schema of `verify`, of gates and of the deployment they are measured for."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

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
    to_tuple,
)
from compress.config.schema.data import PreprocessingConfig, Source
from compress.config.schema.task import DEFAULT_TASK, TaskConfig


class GatesConfig(Section):
    """Limits that the file must keep; each one given is checked."""

    max_drop: dict[str, Limit] = Field(
        {}, description="largest loss against the baseline, of a share as one (0.01 is one point)"
    )
    max_rise: dict[str, Limit] = Field(
        {}, description="largest gain against the baseline; excess_error is what corruptions cost more than it"
    )
    min: dict[str, Limit] = Field({}, description="smallest value")
    max: dict[str, Limit] = Field(
        {}, description="largest value; churn is the share of predictions that are not the baseline's"
    )
    max_drop_on: dict[str, Limit] = Field(
        {}, description="largest loss on a distribution by its name, such as jpeg 3 or a shifted data set"
    )
    max_ratio: dict[
        Literal["macs", "params", "size", "p50", "p90", "p95", "p99", "cold_start", "memory", "energy"], Positive
    ] = Field({}, description="largest share of what the baseline has or takes")
    judge_by: Literal["estimate", "bound", "significant"] = Field(
        "estimate",
        description="estimate: the figure itself must keep its limit; bound: its 95 % interval must show that; "
        "significant: as estimate, but only what the interval shows to be broken fails",
    )
    min_speedup: float | None = Field(None, gt=0, description="baseline latency / slim latency, medians")
    max_latency_ms: float | None = Field(None, gt=0, description="median latency")
    max_quantile_ms: dict[Literal["p90", "p95", "p99"], Positive] = Field({}, description="latency of the slower calls")
    max_macs: int | None = Field(None, gt=0, description="multiply-accumulates for one image")
    max_params: int | None = Field(None, gt=0, description="scalars in parameters")
    max_cold_start_ms: float | None = Field(None, gt=0, description="until a session is there, in a new process")
    max_memory_mb: float | None = Field(None, gt=0, description="growth of memory with the session, in 10^6 bytes")
    min_images_per_second: float | None = Field(None, gt=0, description="at the batch size where they are most")
    max_size_mb: float | None = Field(None, gt=0, description="all files of the model, in 10^6 bytes")
    parity: float = Field(
        1e-3,
        gt=0,
        description="largest absolute difference to torch on real samples; without torch, to itself and other places",
    )
    max_fallback_nodes: int | None = Field(
        None, ge=0, description="nodes that another execution provider than the one asked for computes"
    )


class RobustnessConfig(Section):
    """Noise, corruptions and other data sets under which the file is compared with the baseline."""

    images: Count = Field(1000, description="of the evaluation split, spread evenly")
    noise: Literal["uniform", "gaussian"] = Field("uniform", description="added to what goes into the network")
    noise_levels: Floats = Field((0.1, 0.2, 0.3, 0.4, 0.5), description="in units of the network's input; [] for none")
    corruptions: Names = Field(CORRUPTIONS, description=f"of {', '.join(CORRUPTIONS)}; [] for none")
    severities: Annotated[tuple[Annotated[int, Field(ge=1, le=5)], ...], BeforeValidator(to_tuple)] = Field(
        (3,), min_length=1, description="1 to 5"
    )
    shifted: dict[str, Source] = Field(
        {}, description="data sets from elsewhere with the same classes, each by a name of yours"
    )

    def _check_rules(self) -> None:
        for name in self.corruptions:
            if name not in CORRUPTIONS:
                raise ValueError(f"corruptions must be of {', '.join(CORRUPTIONS)}; '{name}' is not")
        if any(level <= 0 for level in self.noise_levels):
            raise ValueError("noise_levels must be above 0")
        if not self.noise_levels and not self.corruptions and not self.shifted:
            raise ValueError("must hold noise_levels, corruptions or shifted")


class ResourcesConfig(Section):
    """What a file takes besides the time of a call: to start, in memory, and at other batch sizes."""

    batch_sizes: Annotated[tuple[BatchSize, ...], BeforeValidator(to_tuple)] = Field(
        (1, 8, 32), min_length=1, description="batch size for the throughput"
    )


class AlsoConfig(Section):
    """One more place where the same file is opened, compared with the one that ships it, and timed beside it."""

    runtime: Annotated[str, registered(RUNTIMES)] = "onnxruntime"
    provider: str = Field("CPUExecutionProvider", description="execution provider")
    threads: Threads | None = Field(None, description="intra-op threads; those of verify by default")
    required: bool = Field(False, description="whether the verdict fails where this cannot be had")

    @property
    def label(self) -> str:
        """What tells it from others in the names of checks."""
        name = self.provider if self.runtime == "onnxruntime" else self.runtime
        return name if self.threads is None else f"{name}.{self.threads}"


class VerifyConfig(Section):
    """Measure the file in the runtime that ships it."""

    stage: Literal["verify"]
    runtime: Annotated[str, registered(RUNTIMES)] = "onnxruntime"
    provider: str = Field("CPUExecutionProvider", description="execution provider; must be the one in use")
    threads: Threads = Field(1, description="intra-op threads of the latency measurement")
    batch_size: BatchSize = Field(1, description="batch size in the latency measurement")
    warmup: Calls = Field(10, description="calls before the measurement")
    repeats: Calls = Field(
        100, description="timed calls of each model, in several sittings; up to five times as many of fast models"
    )
    parity_samples: int = Field(64, ge=1, description="real images compared with torch")
    robustness: RobustnessConfig | None = Field(None, description="noise and corruptions to look at; by default none")
    resources: ResourcesConfig | None = Field(
        ResourcesConfig(), description="start, memory and throughput; null leaves them out"
    )
    second_opinion: bool = Field(
        False, description="whether the ONNX reference evaluator must have agreed; asked for tiny networks in any case"
    )
    also: Annotated[tuple[AlsoConfig, ...], BeforeValidator(to_tuple)] = Field(
        (), description="more runtimes and providers to compare and to time the file on"
    )
    gates: GatesConfig = GatesConfig()

    def _check_rules(self) -> None:
        labels = [one.label for one in self.also]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"also must name each place once; {label} stands there {labels.count(label)} times")


class GatesFile(VerifyConfig):
    """What `compress verify --gates` reads: the settings of a `verify` stage, and on what to measure."""

    stage: Literal["verify"] = "verify"
    seed: int = Field(0, ge=0, lt=2**63, description="decides noise and corruptions")
    task: TaskConfig = Field(DEFAULT_TASK, description="what the network is for")
    evaluation: Source | None = Field(None, description="images and labels; --data goes before it")
    preprocessing: PreprocessingConfig | None = Field(
        None, description="what happens to an image first; by default what the file says about itself"
    )


class DeployConfig(Section):
    """Where the model will run. Budgets in milliseconds are measured there, and so is the verdict."""

    runtime: Annotated[str, registered(RUNTIMES)] = "onnxruntime"
    provider: str = Field("CPUExecutionProvider", description="execution provider")
    threads: Threads = Field(1, description="intra-op threads")
    batch_size: BatchSize = Field(1, description="batch size")
    repeats: Calls = Field(100, description="timed calls of each variant, of slow ones fewer; more on a noisy machine")
    precision: Literal["fp32", "fp16"] = Field("fp32", description="of the files; fp16 where the provider has it")
    table: OptionalPath = Field(
        None, description="latency table that `compress profile` wrote; measured here by default"
    )
    accept_foreign_table: bool = Field(False, description="use a table of another machine as it is")

"""Schema of a complete pipeline file, and of the stages `export` and `quantize`; no torch.

Kept ratios are in (0, 1] and relative to the baseline. Paths are absolute, or relative to the pipeline file.
"""

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field

from compress.config.schema.base import (
    Names,
    Section,
    Threads,
    to_tuple,
)
from compress.config.schema.data import DataConfig
from compress.config.schema.low_rank import LowRankConfig
from compress.config.schema.model import LoadConfig
from compress.config.schema.prune import PruneConfig, SlimConfig
from compress.config.schema.task import DEFAULT_TASK, TaskConfig
from compress.config.schema.training import FinetuneConfig
from compress.config.schema.verify import DeployConfig, VerifyConfig


class ExportConfig(Section):
    """Write and check the ONNX file."""

    stage: Literal["export"]
    opset: int = Field(18, ge=18, le=23, description="version of the ONNX operator set")
    dynamic_batch: bool = Field(True, description="true: open batch axis")
    dynamic: Annotated[tuple[Literal["height", "width"], ...], BeforeValidator(to_tuple)] = Field(
        (), description="open axes of the image; parity is also checked at other sizes"
    )
    simplify: bool = Field(True, description="simplify with onnxslim, and check parity again")
    external_data: bool = Field(False, description="true: weights in a second file; always above 1.8 GB")
    also: Annotated[tuple[Literal["litert", "ncnn", "openvino"], ...], BeforeValidator(to_tuple)] = Field(
        (), description="formats that the file is also converted into; verify compares each with the file"
    )

    def _check_rules(self) -> None:
        if len(set(self.also)) < len(self.also):
            raise ValueError("also must name each format once")
        if self.dynamic and (fixed := [name for name in self.also if name != "openvino"]):
            raise ValueError(
                f"also must be without {fixed[0]} where dynamic is given: its files are for one size of image"
            )


class QuantizeConfig(Section):
    """Quantise the exported file to INT8; the float file is kept for comparison."""

    stage: Literal["quantize"]
    images: int = Field(
        256, ge=8, description="number of calibration images that the ranges of activations are measured on"
    )
    method: Literal["minmax", "entropy", "percentile"] = Field(
        "minmax", description="range of activations: full range, least loss of information, or without outliers"
    )
    per_channel: bool = Field(True, description="true: one scale for each output channel of a weight")
    reduce_range: bool = Field(False, description="7-bit weights, for processors without VNNI")
    activation_type: Literal["uint8", "int8"] = Field(
        "uint8", description="type of activations; int8 has its zero point at 0, for TensorRT and ARM"
    )
    weight_type: Literal["int8", "uint8"] = Field("int8", description="type of weights")
    exclude: Names = Field((), description="layers or nodes to leave in float; * matches any text")
    format: Literal["qdq", "qoperator", "auto"] = Field(
        "qdq",
        description="qdq: rounding between layers, read by every runtime; qoperator: integer operators of ONNX Runtime "
        "for the CPU; auto: qoperator where it is measured to be faster",
    )

    def _check_rules(self) -> None:
        if (self.activation_type, self.weight_type) == ("int8", "uint8"):
            raise ValueError(
                "weight_type must be int8 where activation_type is: no runtime has kernels for uint8 there"
            )


StageConfig = (
    LoadConfig
    | PruneConfig
    | SlimConfig
    | LowRankConfig
    | FinetuneConfig
    | ExportConfig
    | QuantizeConfig
    | VerifyConfig
)


Stages = Annotated[tuple[Annotated[StageConfig, Field(discriminator="stage")], ...], BeforeValidator(to_tuple)]


STAGE_SECTIONS: dict[str, type[StageConfig]] = {
    get_args(model.model_fields["stage"].annotation)[0]: model for model in get_args(StageConfig)
}


class PipelineConfig(Section):
    """Pipeline file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200, description="name of the run folder")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of all random numbers")
    effort: Literal["quick", "normal", "thorough"] = Field(
        "normal",
        description="defaults of settings that are not given: quick: fewer images and calls, no trials of residual "
        "streams; thorough: more of them, blocks: auto, average of the last training steps",
    )
    threads: Threads | None = Field(None, description="threads of torch; all cores by default")
    plugins: Names = Field((), description="modules that register criteria, methods and runtimes of your own")
    task: TaskConfig = Field(DEFAULT_TASK, description="task of the network; classification by default")
    data: DataConfig
    deploy: DeployConfig | None = None
    stages: Stages = Field(min_length=1, description="stages in order, from load to verify")

    @property
    def int8(self) -> QuantizeConfig | None:
        """Settings of the INT8 files that latencies are measured on; None where `deploy.precision` is another."""
        return self.quantize if self.deploy is not None and self.deploy.precision == "int8" else None

    @property
    def quantize(self) -> QuantizeConfig | None:
        """Settings of the `quantize` stage; None without one."""
        return next((stage for stage in self.stages if isinstance(stage, QuantizeConfig)), None)

"""What may a pipeline file say? Strict, frozen, closed pydantic models; no torch.

Ratios are in (0, 1] and always relative to the baseline (the baseline). Paths are relative to the pipeline
file unless they are absolute.
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
    opset: int = Field(18, ge=18, le=23, description="version of the default ONNX operator set")
    dynamic_batch: bool = Field(True, description="whether the batch axis stays open")
    dynamic: Annotated[tuple[Literal["height", "width"], ...], BeforeValidator(to_tuple)] = Field(
        (), description="which axes of the image stay open; parity is checked at other sizes, too"
    )
    simplify: bool = Field(True, description="run onnxslim; parity is checked again after it")
    external_data: bool = Field(False, description="weights in a second file; forced above 1.8 GB")


class QuantizeConfig(Section):
    """Round the exported file to INT8; the float file is kept to compare with."""

    stage: Literal["quantize"]
    images: int = Field(256, ge=8, description="calibration images whose activations decide the ranges")
    method: Literal["minmax", "entropy", "percentile"] = Field(
        "minmax", description="what of the activations a range keeps: all, what loses least, all but the outermost"
    )
    per_channel: bool = Field(True, description="whether each output channel of a weight has a scale of its own")
    reduce_range: bool = Field(False, description="7 bits for weights, for processors without VNNI")
    activation_type: Literal["uint8", "int8"] = Field(
        "uint8", description="of activations; int8, with its zero point at 0, for TensorRT and ARM"
    )
    weight_type: Literal["int8", "uint8"] = Field("int8", description="of weights")
    exclude: Names = Field((), description="layers or nodes that stay float; * matches any text")

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
    """A whole pipeline file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200, description="name of the run folder")
    seed: int = Field(0, ge=0, lt=2**63, description="decides everything random")
    threads: Threads | None = Field(None, description="torch threads; all cores by default")
    plugins: Names = Field((), description="modules that register criteria and runtimes of your own")
    task: TaskConfig = Field(DEFAULT_TASK, description="what the network is for; classification by default")
    data: DataConfig
    deploy: DeployConfig | None = None
    stages: Stages = Field(min_length=1)

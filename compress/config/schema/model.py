"""Schema of `load`: kinds of models, their inputs and weights."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from compress.catalog import (
    NETWORKS,
)
from compress.config.schema.base import (
    FilePath,
    Ints,
    Names,
    PathKind,
    Reference,
    Section,
)


class InputConfig(Section):
    """One input of a network that takes several, or one that is no image."""

    shape: Ints = Field(description="sizes without the batch axis; [] for one number")
    dtype: Literal["float32", "int64", "int32", "bool"] = "float32"
    high: int | None = Field(None, ge=1, le=2**24, description="whole numbers are below this, at least 0")

    def _check_rules(self) -> None:
        if any(size < 1 for size in self.shape):
            raise ValueError("shape must hold sizes of at least 1")
        if self.high is not None and not self.dtype.startswith("int"):
            raise ValueError("high must stand beside a dtype of whole numbers")


def _to_input(value: object) -> object:
    return {"shape": value} if isinstance(value, list) else value


Input = Annotated[InputConfig, BeforeValidator(_to_input, json_schema_input_type=InputConfig | list[int])]


class NetworkSection(Section):
    """What every way to name a network has in common."""

    kwargs: dict[str, Any] = Field(default_factory=dict, description="keyword arguments that it is built with")
    inputs: dict[str, Input] = Field(
        default_factory=dict,
        description="name -> shape without the batch axis, or shape, dtype and high; without it: one image",
    )
    outputs: Names = Field((), description="which outputs to keep, in this order, where there are several; [] for all")

    def _check_rules(self) -> None:
        if not all(name.isidentifier() for name in self.inputs):
            raise ValueError("inputs must hold names of letters, digits and _ that begin with no digit")
        if len(set(self.outputs)) < len(self.outputs):
            raise ValueError("outputs must name each output once")


class FactoryModel(NetworkSection):
    """A callable that builds the network."""

    factory: Reference = Field(
        description='"pkg.module:callable" or "path/to/file.py:callable"',
    )


class TorchvisionModel(NetworkSection):
    """A network of torchvision.models by its name: classification, segmentation, single-stage detection."""

    torchvision: str = Field(description="such as resnet18, fcn_resnet50, ssdlite320_mobilenet_v3_large")


class TimmModel(NetworkSection):
    """A network of timm by its name; timm is the extra `timm`."""

    timm: str = Field(description="such as convnext_tiny")


class OnnxFileModel(Section):
    """A network that is there as an ONNX file, weights and all."""

    onnx: FilePath = Field(description="path of the .onnx file, in floating point")
    inputs: dict[str, Ints] = Field(
        {}, description="shape of one image by input, such as {input: [3, 224, 224]}, where the file leaves it open"
    )
    outputs: Names = Field((), description="which outputs to keep, in this order, where there are several; [] for all")


def _model_kind(value: object) -> str | None:
    has = value.__contains__ if isinstance(value, dict) else lambda key: hasattr(value, key)
    kinds = [kind for kind in NETWORKS if has(kind)]
    return kinds[0] if len(kinds) == 1 else None


Model = Annotated[
    Annotated[FactoryModel, Tag("factory")]
    | Annotated[OnnxFileModel, Tag("onnx")]
    | Annotated[TimmModel, Tag("timm")]
    | Annotated[TorchvisionModel, Tag("torchvision")],
    Discriminator(
        _model_kind,
        custom_error_type="model_kind",
        custom_error_message=f"must hold exactly one of the keys {', '.join(NETWORKS)}",
    ),
]


class LoadConfig(Section):
    """Build the network, load its weights strictly, measure the baseline."""

    stage: Literal["load"]
    model: Model
    weights: Annotated[str | None, PathKind.WEIGHTS] = Field(
        None,
        description="safetensors, a torch checkpoint that weights_only=True can read, a TorchScript archive, a "
        "torch.export program; pretrained, for what timm or torchvision offer; none, for a seeded initialisation; left "
        "out with model.onnx",
    )
    narrow: bool = Field(
        False,
        description="the weights are those of a network slimmed by another tool: their shapes tell the widths, and the "
        "narrow network is the baseline",
    )
    rewrites: Literal["measured", "always", "never"] = Field(
        "measured", description="rewrite the graph for the runtime, baseline included: where that measures faster"
    )

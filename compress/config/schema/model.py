"""Schema of `load`: the network, its inputs and its weights."""

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
    """Input of a network with several inputs, or with an input that is no image."""

    shape: Ints = Field(description="shape without the batch axis; [] for a scalar")
    dtype: Literal["float32", "int64", "int32", "bool"] = Field("float32", description="type of the values")
    high: int | None = Field(
        None, ge=1, le=2**24, description="exclusive upper bound of whole numbers, which are at least 0"
    )

    def _check_rules(self) -> None:
        if any(size < 1 for size in self.shape):
            raise ValueError("shape must hold sizes of at least 1")
        if self.high is not None and not self.dtype.startswith("int"):
            raise ValueError("high must stand beside a dtype of whole numbers")


def _to_input(value: object) -> object:
    return {"shape": value} if isinstance(value, list) else value


Input = Annotated[InputConfig, BeforeValidator(_to_input, json_schema_input_type=InputConfig | list[int])]


class NetworkSection(Section):
    """Settings that all kinds of networks in Python share."""

    kwargs: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the callable or model")
    inputs: dict[str, Input] = Field(
        default_factory=dict,
        description="name -> shape without the batch axis, or shape, dtype and high; by default one image",
    )
    outputs: Names = Field((), description="outputs to keep, in this order; [] for all")

    def _check_rules(self) -> None:
        if not all(name.isidentifier() for name in self.inputs):
            raise ValueError("inputs must hold names of letters, digits and _ that begin with no digit")
        if len(set(self.outputs)) < len(self.outputs):
            raise ValueError("outputs must name each output once")


class FactoryModel(NetworkSection):
    """Callable that builds the network."""

    factory: Reference = Field(
        description='"pkg.module:callable" or "path/to/file.py:callable"',
    )


class TorchvisionModel(NetworkSection):
    """Network of torchvision.models by name: classification, segmentation, single-stage detection."""

    torchvision: str = Field(description="such as resnet18, fcn_resnet50, ssdlite320_mobilenet_v3_large")


class TimmModel(NetworkSection):
    """Network of timm by name; needs the package timm."""

    timm: str = Field(description="such as convnext_tiny")


class OnnxFileModel(Section):
    """ONNX file with its weights."""

    onnx: FilePath = Field(description="path of the .onnx file, in floating point")
    inputs: dict[str, Ints] = Field(
        {}, description="shapes without the batch axis, such as {input: [3, 224, 224]}, for inputs with open axes"
    )
    outputs: Names = Field((), description="outputs to keep, in this order; [] for all")


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


def read_spelling(value: object) -> object:
    """Return the section of a network that is spelled as one text, and anything else unchanged.

    >>> read_spelling("resnet18"), read_spelling("timm:convnext_tiny"), read_spelling("net.py:build")
    ({'torchvision': 'resnet18'}, {'timm': 'convnext_tiny'}, {'factory': 'net.py:build'})
    """
    if not isinstance(value, str):
        return value
    if value.lower().endswith(".onnx"):
        return {"onnx": value}
    kind, colon, name = value.partition(":")
    if colon and kind in NETWORKS:
        return {kind: name}
    return {"factory": value} if colon else {"torchvision": value}


class LoadConfig(Section):
    """Build the network, load its weights strictly, and measure the baseline."""

    stage: Literal["load"]
    model: Annotated[Model, BeforeValidator(read_spelling, json_schema_input_type=Model | str)] = Field(
        description="network: factory, torchvision, timm or onnx; or one text, such as resnet18, timm:convnext_tiny, "
        "file.py:build, net.onnx"
    )
    weights: Annotated[str | None, PathKind.WEIGHTS] = Field(
        None,
        description="safetensors file, torch checkpoint readable with weights_only=True, TorchScript archive, or "
        "torch.export program; pretrained: weights of timm or torchvision; none: seeded initialisation; left out with "
        "model.onnx",
    )
    narrow: bool = Field(
        False,
        description="true: weights of a network pruned by another tool; widths follow from their shapes, and the "
        "narrow network is the baseline",
    )
    rewrites: Literal["measured", "always", "never"] = Field(
        "measured",
        description="rewrite the graph for the runtime, baseline included; measured: only where that is faster",
    )

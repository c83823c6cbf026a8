"""Artifacts that flow between stages: TorchModel until export, OnnxModel after it, Verdict at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from compress.data.preprocessing import Preprocessing
from compress.model.recipe import Recipe
from compress.tasks.base import Metric
from compress.tasks.classification import CLASSIFICATION

if TYPE_CHECKING:  # the planner and the reports handle these types without importing torch
    from torch import nn

Status = Literal["pass", "fail", "inconclusive", "skipped"]
Outcome = Literal["passed", "failed", "inconclusive"]
NetworkKind = Literal["factory", "onnx", "timm", "torchvision"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output.

    Attributes:
        name: Name in the ONNX file.
        shape: Sizes; "batch" stands for the open batch axis.
        dtype: numpy name, such as "float32".
        high: Exclusive upper bound of an integer input; None if unknown. ONNX files do not store it.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"
    high: int | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Signature:
    """Inputs and outputs of a network."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Signature:
        """Rebuild from `dataclasses.asdict` values that went through JSON."""

        def specs(entries: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(e["name"], tuple(e["shape"]), e["dtype"], e.get("high")) for e in entries)

        return cls(specs(values["inputs"]), specs(values["outputs"]))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""

        def plain(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
            named = ({"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype} for spec in specs)
            return [{**one, "high": spec.high} if spec.high else one for one, spec in zip(named, specs, strict=True)]

        return {"inputs": plain(self.inputs), "outputs": plain(self.outputs)}


@dataclass(frozen=True, slots=True)
class ModelMetrics:
    """The measured size, quality and speed of one network.

    Attributes:
        macs: Multiply-accumulates of conv and linear layers at batch 1.
        params: Trainable scalars.
        size_bytes: All files of the ONNX model.
        quality: Metric name -> value in [0, 1], such as {"top1": 0.9173}; measured on the ONNX file.
        latency_ms: {"p50": ..., "p95": ...} in the target runtime.
    """

    macs: int
    params: int
    size_bytes: int
    quality: dict[str, float]
    latency_ms: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, in the layout of `report.json`; MACs or params that could not be counted are None."""
        return {**asdict(self), "macs": self.macs or None, "params": self.params or None}


@dataclass(frozen=True, slots=True)
class FactorySpec:
    """Specification of the baseline's factory.

    Attributes:
        kind: "factory", "onnx", "timm" or "torchvision".
        reference: "pkg.module:callable", "/absolute/file.py:callable", a name of timm or torchvision, or an
            ONNX file, with or without its weights.
        kwargs: Keyword arguments of the callable; for an ONNX file "inputs", the shapes of its open axes.
        inputs: Input name -> {"shape": [...], "dtype": ..., "high": ...} without the batch axis; {} for one image.
        outputs: Names of the kept outputs, in order; () for all.
    """

    UNKNOWN: ClassVar[str] = ""  # reference of a network that was given as an object

    kind: NetworkKind
    reference: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FactorySpec:
        """Rebuild from `dataclasses.asdict` values that went through JSON; keys that older files lack are empty.

        Raises:
            TypeError: A value is of another kind.
        """
        spec = cls(**{**values, "outputs": tuple(values.get("outputs", ()))})
        if not isinstance(spec.reference, str) or not isinstance(spec.kwargs, dict):
            raise TypeError("factory must hold a reference and kwargs")
        return spec

    @classmethod
    def from_model(cls, model: Mapping[str, Any]) -> FactorySpec:
        """Return the specification from the plain values of a `model:` section."""
        (kind,) = (kind for kind in get_args(NetworkKind) if kind in model)
        if kind == "onnx":
            shapes = {name: list(sizes) for name, sizes in model["inputs"].items()}
            several = {name: {"shape": sizes} for name, sizes in shapes.items()} if len(shapes) > 1 else {}
            return cls("onnx", model["onnx"], {"inputs": shapes}, several, tuple(model["outputs"]))
        return cls(kind, model[kind], dict(model["kwargs"]), dict(model["inputs"]), tuple(model["outputs"]))

    def input_specs(self) -> tuple[TensorSpec, ...]:
        """Return the declared inputs, with their batch axis; () for one image."""
        return tuple(
            TensorSpec(name, ("batch", *declared["shape"]), declared.get("dtype", "float32"), declared.get("high"))
            for name, declared in self.inputs.items()
        )


@dataclass(frozen=True, slots=True)
class Baseline:
    """The baseline, measured once by `load`.

    Attributes:
        metrics: Size, quality and speed.
        onnx_path: Exported ONNX file.
        weights_path: Weights (safetensors), for distillation.
    """

    metrics: ModelMetrics
    onnx_path: Path
    weights_path: Path


@dataclass(frozen=True, slots=True)
class TorchModel:
    """A network between stages: eval mode, CPU, contiguous weights.

    Attributes:
        module: The network.
        factory: Specification that builds the baseline.
        recipe: The edits made so far; replaying them on a newly built network yields this structure.
        signature: Inputs and outputs.
        preprocessing: Preprocessing of an image before the network.
        classes: Class names, or ().
        baseline: The baseline's metrics and files.
        rewrites: Names of the graph rewrites for the runtime, applied at each export, the baseline's included.
        precision: "fp32" or "fp16": precision of the files, the baseline's included; the module is float32.
    """

    module: nn.Module
    factory: FactorySpec
    recipe: Recipe
    signature: Signature
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    baseline: Baseline
    rewrites: tuple[str, ...] = ()
    precision: str = "fp32"


@dataclass(frozen=True, slots=True)
class OnnxModel:
    """An exported network.

    Attributes:
        path: The .onnx file; external data lies beside it.
        opset: Version of the default operator set.
        signature: Inputs and outputs.
        reference: The torch network that the file must equal; for a quantised file, `float_path` must equal it.
        float_path: The float file that a quantised file was made from; None for a float file.
        int8_baseline_path: The baseline's file, quantised in the same way; None where latencies are not compared
            with it.
    """

    path: Path
    opset: int
    signature: Signature
    reference: TorchModel
    float_path: Path | None = None
    int8_baseline_path: Path | None = None


@dataclass(frozen=True, slots=True)
class CheckResult:
    """Result of one check of a verification.

    Attributes:
        name: Name of the check, such as "parity" or "min_speedup".
        status: "pass", "fail", "skipped", or "inconclusive" if the data show neither.
        value: Measured value; None if the measurement was not possible.
        limit: Limit of the value; None for an observation.
        unit: Unit of value and limit: "ms", "x", "share", "bytes", "".
        detail: One sentence.
        remedy: Next step of the user after a check that did not pass, or "".
    """

    name: str
    status: Status
    value: float | None
    limit: float | None
    unit: str
    detail: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a verification.

    Attributes:
        checks: Results of all checks.
        required: Names of checks that must not be skipped.
        slim: Metrics of the file.
        baseline: Metrics of the baseline, measured in the same run where that matters (latency).
        details: Plain values for the report (latency samples, parity quantiles, environment).
        metric: Primary metric of the task.
    """

    checks: tuple[CheckResult, ...]
    required: tuple[str, ...]
    slim: ModelMetrics | None
    baseline: ModelMetrics | None
    details: dict[str, Any] = field(default_factory=dict)
    metric: Metric = CLASSIFICATION.main

    @property
    def outcome(self) -> Outcome:
        """Failed if a check failed, a required one was not made, or no check was made; else inconclusive if one is."""
        made = {check.name for check in self.checks if check.status != "skipped"}
        if not made or not made.issuperset(self.required) or any(check.status == "fail" for check in self.checks):
            return "failed"
        return "inconclusive" if any(check.status == "inconclusive" for check in self.checks) else "passed"

    @property
    def passed(self) -> bool:
        """Return whether at least one check was made, all required checks were made, and all made checks passed."""
        return self.outcome == "passed"

    @property
    def open_checks(self) -> tuple[CheckResult, ...]:
        """Checks that keep the verdict from passing: failed, inconclusive, or required and skipped."""
        return tuple(
            check
            for check in self.checks
            if check.status in ("fail", "inconclusive") or (check.status == "skipped" and check.name in self.required)
        )

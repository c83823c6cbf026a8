"""Targets of `compress inspect`: networks by name, with inputs to trace them on.

    FILE.onnx                                the network that is in it, with its weights
    FILE.yaml                                the baseline of a pipeline, its input, limits and target device; with
                                             `narrow: true` at the widths of its weights, which are then read
    torchvision:NAME, timm:NAME              with its own input size, unless another one is given
    file.py:callable, pkg.module:callable    the input must be given

Trained weights are not needed otherwise: prunable groups and latency do not depend on them. A network as built hides
wrong cuts, however: norms pass everything on alike, and the last norm of a residual block or a layer scale starts near
zero, so that nothing a block computes reaches the outputs. It therefore gets weights that differ from channel to
channel, and batch-norm statistics of real activations.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.allocation.widths import Limits
from compress.checkpoint.rebuild import (
    build_module,
    build_narrow,
    fitting_weights,
    load_strict,
    with_one_array,
    without_unread,
)
from compress.config.load import load_pipeline
from compress.config.schema.model import LoadConfig
from compress.config.schema.pipeline import PipelineConfig
from compress.config.schema.prune import CutConfig
from compress.data.batches import evaluation_batches
from compress.data.from_config import Splits
from compress.data.packing import is_packed, row_width
from compress.errors import ConfigValueError, ModelError
from compress.model.adapter import INPUT_NAME, random_inputs, wiring_of
from compress.model.artifacts import FactorySpec, NetworkKind, Signature
from compress.model.modes import eval_mode
from compress.networks.architectures import CHECKPOINTS, count_outputs, find_architecture
from compress.networks.weights import read_weights
from compress.networks.wiring import signature_of
from compress.onnx_file.io import load_onnx, read_signature
from compress.onnx_import.importer import import_onnx
from compress.pruning.groups import BATCH_NORMS
from compress.search.export import conditions_of
from compress.stages.load import factory_spec, with_inputs
from compress.tasks.from_config import open_task
from compress.verification.measurement import Conditions

CUT_LIMITS = Limits(multiple_of=8)
USUAL_CONDITIONS = Conditions()


_IMAGE_AXES = 3
LIBRARIES: tuple[NetworkKind, ...] = ("timm", "torchvision")


@dataclass(frozen=True)
class Network:
    """Network to inspect.

    Attributes:
        module: Network in eval mode, with varied weights, or the weights that its widths follow from.
        example: One input, (1, ...).
        signature: Inputs and outputs of its ONNX file, and of the files of smaller networks made from it.
        limits: Limits on the widths of every channel group.
        conditions: Device and settings for timing its file.
    """

    module: nn.Module
    example: Tensor
    signature: Signature
    limits: Limits = CUT_LIMITS
    conditions: Conditions = USUAL_CONDITIONS


def open_target(target: str, input_shape: tuple[int, ...] | None, overrides: Sequence[str] = ()) -> Network:
    """Build the torch network that a target names.

    Args:
        target: An ONNX file, a pipeline file, "resnet18" (torchvision), "timm:NAME", "file.py:callable",
            "pkg.module:callable", or a checkpoint of a torchvision network.
        input_shape: Shape of one image, without the batch axis.
        overrides: Texts "key=value" as for `--set`, for a pipeline file.

    Raises:
        ConfigValueError: The target is none of these, or its input shape is not known.
        ModelError: The network cannot be built or imported, or does not run on the input.
        ArtifactError: An ONNX file cannot be read.
    """
    if Path(target).suffix == ".onnx":
        return _of_file(Path(target), input_shape)
    if Path(target).suffix in (".yaml", ".yml"):
        return _of_pipeline(load_pipeline(Path(target), overrides).config, input_shape)
    if Path(target).suffix.lower() in CHECKPOINTS:
        spec, module = _of_checkpoint(Path(target))
    else:
        spec = spec_of(target)
        module = build_module(spec)
    named = f"{spec.kind}:{spec.reference}" if spec.kind in LIBRARIES else target
    shape = input_shape or own_input_shape(named, module)
    if shape is None:
        raise ConfigValueError(f"'{target}' needs the shape of one image.", hint="Add --input 3,224,224.")
    return _running(module, spec, shape)


def spec_of(target: str) -> FactorySpec:
    """Return the factory specification of the network that a target names."""
    kind, colon, name = target.partition(":")
    if not colon:
        return FactorySpec("torchvision", target)
    library = next((one for one in LIBRARIES if one == kind), None)
    return FactorySpec("factory", target) if library is None else FactorySpec(library, name)


def _of_checkpoint(path: Path) -> tuple[FactorySpec, nn.Module]:
    """Return the torchvision network whose parameters a checkpoint has, with its weights."""
    state = read_weights(path)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    classes = count_outputs(shapes)
    kwargs = {} if classes is None else {"num_classes": classes}
    spec = FactorySpec("torchvision", find_architecture(shapes, classes), kwargs)
    module = build_module(spec)
    load_strict(module, fitting_weights(spec, path, module), f"'{path}'")
    return spec, module


def own_input_shape(target: str, module: nn.Module) -> tuple[int, ...] | None:
    """Return the image shape of a network of torchvision or timm; None if the library does not state it."""
    library, _, name = target.partition(":")
    if library == "timm":
        settings = getattr(module, "pretrained_cfg", {})
        return tuple(settings["input_size"]) if settings.get("input_size") else None
    if library != "torchvision":
        return None
    from torchvision import models  # heavy, and only needed by those who name a torchvision network

    weights = next(iter(models.get_model_weights(name)), None)
    transforms = weights.transforms() if weights is not None else None
    size = getattr(transforms, "crop_size", None) or getattr(transforms, "resize_size", None)
    if not size or type(transforms).__name__ == "VideoClassification":  # clips have no stated length
        return None
    return 3, size[0], size[-1]


def _of_file(path: Path, input_shape: tuple[int, ...] | None) -> Network:
    inputs = read_signature(load_onnx(path)).inputs
    shape = input_shape or tuple(size for size in inputs[0].shape[1:] if isinstance(size, int))
    if len(inputs) != 1 or len(shape) != len(inputs[0].shape) - 1:
        raise ModelError(
            f"'{path}' must have one input of known sizes for its channels to be looked at, it has "
            f"{'; '.join(f'{one.name} {one.shape}' for one in inputs)}.",
            hint="Give the shape of one image: --input 3,224,224.",
        )
    spec = FactorySpec("onnx", str(path), {"inputs": {inputs[0].name: list(shape)} if input_shape else {}})
    module = import_onnx(path, spec.kwargs["inputs"])
    return _running(module, spec, shape)


def _of_pipeline(config: PipelineConfig, input_shape: tuple[int, ...] | None) -> Network:
    load = config.stages[0]
    assert isinstance(load, LoadConfig)
    spec = factory_spec(load.model)
    if input_shape is None:
        splits = Splits(config.data, open_task(config.task))
        spec = with_inputs(spec, splits.evaluation)
        images, _ = next(evaluation_batches(splits.evaluation.first(1), 1, "nothing"))
        input_shape = tuple(images.shape[1:])
    cut = next((stage for stage in config.stages if isinstance(stage, CutConfig)), None)
    limits = CUT_LIMITS if cut is None else Limits(cut.min_width, cut.max_removed_ratio, cut.multiple_of)
    if load.narrow and load.weights is not None:
        spec, example = _example_of(spec, input_shape)
        narrow, _, _ = build_narrow(spec, Path(load.weights), example)
        return Network(narrow, example, signature_of(narrow, spec, example), limits, conditions_of(config.deploy))
    return _running(build_module(spec), spec, input_shape, limits, conditions_of(config.deploy))


def _running(
    module: nn.Module,
    spec: FactorySpec,
    shape: tuple[int, ...],
    limits: Limits = CUT_LIMITS,
    conditions: Conditions = USUAL_CONDITIONS,
) -> Network:
    """Return a network in plain layers with varied weights, after a run on an input of that shape."""
    spec, example = _example_of(spec, shape)
    plain, _ = without_unread(with_one_array(module, spec, example), example)
    if spec.kind != "onnx":
        vary_weights(plain, example)
    return Network(plain, example, signature_of(plain, spec, example), limits, conditions)


def _example_of(spec: FactorySpec, shape: tuple[int, ...]) -> tuple[FactorySpec, Tensor]:
    """Return a factory specification that declares an input other than an image, and one input of zeros."""
    if len(shape) != _IMAGE_AXES and not spec.inputs:
        spec = replace(spec, inputs={INPUT_NAME: {"shape": list(shape)}})
    return spec, torch.zeros([1, row_width(spec.input_specs())] if is_packed(spec.input_specs()) else [1, *shape])


_IMAGES = 4
_LEAST_SCALE = 1e-2  # a layer scale below this lets nothing of its block through
_LEAST_VARIANCE = 0.05  # of the layer's mean variance: channels that were constant are not to explode on other images


@torch.no_grad()
def vary_weights(module: nn.Module, example: Tensor, seed: int = 0) -> None:
    """Vary the weights of a newly built network from channel to channel, in place.

    Constant parameters get random values. Batch norms get the statistics of random images, slightly shifted. All other
    parameters keep the values of the factory.

    Args:
        module: Newly built network; its training flags are unchanged.
        example: One input, (1, ...); only its shape matters.
        seed: Seed of the random values; the global random state is unchanged.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and parameter.numel() and _is_constant(parameter):
            parameter.copy_(_varied(parameter, name, generator))
    norms = [part for part in module.modules() if isinstance(part, BATCH_NORMS) and part.running_mean is not None]
    wiring = wiring_of(module)
    if wiring is not None and is_packed(wiring.inputs):  # whole numbers among several inputs have limits
        _settle(module, norms, random_inputs(module, example, _IMAGES, seed))
    else:
        _settle(module, norms, torch.randn((_IMAGES, *example.shape[1:]), generator=generator))
    for norm in norms:
        _shift_statistics(norm, generator)


def _is_constant(values: Tensor) -> bool:
    return bool((values == values.reshape(-1)[0]).all())


def _varied(parameter: Tensor, name: str, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(parameter.shape, generator=generator)
    start = float(parameter.reshape(-1)[0])
    if name.rpartition(".")[2] == "bias":
        return start + 0.4 * (drawn - 0.5)
    if parameter.numel() > max(parameter.shape, default=1):  # a kernel that the factory set to zero
        return (drawn - 0.5) * 3.5 / math.sqrt(parameter[0].numel())
    scale = start if _LEAST_SCALE <= abs(start) <= 1 else 1.0
    return drawn.add(0.5).mul(scale)


def _settle(module: nn.Module, norms: Sequence[nn.Module], images: Tensor) -> None:
    """Set the statistics of batch norms to those of the images."""
    momenta = [norm.momentum for norm in norms]
    with torch.random.fork_rng(devices=[]), eval_mode(module):
        for norm in norms:
            norm.train()
            norm.momentum = 1.0  # type: ignore[assignment]
        try:
            module(images)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def _shift_statistics(norm: nn.Module, generator: torch.Generator) -> None:
    mean, variance = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor)
    assert isinstance(variance, Tensor)
    variance.clamp_(min=max(1e-4, _LEAST_VARIANCE * float(variance.mean())))
    mean += 0.2 * variance.sqrt() * (torch.rand(mean.shape, generator=generator) - 0.5)
    variance *= 0.8 + 0.4 * torch.rand(variance.shape, generator=generator)

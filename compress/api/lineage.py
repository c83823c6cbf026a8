"""Lineage of a slim network in memory: its baseline, its recipe, and how it is called.

A network of the user's is copied and brought into the form that stages work with (`Lineage.model`). What is
returned has the user's own `forward` and the same names of parameters. It carries its lineage as an attribute, so that
the next call continues from there, also after the weights have changed in a training loop of the user's own.
"""

from __future__ import annotations

import copy
import inspect
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.checkpoint.rebuild import example_input, load_strict, with_one_array, without_unread, write_weights
from compress.cost.macs import count_macs, count_params
from compress.data.from_config import AS_IT_IS
from compress.data.packing import pack
from compress.errors import ArtifactError, ConfigValueError, ModelError
from compress.model.adapter import INPUT_NAME, as_users_own
from compress.model.artifacts import Baseline, FactorySpec, ModelMetrics, TensorSpec, TorchModel
from compress.networks.factories import require_kind
from compress.networks.wiring import signature_of

ATTRIBUTE = "compress_lineage"
Example = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
_SAMPLES = 2
_IMAGE_AXES = 4


class Files:
    """A temporary folder that is removed with the object.

    Attributes:
        folder: Its path.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="compress-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


@dataclass(frozen=True, eq=False)
class Lineage:
    """Origin of a slim network.

    Attributes:
        model: The slim network in the form that stages work with, and its recipe.
        baseline: The baseline in that form.
        files: Folder of the baseline's files, removed with the last network that needs it.
    """

    model: TorchModel
    baseline: nn.Module
    files: Files

    def __deepcopy__(self, memo: dict[int, Any]) -> Lineage:
        """Return the same object: copies of a network have one lineage."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the lineage out of pickles; `compress.save` writes it."""
        return (_no_lineage, ())


def _no_lineage() -> None:
    return None


def lineage_of(model: nn.Module) -> Lineage | None:
    """Return the lineage of a network that a function of this package returned, else None."""
    found = getattr(unwrap(model), ATTRIBUTE, None)
    return found if isinstance(found, Lineage) else None


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network inside of DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def open_lineage(model: nn.Module, example: Example | None) -> Lineage:
    """Return the lineage of a network, with its present weights; a network without one becomes a baseline.

    Args:
        model: On any device, in any mode; it is not changed.
        example: What the network is called with: one tensor, or several in order or by name. Needed for a baseline.

    Raises:
        ModelError: The network does not run on the example, or returns something other than tensors.
        ArtifactError: The structure of a slim network was changed since it was returned.
        ConfigValueError: A baseline has no example.
    """
    network = unwrap(model)
    require_kind(network, "model must be")
    known = lineage_of(network)
    if known is None:
        if example is None:
            raise ConfigValueError(
                "example must be given for a network that compress has not returned: a tensor that the network is "
                "called with.",
                hint="example=torch.zeros(1, 3, 224, 224)",
            )
        return _baseline(network, example)
    module = copy.deepcopy(known.model.module)
    try:
        load_strict(module, {name: value.detach().cpu() for name, value in network.state_dict().items()}, "The network")
    except ArtifactError as error:
        raise ArtifactError(
            f"The structure of the slim network was changed after compress returned it: {error.message}",
            hint="Train its weights only; change layers before the first call.",
        ) from error
    return replace(known, model=replace(known.model, module=module.eval()))


def _baseline(network: nn.Module, example: Example) -> Lineage:
    specs, rows = _inputs(network, example)
    kind = type(network)
    spec = FactorySpec("factory", f"{kind.__module__}:{kind.__qualname__}", inputs=specs)
    module = copy.deepcopy(network).cpu().eval()
    module.__dict__.pop(ATTRIBUTE, None)
    other = [name for name, value in module.named_parameters() if value.dtype != torch.float32]
    if other:
        raise ModelError(f"Parameters must be float32, '{other[0]}' is {module.get_parameter(other[0]).dtype}.")
    module = with_one_array(module, spec, rows)
    module, recipe = without_unread(module, rows)
    signature = signature_of(module, spec, rows)
    files = Files()
    weights = files.folder / "baseline.safetensors"
    write_weights(module, weights)
    metrics = ModelMetrics(count_macs(module, example_input(signature)), count_params(module), 0, {}, {})
    baseline = Baseline(metrics, files.folder / "baseline.onnx", weights)
    model = TorchModel(module, spec, recipe, signature, AS_IT_IS, (), baseline)
    return Lineage(model, copy.deepcopy(module).requires_grad_(False), files)


def publish(lineage: Lineage, model: TorchModel, like: nn.Module) -> nn.Module:
    """Return a slim network for the user: own forward, lineage, device of the given network, eval mode.

    Args:
        lineage: Of the network that the slim one was made of.
        model: The slim network.
        like: The network that the user gave.
    """
    result = as_users_own(copy.deepcopy(model.module), example_input(model.signature)).requires_grad_(True)
    place = next((value.device for value in unwrap(like).parameters()), torch.device("cpu"))
    kept = replace(lineage, model=replace(model, module=copy.deepcopy(model.module)))
    result.__dict__[ATTRIBUTE] = kept
    return result.to(place).eval()


def input_names(network: nn.Module, count: int) -> tuple[str, ...]:
    """Return the names of the first `count` parameters of a network's forward."""
    takes = inspect.signature(type(network).forward)
    names = [
        name
        for name, one in takes.parameters.items()
        if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    ][1:]
    return tuple(names[:count]) if len(names) >= count else tuple(f"input_{place}" for place in range(count))


def _inputs(network: nn.Module, example: Example) -> tuple[dict[str, dict[str, Any]], Tensor]:
    """Return the declared inputs of a network ({} for one image), and at least two samples as one array."""
    if isinstance(example, Tensor):
        values = {INPUT_NAME: example}
    elif isinstance(example, Mapping):
        values = dict(example)
    else:
        values = dict(zip(input_names(network, len(example)), example, strict=True))
    for name, value in values.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            raise ConfigValueError(f"example must hold tensors with a batch axis, '{name}' is {_kind(value)}.")
    counts = {len(value) for value in values.values()}
    if len(counts) != 1 or 0 in counts:
        raise ConfigValueError(f"example must hold at least one sample, the same number of each input, got {counts}.")
    twice = {name: _two(value.detach().cpu()) for name, value in values.items()}
    if isinstance(example, Tensor) and example.ndim == _IMAGE_AXES and example.is_floating_point():
        return {}, twice[INPUT_NAME].float()
    if isinstance(example, Tensor):
        (name,) = input_names(network, 1)
        twice = {name: twice.pop(INPUT_NAME)}
    specs = {name: _declared(value) for name, value in twice.items()}
    parts = [TensorSpec(name, ("batch", *one["shape"]), one["dtype"], one.get("high")) for name, one in specs.items()]
    rows = pack({name: np.asarray(value) for name, value in twice.items()}, parts)
    return specs, torch.from_numpy(rows)


def _two(value: Tensor) -> Tensor:
    return torch.cat([value, value])[: max(_SAMPLES, len(value))]


def _declared(value: Tensor) -> dict[str, Any]:
    declared: dict[str, Any] = {
        "shape": list(value.shape[1:]),
        "dtype": str(value.dtype).removeprefix("torch.").replace("float64", "float32"),
    }
    if not value.is_floating_point() and value.dtype != torch.bool:
        declared["high"] = int(value.max()) + 1
    return declared


def _kind(value: Any) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__

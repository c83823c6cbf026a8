"""How does a network come to life: factory, weights, and the replay of a recipe?

Only what `model.factory` names is ever imported, and weights are read as data: safetensors, or a torch checkpoint
that `weights_only=True` accepts.
"""

import copy
import inspect
import pickle  # noqa: TID251 - for the exception that torch raises; nothing is loaded with it
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from compress.artifacts import FactorySpec, Signature
from compress.errors import ArtifactError, InternalError, ModelError, NonFinite, RebuildMismatch, StageError
from compress.importing import beside, import_callable
from compress.lowrank.surgery import replace_structure
from compress.pruning.surgery import remove_block, remove_channels
from compress.recipe import Factorize, Recipe, RemoveBlock, RemoveChannels
from compress.registry import closest

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")
PREFIX = "module."


def build_module(spec: FactorySpec) -> nn.Module:
    """Call the factory and return its network in eval mode; the global random state is left as it is.

    Raises:
        ModelError: The factory cannot be imported, raises, or returns no network.
    """
    make = _torchvision_factory(spec) if spec.kind == "torchvision" else import_callable(spec.reference)
    with beside(spec.reference):
        return call_factory(make, spec)


def call_factory(make: Callable[..., Any], spec: FactorySpec) -> nn.Module:
    """Call `make` with the keyword arguments of `spec` and return its network in eval mode.

    Raises:
        ModelError: It raises, or returns no network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            module = make(**spec.kwargs)
        except (Exception, SystemExit) as error:  # the user's code: its error is shown, ours is around it
            raise ModelError(
                f"Factory '{spec.reference}' must build the network with {_call_text(make, spec.kwargs)}, "
                f"got {type(error).__name__}: {error}"
            ) from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"Factory '{spec.reference}' must return a torch.nn.Module, got {type(module).__name__}.")
    return module.eval()


def reinitialized(module: nn.Module, seed: int) -> nn.Module:
    """Return a copy of a network whose layers have drawn their weights anew, as torch does by default.

    Args:
        module: Any network.
        seed: Decides what is drawn; the global random state is left as it is.

    Raises:
        ModelError: A parameter belongs to a part that cannot draw it anew; says which.
    """
    fresh = copy.deepcopy(module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, part in fresh.named_modules():
            reset = getattr(part, "reset_parameters", None)
            if callable(reset):
                reset()
            elif own := [key for key, _ in part.named_parameters(recurse=False)]:
                raise ModelError(
                    f"Every parameter must belong to a layer that can draw it anew (reset_parameters), "
                    f"'{name}' ({type(part).__name__}) cannot: {', '.join(own)}."
                )
    return fresh


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from safetensors or a torch checkpoint without running any code in it.

    A checkpoint that wraps its state dict is unwrapped, and the prefix that DataParallel adds is stripped.

    Raises:
        ArtifactError: The file is missing, corrupt, would have to run code, or holds no state dict.
    """
    if not path.is_file():
        raise ArtifactError(f"Weights file '{path}' does not exist.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise ArtifactError(f"'{path}' must be a safetensors file: {error}") from error
    return _unwrap(_read_checkpoint(path), path)


def write_weights(module: nn.Module, path: Path) -> None:
    """Write a network's parameters and buffers as safetensors.

    Raises:
        OSError: The file system refused; safetensors' own writer hides that behind an error of another kind.
    """
    # clones, because safetensors refuses tensors that share memory
    path.write_bytes(save({name: value.clone().contiguous() for name, value in module.state_dict().items()}))


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load weights, every key and shape matching.

    Raises:
        ArtifactError: Keys are missing, unexpected, or of another shape; says which.
        NonFinite: A weight is NaN or infinite.
    """
    expected = module.state_dict()
    counters = {name for name in expected if name.endswith("num_batches_tracked") and name not in state}
    missing = sorted(set(expected) - set(state) - counters)
    unexpected = sorted(set(state) - set(expected))
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    problems = [
        f"{kind}: {_some(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("other shape", shapes))
        if names
    ]
    if problems:
        raise ArtifactError(
            f"{source} must fit the network exactly; {'; '.join(problems)}.",
            hint="Check model.factory and model.kwargs, such as the number of classes or the depth.",
        )
    broken = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise NonFinite(f"{source} must be finite, NaN or infinity in {_some(broken)}.")
    module.load_state_dict({**{name: expected[name] for name in counters}, **state})


def apply_edits(module: nn.Module, recipe: Recipe, example: Tensor) -> nn.Module:
    """Return `module` with the structure that the recipe's edits give it; the weights do not matter.

    Raises:
        RebuildMismatch: An edit does not fit the network.
    """
    for edit in recipe.edits:
        try:
            if isinstance(edit, RemoveChannels):
                module = remove_channels(module, edit, example)
            elif isinstance(edit, RemoveBlock):
                module = remove_block(module, edit)
            elif isinstance(edit, Factorize):
                replace_structure(module, edit)
            else:
                raise InternalError(f"No surgery for edit {edit!r}.")
        except StageError as error:
            raise RebuildMismatch(
                f"Edit '{edit.kind}' must fit the network that the factory builds: {error.message}"
            ) from error
    return module.eval()


def rebuild(
    spec: FactorySpec, recipe: Recipe, signature: Signature, weights: Path, make: Callable[..., Any] | None = None
) -> nn.Module:
    """Build the untouched network, replay the recipe on it, and load the slim weights strictly.

    Args:
        spec: How the untouched network is built.
        recipe: The edits.
        signature: Inputs and outputs.
        weights: Of the slim network.
        make: Called instead of what `spec` names, with the same keyword arguments.

    Raises:
        ArtifactError: The weights cannot be read.
        ModelError: The factory fails.
        RebuildMismatch: The recipe or the weights do not fit the factory.
    """
    untouched = build_module(spec) if make is None else call_factory(make, spec)
    module = apply_edits(untouched, recipe, example_input(signature))
    state = read_weights(weights)
    try:
        load_strict(module, state, f"'{weights.name}'")
    except ArtifactError as error:
        raise RebuildMismatch(f"The saved weights must fit the replayed network: {error.message}") from error
    return module


def example_input(signature: Signature, batch: int = 1) -> Tensor:
    """Return zeros of the first input's shape."""
    sizes = [size if isinstance(size, int) else batch for size in signature.inputs[0].shape]
    return torch.zeros([batch, *sizes[1:]])


def _read_checkpoint(path: Path) -> Any:
    if path.stat().st_size == 0:
        raise ArtifactError(f"Weights file '{path}' is empty.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of odd pickles; they are an error here or harmless
            return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ArtifactError(
            f"Weights file '{path}' was refused: it is not a plain state dict, reading it could run code"
            f"{f' ({culprit[1]})' if culprit else ''}.",
            hint="Save `model.state_dict()` with safetensors or torch.save and give that file.",
        ) from error
    except Exception as error:  # torch's reader raises anything, down to AssertionError, on a corrupt file
        raise ArtifactError(
            f"Weights file '{path}' is no readable torch checkpoint, got {type(error).__name__}: "
            f"{_first_sentence(error)}"
        ) from error


def _unwrap(loaded: Any, path: Path) -> dict[str, Tensor]:
    for key in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ArtifactError(
            f"'{path}' must hold a state dict (names to tensors), directly or under one of {', '.join(WRAPPERS)}."
        )
    sparse = [str(name) for name, value in loaded.items() if value.layout != torch.strided]
    if sparse:
        raise ArtifactError(f"The tensors in '{path}' must be dense, {_some(sparse)} is not.")
    prefixed = all(str(name).startswith(PREFIX) for name in loaded)
    return {str(name).removeprefix(PREFIX) if prefixed else str(name): value for name, value in loaded.items()}


def _torchvision_factory(spec: FactorySpec) -> Callable[..., Any]:
    from torchvision import models  # heavy, and only needed by those who name a torchvision network

    names = models.list_models()
    if spec.reference not in names:
        raise ModelError(f"torchvision has no network named '{spec.reference}'.", hint=closest(spec.reference, names))
    return lambda **kwargs: models.get_model(spec.reference, weights=None, **kwargs)


def _call_text(make: Callable[..., Any], kwargs: Mapping[str, Any]) -> str:
    given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items()) or "no arguments"
    try:
        return f"{given} (it takes {inspect.signature(make)})"
    except (TypeError, ValueError):
        return given


def _some(names: list[str], count: int = 4) -> str:
    shown = ", ".join(names[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"


def _first_sentence(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0][:200]

"""Construction of a network: factory, weights, replay of a recipe.

    build_module ──load_strict──> with_one_array ──> as `load` leaves it ──apply_edits──> slim
     (networks/)   (networks/)     (wire, prepare)

Code that reads files or calls factories is in `networks/`; this module combines it.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ArtifactError, InternalError, ModelError, NonFinite, RebuildMismatch, StageError
from compress.lowrank.surgery import replace_structure
from compress.model.adapter import example_input
from compress.model.artifacts import FactorySpec, Signature
from compress.model.modes import eval_mode
from compress.model.recipe import Factorize, MergeBlock, Narrow, Recipe, RemoveBlock, RemoveChannels, RemoveUnread
from compress.networks.factories import call_factory
from compress.networks.narrow_weights import load_narrow, require_same
from compress.networks.normalize import prepare
from compress.networks.unused_modules import find_unread, removable, remove_unread
from compress.networks.weights import Conversion, load_strict, read_weights, some, write_weights
from compress.networks.wiring import observe, wire
from compress.networks.zoo import drop_auxiliary, timm_factory, torchvision_factory, without_auxiliary
from compress.onnx_import.importer import build_imported
from compress.pruning.graph import ChannelGraph
from compress.pruning.narrowing import find_removed, named_tensors
from compress.pruning.surgery import merge_block, remove_block, remove_channels
from compress.user_code import import_callable, import_path_of

__all__ = [
    "apply_edits",
    "build_baseline",
    "build_module",
    "build_narrow",
    "call_factory",
    "example_input",
    "fitting_weights",
    "initialized",
    "load_checkpoint",
    "load_strict",
    "read_weights",
    "rebuild",
    "reinitialized",
    "rewound",
    "with_one_array",
    "without_unread",
    "write_weights",
]

_CHECKPOINT = "A checkpoint to rewind to is of the complete network, as load builds it, before any cut."


def build_module(spec: FactorySpec, seed: int = 0) -> nn.Module:
    """Call the factory and return its network in eval mode; the global random state does not change.

    Args:
        spec: Factory of the network.
        seed: Seed of the factory's random numbers, in [0, 2^63).

    Raises:
        ModelError: The factory cannot be imported, raises, or returns no network, or an ONNX file cannot be imported.
        ArtifactError: An ONNX file cannot be read.
    """
    if spec.kind == "onnx":
        return build_imported(Path(spec.reference), spec.kwargs.get("inputs"))
    if spec.kind == "torchvision":
        return call_factory(torchvision_factory(spec.reference), spec, seed)
    if spec.kind == "timm":
        return call_factory(timm_factory(spec.reference), spec, seed)
    make = import_callable(spec.reference)
    with import_path_of(spec.reference):
        return call_factory(make, spec, seed)


def with_one_array(module: nn.Module, spec: FactorySpec, example: Tensor) -> nn.Module:
    """Return a network in the form that the stages work with: one array in, tensors out, plain layers.

    Args:
        module: Network of the factory, with its weights if they matter; changed in place.
        spec: Factory, with the network's inputs and the outputs to keep.
        example: Batch of inputs to run the network on.

    Raises:
        ModelError: The network does not run on the example, or its outputs are no tensors.
    """
    return _in_plain_layers(wire(module, spec, example), spec, example)


def _in_plain_layers(module: nn.Module, spec: FactorySpec, example: Tensor) -> nn.Module:
    if spec.kind == "torchvision":
        drop_auxiliary(module)
    return prepare(module, example)


def build_narrow(spec: FactorySpec, weights: Path, example: Tensor) -> tuple[nn.Module, Recipe, list[Conversion]]:
    """Build a network at the widths of a state dict that is narrower than the factory's network.

    The cut is found twice: in the factory's network, which the state dict belongs to, and in the plain layers that
    recipes are replayed on.

    Args:
        spec: Factory of the network of full width.
        weights: Path of the state dict of the narrow network.
        example: Inputs, (N, ...).

    Returns:
        The narrow network in the form that `load` returns, in eval mode, its recipe (`RemoveUnread`, `Narrow`), and
        the weights that were converted to another type.

    Raises:
        ModelError: The factory fails.
        ArtifactError: The weights cannot be read, or fit no set of widths.
        NonFinite: A weight is NaN or infinite.
        UnsupportedLayer: The network does not compute the same at these widths.
        UntraceableModel: The network does not run.
    """
    source, module = f"'{weights}'", wire(build_module(spec), spec, example)
    state = read_weights(weights, module.state_dict())
    if spec.kind == "torchvision":
        state = without_auxiliary(state, module.state_dict())
    slim, removed, conversions = load_narrow(module, state, example, source)
    slim, recipe = without_unread(_in_plain_layers(slim, spec, example), example)
    if not removed:
        return slim, recipe, conversions
    full = apply_edits(with_one_array(build_module(spec), spec, example), recipe, example)
    graph = ChannelGraph(full, example[:1])
    shapes = {name: tuple(value.shape) for name, value in slim.state_dict().items()}
    edit = Narrow(find_removed(graph, named_tensors(full), shapes, source))
    replayed = apply_edits(full, Recipe((edit,)), example[:1])
    load_strict(replayed, slim.state_dict(), source)
    require_same(full, replayed, graph, edit.removed, example, source)
    return replayed, recipe.then(edit), conversions


def without_unread(module: nn.Module, example: Tensor) -> tuple[nn.Module, Recipe]:
    """Return a network without the modules that no output reads, and that recipe; the same object if all are read.

    Args:
        module: Network that `with_one_array` returned, in eval mode.
        example: Batch of inputs to run the network on.
    """
    with eval_mode(module):
        is_fixed = not observe(module, example).decisions  # else other inputs may need modules that this one skips
    unread = removable(module, find_unread(module, example), example) if is_fixed else ()
    if not unread:
        return module, Recipe()
    edit = RemoveUnread(unread)
    return remove_unread(module, edit, example).eval(), Recipe((edit,))


def build_baseline(spec: FactorySpec, signature: Signature, make: Callable[..., Any] | None = None) -> nn.Module:
    """Return the baseline in the form that `load` returns, with arbitrary weights.

    Args:
        spec: Factory of the baseline.
        signature: Inputs and outputs of the baseline.
        make: Function called instead of the factory in `spec`, with the same keyword arguments.

    Raises:
        ModelError: The factory fails.
    """
    module = build_module(spec) if make is None else call_factory(make, spec)
    return with_one_array(module, spec, example_input(signature))


def reinitialized(module: nn.Module, seed: int) -> nn.Module:
    """Return a copy of a network whose layers have drawn their weights anew, with torch's default initialisation.

    Args:
        module: Any network.
        seed: Seed of the weights; the global random state does not change.

    Raises:
        ModelError: A parameter belongs to a module without `reset_parameters`; the message names the module.
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


def apply_edits(module: nn.Module, recipe: Recipe, example: Tensor) -> nn.Module:
    """Return `module` with the recipe's edits of its structure; the weights of factorised layers are not computed.

    Raises:
        RebuildMismatch: An edit does not fit the network.
    """
    for edit in recipe.edits:
        try:
            if isinstance(edit, RemoveUnread):
                module = remove_unread(module, edit, example)
            elif isinstance(edit, RemoveChannels):
                module = remove_channels(module, edit, example)
            elif isinstance(edit, RemoveBlock):
                module = remove_block(module, edit)
            elif isinstance(edit, MergeBlock):
                module = merge_block(module, edit)
            elif isinstance(edit, Factorize):
                replace_structure(module, edit)
            else:
                raise InternalError(f"No surgery for edit {edit!r}.")
        except StageError as error:
            raise RebuildMismatch(
                f"Edit '{edit.kind}' must fit the network that the factory builds: {error.message}"
            ) from error
    return module.eval()


def rewound(
    spec: FactorySpec, recipe: Recipe, signature: Signature, checkpoint: Path
) -> tuple[nn.Module, list[Conversion]]:
    """Return the slim network with the weights of a checkpoint of the complete network, cut by the recipe's edits.

    Args:
        spec: Factory of the baseline.
        recipe: Edits that only remove: channels, blocks, modules that no output reads.
        signature: Inputs and outputs of the network.
        checkpoint: Parameters and buffers of the baseline network; formats as `read_weights`.

    Returns:
        The network, and the weights of the checkpoint that were converted to another type.

    Raises:
        ArtifactError: The checkpoint cannot be read, or does not fit the network.
        ModelError: The factory fails.
        NonFinite: A weight is NaN or infinite.
        StageError: The recipe factorises a layer or merges a block: the checkpoint has no weights for them.
        RebuildMismatch: The recipe does not fit the factory.

    Source: Frankle et al. 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", arXiv:1912.05671.
    """
    if merged := [edit.block for edit in recipe.edits if isinstance(edit, MergeBlock)]:
        raise StageError(
            f"Weights cannot be rewound through merged blocks, the recipe has merged {some(merged)}.",
            hint="Set weights: inherited, or leave merges out.",
        )
    if factorised := [edit.layer for edit in recipe.edits if isinstance(edit, Factorize)]:
        raise StageError(
            f"Weights cannot be rewound through a low-rank factorisation, the recipe has factorised "
            f"{some(factorised)}.",
            hint="Set weights: inherited, or leave low_rank out (of slim: moves: [channels, blocks]).",
        )
    module, conversions = load_checkpoint(spec, checkpoint)
    example = example_input(signature)
    return apply_edits(with_one_array(module, spec, example), recipe, example), conversions


def load_checkpoint(spec: FactorySpec, checkpoint: Path) -> tuple[nn.Module, list[Conversion]]:
    """Return the baseline network, as its factory built it, with the weights of a checkpoint to rewind to.

    Raises:
        ArtifactError: The checkpoint cannot be read, or does not fit the network; the message names layers and shapes.
        ModelError: The factory fails.
        NonFinite: A weight is NaN or infinite.
    """
    module = build_module(spec)
    state = fitting_weights(spec, checkpoint, module)
    return module, load_strict(module, state, f"Checkpoint '{checkpoint}' of rewind_to", _CHECKPOINT)


def fitting_weights(spec: FactorySpec, path: Path, module: nn.Module) -> dict[str, Tensor]:
    """Read a state dict of a baseline network, without the layers that its library drops after training.

    Raises:
        ArtifactError: The file cannot be read.
    """
    state = read_weights(path, module.state_dict())
    return without_auxiliary(state, module.state_dict()) if spec.kind == "torchvision" else state


def initialized(spec: FactorySpec, seed: int) -> tuple[nn.Module, bool]:
    """Return an untrained network as its factory initialises it, and whether its weights depend on the seed.

    Args:
        spec: Factory of the network.
        seed: Seed of the factory's random numbers; earlier random draws have no effect.

    Returns:
        The network in eval mode, and False if another seed yields the same weights: the factory then fixes a seed of
        its own, or loads weights.

    Raises:
        ModelError: The factory fails, or builds other weights when it is called again with the same seed.
        NonFinite: A weight is NaN or infinite.
    """
    module = build_module(spec, seed)
    state = module.state_dict()
    if broken := [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise NonFinite(
            f"Initial weights of '{spec.reference}' must be finite, NaN or infinity in {some(broken)}.",
            hint="Let the factory initialise every parameter; torch.empty does not.",
        )
    if differing := _differing(state, build_module(spec, seed).state_dict()):
        raise ModelError(
            f"Factory '{spec.reference}' must build the same weights from the same seed, these differ: "
            f"{some(differing)}.",
            hint="Let it draw from torch, numpy.random or random, and not from a generator without a seed.",
        )
    return module, bool(_differing(state, build_module(spec, (seed + 1) % 2**63).state_dict()))


def _differing(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    return [name for name, value in state.items() if name not in other or not torch.equal(value, other[name])]


def rebuild(
    spec: FactorySpec, recipe: Recipe, signature: Signature, weights: Path, make: Callable[..., Any] | None = None
) -> nn.Module:
    """Build the baseline, replay the recipe on it, and load the slim weights strictly.

    Args:
        spec: Factory of the baseline.
        recipe: Edits from the baseline to the slim network.
        signature: Inputs and outputs of the network.
        weights: Path of the slim network's weights.
        make: Function called instead of the factory in `spec`, with the same keyword arguments.

    Raises:
        ArtifactError: The weights cannot be read.
        ModelError: The factory fails.
        RebuildMismatch: The recipe or the weights do not fit the factory.
    """
    module = apply_edits(build_baseline(spec, signature, make), recipe, example_input(signature))
    state = read_weights(weights)
    try:
        load_strict(module, state, f"'{weights.name}'")
    except ArtifactError as error:
        raise RebuildMismatch(f"The saved weights must fit the replayed network: {error.message}") from error
    return module

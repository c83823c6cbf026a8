"""Loading of the weights of a network that another tool pruned into the factory's network of full width."""

from collections.abc import Mapping

from torch import Tensor, nn

from compress.errors import ArtifactError, UnsupportedLayer, attempt, first_line
from compress.networks.weights import Conversion, check_names, load_strict, some
from compress.onnx_file.counting import FIXED_BUFFER
from compress.pruning.graph import ChannelGraph
from compress.pruning.groups import exclusions_by_cause
from compress.pruning.narrowing import FULL_WIDTH, check_narrow, find_removed, named_tensors
from compress.pruning.surgery import cut_out
from compress.pruning.trial import find_cuttable

Removed = dict[str, tuple[int, ...]]


def load_narrow(
    module: nn.Module, state: Mapping[str, Tensor], example: Tensor, source: str
) -> tuple[nn.Module, Removed, list[Conversion]]:
    """Cut a network to the widths of a state dict and load that strictly.

    Args:
        module: Network of full width, in eval mode; its values are overwritten.
        state: Name -> tensor, at most as wide as the network.
        example: Inputs, (N, ...); the first is traced.
        source: Description of the state dict in messages.

    Returns:
        The narrow network, its removed channels by group (empty for a state dict of full width), and the weights
        that were converted to another type.

    Raises:
        ArtifactError: Names are missing or unexpected, or the shapes fit no set of widths.
        NonFinite: A weight is NaN or infinite.
        UnsupportedLayer: The outputs of the network change at these widths.
        UntraceableModel: The network does not run.
    """
    _require_own_layers(module, state, source)
    check_names(module, state, source)
    tensors = named_tensors(module)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    if all(shapes.get(name, tuple(tensor.shape)) == tuple(tensor.shape) for name, tensor in tensors.items()):
        return module, {}, load_strict(module, state, source)
    graph = ChannelGraph(module, example[:1])
    removed = find_removed(graph, tensors, shapes, source)
    slim = cut_out(module, graph, removed).eval()
    conversions = load_strict(slim, state, source)
    require_same(module, slim, graph, removed, example, source)
    return slim, removed, conversions


def _require_own_layers(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Raise ArtifactError for a state dict in which fixed convolutions replace zero-padded shortcuts.

    Their narrow weights depend on the kept channels, which cannot be derived from shapes.
    """
    expected = module.state_dict()
    fixed = [name for name in state if name.rpartition(".")[2] == FIXED_BUFFER and name not in expected]
    if fixed:
        raise ArtifactError(
            f"{source} must hold layers of the factory's network alone, got {some(fixed)}: compress slimmed this "
            "network and wrote zero-padded shortcuts as convolutions. Shapes do not tell which channels they kept.",
            hint="`compress.load(RUN_FOLDER)` rebuilds the network by its recipe; a factory may return that.",
        )


def require_same(
    module: nn.Module, slim: nn.Module, graph: ChannelGraph, removed: Removed, example: Tensor, source: str
) -> None:
    """Raise UnsupportedLayer unless a narrow network has the outputs of its values in the network of full width.

    Args:
        module: Network of full width; its values are overwritten.
        slim: The narrow network, with its own values.
        graph: Channel graph of `module`.
        removed: Group name -> channels that `slim` lacks.
        example: Inputs, (N, ...).
        source: Description of the state dict in messages.
    """
    found = attempt(  # the user's forward pass may fail at other widths
        lambda: check_narrow(module, slim, graph, removed, example),
        lambda error: f"it does not run ({type(error).__name__}: {first_line(error)})",
    )
    if found is None:
        return
    _, excluded = find_cuttable(module, example[:1], skip=frozenset(graph.groups) - frozenset(removed))
    causes = " ".join(exclusions_by_cause(item for item in excluded if item.name in removed))
    raise UnsupportedLayer(
        f"The network must compute the same at the widths of {source} as at full width with the other channels masked: "
        f"{found}.{f' {causes}' if causes else ''}",
        hint=f"Let a factory build the network as narrow as it is. {FULL_WIDTH}",
    )

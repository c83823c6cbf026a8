"""Inputs of the choice of ranks: layers that are not excluded, moments of their inputs, their singular values."""

from collections.abc import Container, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from compress.catalog import closest
from compress.config.schema.low_rank import LowRankConfig
from compress.errors import StageError
from compress.lowrank.factorize import Moments
from compress.lowrank.layers import Positions, layer_spectra
from compress.lowrank.ranks import LayerSpectra
from compress.progress import Progress
from compress.pruning.ranking.elimination import layer_statistics
from compress.search.context import StageContext


def exclude_layers(
    found: Mapping[str, Positions], reasons: Mapping[str, str], patterns: Sequence[str]
) -> tuple[dict[str, Positions], dict[str, str]]:
    """Return the layers that no pattern names, and the others with reasons.

    Args:
        found: Layers that can be factorised.
        reasons: Other layer -> reason why it cannot be factorised.
        patterns: Names of layers to exclude, with wildcards.

    Raises:
        StageError: A pattern matches no layer.
    """
    reasons, excluded = dict(reasons), set[str]()
    names = [*found, *reasons]
    for pattern in patterns:
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            raise StageError(
                f"exclude pattern '{pattern}' must match a convolution or linear layer, it matches none of "
                f"{len(names)}.",
                hint=closest(pattern, names) or f"layers are named {', '.join(names[:5])}.",
            )
        excluded.update(matches)
        reasons.update((name, f"is excluded by '{pattern}'") for name in matches)
    return {name: places for name, places in found.items() if name not in excluded}, reasons


def measure_moments(
    module: nn.Module, found: Container[str], config: LowRankConfig, ctx: StageContext
) -> dict[str, Moments]:
    """Return layer -> second moments of its inputs on calibration images; empty where errors are of kernels."""
    if config.error_of == "kernels":
        return {}
    names = [name for name, _ in module.named_modules() if name in found]
    split = ctx.data.calibration.first(config.score_images)
    moments: dict[str, Moments] = {}
    for stats in layer_statistics(module, names, split, ctx.progress):
        for name, one in stats.items():
            weight = module.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            inputs = weight[0].numel()
            moments[name] = Moments(one.gram[:inputs, :inputs], tuple(weight.shape[1:]))
    return moments


def measure_spectra(
    module: nn.Module,
    found: Mapping[str, Positions],
    moments: Mapping[str, Moments],
    config: LowRankConfig,
    progress: Progress,
) -> list[LayerSpectra]:
    """Return the singular values of each layer, for the schemes that the settings allow.

    Args:
        module: The network.
        found: Its layers that can be factorised.
        moments: Layer -> second moments of its inputs; empty where errors are of kernels.
        config: Settings of the stage.
        progress: Receives progress by layer.
    """
    spectra, with_norms = [], config.allocation == "alds"
    with progress.task("singular values", max(1, len(found))) as task:
        for name, places in found.items():
            layer = module.get_submodule(name)
            spectra.append(layer_spectra(name, layer, places, config.schemes, moments.get(name), with_norms))
            task.advance(1)
    return spectra

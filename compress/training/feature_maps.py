"""Feature maps that two networks have in common, and the loss between them."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.cost.macs import CONVOLUTIONS
from compress.data.batches import evaluation_batches
from compress.data.splits import Split
from compress.errors import ModelError
from compress.model.modes import eval_mode, hooked


class MapPairs:
    """Context manager that records the feature maps of two networks and compares them after both forward passes.

    A feature map is the output of a module with convolutions inside. It is compared if the module of the same name in
    the other network returns the same shape, or the same shape but for removed channels. If nested modules return the
    same tensor, only the outermost is compared.

    Args:
        student: Network that learns.
        teacher: Network that the student is compared with.
        split: At least one image, to find the maps with.
        kept: Module path -> (n,) channels of the teacher's map that the student keeps, if some were removed.

    Raises:
        ModelError: The networks have no common map.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, split: Split, kept: Mapping[str, Tensor] | None = None
    ) -> None:
        images, _ = next(evaluation_batches(split.first(1), 1, "nothing"))
        shapes = [_maps(network, images) for network in (student, teacher)]
        left = kept or {}
        wanted = {name: _narrowed(shape, left.get(name)) for name, shape in shapes[1].items()}
        self.names = tuple(name for name, shape in shapes[0].items() if wanted.get(name) == shape)
        self._left = {name: left[name] for name in self.names if name in left}
        if not self.names:
            raise ModelError(
                "The slim network must have a feature map of the same name and shape as the baseline's for "
                "distillation.features, it has none.",
                hint="Set distillation.features to 0.",
            )
        self._networks = (student, teacher)
        self._kept: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self._hooks = ExitStack()

    def difference(self) -> Tensor:
        """Return the mean over maps of the squared difference, relative to the teacher's mean square."""
        ours, theirs = self._kept
        for name, channels in self._left.items():
            theirs[name] = theirs[name].index_select(1, channels.to(theirs[name].device))
        differences = [
            F.mse_loss(ours[name], theirs[name]) / theirs[name].square().mean().clamp_min(1e-12) for name in self.names
        ]
        ours.clear()
        theirs.clear()
        return torch.stack(differences).mean()

    def __enter__(self) -> "MapPairs":
        for network, kept in zip(self._networks, self._kept, strict=True):
            parts = [(network.get_submodule(name), _keep(kept, name)) for name in self.names]
            self._hooks.enter_context(hooked(after=parts))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()


def at_least_float32(values: Tensor) -> Tensor:
    """Return values of less than 32 bits as float32, others unchanged."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _keep(kept: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(_part: nn.Module, _inputs: object, output: Tensor) -> None:
        kept[name] = at_least_float32(output.clone())  # later layers may change it in place

    return hook


def _narrowed(shape: tuple[int, ...], kept: Tensor | None) -> tuple[int, ...]:
    return shape if kept is None else (shape[0], len(kept), *shape[2:])


def _maps(network: nn.Module, images: Tensor) -> dict[str, tuple[int, ...]]:
    """Return module path -> shape of its feature map for one image; of equal maps, only the outermost module's."""
    found: dict[int, tuple[str, Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_part: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                found[id(output)] = name, output  # an outer part comes after those inside it

        return hook

    parts = [
        (name, part)
        for name, part in network.named_modules()
        if name and any(isinstance(child, CONVOLUTIONS) for child in part.modules() if child is not part)
    ]
    with hooked(after=[(part, watch(name)) for name, part in parts]), torch.no_grad(), eval_mode(network):
        network(images)
    return {name: tuple(output.shape) for name, output in found.values()}

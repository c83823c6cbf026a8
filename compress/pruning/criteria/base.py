"""What is a criterion, and what does it get to look at?"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.attributes import detach_stored
from compress.cost.macs import eval_mode
from compress.errors import UnsupportedLayer
from compress.pruning.groups import ChannelGroup
from compress.tasks.outputs import plain

_CHANNELS_LAST = (nn.Linear, nn.LayerNorm)


@dataclass(frozen=True)
class GradientStats:
    """What one backward pass over each of several batches told about every gate.

    Attributes:
        batches: For each batch and gate layer, (channels,) the derivative of the mean loss by a factor 1 that
            multiplies the channel there.
    """

    batches: tuple[dict[str, Tensor], ...]


class Criterion(Protocol):
    """A score for each channel of a group.

    Attributes:
        name: As in the pipeline file.
        needs_gradients: Whether `scores` gets `GradientStats`.
        comparable: Whether scores of different groups may be ranked together as they are; if not, each group's are
            divided by their mean first.
        treats_equals_equally: Whether equal channels get equal scores (all but random).

    A criterion may also say `orders_by_refit = True`: its scores then decide widths only, and channels go in the order
    of `compress.pruning.elimination`.
    """

    name: ClassVar[str]
    needs_gradients: ClassVar[bool]
    comparable: ClassVar[bool]
    treats_equals_equally: ClassVar[bool]

    def __init__(self, seed: int = 0) -> None: ...

    def scores(self, group: ChannelGroup, stats: GradientStats | None) -> Tensor:
        """Score each channel of `group`.

        Returns:
            (C,) float32, finite. Larger means keep.

        Raises:
            UnsupportedLayer: The group lacks what the criterion looks at.
        """
        ...


def require_producers(group: ChannelGroup) -> None:
    """Raise UnsupportedLayer unless some convolution or linear layer computes the group's channels."""
    if not group.producers:
        raise UnsupportedLayer(f"Group '{group.name}' must have a convolution or linear producer, it has none.")


def cross_entropies(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return (N,) the loss of each image of a classifier, in nats."""
    return F.cross_entropy(outputs, labels, reduction="none")


def collect_gradients(
    module: nn.Module,
    groups: Iterable[ChannelGroup],
    batches: Iterable[tuple[Tensor, Any]],
    images_each: int | None = None,
    losses: Callable[[Any, Any], Tensor] = cross_entropies,
) -> GradientStats:
    """Run forward and backward over labelled batches and record the derivative at every gate.

    Args:
        module: The network; weights, gradients, buffers and training flags are left as they are.
        groups: Whose gates are watched.
        batches: (images, targets) pairs, as large as is fast.
        images_each: Images that one entry of the statistics averages over; None takes a whole batch. The network is
            in eval mode, where images do not influence each other, so small entries cost no more than large ones.
        losses: Of the network's outputs and the targets, (N,); by default the cross-entropy of a classifier.
    """
    gates = {gate.layer for group in groups for gate in group.gates}
    if not gates:
        return GradientStats(())
    entries: list[dict[str, Tensor]] = []
    for images, targets in batches:
        derivatives = _image_derivatives(module, gates, images, targets, losses)
        for chosen in torch.split(torch.arange(len(images)), images_each or len(images)):
            entries.append({name: values[chosen].mean(0) for name, values in derivatives.items()})
    return GradientStats(tuple(entries))


def _image_derivatives(
    module: nn.Module, gates: set[str], images: Tensor, targets: Any, losses: Callable[[Any, Any], Tensor]
) -> dict[str, Tensor]:
    """Return for each gate layer (images, channels) derivatives of each image's own loss by the gates."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in gates}

    def keep(name: str) -> Any:
        def hook(_layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            # an in-place activation may follow: what it overwrites is this alias, not the tensor kept here
            gate_output = output if output.requires_grad else output.detach().requires_grad_(True)
            outputs[name].append(gate_output)
            return gate_output.clone()

        return hook

    handles = [module.get_submodule(name).register_forward_hook(keep(name)) for name in gates]
    try:
        with torch.enable_grad(), eval_mode(module):
            loss = losses(plain(module(images), getattr(module, "output_names", ())), targets).sum()
        kept = [(name, output) for name, tensors in outputs.items() for output in tensors]
        gradients = torch.autograd.grad(loss, [output for _, output in kept], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
        detach_stored(module)
    derivatives: dict[str, Tensor] = {}
    for (name, output), gradient in zip(kept, gradients, strict=True):
        product = torch.zeros_like(output) if gradient is None else output.detach() * gradient
        channels = -1 if isinstance(module.get_submodule(name), _CHANNELS_LAST) else 1
        sums = product.movedim(channels, -1).reshape(len(images), -1, product.shape[channels]).sum(1)
        derivatives[name] = derivatives[name] + sums if name in derivatives else sums
    return derivatives

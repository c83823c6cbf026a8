"""Criteria: scores of channels, orders in which they are removed, and the evidence that both rest on.

evidence   collected once for a network: weights alone, gradients at gates, contributions to readers, ...
scores     one number for each channel, larger = keep; they decide widths, and the order unless `order` says otherwise
ranking    order of removal of a group's units, and the error of the readers at each number of removed units
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import UnsupportedLayer
from compress.model.modes import eval_mode, hooked
from compress.model.tensors import detach_stored
from compress.pruning.groups import ChannelGroup
from compress.tasks.outputs import plain

_CHANNELS_LAST = (nn.Linear, nn.LayerNorm)


@dataclass(frozen=True)
class GradientStats:
    """Derivatives of the loss by every gate, from one backward pass over each of several batches.

    Attributes:
        batches: For each batch and gate layer, (channels,) the derivative of the mean loss by a factor 1 that
            multiplies the channel there.
        is_signed: True if the sign of a derivative matters (`grasp` on an untrained network).
    """

    batches: tuple[dict[str, Tensor], ...]
    is_signed: bool = False


Evidence = Literal["weights", "gate_gradients", "gradient_flow", "parameter_gradients", "contributions"]
Order = Literal["scores", "readers", "loss"]
WidthsBy = Literal["scores", "errors"]


@dataclass(frozen=True)
class Ranking:
    """Order of removal of a group's units.

    Attributes:
        order: (U,) int64, units in the order in which they are removed; arbitrary beyond the largest number to remove.
        errors: (U + 1,) float64, >= 0, rising: error with the first n units of `order` removed, summed over the layers
            that read the group, each relative to the energy of its outputs; constant where `order` is arbitrary.
        scales: (U + 1, U) float32, factor on the weights that read each unit, with the first n removed; None for all 1.
    """

    order: np.ndarray
    errors: np.ndarray
    scales: np.ndarray | None = None


class Criterion(Protocol):
    """Criterion that scores each channel of a group.

    Attributes:
        name: Name in the pipeline file.
        evidence: Kind of evidence that `scores` gets:
            "weights"              None: the layers of the group suffice
            "gate_gradients"       `GradientStats` of the loss
            "gradient_flow"        `GradientStats` of the gradient norm (`gradient_flow.collect_gradient_flow`)
            "parameter_gradients"  `parameter_gradients.ParameterGradients` of the loss
            "contributions"        `pfp.Contributions` to the layers that read a group; no labels
        order: Rule of the order in which channels are removed:
            "scores"   lowest score first
            "readers"  `rank`, from the statistics of the layers that read a group
            "loss"     `rank_by_loss`, from losses of the network with channels masked
        widths_by: Basis of a width's damage: "scores", or the "errors" of the ranking. With "errors", scores are used
            only for groups that cannot be ranked.
        comparable: Whether scores of different groups may be ranked together directly; if not, each group's scores are
            divided by their mean first.
        treats_equals_equally: Whether equal channels get equal scores (all but random).

    Three methods are optional: `damages` (the damage of each number of removed units, if it is not the squared sum of
    their scores), `rank` for the order "readers", `rank_by_loss` for the order "loss".
    """

    name: ClassVar[str]
    evidence: ClassVar[Evidence]
    order: ClassVar[Order]
    widths_by: ClassVar[WidthsBy]
    comparable: ClassVar[bool]
    treats_equals_equally: ClassVar[bool]

    def __init__(self, seed: int = 0) -> None: ...

    def scores(self, group: ChannelGroup, stats: Any) -> Tensor:
        """Score each channel of `group`.

        Args:
            group: C coupled channels.
            stats: The evidence, of the kind that `evidence` names.

        Returns:
            (C,) float32, finite. Larger means keep.

        Raises:
            UnsupportedLayer: The group lacks the layers that the criterion reads.
        """
        ...


class RanksByReaders(Criterion, Protocol):
    """A criterion with the order "readers"."""

    def rank(self, group: ChannelGroup, stats: Mapping[str, Any], most: int) -> Ranking:
        """Rank the units of a group whose readers can all be refitted.

        Args:
            group: C channels in `parts` equal parts; a unit is one channel of each part.
            stats: `compress.pruning.ranking.elimination.ReaderStats` of each of its readers.
            most: Largest number of units to remove.
        """
        ...


class RanksByLoss(Criterion, Protocol):
    """A criterion with the order "loss"."""

    def rank_by_loss(self, group: ChannelGroup, loss_of: Callable[[Tensor], float], most: int) -> Ranking:
        """Rank the units of a group by losses of the complete network.

        Args:
            group: C channels in `parts` equal parts.
            loss_of: (C,) float32 factors on the weights that read each channel -> mean loss on one fixed batch.
            most: Largest number of units to remove.
        """
        ...


class HasDamages(Criterion, Protocol):
    """A criterion with its own damage of each number of removed units."""

    def damages(self, scores: np.ndarray) -> np.ndarray:
        """Return (U + 1,) float64, >= 0, rising: the damage of removing the n lowest of (U,) unit scores."""
        ...


def gate_sum(group: ChannelGroup, entry: Mapping[str, Tensor]) -> Tensor:
    """Return (C,) the signed sum over all gates of each channel, from one entry of `GradientStats`."""
    total = torch.zeros(group.width)
    for gate in group.gates:
        total.index_add_(0, gate.channels, entry[gate.layer][gate.slots])
    return total


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
        groups: Groups whose gates are watched.
        batches: (images, targets) pairs, as large as is fast.
        images_each: Images that one entry of the statistics averages over; None for a full batch. The network is
            in eval mode, where images do not influence each other, so small entries cost no more than large ones.
        losses: Loss of each image, (N,), from the network's outputs and the targets; by default cross-entropy.
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
            # an in-place activation may follow: it overwrites the returned clone, not the tensor kept here
            gate_output = output if output.requires_grad else output.detach().requires_grad_(True)
            outputs[name].append(gate_output)
            return gate_output.clone()

        return hook

    try:
        with hooked(after=[(module.get_submodule(name), keep(name)) for name in gates]):
            with torch.enable_grad(), eval_mode(module):
                loss = losses(plain(module(images), getattr(module, "output_names", ())), targets).sum()
            kept = [(name, output) for name, tensors in outputs.items() for output in tensors]
            gradients = torch.autograd.grad(loss, [output for _, output in kept], allow_unused=True)
    finally:
        detach_stored(module)
    derivatives: dict[str, Tensor] = {}
    for (name, output), gradient in zip(kept, gradients, strict=True):
        product = torch.zeros_like(output) if gradient is None else output.detach() * gradient
        channels = -1 if isinstance(module.get_submodule(name), _CHANNELS_LAST) else 1
        sums = product.movedim(channels, -1).reshape(len(images), -1, product.shape[channels]).sum(1)
        derivatives[name] = derivatives[name] + sums if name in derivatives else sums
    return derivatives

"""Gradients of the loss by weights: the evidence of criteria that score single weights."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.model.modes import eval_mode
from compress.model.tensors import detach_stored
from compress.pruning.criteria.base import cross_entropies
from compress.tasks.outputs import plain


@dataclass(frozen=True)
class ParameterGradients:
    """Gradients of the loss, in eval mode.

    Attributes:
        mean: Parameter name -> gradient of the mean loss over all images, in the parameter's shape.
        squares: Parameter name -> mean over batches of the squared gradient of a batch's mean loss, in the parameter's
            shape. With batches of one image, it is the diagonal of the empirical Fisher matrix.
    """

    mean: dict[str, Tensor]
    squares: dict[str, Tensor]


def collect_parameter_gradients(
    module: nn.Module,
    batches: Iterable[tuple[Tensor, Any]],
    losses: Callable[[Any, Any], Tensor] = cross_entropies,
) -> ParameterGradients:
    """Run each batch forward and backward and record the gradients of all parameters.

    Args:
        module: The network; weights, gradients, buffers and training flags are left as they are.
        batches: (images, targets) pairs; one image each for squares of single images.
        losses: Loss of each image, (N,), from the network's outputs and the targets.
    """
    parameters = {name: one for name, one in module.named_parameters() if one.is_floating_point()}
    frozen = [one for one in parameters.values() if not one.requires_grad]
    mean = {name: torch.zeros_like(one) for name, one in parameters.items()}
    squares = {name: torch.zeros_like(one) for name, one in parameters.items()}
    seen = batches_seen = 0
    try:
        for one in frozen:
            one.requires_grad_(True)
        with torch.enable_grad(), eval_mode(module):
            for images, targets in batches:
                loss = losses(plain(module(images), getattr(module, "output_names", ())), targets).mean()
                for name, gradient in zip(
                    parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True), strict=True
                ):
                    if gradient is not None:
                        mean[name].add_(gradient, alpha=len(images))
                        squares[name].add_(gradient.square())
                seen, batches_seen = seen + len(images), batches_seen + 1
    finally:
        for one in frozen:
            one.requires_grad_(False)
        detach_stored(module)
    for values, count in ((mean, seen), (squares, batches_seen)):
        for total in values.values():
            total.div_(max(count, 1))
    return ParameterGradients(mean, squares)

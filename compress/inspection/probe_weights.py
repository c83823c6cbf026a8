"""With which weights does a network that was never trained show that a cut of it went wrong?

As built, many networks hide it: norms pass everything on alike, and the last norm of a residual block or a layer scale
starts at (nearly) zero, so that nothing a block computes reaches the outputs. Weights that differ from channel to
channel, and batch-norm statistics of what really arrives, let every channel count.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compress.cost.macs import eval_mode
from compress.data.packing import is_packed
from compress.model.adapter import random_inputs, wiring_of
from compress.pruning.groups import BATCH_NORMS

_IMAGES = 4
_LEAST_SCALE = 1e-2  # a layer scale below this lets nothing of its block through
_LEAST_VARIANCE = 0.05  # of the layer's mean variance: channels that were constant are not to explode on other images


@torch.no_grad()
def vary_weights(module: nn.Module, example: Tensor, seed: int = 0) -> None:
    """Give every channel of a newly built network a weight of its own, in place.

    Parameters that are still one and the same number are drawn anew; batch norms get the statistics of random images,
    a little shifted. All else stays as the factory drew it.

    Args:
        module: As built; its training flags stay as they are.
        example: One input, (1, ...); only its shape matters.
        seed: Decides what is drawn; the global random state is left as it is.
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
    if parameter.numel() > max(parameter.shape, default=1):  # a kernel, which a factory has set to zero
        return (drawn - 0.5) * 3.5 / math.sqrt(parameter[0].numel())
    scale = start if _LEAST_SCALE <= abs(start) <= 1 else 1.0
    return drawn.add(0.5).mul(scale)


def _settle(module: nn.Module, norms: Sequence[nn.Module], images: Tensor) -> None:
    """Let batch norms take the statistics of the images."""
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

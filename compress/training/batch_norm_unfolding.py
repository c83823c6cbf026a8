"""Batch norms for training networks whose own batch norms were folded into convolutions, as ONNX exporters do.

    conv(w, b)  --unfolded-->  conv(w / n), batch norm  --training-->  --folded-->  conv(w', b')

n is the norm of each filter, so that filters have a norm of 1 at any scale of the images. The batch norm has the mean
and variance of the convolution's outputs on calibration images, and a scale and shift that restore these outputs. In
eval mode the network computes the same as before; in training it is as stable as the original. Folding is exact.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from compress.data.batches import evaluation_batches
from compress.data.splits import Split
from compress.model.modes import hooked

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
IMAGES = 128
_LEAST_NORM = 1e-12


class UnfoldedConv(nn.Module):
    """A convolution and the batch norm behind it.

    Args:
        conv: Convolution with a bias, not modified.
        mean: (C,) mean of the convolution's outputs.
        variance: (C,) variance of the convolution's outputs.
    """

    def __init__(self, conv: nn.Conv2d, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        assert conv.bias is not None
        norms = conv.weight.detach().flatten(1).norm(dim=1).clamp_min(_LEAST_NORM)
        self.conv = copy.deepcopy(conv)
        self.conv.bias = None
        self.norm = nn.BatchNorm2d(conv.out_channels)
        with torch.no_grad():
            self.conv.weight.copy_(conv.weight / _by_filter(norms))
            running_mean, running_var = _running(self.norm)
            running_mean.copy_((mean - conv.bias) / norms)
            running_var.copy_(variance / norms.square())
            self.norm.weight.copy_((running_var + self.norm.eps).sqrt() * norms)
            self.norm.bias.copy_(mean)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H, W) normalised outputs."""
        result: Tensor = self.norm(self.conv(x))
        return result

    @torch.no_grad()
    def fold_into(self, conv: nn.Conv2d) -> None:
        """Set a convolution's weights and bias so that it computes the same as this module in eval mode."""
        assert conv.bias is not None
        running_mean, running_var = _running(self.norm)
        scale = self.norm.weight / (running_var + self.norm.eps).sqrt()
        conv.weight.copy_(self.conv.weight * _by_filter(scale))
        conv.bias.copy_(self.norm.bias - running_mean * scale)


def can_unfold(module: nn.Module) -> bool:
    """Return whether a network has convolutions with biases, and no norms."""
    parts = list(module.modules())
    return not any(isinstance(part, NORMS) for part in parts) and any(_is_foldable(part) for part in parts)


def unfolded(module: nn.Module, images: Split) -> nn.Module:
    """Return a copy of a network with batch norms behind its convolutions, in eval mode.

    Two kinds of convolutions get none: those with one output value per image and channel, as a batch has too few
    values of it, and those called more than once.

    Args:
        module: The network, not modified.
        images: Split whose first images determine the statistics.
    """
    changed = copy.deepcopy(module)
    for name, (mean, variance) in _statistics(changed, images).items():
        parent, _, last = name.rpartition(".")
        part = UnfoldedConv(_conv(changed, name), mean, variance).eval()
        setattr(changed.get_submodule(parent), last, part)
    return changed


def folded(module: nn.Module, like: nn.Module) -> nn.Module:
    """Return a network without batch norms that computes the same in eval mode as one with them.

    Args:
        module: Network that `unfolded` returned, trained since; not modified.
        like: Network that `unfolded` was given; not modified.
    """
    changed = copy.deepcopy(like)
    changed.load_state_dict(module.state_dict(), strict=False)  # all but the convolutions, whose names differ
    for name, part in module.named_modules():
        if isinstance(part, UnfoldedConv):
            part.fold_into(_conv(changed, name))
    return changed


def _statistics(module: nn.Module, images: Split) -> dict[str, tuple[Tensor, Tensor]]:
    """Return name of convolution -> (C,) mean and variance of its outputs."""
    sums: dict[str, list[Tensor]] = {}
    calls: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_part: nn.Module, _inputs: Any, output: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            values = output.double()
            count = torch.tensor(float(values.numel() // values.shape[1]))
            found = [count, values.sum((0, 2, 3)), values.square().sum((0, 2, 3))]
            if output.shape[2] * output.shape[3] > 1:
                sums[name] = (
                    [one + other for one, other in zip(sums[name], found, strict=True)] if name in sums else found
                )

        return hook

    parts = {name: part for name, part in module.named_modules() if _is_foldable(part)}
    batches = 0
    with hooked(after=[(part, watch(name)) for name, part in parts.items()]), torch.no_grad():
        for inputs, _ in evaluation_batches(images.first(IMAGES), 32, "nothing"):
            module.eval()(inputs)
            batches += 1
    found = {}
    for name, (count, total, squares) in sums.items():
        if calls[name] == batches:
            mean = total / count
            found[name] = mean.float(), (squares / count - mean.square()).clamp_min(0).float()
    return found


def _is_foldable(part: nn.Module) -> bool:
    return type(part) is nn.Conv2d and part.bias is not None


def _conv(module: nn.Module, name: str) -> nn.Conv2d:
    part = module.get_submodule(name)
    assert isinstance(part, nn.Conv2d)
    return part


def _by_filter(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _running(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var

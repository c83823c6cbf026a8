"""How many multiply-accumulates and parameters does a torch network have?

MACs are those of convolution and linear layers for one image: no bias, no normalisation, no activation.
`cost/onnx_graph.py` counts the same from an ONNX file by other means; the two must agree.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
COUNTED = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)


def count_macs(module: nn.Module, example: Tensor) -> int:
    """Return the MACs of one image.

    Args:
        module: Any network.
        example: One input, (1, C, H, W).
    """
    return sum(layer_macs(module, example).values())


def layer_macs(module: nn.Module, example: Tensor) -> dict[str, int]:
    """Return MACs for one image by layer name, in definition order; a layer used twice counts twice.

    Args:
        module: Any network; its training flags and buffers are left as they are.
        example: One input, (1, C, H, W).
    """
    return _count_calls(module, example, _call_macs)


def count_layer_weights(module: nn.Module, example: Tensor) -> int:
    """Return the scalars that one image is multiplied by: kernels without biases; a layer used twice counts twice.

    Args:
        module: Any network; its training flags and buffers are left as they are.
        example: One input, (1, C, H, W).
    """
    return sum(_count_calls(module, example, lambda layer, *_: layer.weight.numel()).values())  # type: ignore[operator,union-attr]


def _count_calls(
    module: nn.Module, example: Tensor, of_call: Callable[[nn.Module, Tensor, Tensor], int]
) -> dict[str, int]:
    """Return by layer name the sum of what one call of the layer comes to, over its calls for one input."""
    names: dict[nn.Module, str] = {part: name for name, part in module.named_modules() if isinstance(part, COUNTED)}
    counts = dict.fromkeys(names.values(), 0)

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        first = next(value for value in tree_leaves(output) if isinstance(value, Tensor))  # some return several
        counts[names[layer]] += of_call(layer, inputs[0], first)

    handles = [layer.register_forward_hook(count) for layer in names]
    try:
        with torch.no_grad(), eval_mode(module):
            module(example)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def count_params(module: nn.Module) -> int:
    """Return the number of trainable scalars; shared parameters count once."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Switch to eval mode and give every part its own training flag back at the end."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _call_macs(layer: nn.Module, image: Tensor, output: Tensor) -> int:
    if isinstance(layer, nn.Linear):
        return output.numel() // output.shape[0] * layer.in_features
    weight = layer.weight
    assert isinstance(weight, Tensor)
    per_position = weight[0].numel()
    positions = image if isinstance(layer, TRANSPOSED) else output
    return positions.numel() // positions.shape[0] * per_position

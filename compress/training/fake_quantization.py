"""Quantisation-aware training: weights and inputs of layers are rounded to 8 bits in the forward pass.

Rounding has no useful gradient. It is passed over, and values outside of the range get none (Jacob et al. 2018,
arXiv:1712.05877). Ranges are those of the present batch, so that a run has no state besides the weights. The scales of
weights do not depend on a batch norm behind them where each output channel has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_LAYERS: dict[Any, int] = {  # function -> axis of the output channels in its weight
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d, F.linear), 0),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), 1),
}
_SMALLEST = 1e-12  # of a scale: a tensor of zeros has none


@dataclass(frozen=True, slots=True)
class Int8Rounding:
    """Rounding of a quantised file, as its `quantize` stage makes it.

    Attributes:
        per_channel: Whether each output channel of a weight has its own scale.
        reduce_range: Whether weights have 7 bits.
        has_signed_weights: Whether weights are int8 around 0, else uint8 with a zero point.
        has_signed_activations: Whether activations are int8 around 0, else uint8 with a zero point.
        exclude: Patterns of layers that stay float; * matches any text.
    """

    per_channel: bool = True
    reduce_range: bool = False
    has_signed_weights: bool = True
    has_signed_activations: bool = False
    exclude: tuple[str, ...] = ()

    def floats(self, module: nn.Module) -> set[int]:
        """Return the identities of the weights that stay float."""
        excluded = [
            part for name, part in module.named_modules() if any(fnmatchcase(name, one) for one in self.exclude)
        ]
        weights = [getattr(part, "weight", None) for part in excluded]  # containers and activations have none
        return {id(weight) for weight in weights if isinstance(weight, Tensor)}


class FakeQuantization(TorchFunctionMode):
    """Context manager in which convolutions and linear layers compute with rounded weights and inputs.

    Args:
        rounding: The rounding.
        floats: Identities of the weights that stay float (`Int8Rounding.floats`).
    """

    def __init__(self, rounding: Int8Rounding, floats: Iterable[int] = ()) -> None:
        super().__init__()
        self._rounding, self._floats = rounding, frozenset(floats)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, with rounded tensors if it is a layer."""
        given = dict(kwargs or {})
        axis = _LAYERS.get(func)
        if axis is None:
            return func(*args, **given)
        names = ("input", "weight")
        found = {**dict(zip(names, args, strict=False)), **{name: given[name] for name in names if name in given}}
        inputs, weight = found["input"], found["weight"]
        if id(weight) in self._floats:
            return func(*args, **given)
        rest = {name: value for name, value in given.items() if name not in names}
        return func(self._round_inputs(inputs), self._round_weight(weight, axis), *args[2:], **rest)

    def _round_inputs(self, inputs: Tensor) -> Tensor:
        return round_tensor(inputs, 8, is_signed=self._rounding.has_signed_activations)

    def _round_weight(self, weight: Tensor, axis: int) -> Tensor:
        bits = 7 if self._rounding.reduce_range else 8
        return round_tensor(
            weight, bits, is_signed=self._rounding.has_signed_weights, axis=axis if self._rounding.per_channel else None
        )


def round_tensor(values: Tensor, bits: int, *, is_signed: bool, axis: int | None = None) -> Tensor:
    """Round values to the nearest of 2**bits levels between their smallest and largest; 0 is always a level.

    Args:
        values: Float tensor of any shape.
        bits: Number of bits.
        is_signed: True for levels around 0 (zero point 0), else for levels over the whole range.
        axis: Axis whose entries have a range each; None for one range.

    Returns:
        Values of the same shape, with the gradient of the identity inside of the range.

    >>> round_tensor(torch.tensor([0.0, 0.4, 1.0]), 1, is_signed=False)
    tensor([0., 0., 1.])
    """
    with torch.no_grad():
        others = None if axis is None else [one for one in range(values.ndim) if one != axis]
        ends = torch.aminmax(values) if others is None else (values.amin(others), values.amax(others))
        low, high = ends[0].float().clamp(max=0), ends[1].float().clamp(min=0)
        if is_signed:
            least, most = -(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1
            scale = (torch.maximum(-low, high) / most).clamp(min=_SMALLEST)
            zero = torch.zeros_like(scale, dtype=torch.int32)
        else:
            least, most = 0, 2**bits - 1
            scale = ((high - low) / most).clamp(min=_SMALLEST)
            zero = (-low / scale).round().to(torch.int32)
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(values, scale, zero, least, most)
    return torch.fake_quantize_per_channel_affine(values, scale, zero, axis, least, most)

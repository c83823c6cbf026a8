"""Facts about channels that operations reveal, written to the trace.

same        two labels of one channel: the two sides of a sum, a convolution's output and its batch norm
tied        two labels that are removed together though they are different channels: position 3 of every part of a
            grouped convolution
frozen      labels that cannot be removed, with the reason: a softmax over channels, an unknown operation
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from compress.pruning.tracing.call import Call
from compress.pruning.tracing.record import Shaped, Sized, Trace, is_labelled, of_channels


class Facts:
    """Recorder of facts about channels in a trace.

    Args:
        trace: Trace that facts are added to.
        paths: Paths of the modules whose code is running, innermost last.
    """

    def __init__(self, trace: Trace, paths: Sequence[str]) -> None:
        self.trace = trace
        self._paths = paths
        self._layer_outputs: Any = WeakIdKeyDictionary()  # value -> the weight that computed it, and its module's path

    @property
    def place(self) -> str:
        """Path of the module whose code is running."""
        return self._paths[-1]

    def match(self, one: Tensor, other: Tensor) -> None:
        """Record that labels at the same position are one channel, wherever both belong to a channel."""
        self.trace.same.extend(_pairs(one, other))

    def join(self, one: Tensor, other: Tensor) -> None:
        """Note that two vectors of labels are the same channels; a channel without a counterpart is frozen."""
        self.match(one, other)
        reason = f"it meets values that follow no channel, in {where(self.place)}"
        self.freeze(one[(one >= 0) & (other < 0)], reason)
        self.freeze(other[(one < 0) & (other >= 0)], reason)

    def tie(self, one: Tensor, other: Tensor) -> None:
        """Record that labels at the same position are removed together."""
        self.trace.tied.extend(_pairs(one, other))

    def require(self, own: Tensor, source: Tensor) -> None:
        """Note that each channel in `own` is removed with the channel in `source` that it is computed from."""
        self.tie(own, source)
        self.freeze(own[source < 0], f"it is computed from values that follow no channel, in {where(self.place)}")

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Note that channels cannot be removed."""
        channels = of_channels(labels)
        if len(channels):
            self.trace.frozen.append((channels, reason))

    def mix(self, labels: Tensor, call: Call) -> None:
        """Note that an operation mixes channels in a way that a cut would change."""
        if is_labelled(labels):
            self.freeze(labels, f"its channels are mixed by '{call.name}' in {where(self.place)}")

    def note_size(self, *labels: Tensor) -> None:
        """Note that the running code may contain numbers of channels."""
        self.trace.sized.append(Sized(self.place, tuple(of_channels(one) for one in labels)))

    def note_shape(self, labels: Tensor, shape: Sequence[int], dim: int) -> None:
        """Note that the running code may contain the sizes of a value, one of which is a number of channels.

        Args:
            labels: Labels of the channels along `dim`.
            shape: Sizes of the value.
            dim: Axis of the value that shrinks with its channels.
        """
        self.trace.shaped.append(Shaped(self.place, tuple(shape), dim, of_channels(labels)))

    def note_layer(self, output: Tensor, weight: Tensor) -> None:
        """Note that a layer with this weight computed a value."""
        self._layer_outputs[output] = (weight, self.place)

    def note_norm(self, value: Tensor, parameter: Tensor) -> None:
        """Note that a norm reads a value."""
        found = self._layer_outputs.get(value)
        if found is not None:
            self.trace.behind.append((found, (parameter, self.place)))


def where(place: str) -> str:
    """Return a module's path as messages name it."""
    return f"'{place}'" if place else "the network's own forward pass"


def _pairs(one: Tensor, other: Tensor) -> list[Tensor]:
    """Return a list of the (2, n) pairs of different channel labels; empty without such pairs."""
    chosen = (one >= 0) & (other >= 0) & (one != other)
    return [torch.stack([one[chosen], other[chosen]])] if bool(chosen.any()) else []

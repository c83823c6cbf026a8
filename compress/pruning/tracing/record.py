"""What does one watched forward pass tell about the channels of a network's parameters?"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

OUTPUTS = "its channels are the network's outputs"


@dataclass(frozen=True)
class Axis:
    """The outputs ("out"), inputs ("in") or scaled channels ("scale") of a parameter or buffer.

    Attributes:
        tensor: The parameter.
        role: What its places are.
        dim: Which dimension of the tensor holds them.
        size: How many there are; more than the dimension has where a grouped convolution keeps one part's only.
        start: The label of the first.
    """

    tensor: Tensor
    role: str
    dim: int
    size: int
    start: int

    @property
    def labels(self) -> Tensor:
        """(size,) the labels of its places."""
        return torch.arange(self.start, self.start + self.size)

    def slots(self, places: Tensor) -> Tensor:
        """Return the indices along `dim` of the places given by their numbers."""
        return places % self.tensor.shape[self.dim]


@dataclass(frozen=True)
class Sized:
    """Somewhere in a module's code where a number of channels is or may be written down.

    Attributes:
        module: Its path.
        labels: The places whose numbers stand there, one after the other.
    """

    module: str
    labels: tuple[Tensor, ...]


@dataclass(frozen=True)
class Shaped:
    """Somewhere in a module's code where the sizes of a value are or may be written down.

    Attributes:
        module: Its path.
        shape: The sizes.
        dim: The axis that channels lie along.
        labels: Those channels.
    """

    module: str
    shape: tuple[int, ...]
    dim: int
    labels: Tensor


@dataclass(frozen=True)
class Counted:
    """Multiply-accumulates that follow numbers of channels.

    Attributes:
        module: Path of the module whose code multiplies.
        macs: With all channels.
        labels: For each number that `macs` is proportional to, the places that it counts; two at most.
    """

    module: str
    macs: int
    labels: tuple[Tensor, ...]


@dataclass
class Trace:
    """What one forward pass told.

    Attributes:
        axes: In the order of their labels.
        same: Pairs of labels, each (2, n).
        tied: Likewise.
        frozen: Labels and the reason.
        behind: Weight and the norm's parameter that its outputs go to directly, each with the path of the module whose
            code uses it.
        norm_groups: Module path of each group norm -> labels of the channels it normalises.
        sized: Where numbers of channels may be written down.
        shaped: Where sizes of whole values may be written down.
        padded: Module paths whose code puts zero channels around others.
        summed: Labels of channels that a sum of two feature maps is of.
        maps: Module path -> (C,) labels of the channels of the feature map that it returned last.
        counted: Products whose MACs follow numbers of channels.
        multiplied: Parameters that values are multiplied by, by identity.
    """

    axes: list[Axis] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)
    tied: list[Tensor] = field(default_factory=list)
    frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    behind: list[tuple[tuple[Tensor, str], tuple[Tensor, str]]] = field(default_factory=list)
    norm_groups: list[tuple[str, Tensor]] = field(default_factory=list)
    sized: list[Sized] = field(default_factory=list)
    shaped: list[Shaped] = field(default_factory=list)
    padded: list[str] = field(default_factory=list)
    summed: list[Tensor] = field(default_factory=list)
    maps: dict[str, Tensor] = field(default_factory=dict)
    counted: list[Counted] = field(default_factory=list)
    multiplied: set[int] = field(default_factory=set)

    @property
    def size(self) -> int:
        """How many labels there are."""
        return self.axes[-1].start + self.axes[-1].size if self.axes else 0

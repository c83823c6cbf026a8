"""What is known of a value while a network is built from a file?

    Fixed      known before any image is: weights, constants, sizes, and everything computed from those alone
    Computed   the output of an operation on images: a node of the graph that is built, and its shapes

Sizes may depend on the number of images. Therefore everything is followed for two made-up numbers of images at once,
`PROBES`; what differs between the two depends on that number. They are large primes so that no width of a layer is
likely to be taken for one of them.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor, fx

PROBES = (11, 13)


class Refused(Exception):
    """A node that cannot be built; its text says why, without naming the node."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """A value that no image changes.

    Attributes:
        name: In the file.
        arrays: Its value for each number of images in `PROBES`.
    """

    name: str
    arrays: tuple[np.ndarray, ...]

    @classmethod
    def constant(cls, name: str, array: np.ndarray) -> "Fixed":
        """Return a value that is the same for any number of images; floating-point numbers become float32."""
        kept = as_float32(array)
        return cls(name, (kept,) * len(PROBES))

    @property
    def is_constant(self) -> bool:
        """Whether it is the same for any number of images."""
        first, *others = self.arrays
        return all(other is first or np.array_equal(first, other) for other in others)

    @property
    def array(self) -> np.ndarray:
        """The value.

        Raises:
            Refused: It depends on the number of images.
        """
        if not self.is_constant:
            raise Refused(f"'{self.name}' must not depend on the number of images")
        return self.arrays[0]


@dataclass(frozen=True, slots=True)
class Computed:
    """A value that images change.

    Attributes:
        name: In the file.
        node: Computes it.
        probes: A tensor without data for each number of images in `PROBES`: shape and dtype.
    """

    name: str
    node: fx.Node
    probes: tuple[Tensor, ...]

    @property
    def rank(self) -> int:
        """Number of axes."""
        return self.probes[0].ndim

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape for each number of images in `PROBES`."""
        return tuple(tuple(probe.shape) for probe in self.probes)

    def size(self, axis: int) -> int:
        """Return the size of an axis.

        Raises:
            Refused: It depends on the number of images.
        """
        first, *others = (shape[axis] for shape in self.shapes)
        if any(other != first for other in others):
            raise Refused(f"axis {axis} of '{self.name}' must not depend on the number of images")
        return first

    def axis(self, axis: int) -> int:
        """Return an axis counted from the front."""
        return axis % self.rank if self.rank else 0


@dataclass(frozen=True, slots=True)
class BatchSize:
    """The number of images, as an argument of a call.

    Attributes:
        node: Computes it.
        probes: `PROBES`.
    """

    node: fx.Node
    probes: tuple[int, ...] = PROBES


Value = Fixed | Computed | None


def as_float32(array: np.ndarray) -> np.ndarray:
    """Return floating-point numbers of any precision as float32, other values as they are."""
    is_other_float = array.dtype.kind == "f" or array.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
    return array.astype(np.float32) if is_other_float and array.dtype != np.float32 else array

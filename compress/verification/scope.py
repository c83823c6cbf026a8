"""Scope of a verification: optional measurements beyond the checks of every file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from compress.data.splits import Split
from compress.verification.other_runtimes import EVALUATOR, Also
from compress.verification.robustness import Robustness, distributions


@dataclass(frozen=True, slots=True)
class Scope:
    """Scope of a verification.

    Attributes:
        parity_samples: Number of images compared with the torch network.
        robustness: Settings of noise and corruptions; None measures no robustness.
        shifted: Name -> split of a shifted data set, measured together with `robustness`.
        batch_sizes: Batch sizes of the throughput; without any, start and memory are not measured either.
        second_opinion: Whether the comparison with the ONNX reference evaluator is required. It is made in any case
            where it takes seconds.
        also: More runtimes to open the file in.
    """

    parity_samples: int = 64
    robustness: Robustness | None = None
    shifted: Mapping[str, Split] = field(default_factory=dict)
    batch_sizes: tuple[int, ...] = ()
    second_opinion: bool = False
    also: tuple[Also, ...] = ()

    def __post_init__(self) -> None:
        if self.robustness is not None:
            distributions(self.robustness, self.shifted)  # refuses names that are taken, before any work

    @property
    def required(self) -> tuple[str, ...]:
        """Names of the checks that this scope requires."""
        return (*([EVALUATOR] if self.second_opinion else []), *(one.check for one in self.also if one.is_required))

    @property
    def opinions(self) -> tuple[str, ...]:
        """Names of the checks in other runtimes."""
        return (EVALUATOR, *(one.check for one in self.also))

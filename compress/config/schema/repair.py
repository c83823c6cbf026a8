"""Schema of repairs after a cut."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from compress.config.schema.base import Count, Positive, Section, to_tuple

Name = Literal["scaling", "least_squares", "bias_folding", "batch_norm", "blocks"]
CLOSED_FORM: tuple[Name, ...] = ("scaling", "least_squares", "bias_folding", "batch_norm")
BLOCKS: Name = "blocks"


def _to_repairs(value: object) -> object:
    """Return the names of repairs; `blocks` alone, outside a list, stands for all, and block reconstruction last."""
    return (*CLOSED_FORM, BLOCKS) if value == BLOCKS else to_tuple(value)


class BlockRepairConfig(Section):
    """Settings of the repair `blocks`: each block is trained alone to return what it returned before the cut."""

    images: Count = Field(
        4096, description="number of images: those of calibration, then of train; labels are not used"
    )
    steps: Count | None = Field(
        None, description="number of training steps of each block; 400 by default, fewer for networks of many MACs"
    )
    batch_size: Count | None = Field(
        None, description="number of images in a step; 64 by default, fewer for networks of many MACs"
    )
    learning_rate: Positive = Field(
        0.05, description="peak learning rate of Adam, relative to the root mean square of each weight tensor"
    )


Repairs = Annotated[
    tuple[Name, ...],
    BeforeValidator(_to_repairs),
]
BlockRepair = Annotated[
    BlockRepairConfig | None, Field(description="settings of the repair blocks; its defaults where left out")
]


def check_block_repair(repair: tuple[str, ...], settings: BlockRepairConfig | None) -> None:
    """Check that settings of the repair `blocks` are given only where it is one of the repairs.

    Raises:
        ValueError: They are given without it.
    """
    if settings is not None and BLOCKS not in repair:
        raise ValueError("block_repair must be left out unless repair holds blocks")


def without_blocks(repair: tuple[Name, ...]) -> tuple[Name, ...]:
    """Return the names of the repairs in closed form."""
    return tuple(name for name in repair if name != BLOCKS)

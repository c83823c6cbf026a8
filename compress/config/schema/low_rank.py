"""Schema of `low_rank`: factorisation of kernels."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from compress.config.schema.base import (
    Count,
    Names,
    Section,
    to_tuple,
)
from compress.config.schema.repair import BLOCKS, BlockRepair, check_block_repair
from compress.config.schema.targets import RankTargetConfig
from compress.config.schema.training import TrainingConfig, check_training

Schemes = Annotated[
    tuple[Literal["nc", "vh", "tucker2", "svd", "nc2", "nc4"], ...],
    BeforeValidator(to_tuple),
    Field(
        min_length=1,
        description="factorisations to choose from; nc2 and nc4 are nc in 2 and 4 groups of input channels",
    ),
]


SCHEMES: Schemes = ("nc", "vh", "tucker2", "svd")


ALDS_SCHEMES: Schemes = ("nc", "nc2", "nc4", "svd")


RankAllocation = Annotated[
    Literal["shared_error", "alds", "energy"],
    Field(
        description="shared_error: one relative error for all layers; alds: least bound of operator norms, with "
        "groups of channels; energy: retained energy against cost"
    ),
]


def fill_schemes(values: Any, key: str) -> Any:
    """Return the values of a section with the schemes of alds, if alds allocates ranks and no schemes are given."""
    if isinstance(values, dict) and values.get(key) == "alds" and "schemes" not in values:
        return {**values, "schemes": ALDS_SCHEMES}
    return values


def check_alds_schemes(allocation: str, schemes: Schemes) -> None:
    """Check that alds uses only schemes that it has a bound for.

    Raises:
        ValueError: Another scheme is given.
    """
    if allocation == "alds" and not set(schemes) <= set(ALDS_SCHEMES):
        raise ValueError(f"schemes must be of {', '.join(ALDS_SCHEMES)} where alds allocates ranks")


def _with_allocation(values: Any) -> Any:
    """Set `allocation` to energy for one cut within MACs or params, where it was the best rule in comparisons."""
    if not isinstance(values, dict) or "allocation" in values or values.get("method") is not None:
        return values
    target = values.get("target")
    given = target.given() if isinstance(target, RankTargetConfig) else target
    if isinstance(given, dict) and not {"macs", "params"}.isdisjoint(given):
        return {**values, "allocation": "energy"}
    return values


def _to_repairs(value: object) -> object:
    return ("batch_norm", BLOCKS) if value == BLOCKS else to_tuple(value)


class TrpConfig(Section):
    """Settings of the method trp (trained rank pruning)."""

    interval: Count = Field(20, description="steps between two projections to low rank")
    strength: float = Field(3e-4, ge=0, description="factor of the sub-gradient of the nuclear norm after a projection")


class LowRankConfig(Section):
    """Factorise kernels into products of smaller ones (NC, VH, Tucker-2, SVD) where that is cheaper."""

    stage: Literal["low_rank"]
    relative_error: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="bound on the relative error of every layer"
    )
    target: RankTargetConfig | None = Field(None, description="budget that the ranks are solved from")
    allocation: RankAllocation = Field(
        "shared_error",
        description="shared_error: one relative error for all layers; alds: least bound of operator norms, with "
        "groups of channels; energy: retained energy against cost; by default energy for a target of macs or params "
        "without a method, else shared_error",
    )
    schemes: Schemes = SCHEMES
    error_of: Literal["outputs", "kernels"] = Field(
        "kernels",
        description="relative error of kernels, or of outputs on calibration images; the latter is better without "
        "training",
    )
    score_images: Count = Field(256, description="number of calibration images for errors of outputs")
    multiple_of: Count = Field(8, description="ranks are multiples of this if the layer is wide enough")
    exclude: Names = Field((), description="layers to leave dense; * matches any text")
    repair: Annotated[tuple[Literal["batch_norm", "blocks"], ...], BeforeValidator(_to_repairs)] = Field(
        ("batch_norm",),
        description="repairs after the factorisation, each kept only if it lowers the validation loss; [] for none; "
        "blocks alone stands for both",
    )
    block_repair: BlockRepair = None
    method: Literal["trp"] | None = Field(
        None,
        description="trp: training with projections of kernels to low rank at intervals; by default one factorisation",
    )
    training: TrainingConfig | None = Field(None, description="training with that method")
    trp: TrpConfig | None = Field(None, description="settings of trp")

    @model_validator(mode="before")
    @classmethod
    def _resolve_allocation(cls, values: Any) -> Any:
        return fill_schemes(_with_allocation(values), "allocation")

    def _check_rules(self) -> None:
        check_block_repair(self.repair, self.block_repair)
        if (self.relative_error is None) == (self.target is None):
            raise ValueError("must hold exactly one of relative_error, target")
        if self.allocation != "shared_error" and self.target is None:
            raise ValueError("allocation must be shared_error where relative_error is given: the others need a target")
        check_alds_schemes(self.allocation, self.schemes)
        check_training(self.method, self.training)
        if self.trp is not None and self.method is None:
            raise ValueError("trp must be left out unless it is the method")
        if self.method is not None and self.error_of == "outputs":
            raise ValueError("error_of must be kernels where a method cuts kernels while training")

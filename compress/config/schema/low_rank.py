"""Schema of `low_rank`."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from compress.config.schema.base import (
    Count,
    Names,
    Section,
    to_tuple,
)
from compress.config.schema.targets import RankTargetConfig
from compress.config.schema.training import TrainingConfig, check_training

Schemes = Annotated[
    tuple[Literal["nc", "vh", "tucker2", "svd", "nc2", "nc4"], ...],
    BeforeValidator(to_tuple),
    Field(min_length=1, description="schemes to choose from; nc2 and nc4 are nc in 2 and 4 groups of input channels"),
]


SCHEMES: Schemes = ("nc", "vh", "tucker2", "svd")


ALDS_SCHEMES: Schemes = ("nc", "nc2", "nc4", "svd")


RankAllocation = Annotated[
    Literal["shared_error", "alds", "energy"],
    Field(
        description="shared_error: one relative error for all layers; alds: least bound of operator norms, groups of "
        "channels too; energy: retained energy against cost"
    ),
]


def fill_schemes(values: Any, key: str) -> Any:
    """Return the values with the schemes of alds where it allocates ranks and no schemes are given."""
    if isinstance(values, dict) and values.get(key) == "alds" and "schemes" not in values:
        return {**values, "schemes": ALDS_SCHEMES}
    return values


def check_alds_schemes(allocation: str, schemes: Schemes) -> None:
    """Raise ValueError if `alds` is asked to use a scheme that it has no bound for."""
    if allocation == "alds" and not set(schemes) <= set(ALDS_SCHEMES):
        raise ValueError(f"schemes must be of {', '.join(ALDS_SCHEMES)} where alds allocates ranks")


class TrpConfig(Section):
    """Settings of the method trp."""

    interval: Count = Field(20, description="steps from one cut to low rank to the next")
    strength: float = Field(3e-4, ge=0, description="of the pull towards lower ranks in the steps of a cut")


class LowRankConfig(Section):
    """Replace kernels by products of smaller ones (NC, VH, Tucker-2, SVD), where that is cheaper."""

    stage: Literal["low_rank"]
    relative_error: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="shared bound of the relative error of every layer"
    )
    target: RankTargetConfig | None = Field(None, description="budget that decides the ranks")
    allocation: RankAllocation = "shared_error"
    schemes: Schemes = SCHEMES
    error_of: Literal["outputs", "kernels"] = Field(
        "kernels", description="kernels; or outputs on calibration images, better where no training follows"
    )
    score_images: Count = Field(256, description="calibration images that outputs are looked at on")
    multiple_of: Count = Field(8, description="ranks are multiples of this where the layer is wide enough")
    exclude: Names = Field((), description="layers that stay dense; * matches any text")
    method: Literal["trp"] | None = Field(
        None, description="trp cuts kernels to low rank again and again while the network trains; by default once"
    )
    training: TrainingConfig | None = Field(None, description="how the network trains with that method")
    trp: TrpConfig | None = Field(None, description="settings of that method")

    @model_validator(mode="before")
    @classmethod
    def _resolve_schemes(cls, values: Any) -> Any:
        return fill_schemes(values, "allocation")

    def _check_rules(self) -> None:
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

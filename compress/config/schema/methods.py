"""Schemas of the training-time methods of `prune`."""

from typing import Annotated, Literal

from pydantic import Field

from compress.config.schema.base import (
    Count,
    Section,
)


class GsmConfig(Section):
    """Settings of the method gsm."""

    frozen_ratio: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="share of the steps, at the end, in which the choice stands"
    )
    interval: Count = Field(20, description="steps from one choice to the next before that")
    passive_decay: float | None = Field(
        None, gt=0, description="L2 factor of what gets no gradient; by default sized for the run"
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="of SGD while the method decides, in place of training.momentum; 0.98 in the paper"
    )


class GatesMethodConfig(Section):
    """Settings of the method gates."""

    frozen_ratio: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.34, description="share of the steps, at the end, in which the gates are fixed"
    )
    gate_rate: float | None = Field(None, gt=0, description="learning rate of the gates; by default sized for the run")
    multiplier_rate: float | None = Field(
        None, gt=0, description="how fast the price rises while the budget is exceeded; by default sized for the run"
    )


def check_rising(section: Section, first: str, second: str) -> None:
    """Check that one share is below another; the one that was given is named, with the default of the other."""
    low, high = getattr(section, first), getattr(section, second)
    if low < high:
        return
    if first in section.model_fields_set:
        default = "" if second in section.model_fields_set else ", the default"
        raise ValueError(f"{first} must be below {second} ({high:g}{default})")
    raise ValueError(f"{second} must be above {first} ({low:g}, the default)")


class GregConfig(Section):
    """Settings of the method greg."""

    variant: Literal[1, 2] = Field(
        2, description="1 chooses early by scores; 2 first lets the penalty of all channels grow alike"
    )
    interval: Count = Field(5, description="steps from one increase of the penalties to the next")
    ceiling: float | None = Field(
        None, gt=0, description="of the penalty of what goes; by default 1, or more where the run is too short for that"
    )
    picked_at: Annotated[float, Field(gt=0, lt=1)] = Field(0.3, description="share of the steps before the choice")
    full_at: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.75, description="share of the steps after which the penalty has reached its ceiling"
    )

    def _check_rules(self) -> None:
        check_rising(self, "picked_at", "full_at")


class IncRegConfig(Section):
    """Settings of the method increg."""

    frozen_ratio: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.4, description="share of the steps, at the end, in which the choice stands"
    )
    interval: Count = Field(10, description="steps from one change of the penalties to the next")
    ceiling: float | None = Field(
        None,
        gt=0,
        description="of a penalty; a channel that reaches it is the first to go; by default 1, or more where the run "
        "is too short for that",
    )


class CsgdConfig(Section):
    """Settings of the method csgd."""

    pull: float | None = Field(
        None, gt=0, description="factor that draws channels to the mean of their cluster; by default sized for the run"
    )


class GrdaConfig(Section):
    """Settings of the method grda."""

    mu: Annotated[float, Field(gt=0.5, lt=1)] = Field(0.51, description="exponent of the threshold's growth")
    c: float | None = Field(None, gt=0, description="factor of the threshold; by default sized for the run")
    interval: Count = Field(10, description="steps from one look at whether the zeros are enough to the next")
    reached_at: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="share of the steps after which the threshold is what the weights at the start ask for"
    )
    until: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.9, description="share of the steps after which the choice is final even where the zeros are not enough"
    )

    def _check_rules(self) -> None:
        check_rising(self, "reached_at", "until")


class RegrowConfig(Section):
    """Settings of the method regrow."""

    interval: Count | None = Field(
        None, description="steps from one choice to the next; by default a fortieth of the run"
    )
    ratio: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="share of a group's channels that comes back after the first choice; falls to 0 as a cosine"
    )
    until: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.75, description="share of the steps after which the choice is final"
    )


class TppConfig(Section):
    """Settings of the method tpp."""

    strength: float = Field(1.0, ge=0, description="of the Gram term next to the penalty; 0 is off")
    interval: Count = Field(5, description="steps from one increase of the penalties to the next")
    ceiling: float | None = Field(
        None, gt=0, description="of the penalty of what goes; by default 1, or more where the run is too short for that"
    )
    picked_at: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="share of the steps before the choice")
    full_at: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.6, description="share of the steps after which the penalty has reached its ceiling"
    )

    def _check_rules(self) -> None:
        check_rising(self, "picked_at", "full_at")


METHOD_SETTINGS = ("gsm", "gates", "greg", "increg", "csgd", "grda", "regrow", "tpp")

"""Schemas of the training-time methods of `prune`, one section each."""

from typing import Annotated, Literal

from pydantic import Field

from compress.config.schema.base import (
    Count,
    Section,
)


class GsmConfig(Section):
    """Settings of the method gsm."""

    frozen_ratio: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="share of the steps, at the end, with a fixed choice"
    )
    interval: Count = Field(20, description="steps between two choices before that")
    passive_decay: float | None = Field(
        None, gt=0, description="weight decay of channels without gradient; by default sized for the run"
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="momentum of SGD until the choice is fixed, in place of training.momentum; 0.98 in the paper"
    )


class GatesMethodConfig(Section):
    """Settings of the method gates."""

    frozen_ratio: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.34, description="share of the steps, at the end, with fixed gates"
    )
    gate_rate: float | None = Field(None, gt=0, description="learning rate of the gates; by default sized for the run")
    multiplier_rate: float | None = Field(
        None,
        gt=0,
        description="growth rate of the multiplier while the budget is exceeded; by default sized for the run",
    )


def check_rising(section: Section, first: str, second: str) -> None:
    """Check that one setting is below another.

    Raises:
        ValueError: It is not; the message begins with the key that was given.
    """
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
        2, description="1: early choice by scores; 2: choice after the same growing penalty on all channels"
    )
    interval: Count = Field(5, description="steps between two increases of the penalties")
    ceiling: float | None = Field(
        None, gt=0, description="largest penalty on removed channels; by default 1, or more in a short run"
    )
    picked_at: Annotated[float, Field(gt=0, lt=1)] = Field(0.3, description="share of the steps before the choice")
    full_at: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.75, description="share of the steps until the penalty reaches its ceiling"
    )

    def _check_rules(self) -> None:
        check_rising(self, "picked_at", "full_at")


class IncRegConfig(Section):
    """Settings of the method increg."""

    frozen_ratio: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.4, description="share of the steps, at the end, with a fixed choice"
    )
    interval: Count = Field(10, description="steps between two changes of the penalties")
    ceiling: float | None = Field(
        None,
        gt=0,
        description="largest penalty; a channel that reaches it is removed first; by default 1, or more in a short run",
    )


class CsgdConfig(Section):
    """Settings of the method csgd."""

    pull: float | None = Field(
        None, gt=0, description="pull of channels to the mean of their cluster; by default sized for the run"
    )


class GrdaConfig(Section):
    """Settings of the method grda."""

    mu: Annotated[float, Field(gt=0.5, lt=1)] = Field(0.51, description="exponent of the growth of the threshold")
    c: float | None = Field(None, gt=0, description="factor of the threshold; by default sized for the run")
    interval: Count = Field(10, description="steps between two counts of the zeros")
    reached_at: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="share of the steps until the threshold meets the target on the initial weights"
    )
    until: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.9, description="share of the steps until the choice is final, even with too few zeros"
    )

    def _check_rules(self) -> None:
        check_rising(self, "reached_at", "until")


class RegrowConfig(Section):
    """Settings of the method regrow."""

    interval: Count | None = Field(None, description="steps between two choices; by default a fortieth of the run")
    ratio: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="share of the channels of a group that returns after the first choice; falls to 0 as a cosine"
    )
    until: Annotated[float, Field(gt=0, lt=1)] = Field(0.75, description="share of the steps until the choice is final")


class TppConfig(Section):
    """Settings of the method tpp."""

    strength: float = Field(1.0, ge=0, description="weight of the Gram term beside the penalty; 0 is off")
    interval: Count = Field(5, description="steps between two increases of the penalties")
    ceiling: float | None = Field(
        None, gt=0, description="largest penalty on removed channels; by default 1, or more in a short run"
    )
    picked_at: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="share of the steps before the choice")
    full_at: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.6, description="share of the steps until the penalty reaches its ceiling"
    )

    def _check_rules(self) -> None:
        check_rising(self, "picked_at", "full_at")


METHOD_SETTINGS = ("gsm", "gates", "greg", "increg", "csgd", "grda", "regrow", "tpp")

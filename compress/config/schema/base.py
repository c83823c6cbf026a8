"""Base class of all sections, and types of settings that several sections share."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from compress.catalog import (
    Registry,
)


class Section(BaseModel):
    """Base of every part of a pipeline file."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


def registered(registry: Registry[Any]) -> AfterValidator:
    """Return a validator that accepts the names of a registry."""

    def check(name: str) -> str:
        if name not in registry:
            raise ValueError(f"must be one of {', '.join(registry)}")
        return name

    return AfterValidator(check)


MAX_SIDE = 8192  # pixels


def to_names(value: object) -> object:
    """Return a list of names as a tuple; a folder called 0 may stand there as a number."""
    plain = [str(one) if isinstance(one, int) and not isinstance(one, bool) else one for one in as_list(value)]
    return tuple(plain) if isinstance(value, list | tuple) else value


def as_list(value: object) -> list[object]:
    """Return the items of a list or tuple; an empty list for any other value."""
    return list(value) if isinstance(value, list | tuple) else []


def to_tuple(value: object) -> object:
    """Return a list as a tuple, any other value unchanged."""
    return tuple(value) if isinstance(value, list) else value


Floats = Annotated[tuple[float, ...], BeforeValidator(to_tuple)]


Ints = Annotated[tuple[int, ...], BeforeValidator(to_tuple)]


Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]


Size = Annotated[tuple[Side, Side], BeforeValidator(to_tuple)]


Names = Annotated[tuple[str, ...], BeforeValidator(to_tuple)]


KeptRatio = Annotated[float, Field(gt=0, le=1)]


Share = Annotated[float, Field(ge=0, lt=1)]


Limit = Annotated[float, Field(allow_inf_nan=False)]


Positive = Annotated[float, Field(gt=0)]


Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


Calls = Annotated[int, Field(ge=1, le=1_000_000)]


BatchSize = Annotated[int, Field(ge=1, le=65536)]


Threads = Annotated[int, Field(ge=1, le=1024)]


REFERENCE = r"^[^:]+(:[^:]+)?:[A-Za-z_][A-Za-z0-9_]*$"

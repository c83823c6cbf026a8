"""Base class of all sections, and types of settings that several sections share."""

from enum import Enum
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator
from typing_extensions import Self  # in typing from Python 3.11 on

from compress.catalog import (
    Registry,
)


class PathKind(Enum):
    """Mark of a setting that holds a path; pydantic ignores it, `config/paths.py` makes such paths absolute.

    Attributes:
        FILE: Path of a file or folder.
        WEIGHTS: Path of a file of weights, or one of the words `pretrained` and `none`.
        CODE: Reference "path/to/file.py:name" or "pkg.module:name"; only the former holds a path.
    """

    FILE = "file"
    WEIGHTS = "weights"
    CODE = "code"


WITHOUT_RULES = "without rules"  # validation context in which a section is not held to its rules


class Section(BaseModel):
    """Base of every part of a pipeline file."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    def _check_rules(self) -> None:
        """Check the rules between settings of this section; each setting is valid by itself.

        Raises:
            ValueError: A rule is broken; the message begins with "must", or with the key of the setting at fault.
        """

    @model_validator(mode="after")
    def _check_all(self, info: ValidationInfo) -> Self:
        if info.context != WITHOUT_RULES:
            self._check_rules()
        return self


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


FilePath = Annotated[str, PathKind.FILE]


OptionalPath = Annotated[str | None, PathKind.FILE]


KeptRatio = Annotated[float, Field(gt=0, le=1)]


Share = Annotated[float, Field(ge=0, lt=1)]


Limit = Annotated[float, Field(allow_inf_nan=False)]


Positive = Annotated[float, Field(gt=0)]


Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


Calls = Annotated[int, Field(ge=1, le=1_000_000)]


BatchSize = Annotated[int, Field(ge=1, le=65536)]


Threads = Annotated[int, Field(ge=1, le=1024)]


_REFERENCE = r"^[^:]+(:[^:]+)?:[A-Za-z_][A-Za-z0-9_]*$"


Reference = Annotated[str, Field(pattern=_REFERENCE), PathKind.CODE]


OptionalReference = Annotated[str | None, Field(pattern=_REFERENCE), PathKind.CODE]

"""Problems of a pipeline file with their positions, and the error that reports all of them.

FILE:LINE:COL: stages[0].target.macs must be at most 1, got 1.5.
Hint: 0.5 keeps half of the baseline's MACs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from compress.errors import ConfigError, ConfigSyntaxError, ConfigValueError, StageOrderError

KeyPath = tuple[str | int, ...]
Kind = Literal["syntax", "value", "order"]

_MAX_SHOWN_PROBLEMS = 50
_MAX_SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True, order=True)
class Origin:
    """Position of a value; sorts in reading order, the file before the command line.

    Attributes:
        source: 0 for the file, 1 for the command line, 2 for the environment.
        line: Line in the file, or number of the option on the command line, from 1.
        column: Column in the file, from 1.
        text: Position in messages, such as "a.yaml:7:14" or "--set stages.prune.target.macs".
    """

    source: int
    line: int
    column: int
    text: str

    @property
    def in_file(self) -> bool:
        """True for a value of the file, False for one of the command line or environment."""
        return self.source == 0


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of a file.

    Attributes:
        origin: Position of the value.
        text: Sentence with the rule and the value.
        hint: Remedy.
        kind: Kind of problem, which decides the class of the error.
    """

    origin: Origin
    text: str
    hint: str | None = field(default=None, compare=False)
    kind: Kind = field(default="value", compare=False)

    def __str__(self) -> str:
        line = f"{self.origin.text}: {self.text}"
        return line if self.hint is None else f"{line}\nHint: {self.hint}"


def as_error(problems: Sequence[Problem]) -> ConfigError:
    """Return one error for all problems, in reading order.

    Returns:
        ConfigSyntaxError if any problem is one of syntax, StageOrderError if all are of order, ConfigValueError
        otherwise.
    """
    ordered = sorted(dict.fromkeys(problems), key=lambda problem: problem.origin)
    kinds = {problem.kind for problem in ordered}
    error = StageOrderError if kinds == {"order"} else ConfigSyntaxError if "syntax" in kinds else ConfigValueError
    if len(ordered) == 1:
        return error(f"{ordered[0].origin.text}: {ordered[0].text}", hint=ordered[0].hint)
    lines = [str(problem) for problem in ordered[:_MAX_SHOWN_PROBLEMS]]
    if len(ordered) > _MAX_SHOWN_PROBLEMS:
        lines.append(f"... and {len(ordered) - _MAX_SHOWN_PROBLEMS} more problems.")
    return error("\n".join(lines))


def format_path(path: KeyPath) -> str:
    """Return a key path as text.

    >>> format_path(("stages", 0, "target", "macs"))
    'stages[0].target.macs'
    """
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "the file"


def show(value: Any) -> str:
    """Return a value for messages, shortened and in the spelling of YAML.

    >>> show(True), show(None), show(1.5), show("a"), show([1, 2]), show({"b": 1, "a": 2})
    ('true', 'null', '1.5', "'a'", '[1, 2]', 'a mapping with b, a')
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, str):
        text = value.replace("\n", "\\n")
        return f"'{text}'" if len(text) <= _MAX_SHOWN_CHARACTERS else f"'{text[:_MAX_SHOWN_CHARACTERS]}...'"
    if isinstance(value, (list, tuple)):
        return _show_list(value)
    if isinstance(value, dict):
        return _cut(f"a mapping with {', '.join(map(str, value))}") if value else "an empty mapping"
    return _cut(str(value))


def _show_list(values: Sequence[Any]) -> str:
    nested = any(isinstance(value, (list, tuple, dict)) for value in values)
    text = f"[{', '.join(show(value) for value in values[:20])}]"
    return text if not nested and len(values) <= 20 and len(text) <= _MAX_SHOWN_CHARACTERS else "a list"


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else f"{text[:_MAX_SHOWN_CHARACTERS]}..."

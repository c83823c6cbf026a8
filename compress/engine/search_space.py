"""Search space of a Pareto search, as the command line states it.

--vary stages.prune.criterion=[taylor, l1]          one of several values, each as in --set
--vary stages.slim.moves=[[channels], [channels, blocks]]
--vary stages.finetune.learning_rate=0.01..0.1      a range, on a logarithmic scale
--vary stages.finetune.epochs=1..4                  whole numbers where both ends are
--also FILE.yaml                                    another pipeline file, such as one with a quantize stage
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.config.document import parse_value
from compress.errors import ConfigError, ConfigSyntaxError

_RANGE = re.compile(r"\s*([-+0-9.eE]+?)\s*\.\.\s*([-+0-9.eE]+)\s*")
_HINT = "such as --vary stages.prune.criterion=[taylor,l1] or --vary stages.finetune.learning_rate=0.01..0.1"


@dataclass(frozen=True, slots=True)
class Choice:
    """A varied setting.

    Attributes:
        key: Key as in `--set`.
        values: Values to choose from, as JSON; () for a range.
        between: Ends of a range.
        is_whole: Whether only whole numbers of the range are chosen.
    """

    key: str
    values: tuple[str, ...] = ()
    between: tuple[float, float] = (0.0, 0.0)
    is_whole: bool = False

    @property
    def ends(self) -> tuple[str, ...]:
        """All values to choose from, or both ends of the range, as texts for `--set`."""
        form = "{:.0f}" if self.is_whole else "{:.12g}"
        return self.values or tuple(form.format(end) for end in self.between)


@dataclass(frozen=True, slots=True)
class Space:
    """Search space.

    Attributes:
        between: Smallest and largest budget; None for shares from 0.1 to 1.
        choices: Varied settings.
        also: Further pipeline files to choose from.
        storage: Journal file, or URL of a database, that holds the trials; None for a journal in the search's folder.
    """

    between: tuple[float, float] | None = None
    choices: tuple[Choice, ...] = ()
    also: tuple[Path, ...] = ()
    storage: str | None = None


def parse_choices(texts: Sequence[str]) -> tuple[Choice, ...]:
    """Return the varied settings of `--vary` options.

    Raises:
        ConfigError: A text is no key with a list or range, or a key is given twice.
    """
    choices = tuple(map(_parse_choice, texts))
    keys = [choice.key for choice in choices]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise ConfigError(f"--vary {twice} must be given once, got {keys.count(twice)} times.")
    return choices


def _parse_choice(text: str) -> Choice:
    """Return the choice in a text.

    >>> _parse_choice("stages.prune.criterion=[taylor, l1]").values
    ('"taylor"', '"l1"')
    >>> _parse_choice("a.b=1..4")
    Choice(key='a.b', values=(), between=(1.0, 4.0), is_whole=True)
    """
    key, _, said = text.partition("=")
    if found := _RANGE.fullmatch(said):
        return _parse_range(key.strip(), text, found[1], found[2])
    try:
        values = parse_value(said)
    except ConfigSyntaxError:
        values = None
    if not key.strip() or not isinstance(values, list) or len(values) < 2:
        raise ConfigError(f"--vary must be a key with a list of values or a range, got '{text}'.", hint=_HINT)
    return Choice(key.strip(), tuple(dict.fromkeys(json.dumps(value) for value in values)))


def _parse_range(key: str, text: str, low: str, high: str) -> Choice:
    try:
        ends = float(low), float(high)
    except ValueError:
        ends = 0.0, 0.0
    if not key or not ends[0] < ends[1] < float("inf"):
        raise ConfigError(f"--vary must have a range from a smaller to a larger number, got '{text}'.", hint=_HINT)
    is_whole = all(re.fullmatch(r"[-+]?\d+", one) for one in (low, high))
    return Choice(key, (), ends, is_whole)

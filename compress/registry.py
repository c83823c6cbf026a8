"""How does a name become an object, without importing what nobody asked for?"""

from collections.abc import Iterator
from difflib import get_close_matches
from importlib import import_module
from typing import Generic, TypeVar

from compress.errors import InternalError, UnknownName

T = TypeVar("T")


class Registry(Generic[T]):
    """Names of one kind of thing; an entry is an object or the place ("module:attribute") to import it from.

    Args:
        kind: What the entries are, for messages: "criterion", "runtime".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T | str] = {}
        self._summaries: dict[str, str] = {}

    def declare(self, name: str, place: str, summary: str = "") -> None:
        """Say where `name` is imported from once somebody asks for it, and in one line what it is.

        Raises:
            InternalError: The name is taken.
        """
        self._add(name, place)
        self._summaries[name] = summary

    def register(self, name: str, entry: T, summary: str = "") -> None:
        """Add an object under `name`, with one line that says what it is; for plug-ins.

        Raises:
            InternalError: The name is taken.
        """
        self._add(name, entry)
        self._summaries[name] = summary

    def summary(self, name: str) -> str:
        """Return the line that says what `name` is, or ""; imports nothing."""
        return self._summaries.get(name, "")

    def get(self, name: str) -> T:
        """Return the object called `name`, importing it if need be.

        Raises:
            UnknownName: There is none; names the choices and the closest match.
        """
        self.check(name)
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self._entries[name] = getattr(import_module(module), attribute)
        return entry  # type: ignore[return-value]

    def check(self, name: str) -> None:
        """Raise UnknownName unless `name` is registered; imports nothing."""
        if name not in self._entries:
            raise UnknownName(f"{self.kind} must be one of {', '.join(self)}, got '{name}'.", hint=closest(name, self))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def _add(self, name: str, entry: T | str) -> None:
        if name in self._entries:
            raise InternalError(f"{self.kind} '{name}' is registered twice.")
        self._entries[name] = entry


def closest(name: str, choices: Registry[T] | list[str]) -> str | None:
    """Return "did you mean 'x'?" for the closest choice, or None when nothing is close."""
    matches = get_close_matches(name, list(choices), n=1, cutoff=0.51)
    return f"did you mean '{matches[0]}'?" if matches else None

"""Numbers of channels written down in a module's attributes, and what they are after a cut.

sizes       (32,) -> (20,)          one number, or several that stand one after the other (of a split)
shapes      (128, 4, 4) -> (80, 4, 4)   the sizes of a value, or some of them in a row; -1 stands for any of them
"""

import argparse
import copy
import dataclasses
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

_DEEPEST = 6  # containers within containers


class Sizes:
    """What becomes of the counts of channels that the code of one module may have written down.

    A count that would become two different ones becomes neither.
    """

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
        self._shapes: dict[tuple[int, ...], set[tuple[int, ...]]] = {}

    def add(self, before: tuple[int, ...], after: tuple[int, ...]) -> None:
        """Note a number, or several that stand together."""
        self._after.setdefault(before, set()).add(after)

    def add_shape(self, shape: tuple[int, ...], dim: int, left: int) -> None:
        """Note the sizes of a value, of which that along `dim` becomes `left`."""
        for start in range(dim + 1):
            for end in range(dim + 1, len(shape) + 1):
                if end - start > 1:
                    after = (*shape[start:dim], left, *shape[dim + 1 : end])
                    self._shapes.setdefault(shape[start:end], set()).add(after)

    def with_counts(self, counts: Mapping[int, int]) -> "Sizes":
        """Return these sizes with single counts in the place of what was known of them."""
        both = Sizes()
        both._after = {**self._after, **{(before,): {(after,)} for before, after in counts.items()}}
        both._shapes = self._shapes
        return both

    def after(self, numbers: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return what numbers that stand together become; None where nothing is known of them."""
        found = self._after.get(numbers)
        if found is None:
            found = {
                tuple(-1 if given == -1 else size for given, size in zip(numbers, after, strict=True))
                for before, afters in self._shapes.items()
                if len(before) == len(numbers) and _is_shape(numbers, before)
                for after in afters
            }
        return next(iter(found)) if len(found) == 1 else None


def corrected(value: object, sizes: Sizes, depth: int = 0) -> object:
    """Return an attribute as it is after a cut: numbers in it, and in containers in it; the same object if unchanged.

    Args:
        value: Any attribute.
        sizes: What becomes of numbers of channels.
        depth: Containers around it.
    """
    if type(value) is int:  # True and False are not
        after = sizes.after((value,))
        return value if after is None or after[0] == value else after[0]
    if isinstance(value, Tensor | nn.Module | str) or depth == _DEEPEST:
        return value
    if type(value) in (list, tuple) and value and all(type(one) is int for one in value):  # type: ignore[attr-defined]
        after = sizes.after(tuple(value))  # type: ignore[arg-type]
        return value if after is None or after == tuple(value) else type(value)(after)  # type: ignore[arg-type,call-arg]
    changed = {
        key: new for key, old in _entries(value) if (new := corrected(old, sizes, depth + 1)) is not old
    }  # fmt: skip
    return _with(value, changed) if changed else value


def _is_shape(numbers: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether numbers are these sizes, at most one of them left open by -1."""
    return numbers.count(-1) <= 1 and all(
        given in (-1, size) for given, size in zip(numbers, shape, strict=True)
    )  # fmt: skip


def _entries(value: object) -> Iterator[tuple[object, object]]:
    """Yield what lies in a container by its key, place or name; nothing of what is none."""
    if isinstance(value, list | tuple):
        yield from enumerate(value)
    elif isinstance(value, dict):
        yield from value.items()
    elif _is_record(value):
        yield from vars(value).items()


def _is_record(value: object) -> bool:
    is_data = dataclasses.is_dataclass(value) and not isinstance(value, type) and hasattr(value, "__dict__")
    return is_data or type(value) in (SimpleNamespace, argparse.Namespace)


def _with(value: Any, changed: Mapping[Any, Any]) -> Any:
    """Return a copy of a container with some of its entries changed."""
    if isinstance(value, tuple):
        entries = [changed.get(place, one) for place, one in enumerate(value)]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    copied = copy.copy(value)
    if isinstance(copied, list | dict):
        for key, one in changed.items():
            copied[key] = one
    else:
        vars(copied).update(changed)
    return copied

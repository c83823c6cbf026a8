"""Overrides of a document from the command line: `--set key=value`.

stages.prune.target.macs=0.4      stage by name, if only one stage has it
stages.1.target.macs=0.4          stage by index, from 0
data.array_folder=/data/cifar10   missing mappings are created
"""

import re
from collections.abc import Sequence
from typing import Any

from compress.catalog import STAGES, closest
from compress.config.document import Document, parse_value
from compress.config.problems import KeyPath, Origin, Problem, format_path, show
from compress.errors import ConfigSyntaxError


class _RefusedError(Exception):
    """An override cannot be applied.

    Args:
        text: Reason, a sentence.
        hint: Remedy.
    """

    def __init__(self, text: str, hint: str | None = None) -> None:
        super().__init__(text)
        self.text, self.hint = text, hint


def apply_overrides(document: Document, overrides: Sequence[str]) -> None:
    """Apply overrides to a document, in order.

    Args:
        document: Changed in place. The position of a new value is the --set option it came from. Overrides that cannot
            be applied are added to its problems.
        overrides: Texts "key=value", whose value is YAML.
    """
    for number, assignment in enumerate(overrides, start=1):
        key, equals, value = assignment.partition("=")
        try:
            if not equals or not key.strip():
                raise _RefusedError("must have the form key=value.", "such as --set stages.prune.target.macs=0.4")
            _assign(document, key.strip(), _parse(value), Origin(1, number, 0, f"--set {key.strip()}"))
        except _RefusedError as refused:
            origin = Origin(1, number, 0, f"--set {assignment}")
            document.problems.append(Problem(origin, refused.text, refused.hint))


def _parse(text: str) -> Any:
    try:
        return parse_value(text)
    except ConfigSyntaxError as error:
        reason = error.message.split(": ", 1)[-1] if error.message.startswith("value:") else error.message
        raise _RefusedError(f"the value must be YAML: {reason}", error.hint) from error


def _assign(document: Document, key: str, value: Any, origin: Origin) -> None:
    parts = re.sub(r"\[(\d+)\]", r".\1", key).split(".")
    if not all(parts):
        raise _RefusedError("the key must be names joined by single dots.")
    container: Any = document.value
    path: KeyPath = ()
    for part in parts[:-1]:
        path = (*path, _resolve(container, path, part))
        child = container.get(path[-1]) if isinstance(container, dict) else container[path[-1]]
        if child is None:
            child = {}
            document.set(path, container, child, origin)
        container = child
    path = (*path, _resolve(container, path, parts[-1]))
    document.set(path, container, value, origin)


def _resolve(container: Any, path: KeyPath, part: str) -> str | int:
    """Return the key or index of one part of an override's key."""
    if isinstance(container, dict):
        return part
    if not isinstance(container, list):
        raise _RefusedError(f"{format_path(path)} holds {show(container)}, which has no key '{part}'.")
    if part.isdecimal():
        if int(part) >= len(container):
            raise _RefusedError(f"{format_path(path)} has {len(container)} entries, counted from 0.")
        return int(part)
    if path != ("stages",):
        raise _RefusedError(f"{format_path(path)} is a list; its entries are numbered from 0, got '{part}'.")
    return _find_stage(container, part)


def _find_stage(stages: list[Any], name: str) -> int:
    names = [entry.get("stage") if isinstance(entry, dict) else None for entry in stages]
    places = [index for index, known in enumerate(names) if known == name]
    if len(places) == 1:
        return places[0]
    if places:
        options = " or ".join(f"stages.{place}" for place in places)
        raise _RefusedError(f"{len(places)} stages are called '{name}'.", f"say which one by its place: {options}.")
    present = [known for known in names if isinstance(known, str)]
    if name in STAGES:
        raise _RefusedError(f"the file has no stage '{name}', it has {', '.join(present) or 'none'}.")
    raise _RefusedError(
        f"no stage is called '{name}', the file has {', '.join(present) or 'none'}.", closest(name, present)
    )

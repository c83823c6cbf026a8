"""Placeholders in the command that times files on a device, and the checks of such a command."""

import re
from collections.abc import Collection, Mapping, Sequence

FILES = ("model", "stdin")  # the file's path, or "-" for a file on standard input
CALLS = ("threads", "batch_size", "repeats")
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]+)\}")


def placeholders(command: Sequence[str]) -> set[str]:
    """Return the names in braces.

    >>> sorted(placeholders(["ssh", "pi", "./time_onnx", "{stdin}", "--threads={threads}"]))
    ['stdin', 'threads']
    """
    return {name for argument in command for name in _PLACEHOLDER.findall(argument)}


def fill_placeholders(command: Sequence[str], values: Mapping[str, object]) -> list[str]:
    """Return the arguments with values in place of the placeholders.

    >>> fill_placeholders(["./time", "{model}", "--threads={threads}"], {"model": "/tmp/a.onnx", "threads": 4})
    ['./time', '/tmp/a.onnx', '--threads=4']
    """
    return [_PLACEHOLDER.sub(lambda found: str(values[found[1]]), argument) for argument in command]


def check_command(command: Sequence[str]) -> None:
    """Check a command by itself.

    Raises:
        ValueError: It is empty, names no file, or has an unknown placeholder.
    """
    if not command or not command[0].strip():
        raise ValueError("command must begin with a program")
    names = placeholders(command)
    unknown = sorted(names - {*FILES, *CALLS})
    if unknown:
        known = ", ".join(f"{{{one}}}" for one in (*FILES, *CALLS))
        raise ValueError(f"command must have no other placeholders than {known}; {{{unknown[0]}}} is another")
    if names.isdisjoint(FILES):
        raise ValueError("command must hold {model}, the path of the file to time, or {stdin}")


def unused_settings(command: Sequence[str], changed: Collection[str]) -> list[str]:
    """Return the changed settings that have no placeholder, so that the command cannot follow them.

    >>> unused_settings(["./time", "{model}"], ["threads"])
    ['threads']
    """
    return [name for name in CALLS if name in changed and name not in placeholders(command)]

"""How is YAML text read into nodes, and written? By the core schema of version 1.2, on top of PyYAML.

That is what people expect: `1e-3` is a number, only `true` and `false` are booleans (`no`, `off` are text), `1:30`
and `2024-01-01` are text.
"""

import re
from typing import Any

import yaml

from compress.errors import ConfigSyntaxError

MAX_DEPTH = 50
TAG = "tag:yaml.org,2002:"
_SPELLINGS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
)


class _Loader(yaml.SafeLoader):
    """Composes nodes; plain words are told apart by `_SPELLINGS`."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the name and kind are PyYAML's


class _Dumper(yaml.SafeDumper):
    """Writes text that `_Loader` reads back as it was: quotes what would be taken for a number."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the name and kind are PyYAML's

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value out wherever it occurs."""
        return True


for _name, _pattern, _first in _SPELLINGS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)  # type: ignore[no-untyped-call]


def _to_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _to_int(text: str) -> int:
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text, 10)


CONSTRUCTORS: dict[str, Any] = {
    TAG + "null": lambda text: None,
    TAG + "bool": _to_bool,
    TAG + "int": _to_int,
    TAG + "float": lambda text: float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", text.lower())),
    TAG + "str": str,
}


def dump_document(value: Any) -> str:
    """Write plain values as YAML that `read_document` reads back equal; keys keep their order."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110))


def compose(text: str, shown: str) -> yaml.Node | None:
    """Parse text into nodes with positions."""
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_node()  # type: ignore[no-any-return]
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        where = f"{shown}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
        raise ConfigSyntaxError(f"{where}: the character {_character(error)!r} is not allowed in YAML.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = shown if mark is None else f"{shown}:{mark.line + 1}:{mark.column + 1}"
        context = f" ({error.context})" if error.context else ""
        raise ConfigSyntaxError(
            f"{where}: the YAML cannot be read: {error.problem}{context}.", hint=_hint(error.problem or "")
        ) from error
    except RecursionError as error:
        raise ConfigSyntaxError(f"{shown}: values must be nested at most {MAX_DEPTH} deep.") from error


def _character(error: yaml.reader.ReaderError) -> str:
    return chr(error.character) if isinstance(error.character, int) else str(error.character)


def _hint(problem: str) -> str | None:
    if "'\\t'" in problem:
        return "indent with spaces, YAML allows no tabs."
    if "mapping values are not allowed" in problem:
        return "check the indentation, and put quotes around text that holds ': '."
    if "expected <block end>" in problem:
        return "lines of one mapping or list must begin in the same column."
    if "another document" in problem:
        return "the file holds one document, without '---' in the middle."
    return None

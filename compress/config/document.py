"""How is YAML text read into nodes, and written? By the core schema of version 1.2, on top of PyYAML.

That is what people expect: `1e-3` is a number, only `true` and `false` are booleans (`no`, `off` are text), `1:30`
and `2024-01-01` are text.

What does a YAML file say, and at which line and column?

Duplicate keys, tags, merge keys, keys that are no text and numbers that are not finite are refused; how words and
numbers are told apart is in `yaml_core.py`.
"""

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from compress.catalog import closest
from compress.config.problems import KeyPath, Origin, Problem, format_path, show
from compress.errors import ConfigError, ConfigSyntaxError

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


MAX_BYTES = 1_000_000
_MAX_VALUES = 100_000
_MAX_CHARACTERS = 4_096  # the longest path of most systems
_LEAST_INT, _MOST_INT = -(2**63), 2**63 - 1
_MOST_FLOAT = 3.4e38  # of single precision, which networks compute with
PIPELINE, GATES = "pipeline", "gates"
_HINTS = {PIPELINE: "compress init writes one to start from.", GATES: "such as gates: {max_drop: {top1: 0.01}}"}
_KINDS = {"int": "whole number", "float": "number", "bool": "true or false"}


@dataclass
class Document:
    """A YAML file as plain values that know where they stand.

    Attributes:
        shown: The file's name in messages.
        value: Mappings, lists, text, numbers, booleans, None.
        origins: Where each value begins.
        key_origins: Where the key of each value begins.
        problems: What is wrong so far.
        refused: Paths of values with a problem already; nothing that follows from them is reported.
        noun: What the file is called in messages: "pipeline" or "gates".
    """

    shown: str
    value: Any = None
    origins: dict[KeyPath, Origin] = field(default_factory=dict)
    key_origins: dict[KeyPath, Origin] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    refused: set[KeyPath] = field(default_factory=set)
    noun: str = PIPELINE

    def origin(self, path: KeyPath) -> Origin:
        """Return where the value at `path` stands, or else the closest thing around it."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins[path]

    def key_origin(self, path: KeyPath) -> Origin:
        """Return where the key of `path` stands, or else its value."""
        return self.key_origins.get(path) or self.origin(path)

    def value_at(self, path: KeyPath) -> Any:
        """Return the value at `path`."""
        value = self.value
        for part in path:
            value = value[part]
        return value

    def problem(self, path: KeyPath, rule: str, hint: str | None = None) -> Problem:
        """Return the problem of the value at `path`, whose message begins with the path."""
        return Problem(self.origin(path), f"{format_path(path)} {rule}", hint)

    def is_valid_itself(self, path: KeyPath) -> bool:
        """Return whether neither the value at `path` nor one around it is refused."""
        return all(path[:length] not in self.refused for length in range(len(path) + 1))

    def is_valid(self, path: KeyPath) -> bool:
        """Return whether neither the value at `path` nor one around or inside it is refused."""
        return self.is_valid_itself(path) and all(inner[: len(path)] != path for inner in self.refused)

    def refuse(self, path: KeyPath, origin: Origin, text: str, hint: str | None = None) -> None:
        """Note a fault of the YAML at `path`."""
        self.problems.append(Problem(origin, text, hint, "syntax"))
        self.refused.add(path)

    def set(self, path: KeyPath, container: Any, value: Any, origin: Origin) -> None:
        """Put `value` at the end of `path`, inside `container`, and remember where it came from."""
        container[path[-1]] = value
        for known in (self.origins, self.key_origins):
            for inner in [inner for inner in known if inner[: len(path)] == path]:
                del known[inner]
        self.refused -= {inner for inner in self.refused if inner[: len(path)] == path}
        self.origins[path] = self.key_origins[path] = origin


def read_document(path: Path, noun: str = PIPELINE) -> Document:
    """Read a pipeline file, or a file of gates.

    Raises:
        ConfigError: There is no such file, or it cannot be opened.
        ConfigSyntaxError: It is no UTF-8 text, too large, empty, or no YAML mapping. Lesser faults are left in
            `Document.problems`.
    """
    return parse_document(_read_text(path, noun), str(path), noun)


def parse_document(text: str, shown: str, noun: str = PIPELINE) -> Document:
    """Parse the text of such a file; `shown` is its name in messages.

    Raises:
        ConfigSyntaxError: The text is empty or no YAML mapping.
    """
    node = compose(text, shown)
    if node is None:
        raise ConfigSyntaxError(
            f"{shown}: the file must hold {'gates' if noun == GATES else 'a pipeline'}, it is empty.", hint=_HINTS[noun]
        )
    document = Document(shown, noun=noun)
    document.value = _Reader(document).read(node, (), 0)
    if not isinstance(document.value, dict) and not document.problems:
        where = document.origins[()].text
        raise ConfigSyntaxError(f"{where}: the file must be a mapping of keys to values, got {show(document.value)}.")
    return document


def parse_value(text: str) -> Any:
    """Read one YAML value, such as the right side of `--set key=value`.

    Raises:
        ConfigSyntaxError: The text is no YAML; the message says where without naming a file.
    """
    node = compose(text, "value")
    document = Document("value")
    value = None if node is None else _Reader(document).read(node, (), 0)
    if document.problems:
        raise ConfigSyntaxError(document.problems[0].text, hint=document.problems[0].hint)
    return value


def _read_text(path: Path, noun: str) -> str:
    if not path.exists():
        siblings = [entry.name for entry in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(f"{path}: the {noun} file does not exist.", hint=closest(path.name, siblings))
    if not path.is_file():
        raise ConfigError(f"{path}: the {noun} must be a file, got a {'folder' if path.is_dir() else 'device'}.")
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: the {noun} file cannot be read: {error.strerror}.") from error
    if len(data) > MAX_BYTES:
        raise ConfigSyntaxError(f"{path}: the {noun} file must be at most {MAX_BYTES} bytes, it is larger.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, start = data.count(b"\n", 0, error.start) + 1, data.rfind(b"\n", 0, error.start) + 1
        raise ConfigSyntaxError(
            f"{path}:{line}:{error.start - start + 1}: the {noun} file must be UTF-8 text, "
            f"got the byte 0x{data[error.start]:02x}."
        ) from error


class _Reader:
    """Turns nodes into plain values and notes where they stand.

    Args:
        document: Filled while reading.
    """

    def __init__(self, document: Document) -> None:
        self._document = document
        self._open: set[int] = set()
        self._count = 0

    def read(self, node: yaml.Node, path: KeyPath, depth: int) -> Any:
        """Return the plain value of `node`; what is wrong with it goes to the document's problems."""
        origin = self._origin(node)
        self._document.origins[path] = origin
        self._count += 1
        if self._count > _MAX_VALUES:  # a few nested aliases can stand for billions of values
            raise ConfigSyntaxError(
                f"{origin.text}: the file must hold at most {_MAX_VALUES} values, aliases included."
            )
        if id(node) in self._open:
            return self._document.refuse(path, origin, f"{format_path(path)} must not contain itself through an alias.")
        if depth > MAX_DEPTH:
            raise ConfigSyntaxError(f"{origin.text}: values must be nested at most {MAX_DEPTH} deep.")
        if node.tag not in CONSTRUCTORS and not isinstance(node, yaml.CollectionNode):
            return self._refuse_tag(node, path)
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == TAG + "map":
                return self._read_mapping(node, path, depth)
            if isinstance(node, yaml.SequenceNode) and node.tag == TAG + "seq":
                return [self.read(entry, (*path, index), depth + 1) for index, entry in enumerate(node.value)]
            if isinstance(node, yaml.CollectionNode):
                return self._refuse_tag(node, path)
            return self._read_scalar(node, path)
        finally:
            self._open.discard(id(node))

    def _read_mapping(self, node: yaml.MappingNode, path: KeyPath, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            origin = self._origin(key_node)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != TAG + "str":
                spelling = f"'{key_node.value}'" if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                self._note(
                    origin, f"keys of {format_path(path)} must be text, got {spelling}.", "put quotes around it."
                )
                continue
            key = key_node.value
            inner = (*path, key)
            if key == "<<":
                self._note(
                    origin, "merge keys (<<) are not allowed.", "write the keys out, a pipeline file reads alone."
                )
            elif key in values:
                first = self._document.key_origins[inner]
                self._note(origin, f"{format_path(inner)} is given twice, first in line {first.line}.", None)
            else:
                self._document.key_origins[inner] = origin
                values[key] = self.read(value_node, inner, depth + 1)
        return values

    def _read_scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        origin = self._origin(node)
        if limit := _limit_of_text(node.value, is_text=node.tag == TAG + "str"):
            text = f"{format_path(path)} must {limit}, got {show(node.value[:40].replace(chr(0), chr(92) + '0'))} ..."
            return self._document.refuse(path, origin, text)
        try:
            value = CONSTRUCTORS[node.tag](node.value)
        except ValueError:
            kind = _KINDS[node.tag.removeprefix(TAG)]
            text = f"{format_path(path)} must be a readable {kind}, got {show(node.value)}."
            return self._document.refuse(path, origin, text)
        if isinstance(value, float) and not math.isfinite(value):
            return self._document.refuse(path, origin, f"{format_path(path)} must be finite, got {node.value}.")
        if limit := _limit_of_number(value):
            return self._document.refuse(path, origin, f"{format_path(path)} must be {limit}, got {show(node.value)}.")
        return value

    def _refuse_tag(self, node: yaml.Node, path: KeyPath) -> None:
        tag = node.tag.replace(TAG, "!!")
        self._document.refuse(
            path,
            self._origin(node),
            f"{format_path(path)} must be a plain value, got the tag {tag}.",
            "remove the tag.",
        )

    def _note(self, origin: Origin, text: str, hint: str | None) -> None:
        self._document.problems.append(Problem(origin, text, hint, "syntax"))

    def _origin(self, node: yaml.Node) -> Origin:
        line, column = node.start_mark.line + 1, node.start_mark.column + 1
        return Origin(0, line, column, f"{self._document.shown}:{line}:{column}")


def _limit_of_text(text: str, is_text: bool) -> str | None:
    """Return which limit the text of a value exceeds; None where it exceeds none."""
    if len(text) > _MAX_CHARACTERS:
        return f"have at most {_MAX_CHARACTERS} {'characters' if is_text else 'digits'}"
    if "\0" in text:
        return "hold no NUL character"
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return "hold no lone surrogate characters"
    return None


def _limit_of_number(value: object) -> str | None:
    """Return what a number must be and is not: within what the program computes with."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int) and not _LEAST_INT <= value <= _MOST_INT:
        return f"between {_LEAST_INT} and {_MOST_INT}"
    if isinstance(value, float) and abs(value) > _MOST_FLOAT:
        return f"between -{_MOST_FLOAT:g} and {_MOST_FLOAT:g}"
    return None

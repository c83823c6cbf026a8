"""Translation of pydantic errors into problems with the user's key path, position and hint."""

import re
import types
from difflib import get_close_matches
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, Tag
from pydantic_core import ErrorDetails

from compress.catalog import STAGES, closest
from compress.config.document import Document
from compress.config.problems import KeyPath, Origin, Problem, format_path, show
from compress.config.schema.pipeline import PipelineConfig

_TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
}
_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}
_PATTERNS = {
    "name": "must begin with a letter or digit and hold only letters, digits, '.', '_' and '-'",
    **dict.fromkeys(("factory", "postprocess", "loss"), "must be pkg.module:callable or path/to/file.py:callable"),
    **dict.fromkeys(("own", "torch_pruning"), "must be pkg.module:Class or path/to/file.py:Class"),
}
_RATIO_HINTS = {
    "target.latency": "0.5 halves the baseline's latency.",
    "target.macs": "0.5 keeps half of the baseline's MACs.",
    "target.params": "0.5 keeps half of the baseline's params.",
}
_SWITCHES = {"yes": "true", "on": "true", "no": "false", "off": "false"}


def translate(error: ErrorDetails, document: Document, root: type[BaseModel] = PipelineConfig) -> Problem | None:
    """Return the problem for a pydantic error.

    Args:
        error: Entry of `ValidationError.errors()`.
        document: The checked document.
        root: Model that the document was checked against.

    Returns:
        None for an error that follows from another one.
    """
    path, place = strip_tags(error["loc"], root)
    kind = error["type"]
    if not document.is_valid_itself(path) or (kind == "value_error" and not document.is_valid(path)):
        return None
    if kind == "missing":
        return _missing(path, error, document, root)
    if kind == "extra_forbidden":
        return _unknown_key(path, allowed_keys(strip_tags(error["loc"][:-1], root)[1]), document)
    if path[-1:] == ("[key]",):
        return _unknown_key(path[:-1], _choices(error), document)
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return _stage_name(path, error["input"], document)
    if kind in ("source_kind", "model_kind"):
        return _kind_key(path, error, document)
    if kind == "value_error":
        return _broken_rule(path, place, error, document)
    if kind == "too_short" and len(document.value_at(path) or ()) >= error["ctx"]["min_length"]:
        return None  # entries that are wrong themselves do not count for pydantic
    return _plain(path, error, document)


def refused_path(error: ErrorDetails, root: type[BaseModel]) -> KeyPath | None:
    """Return the key path of the setting that a pydantic error refuses; None for a rule between several settings."""
    path, place = strip_tags(error["loc"], root)
    if error["type"] == "value_error" and (not path or _model(place) is not None):
        return None
    return path[:-1] if path[-1:] == ("[key]",) else path


def strip_tags(loc: tuple[int | str, ...], root: type[BaseModel] = PipelineConfig) -> tuple[KeyPath, Any]:
    """Return the key path without the union tags that pydantic inserts, and the annotation of the value there.

    >>> strip_tags(("stages", 0, "prune", "target", "macs"))[0]
    ('stages', 0, 'target', 'macs')
    >>> strip_tags(("data", "train", "arrays", "arrays"))[0]
    ('data', 'train', 'arrays')
    """
    path: list[str | int] = []
    here: Any = root
    for part in loc:
        variants = _variants(here)
        if part in variants:
            here = variants[str(part)]
            continue
        path.append(part)
        here = _child(here, part)
    return tuple(path), here


def allowed_keys(annotation: Any) -> list[str]:
    """Return the keys of the model that an annotation stands for; [] for other annotations."""
    model = _model(annotation)
    return [] if model is None else list(model.model_fields)


def _members(annotation: Any) -> list[Any]:
    """Return the members of a union without None, or the annotation itself."""
    if get_origin(annotation) is Annotated and get_origin(get_args(annotation)[0]) in (Union, types.UnionType):
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for member in get_args(annotation) if member is not type(None)]
    return [annotation]


def _variants(annotation: Any) -> dict[str, Any]:
    """Return the members of a discriminated union by tag; {} for other annotations."""
    members = _members(annotation)
    models = [get_args(member)[0] if get_origin(member) is Annotated else member for member in members]
    every = [[meta.tag for meta in get_args(member)[1:] if isinstance(meta, Tag)] for member in members]
    is_tagged = [
        bool(tags) or (isinstance(model, type) and issubclass(model, BaseModel))
        for tags, model in zip(every, models, strict=True)
    ]
    if len(models) < 2 or not all(is_tagged):
        return {}
    variants = {}
    for tags, model in zip(every, models, strict=True):
        variants[tags[0] if tags else get_args(model.model_fields["stage"].annotation)[0]] = model
    return variants


def _model(annotation: Any) -> type[BaseModel] | None:
    members = _members(annotation)
    found = members[0] if len(members) == 1 else None
    return found if isinstance(found, type) and issubclass(found, BaseModel) else None


def _child(annotation: Any, part: str | int) -> Any:
    model = _model(annotation)
    if model is not None and part in model.model_fields:
        return model.model_fields[str(part)].annotation
    members = _members(annotation)
    if get_origin(annotation) is dict:
        value = get_args(annotation)[1]
        return get_args(value)[0] if get_origin(value) is Annotated else value
    return get_args(members[0])[0] if len(members) == 1 and get_origin(members[0]) is tuple else None


def _missing(path: KeyPath, error: ErrorDetails, document: Document, root: type[BaseModel]) -> Problem:
    if isinstance(path[-1], int):  # a tuple of fixed length is too short
        count = len(error["input"])
        text = f"{format_path(path[:-1])} must have {_fixed_length(error, root)} values, got {count}."
        return Problem(document.origin(path[:-1]), text)
    return Problem(document.origin(path[:-1]), f"{format_path(path)} is missing.")


def _fixed_length(error: ErrorDetails, root: type[BaseModel]) -> int:
    annotation = strip_tags(error["loc"][:-1], root)[1]
    return len(get_args(_members(annotation)[0]))


def _unknown_key(path: KeyPath, allowed: list[str], document: Document) -> Problem:
    hint = closest(str(path[-1]), allowed) or f"the keys here are {', '.join(allowed)}."
    return Problem(document.key_origin(path), f"{format_path(path)} is not a known key.", hint)


def _stage_name(path: KeyPath, value: dict[str, Any], document: Document) -> Problem:
    names = ", ".join(STAGES)
    place = (*path, "stage")
    if "stage" in value:
        name = value["stage"]
        hint = closest(name, list(STAGES)) if isinstance(name, str) else None
        return Problem(document.origin(place), f"{format_path(place)} must be one of {names}, got {show(name)}.", hint)
    typo = next(iter(get_close_matches("stage", list(value), n=1, cutoff=0.75)), None)
    hint = f"did you mean 'stage' instead of '{typo}'?" if typo else f"it says which one of {names} this is."
    return Problem(document.origin(path), f"{format_path(place)} is missing.", hint)


def _kind_key(path: KeyPath, error: ErrorDetails, document: Document) -> Problem:
    value = error["input"]
    allowed = re.findall(r"\w+", error["msg"].partition("keys ")[2])
    if not isinstance(value, dict):
        return _problem(document.origin(path), path, error["msg"], show(value), None)
    present = [key for key in value if key in allowed]
    hints = (closest(key, allowed) for key in value)
    hint = next((hint for hint in hints if hint), None) if not present else None
    got = " and ".join(present) if present else show(value)
    return _problem(document.origin(path), path, error["msg"], got, hint)


def _broken_rule(path: KeyPath, place: Any, error: ErrorDetails, document: Document) -> Problem:
    """Return the problem for a `ValueError` of the schema; its text begins with "must" or a key of the section."""
    text, value = str(error["ctx"]["error"]), error["input"]
    first, _, rest = text.partition(" ")
    keys = first.split(".")  # of a section in the section, as in training.optimizer
    if keys[0] in allowed_keys(place):  # a section, or the text that stands for one
        path, text = (*path, *keys), rest
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
    if " one of " in text and isinstance(value, dict):
        names = re.findall(r"\w+", text.partition(" one of ")[2])
        present = [name for name in names if value.get(name) is not None]
        return _problem(document.origin(path), path, text, " and ".join(present) or "none", None)
    hint = closest(value, text.removeprefix("must be one of ").split(", ")) if isinstance(value, str) else None
    return _problem(document.origin(path), path, text, show(value), hint)


def _plain(path: KeyPath, error: ErrorDetails, document: Document) -> Problem:
    """Return the problem for an error that needs only its own context."""
    kind, value, ctx = error["type"], error["input"], error.get("ctx", {})
    hint = None
    if kind in _TYPES:
        rule, hint = f"must be {_TYPES[kind]}", _type_hint(kind, value)
        if path[-1] == "command" and isinstance(value, str):
            words = [f'"{word}"' if "{" in word else word for word in value.split()]
            hint = f"write [{', '.join(words)}]; no shell reads it."
    elif kind in _BOUNDS:
        word, key = _BOUNDS[kind]
        rule, hint = f"must be {word} {ctx[key]:g}", _bound_hint(path)
    elif kind == "literal_error":
        choices = _choices(error)
        rule = f"must be one of {', '.join(choices)}"
        hint = closest(value, choices) if isinstance(value, str) else None
    elif kind == "string_pattern_mismatch":
        rule = _PATTERNS.get(str(path[-1]), f"must match {ctx.get('pattern')}")
    elif kind == "too_short":
        rule = f"must have at least {ctx['min_length']} {'entry' if ctx['min_length'] == 1 else 'entries'}"
        return Problem(document.origin(path), f"{format_path(path)} {rule}, it is empty.")
    elif kind == "too_long":
        return Problem(
            document.origin(path),
            f"{format_path(path)} must have {ctx['max_length']} values, got {ctx['actual_length']}.",
        )
    else:
        rule = f"is not valid ({error['msg']})"
    return _problem(document.origin(path), path, rule, show(value), hint)


def _bound_hint(path: KeyPath) -> str | None:
    return _RATIO_HINTS.get(format_path(path[-2:]))


def _type_hint(kind: str, value: Any) -> str | None:
    """Return a hint for a value that is probably meant for another type."""
    if kind == "bool_type" and isinstance(value, str):
        word = value if value.lower() in ("true", "false") else _SWITCHES.get(value.lower())
        return f"write {word.lower()}, without quotes." if word else None
    if kind in ("int_type", "float_type") and isinstance(value, str):
        bare = value.replace("_", "").replace(",", "").strip()
        number = re.fullmatch(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?", bare)
        return f"write {bare}, without quotes or separators." if number else None
    if kind == "string_type" and isinstance(value, (int, float)):
        return f'put quotes around it: "{show(value)}".'
    if kind == "tuple_type" and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return f"write [{value}]."
    if kind == "model_attributes_type" and isinstance(value, str) and value in STAGES:
        return f"write 'stage: {value}'."
    return None


def _choices(error: ErrorDetails) -> list[str]:
    return re.findall(r"'([^']*)'", error["ctx"]["expected"])


def _problem(origin: Origin, path: KeyPath, rule: str, got: str, hint: str | None) -> Problem:
    return Problem(origin, f"{format_path(path)} {rule}, got {got}.", hint)

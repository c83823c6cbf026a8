"""Pipeline files: from YAML to a checked, typed configuration with absolute paths.

    document.py     values with positions, changed by --set (overrides.py)
    schema/         typed sections, checked by pydantic (sections.py, messages.py)
    rules/          rules between sections
    defaults.py     defaults that follow from other sections
    paths.py        absolute paths

All problems of a file are reported at once, each with position, key path, value and hint (problems.py).
"""

import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.config.defaults import fill_preprocessing, fill_stages
from compress.config.document import Document, dump_document, parse_document, read_document
from compress.config.overrides import apply_overrides
from compress.config.paths import resolve_paths, use_array_folder
from compress.config.problems import Origin, as_error, show
from compress.config.rules import check_rules
from compress.config.schema.pipeline import PipelineConfig
from compress.config.sections import sections_of, validate
from compress.errors import CompressError
from compress.user_code import describe_error, is_interrupt, moved_module_hint


@dataclass(frozen=True)
class Pipeline:
    """Checked pipeline.

    Attributes:
        config: Typed settings with absolute paths.
        path: Path of the pipeline file, as given.
        resolved: Plain values of `config`, ready for JSON; as YAML they load to an equal `config`.
    """

    config: PipelineConfig
    path: Path
    resolved: dict[str, Any]

    def to_yaml(self) -> str:
        """Return `resolved` as the text of a pipeline file that can be moved anywhere."""
        return dump_document(self.resolved)


def load_pipeline(
    path: Path, overrides: Sequence[str] = (), seed: int | None = None, environ: Mapping[str, str] | None = None
) -> Pipeline:
    """Read and check a pipeline file, without opening data or weights.

    Args:
        path: The YAML file.
        overrides: Texts "key=value", applied in order before the check.
        seed: Replaces the seed of the file.
        environ: Environment variables; those of this process by default.

    Raises:
        ConfigError: The file is missing or unreadable.
        ConfigSyntaxError: The file is no valid YAML.
        ConfigValueError: Keys, values, names or overrides are wrong, one line each.
        StageOrderError: The stages cannot run in this order.
    """
    return _check(read_document(path), path, overrides, seed, os.environ if environ is None else environ)


def parse_pipeline(
    text: str,
    path: Path,
    overrides: Sequence[str] = (),
    seed: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> Pipeline:
    """Check the text of a pipeline file as if it were at `path`; no environment variables by default.

    Raises:
        ConfigError: As `load_pipeline`.
    """
    return _check(parse_document(text, str(path)), path, overrides, seed, environ or {})


def _check(
    document: Document, path: Path, overrides: Sequence[str], seed: int | None, environ: Mapping[str, str]
) -> Pipeline:
    folder = path.absolute().parent
    if not isinstance(document.value, dict):
        raise as_error(document.problems)
    apply_overrides(document, overrides)
    if seed is not None:
        document.set(("seed",), document.value, seed, Origin(1, len(overrides) + 1, 0, "--seed"))
    _import_plugins(document, folder)
    config = resolve_paths(fill_stages(_checked(document)), document, folder)
    config = use_array_folder(config, document, environ)
    if document.problems:
        raise as_error(document.problems)
    config = fill_preprocessing(config)
    return Pipeline(config, path, config.model_dump(mode="json"))


def _checked(document: Document) -> PipelineConfig:
    """Return the typed configuration, or raise all problems of the document as one error."""
    config = validate(document, PipelineConfig)
    document.problems += check_rules(sections_of(document, config))
    if config is None or document.problems:
        raise as_error(document.problems)
    return config


def _import_plugins(document: Document, folder: Path) -> None:
    """Import plug-ins, which register names that the schema then accepts."""
    plugins = document.value.get("plugins")
    if not isinstance(plugins, list):
        return
    with _search_also(str(folder), str(Path.cwd())):
        for index, name in enumerate(plugins):
            if isinstance(name, str) and (failure := _import_failure(name)) is not None:
                reason, hint = failure
                rule = f"must be a module that can be imported, got {show(name)}: {reason}."
                document.problems.append(document.problem(("plugins", index), rule, hint))


def _import_failure(name: str) -> tuple[str, str | None] | None:
    """Import a module; return why that failed, with a hint, or None if it did not."""
    try:
        importlib.import_module(name)
    except CompressError as error:
        return error.message.rstrip("."), error.hint
    except BaseException as error:  # a foreign module can raise anything while it is imported
        if is_interrupt(error):
            raise
        return describe_error(error).rstrip(".: "), moved_module_hint(error)
    return None


@contextmanager
def _search_also(*folders: str) -> Iterator[None]:
    """Append folders to the import path, after installed packages."""
    before = list(sys.path)
    sys.path += folders
    try:
        yield
    finally:
        sys.path[:] = before

"""How does a pipeline file become a checked configuration?

    text -> Document (values with positions) -> --set -> plug-ins -> PipelineConfig -> absolute paths -> Pipeline

Everything that is wrong is reported at once; see `problems.py` for the wording.
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
from compress.config.problems import Origin, Problem, as_error, show
from compress.config.rules import check_rules
from compress.config.schema.pipeline import PipelineConfig
from compress.config.sections import sections_of, validate
from compress.errors import CompressError
from compress.user_code import described, is_interrupt


@dataclass(frozen=True)
class Pipeline:
    """A pipeline that can run.

    Attributes:
        config: Checked, with absolute paths.
        path: The pipeline file, as it was named.
        resolved: Plain, JSON-ready values of `config`; written as YAML they load to an equal `config`.
    """

    config: PipelineConfig
    path: Path
    resolved: dict[str, Any]

    def to_yaml(self) -> str:
        """Return `resolved` as the text of a pipeline file that reads alone."""
        return dump_document(self.resolved)


def load_pipeline(
    path: Path, overrides: Sequence[str] = (), seed: int | None = None, environ: Mapping[str, str] | None = None
) -> Pipeline:
    """Read and check a pipeline file; no data and no weights are opened.

    Args:
        path: The YAML file.
        overrides: "key=value" each, applied in order before anything is checked.
        seed: Takes the place of the file's seed.
        environ: Environment variables; those of this process by default.

    Raises:
        ConfigError: Missing or unreadable file.
        ConfigSyntaxError: The YAML is at fault.
        ConfigValueError: Keys, values, names or overrides are wrong; one line each.
        StageOrderError: The stages cannot follow each other.
    """
    return _check(read_document(path), path, overrides, seed, os.environ if environ is None else environ)


def parse_pipeline(text: str, path: Path) -> Pipeline:
    """Check the text of a pipeline file that would be written to `path`.

    Raises:
        ConfigError: As `load_pipeline`.
    """
    return _check(parse_document(text, str(path)), path, (), None, {})


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
    """Import the modules that register names of the user's own, before names are looked up."""
    plugins = document.value.get("plugins")
    if not isinstance(plugins, list):
        return
    with _search_also(str(folder), str(Path.cwd())):
        for index, name in enumerate(plugins):
            if isinstance(name, str):
                reason = _import_failure(name)
                if reason is not None:
                    text = f"plugins[{index}] must be a module that can be imported, got {show(name)}: {reason}."
                    document.problems.append(Problem(document.origin(("plugins", index)), text))


def _import_failure(name: str) -> str | None:
    """Import a module; return why that failed, None when it did not."""
    try:
        importlib.import_module(name)
    except CompressError as error:
        return error.message.rstrip(".")
    except BaseException as error:  # a foreign module can raise anything while it is imported
        if is_interrupt(error):
            raise
        return described(error).rstrip(".: ")
    return None


@contextmanager
def _search_also(*folders: str) -> Iterator[None]:
    """Let imports find modules in `folders` too, after everything that is installed."""
    before = list(sys.path)
    sys.path += folders
    try:
        yield
    finally:
        sys.path[:] = before

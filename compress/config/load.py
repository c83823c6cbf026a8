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

from pydantic import ValidationError

from compress.config.document import Document, dump_document, parse_document, read_document
from compress.config.messages import translate
from compress.config.overrides import apply_overrides
from compress.config.paths import resolve_paths, use_array_folder
from compress.config.problems import Origin, Problem, as_error, show
from compress.config.rules.gates import check_gates
from compress.config.rules.stages import check_deploy, check_order, check_quantize, follow_deploy
from compress.config.rules.weights import (
    check_features,
    check_narrow,
    check_rewinding,
    check_untrained,
    check_weights,
    follow_file,
    follow_untrained,
)
from compress.config.schema.pipeline import PipelineConfig
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
    checked = _validate(document)
    values = checked.model_dump(mode="json")
    follow_deploy(values, document)
    follow_untrained(values, document)
    resolve_paths(values, document, folder)
    use_array_folder(values, document, folder, environ)
    follow_file(values, document)
    if document.problems:
        raise as_error(document.problems)
    config = PipelineConfig.model_validate(values)
    return Pipeline(config, path, config.model_dump(mode="json"))


def _validate(document: Document) -> PipelineConfig:
    """Return the checked configuration, or raise everything that is wrong with it."""
    document.problems += (
        check_order(document)
        + check_deploy(document)
        + check_quantize(document)
        + check_weights(document)
        + check_narrow(document)
        + check_features(document)
        + check_rewinding(document)
        + check_untrained(document)
    )
    document.problems += check_gates(document)
    try:
        config = PipelineConfig.model_validate(document.value)
    except ValidationError as error:
        details = error.errors(include_url=False)
        translated = [translate(detail, document) for detail in details]
        document.problems += [problem for problem in translated if problem is not None]
        raise as_error(document.problems) from error
    if document.problems:
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

"""Typed sections of a pipeline file, checked by pydantic. A file with problems still yields its valid sections."""

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from compress.config.document import Document
from compress.config.messages import refused_path, translate
from compress.config.problems import KeyPath
from compress.config.schema.base import WITHOUT_RULES, Section
from compress.config.schema.data import DataConfig
from compress.config.schema.pipeline import STAGE_SECTIONS, PipelineConfig
from compress.config.schema.task import DEFAULT_TASK, TaskConfig
from compress.config.schema.verify import DeployConfig

S = TypeVar("S", bound=Section)


@dataclass(frozen=True, slots=True)
class Sections:
    """The valid sections of a pipeline file, for rules that compare one section with another.

    If a setting is invalid, the rest of its section is still read, but rules within that section are not checked. So
    all problems of a file are found at once: problems within sections, by pydantic, and problems between sections.

    Attributes:
        document: Positions, and paths of refused values.
        names: Name of each stage; None if it is unknown.
        stages: Settings of each stage; None if they are invalid.
        task: None if it is invalid.
        data: None if it is missing or invalid.
        deploy: None if it is left out or invalid, `document.is_valid(("deploy",))` tells which.
    """

    document: Document
    names: tuple[str | None, ...]
    stages: tuple[Section | None, ...]
    task: TaskConfig | None
    data: DataConfig | None
    deploy: DeployConfig | None

    def of(self, kind: type[S]) -> Iterator[tuple[KeyPath, S]]:
        """Yield key path and settings of each valid stage of one kind, in order."""
        for index, stage in enumerate(self.stages):
            if isinstance(stage, kind):
                yield ("stages", index), stage


def validate(document: Document, model: type[S]) -> S | None:
    """Check a document against a model.

    Args:
        document: Problems are added to its `problems`, paths of refused values to its `refused`.
        model: Class of the section that the document must match.

    Returns:
        The typed values; None if any of them is refused.
    """
    try:
        return model.model_validate(document.value)
    except ValidationError as error:
        translated = [(detail, translate(detail, document, model)) for detail in error.errors(include_url=False)]
    found = [(detail, problem) for detail, problem in translated if problem is not None]
    document.problems += [problem for _, problem in found]
    document.refused |= {path for detail, _ in found if (path := refused_path(detail, model)) is not None}
    return None


def sections_of(document: Document, config: PipelineConfig | None) -> Sections:
    """Return the sections of a checked configuration, or else the valid sections of the document."""
    if config is not None:
        names: tuple[str | None, ...] = tuple(stage.stage for stage in config.stages)
        return Sections(document, names, config.stages, config.task, config.data, config.deploy)
    entries = document.value["stages"] if document.is_valid_itself(("stages",)) else []
    names = tuple(_stage_name(entry) for entry in entries)
    stages = tuple(
        None if name is None else read_valid(document, ("stages", index), STAGE_SECTIONS[name])
        for index, name in enumerate(names)
    )
    task = read_valid(document, ("task",), TaskConfig) if "task" in document.value else DEFAULT_TASK
    deploy = None if document.value.get("deploy") is None else read_valid(document, ("deploy",), DeployConfig)
    return Sections(document, names, stages, task, read_valid(document, ("data",), DataConfig), deploy)


def read_valid(document: Document, path: KeyPath, model: type[S]) -> S | None:
    """Return the section at `path` without refused settings and without its own rules; None if it is still invalid."""
    if not document.is_valid_itself(path):
        return None
    try:
        return model.model_validate(_without(document.value_at(path), path, document.refused), context=WITHOUT_RULES)
    except ValidationError:
        return None


def _without(value: Any, path: KeyPath, refused: Set[KeyPath]) -> Any:
    """Return a copy of a plain value without the values at refused paths."""
    if isinstance(value, dict):
        return {key: _without(one, (*path, key), refused) for key, one in value.items() if (*path, key) not in refused}
    if isinstance(value, list):
        kept = [(*path, index) for index in range(len(value)) if (*path, index) not in refused]
        return [_without(value[int(inner[-1])], inner, refused) for inner in kept]
    return value


def _stage_name(entry: Any) -> str | None:
    name = entry.get("stage") if isinstance(entry, dict) else None
    return name if isinstance(name, str) and name in STAGE_SECTIONS else None

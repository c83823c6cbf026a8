"""Which figures may gates name? Those of the task; a task of the user's own may have any."""

from collections.abc import Iterator, Mapping
from typing import Any

from compress.catalog import GATED, GATED_WITHOUT_LABELS, HARDER, SHARES, closest
from compress.config.document import Document
from compress.config.problems import KeyPath, Problem, format_path, show
from compress.config.schema.pipeline import PipelineConfig
from compress.config.schema.verify import VerifyConfig
from compress.errors import ConfigValueError

_BOUNDS: dict[str, tuple[float, float]] = {
    "max_drop": (-1, 1),
    "max_rise": (-1, 1),
    "max_drop_on": (-1, 1),
    "min": (0, 1),
    "max": (0, 1.5),
}
_NO_SHARES = ("regression", "embedding")  # whose figure that decides is none


def check_gates(document: Document) -> list[Problem]:
    """Return one problem for each name or limit that does not fit the task."""
    name = _task_name(document.value.get("task", "classification"))
    return [
        problem
        for path, gates in _gates(document)
        for kind in _BOUNDS
        if isinstance(limits := gates.get(kind), dict)
        for problem in _check_limits(document, (*path, kind), limits, name)
    ]


def require_known_metrics(config: PipelineConfig, record: Mapping[str, Any]) -> None:
    """Refuse gates of a task of the user's own that name no metric of it, as soon as the baseline was measured.

    Args:
        config: A checked pipeline.
        record: Of its `load` stage; says which metrics the task has.

    Raises:
        ConfigValueError: A gate names another one.
    """
    known, verify = record.get("metrics"), config.stages[-1]
    if config.task.own is None or not known or not isinstance(verify, VerifyConfig):
        return
    for kind in ("max_drop", "max_rise", "min", "max"):
        limits: Mapping[str, float] = getattr(verify.gates, kind)
        allowed = [*known, *HARDER, "worst_distribution", "excess_error", *GATED_WITHOUT_LABELS[kind]]
        for name in limits:
            if name not in allowed:
                raise ConfigValueError(
                    f"gates.{kind} must name metrics of the task ({', '.join(known)}), got '{name}'.",
                    hint=closest(name, known),
                )


def _task_name(task: Any) -> str | None:
    """Return the task as far as it can be told; None for one of the user's own, or one that is reported elsewhere."""
    found = task.get("name") if isinstance(task, dict) else task
    return found if isinstance(found, str) and found in GATED else None


def _gates(document: Document) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    """Yield the gates of every verify stage, or those of a file of gates, and where they stand."""
    stages = document.value.get("stages")
    places: list[tuple[KeyPath, Any]] = [((), document.value)]
    places += [(("stages", index), stage) for index, stage in enumerate(stages if isinstance(stages, list) else [])]
    for path, section in places:
        if isinstance(section, dict) and isinstance(section.get("gates"), dict):
            yield (*path, "gates"), section["gates"]


def _check_limits(document: Document, path: KeyPath, limits: dict[Any, Any], task: str | None) -> Iterator[Problem]:
    kind = str(path[-1])
    for name, limit in limits.items():
        if task is not None and kind != "max_drop_on":
            allowed = list(dict.fromkeys((*GATED[task][kind], *GATED_WITHOUT_LABELS[kind])))
            if name not in allowed:
                own = list(GATED[task][kind])
                hint = closest(str(name), allowed) or (
                    f"the keys here are {', '.join(own)}." if own else f"task {task} has no figure for it."
                )
                text = f"{format_path((*path, name))} is not a known key."
                yield Problem(document.key_origin((*path, name)), text, hint)
                continue
        if isinstance(limit, int | float) and not isinstance(limit, bool) and _is_share(str(name), kind, task):
            yield from _check_bounds(document, (*path, name), limit)


def _is_share(name: str, kind: str, task: str | None) -> bool:
    if task is None:
        return False
    return (
        (task == "classification" and name != "distance")
        or (name in SHARES | {"cosine"} and task not in _NO_SHARES)
        or (kind == "max_drop_on" and task not in _NO_SHARES)
    )


def _check_bounds(document: Document, path: KeyPath, limit: float) -> Iterator[Problem]:
    low, high = _BOUNDS[str(path[-2])]
    rule = None
    if limit > high:
        rule = f"must be at most {high:g}"
    elif path[-2] == "min" and limit <= low:
        rule = f"must be above {low:g}"
    elif limit < low:
        rule = f"must be at least {low:g}"
    if rule is not None:
        text = f"{format_path(path)} {rule}, got {show(limit)}."
        yield Problem(document.origin(path), text, "shares are not in percent: 0.01 is one point.")

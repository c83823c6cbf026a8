"""Rules for gates: their metrics are those of the task, and limits of shares are no percentages."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from compress.catalog import GATED, GATED_WITHOUT_LABELS, PERTURBED, SHARES, closest
from compress.config.document import Document
from compress.config.problems import KeyPath, Problem, format_path, show
from compress.config.schema.pipeline import PipelineConfig
from compress.config.schema.task import TaskConfig
from compress.config.schema.verify import GatesConfig, VerifyConfig
from compress.config.sections import Sections
from compress.errors import ConfigValueError

_BOUNDS: dict[str, tuple[float, float]] = {
    "max_drop": (-1, 1),
    "max_rise": (-1, 1),
    "max_drop_on": (-1, 1),
    "min": (0, 1),
    "max": (0, 1.5),
}
_OF_UNLABELLED = ("distance", "cosine", "agreement")
_HINTED = {True: "min: {agreement: 0.95}", False: "max_drop"}
_READ_BY = {"mask_": "polygons: true", "keypoint_": "keypoints: K"}  # metrics of detection -> setting of their labels
_NO_SHARES = ("regression", "embedding")  # tasks whose primary metric is no share


def check_gates(sections: Sections) -> Iterator[Problem]:
    """Gates must name metrics of the task; a task of the user's own may have any."""
    for path, verify in sections.of(VerifyConfig):
        yield from check_limits(sections.document, (*path, "gates"), verify.gates, sections.task)


def check_limits(document: Document, path: KeyPath, gates: GatesConfig, task: TaskConfig | None) -> Iterator[Problem]:
    """Yield a problem for each metric that the task does not have, and for each limit that is out of range.

    Args:
        document: Positions of the limits.
        path: Key path of the gates.
        gates: Limits by kind and metric.
        task: None, or a task without known metrics, allows any limit.
    """
    name = task.name if task is not None else None
    if name is None or name not in GATED:
        return
    for kind in _BOUNDS:
        limits: Mapping[str, float] = getattr(gates, kind)
        for metric, limit in limits.items():
            place = (*path, kind, metric)
            if kind != "max_drop_on" and metric not in (*GATED[name][kind], *GATED_WITHOUT_LABELS[kind]):
                yield _unknown_metric(document, place, name)
            elif _is_share(metric, kind, name) and (rule := _broken_bound(kind, limit)) is not None:
                text, hint = (
                    f"{rule}, got {show(document.value_at(place))}.",
                    "shares are not in percent: 0.01 is one point.",
                )
                yield document.problem(place, text, hint)


def require_known_metrics(config: PipelineConfig, record: Mapping[str, Any]) -> None:
    """Check gates against the metrics of the baseline: those of a user's task, or of images without labels.

    Args:
        config: A checked pipeline.
        record: Record of its `load` stage, with the "metrics" of the baseline on the evaluation images.

    Raises:
        ConfigValueError: A gate names a metric that is not among them.
    """
    verify, task, known = config.stages[-1], config.task.name, record.get("metrics")
    if not known or not isinstance(verify, VerifyConfig):
        return
    is_unlabelled = task is not None and set(known) <= set(_OF_UNLABELLED)
    kind_of_metric = "evaluation images without labels" if is_unlabelled and task != "embedding" else "the task"
    for kind in GATED_WITHOUT_LABELS:
        limits: Mapping[str, float] = getattr(verify.gates, kind)
        for name in limits:
            if not _is_measured(name, kind, known, task, is_unlabelled):
                raise ConfigValueError(
                    f"gates.{kind} must name metrics of {kind_of_metric} ({', '.join(known)}), got '{name}'.",
                    hint=_reader_of(name) or closest(name, list(known)) or f"gates.{_HINTED[is_unlabelled]}",
                )


def _is_measured(name: str, kind: str, known: Sequence[str], task: str | None, is_unlabelled: bool) -> bool:
    """Return whether a metric of a gate can be measured where the baseline has the `known` ones."""
    if name in known or name in (*PERTURBED, "worst_distribution", "excess_error"):
        return True
    if task is None:
        return name in GATED_WITHOUT_LABELS[kind]
    return not is_unlabelled and name in GATED[task][kind] and not name.startswith(tuple(_READ_BY))


def _reader_of(name: str) -> str | None:
    """Return a hint at the setting that reads the labels of a metric; None for other metrics."""
    setting = next((setting for beginning, setting in _READ_BY.items() if name.startswith(beginning)), None)
    return setting and f"data.evaluation: {{yolo or coco: ..., {setting}}} reads their labels"


def _unknown_metric(document: Document, path: KeyPath, task: str) -> Problem:
    kind, metric = str(path[-2]), str(path[-1])
    own = GATED[task][kind]
    other = f"the keys here are {', '.join(own)}." if own else f"task {task} has no metric for it."
    hint = closest(metric, [*own, *GATED_WITHOUT_LABELS[kind]]) or other
    return Problem(document.key_origin(path), f"{format_path(path)} is not a known key.", hint)


def _is_share(metric: str, kind: str, task: str) -> bool:
    if task == "classification" and metric != "distance":
        return True
    return task not in _NO_SHARES and (metric in SHARES or metric == "cosine" or kind == "max_drop_on")


def _broken_bound(kind: str, limit: float) -> str | None:
    """Return the bound that a limit of a share exceeds, in words; None if it keeps both."""
    low, high = _BOUNDS[kind]
    if limit > high:
        return f"must be at most {high:g}"
    if kind == "min" and limit <= low:
        return f"must be above {low:g}"
    return f"must be at least {low:g}" if limit < low else None

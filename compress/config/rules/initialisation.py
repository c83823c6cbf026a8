"""Pruning at initialisation, `load: {weights: none}`: its checks and defaults.

The baseline is untrained then. Nothing may be learned from it, nothing may be judged relative to its quality, and
repairs towards it restore nothing.
"""

from collections.abc import Iterator
from typing import Any

from compress.catalog import GATED
from compress.config.document import Document
from compress.config.paths import UNTRAINED
from compress.config.problems import KeyPath, Problem, format_path

_RELATIVE = ("max_drop", "max_rise", "max_drop_on")
_TO_BASELINE = frozenset({"churn", "softmax_distance", "distance", "agreement", "cosine"})
_DEFAULTS: dict[str, Any] = {"repair": ["batch_norm"], "residual": "cut"}


def check_untrained(document: Document) -> list[Problem]:
    """Return one problem for each setting that learns from an untrained baseline, or judges by it."""
    stages = _stages(document.value)
    if not _is_untrained(stages) or _is_onnx(stages[0].get("model")):  # weights: none is refused there
        return []
    problems = [
        Problem(
            document.origin(path),
            f"{format_path(path)} must be left out with weights: none: the baseline is untrained and teaches nothing.",
        )
        for path in _teachings(document.value, stages)
    ]
    task = document.value.get("task", "classification")
    task = task.get("name") if isinstance(task, dict) else task
    for index, stage in enumerate(stages):
        if stage.get("stage") == "verify":
            gates = stage.get("gates", {})
            problems += _check_gates(document, index, gates if isinstance(gates, dict) else {}, task)
    return problems


def follow_untrained(values: dict[str, Any], document: Document) -> None:
    """Set the defaults of cuts before the first training of an untrained network.

    Only batch-norm statistics are repaired, and channels along shortcuts are cut by their scores: a validation loss at
    chance level cannot decide about them.

    Args:
        values: Dumped PipelineConfig, changed in place.
        document: Tells what was given.
    """
    given = _stages(document.value)
    if not _is_untrained(given):
        return
    for stage, said in zip(values["stages"], given, strict=True):
        if stage["stage"] == "finetune" or stage.get("training") is not None:
            return
        if stage["stage"] in ("prune", "slim"):
            stage.update({key: default for key, default in _DEFAULTS.items() if key not in said})


def _is_untrained(stages: list[dict[str, Any]]) -> bool:
    return bool(stages) and stages[0].get("stage") == "load" and stages[0].get("weights") == UNTRAINED


def _is_onnx(model: Any) -> bool:
    return isinstance(model, dict) and "onnx" in model


def _teachings(value: dict[str, Any], stages: list[dict[str, Any]]) -> Iterator[KeyPath]:
    """Yield where something would be learned from the baseline."""
    for index, stage in enumerate(stages):
        for within in ((), ("training",), ("between",)):
            section = stage.get(within[0]) if within else stage
            if isinstance(section, dict) and section.get("distillation") is not None:
                yield ("stages", index, *within, "distillation")
    data, task = value.get("data"), value.get("task")
    if isinstance(data, dict) and isinstance(data.get("train"), dict) and "unlabelled" in data["train"]:
        yield ("data", "train", "unlabelled")
    if isinstance(task, dict) and task.get("name") == "detection" and task.get("loss") is None:
        yield ("task",)
    if task == "embedding" or (isinstance(task, dict) and task.get("name") == "embedding"):
        yield ("task",)


def _check_gates(document: Document, index: int, gates: dict[str, Any], task: Any) -> Iterator[Problem]:
    path: KeyPath = ("stages", index, "gates")
    kind = "max" if isinstance(task, str) and task in GATED and not GATED[task]["min"] else "min"
    hint = f"gates: {{{kind}: {{METRIC: LIMIT}}}} holds the file to a value of its own."
    relative: list[KeyPath] = [(*path, name) for name in _RELATIVE if gates.get(name)]
    limits = {name: gates[name] if isinstance(gates.get(name), dict) else {} for name in ("min", "max")}
    relative += [(*path, name, one) for name, given in limits.items() for one in given if one in _TO_BASELINE]
    for place in relative:
        text = f"{format_path(place)} must be left out with weights: none: an untrained baseline is no yardstick."
        yield Problem(document.origin(place), text, hint)
    wanted = (kind,) if isinstance(task, str) and task in GATED else ("min", "max")
    if not relative and not any(limits[name] for name in wanted):
        text = f"{format_path(path)} must hold {kind} with weights: none: else nothing says that the network learned."
        yield Problem(document.origin(path), text, hint)


def _stages(value: Any) -> list[dict[str, Any]]:
    stages = value.get("stages")
    return [stage if isinstance(stage, dict) else {} for stage in stages] if isinstance(stages, list) else []

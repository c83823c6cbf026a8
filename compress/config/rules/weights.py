"""What follows from a network that is there as an ONNX file? It has its weights, and may say how images are prepared.

What this program writes into the files it exports is read here: `preprocessing` and `classes`, as JSON.

Checks of `narrow`, which loads networks that were slimmed by other tools.

Checks of `finetune: {weights: rewound}` against the stages before it.

Pruning at initialisation, `load: {weights: none}`: its checks and defaults.

The baseline is untrained then. Nothing may be learned from it, nothing may be judged relative to its quality, and
repairs towards it restore nothing.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress.catalog import GATED
from compress.config.document import Document
from compress.config.paths import PRETRAINED, UNTRAINED
from compress.config.problems import KeyPath, Problem, format_path, show
from compress.config.schema.data import PreprocessingConfig
from compress.errors import ArtifactError

PREPROCESSING_KEY = "compress.preprocessing"
CLASSES_KEY = "compress.classes"


def check_weights(document: Document) -> list[Problem]:
    """Return one problem for each `load` that names no weights without an ONNX file, or weights beside one."""
    stages, problems = document.value.get("stages"), []
    for index, stage in enumerate(stages if isinstance(stages, list) else []):
        if not isinstance(stage, dict) or stage.get("stage") != "load" or not isinstance(stage.get("model"), dict):
            continue
        place = ("stages", index, "weights")
        if document.is_broken(place):
            continue
        has_file, has_weights = "onnx" in stage["model"], stage.get("weights") is not None
        if has_file and has_weights:
            text = f"{format_path(place)} must be left out: the ONNX file has its weights."
            problems.append(Problem(document.origin(place), text))
        elif not has_file and not has_weights:
            problems.append(Problem(document.origin(place[:-1]), f"{format_path(place)} is missing."))
    return problems


def check_features(document: Document) -> list[Problem]:
    """Return one problem for each training that would compare feature maps of a network that has no parts."""
    stages = document.value.get("stages")
    stages = [stage if isinstance(stage, dict) else {} for stage in stages] if isinstance(stages, list) else []
    models = [stage.get("model") for stage in stages if stage.get("stage") == "load"]
    if not any(isinstance(model, dict) and "onnx" in model for model in models):
        return []
    problems = []
    for index, stage in enumerate(stages):
        for within in ((), *((key,) for key in ("training", "between") if isinstance(stage.get(key), dict))):
            distillation = (stage[within[0]] if within else stage).get("distillation")
            if isinstance(distillation, dict) and distillation.get("features"):
                place: tuple[str | int, ...] = ("stages", index, *within, "distillation", "features")
                text = (
                    f"{format_path(place)} must be left out with model.onnx: feature maps are those of parts of a "
                    "network, and a file has single layers only."
                )
                problems.append(Problem(document.origin(place), text))
    return problems


def follow_file(values: dict[str, Any], document: Document) -> None:
    """Let the ONNX file say how images are prepared where the pipeline does not; an unreadable file says nothing.

    Args:
        values: Dumped PipelineConfig with absolute paths, changed in place.
        document: Tells what was given.

    Raises:
        ArtifactError: What the file says cannot be used.
    """
    data = document.value.get("data")
    first = values["stages"][0]
    path = first["model"].get("onnx") if first["stage"] == "load" else None
    if path is None or (isinstance(data, dict) and data.get("preprocessing") is not None):
        return
    written = _written(Path(path))
    if written is None:
        return
    try:
        values["data"]["preprocessing"] = PreprocessingConfig.model_validate(written).model_dump(mode="json")
    except ValidationError as error:
        raise ArtifactError(
            f"'{path}' must say how images are prepared as this program writes it ({PREPROCESSING_KEY}), "
            f"got {show(written)}.",
            hint="Give data.preprocessing; it goes before what the file says.",
        ) from error


def _written(path: Path) -> Any:
    import onnx  # half a second; only for those who name an ONNX file

    try:
        model = onnx.load(path, load_external_data=False)
        entries = {entry.key: entry.value for entry in model.metadata_props}
        return json.loads(entries.get(PREPROCESSING_KEY, "null"))
    except Exception:  # protobuf and the file system each raise types of their own; `load` says what is wrong
        return None


def check_narrow(document: Document) -> list[Problem]:
    """Return one problem for each `load` with `narrow: true` whose weights come with the network.

    Weights that are missing are reported by `onnx_model.check_weights`.
    """
    stages, problems = document.value.get("stages"), []
    for index, stage in enumerate(stages if isinstance(stages, list) else []):
        if not isinstance(stage, dict) or stage.get("stage") != "load" or stage.get("narrow") is not True:
            continue
        place, weights, model = ("stages", index, "narrow"), stage.get("weights"), stage.get("model")
        if isinstance(model, dict) and "onnx" in model:
            why = "an ONNX file has the widths it has, and its weights with them"
        elif weights in (PRETRAINED, UNTRAINED):
            why = f"the widths are read from a file of weights, got weights: {weights}"
        else:
            continue
        problems.append(Problem(document.origin(place), f"{format_path(place)} must be left out: {why}."))
    return problems


def check_rewinding(document: Document) -> list[Problem]:
    """Return one problem for each rewinding of a network that has no checkpoint of its whole form.

    That is a network from an ONNX file, whose layers have the names of its graph, one that another tool slimmed, and
    one with factorised layers.
    """
    stages = document.value.get("stages")
    stages = [stage if isinstance(stage, dict) else {} for stage in stages] if isinstance(stages, list) else []
    problems = []
    for index, stage in enumerate(stages):
        if stage.get("stage") != "finetune" or stage.get("weights") != "rewound":
            continue
        path = ("stages", index, "weights")
        text, hint = _obstacle(stages[:index])
        if text is not None:
            problems.append(Problem(document.origin(path), f"{format_path(path)} must not be rewound {text}", hint))
    return problems


def _obstacle(before: list[dict[str, Any]]) -> tuple[str | None, str | None]:
    for index, stage in enumerate(before):
        name, model = stage.get("stage"), stage.get("model")
        if name == "load" and isinstance(model, dict) and "onnx" in model:
            return "with model.onnx: no checkpoint has the names of a file's layers.", "name the network's factory."
        if name == "load" and stage.get("narrow") is True:
            text = "with narrow: a checkpoint of the whole network does not tell which of its channels were kept."
            return text, "set weights: inherited, or random."
        if name == "low_rank":
            return f"after low_rank (stages[{index}]): a checkpoint has no factors of its layers.", None
        moves = stage.get("moves", ["ranks"])
        if name == "slim" and isinstance(moves, list) and "ranks" in moves:
            text = f"after slim with ranks (stages[{index}]): a checkpoint has no factors of its layers."
            return text, f"set stages[{index}].moves: [channels, blocks]."
    return None, None


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

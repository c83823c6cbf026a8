"""What follows from a network that is there as an ONNX file? It has its weights, and may say how images are prepared.

What this program writes into the files it exports is read here: `preprocessing` and `classes`, as JSON.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress.config.document import Document
from compress.config.problems import Problem, format_path, show
from compress.config.schema import PreprocessingConfig
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

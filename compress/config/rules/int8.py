"""What must a pipeline say so that a file can be rounded to INT8? Said before any work, not after hours of training."""

from typing import Any

from compress.config.document import Document
from compress.config.problems import Problem
from compress.config.schema import DataConfig, QuantizeConfig


def check_quantize(document: Document) -> list[Problem]:
    """Return what does not fit: files in half precision, fewer calibration images than asked for."""
    stages = document.value.get("stages")
    problems = []
    for index, stage in enumerate(stages if isinstance(stages, list) else []):
        if not isinstance(stage, dict) or stage.get("stage") != "quantize":
            continue
        place = ("stages", index)
        if _get(document, "deploy", "precision", "fp32") == "fp16":
            text = f"stages[{index}] 'quantize' needs files in fp32, but deploy.precision is fp16."
            problems.append(Problem(document.origin(place), text, "leave one of the two out"))
        images = stage.get("images", QuantizeConfig.model_fields["images"].default)
        there = _get(document, "data", "calibration", DataConfig.model_fields["calibration"].default)
        if isinstance(images, int) and isinstance(there, int) and images > there:
            origin = document.origin((*place, "images") if "images" in stage else place)
            text = f"stages[{index}].images must be at most data.calibration ({there}), got {images}."
            problems.append(Problem(origin, text, f"set data.calibration: {images}, or images: {there}"))
    return problems


def _get(document: Document, section: str, key: str, default: Any) -> Any:
    values = document.value.get(section)
    return values.get(key, default) if isinstance(values, dict) else default

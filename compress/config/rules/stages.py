"""Can the stages run in the order given? Derived from what each one consumes and produces.

What follows from where the model will run? Latency targets need it said; `verify` measures there unless told.

What must a pipeline say so that a file can be rounded to INT8? Said before any work, not after hours of training.
"""

from collections.abc import Iterator
from typing import Any

from compress.catalog import NOTHING, RUNTIMES, STAGES, VERDICT
from compress.config.document import Document
from compress.config.problems import KeyPath, Problem, format_path
from compress.config.schema.data import DataConfig
from compress.config.schema.pipeline import QuantizeConfig

_ARTICLES = {"TorchModel": "a TorchModel", "OnnxModel": "an OnnxModel", VERDICT: "a Verdict"}


def check_order(document: Document) -> list[Problem]:
    """Return one problem for each stage that cannot follow the one before it.

    Stages whose names are not known are passed over; they are reported elsewhere.
    """
    stages = document.value.get("stages")
    if not isinstance(stages, list) or not stages:
        return []
    names = [_name(entry) for entry in stages]
    problems = []
    for index, name in enumerate(names):
        text, hint = _check_place(index, name, names)
        if text is not None:
            problems.append(Problem(document.origin(("stages", index)), text, hint, "order"))
    last = names[-1]
    if last is not None and STAGES[last].produces != VERDICT:
        problems.append(
            Problem(
                document.origin(("stages", len(names) - 1)),
                f"stages must end with 'verify', but stages[{len(names) - 1}] '{last}' is the last one.",
                "without verify nothing is checked, and nothing passes by checking nothing.",
                "order",
            )
        )
    return problems


def _name(entry: Any) -> str | None:
    name = entry.get("stage") if isinstance(entry, dict) else None
    return name if isinstance(name, str) and name in STAGES else None


def _label(names: list[str | None], index: int) -> str:
    return f"stages[{index}]" + (f" '{names[index]}'" if names[index] else "")


def _check_place(index: int, name: str | None, names: list[str | None]) -> tuple[str | None, str | None]:
    """Return what is wrong with the place of one stage, and a hint."""
    if name is None:
        return None, None
    wanted = STAGES[name].consumes
    if index == 0:
        if wanted == NOTHING:
            return None, None
        return f"stages[0] '{name}' needs {_ARTICLES[wanted]}, but nothing comes before it.", "begin with load."
    before = names[index - 1]
    if wanted == NOTHING:
        return (
            f"stages[{index}] '{name}' must be the first stage, but {_label(names, index - 1)} comes before it.",
            None,
        )
    if name == "quantize" and name in names[:index]:
        first = names.index(name)
        return f"stages[{index}] 'quantize' needs a float file, but stages[{first}] 'quantize' quantises it.", None
    if before is None or STAGES[before].produces == wanted:
        return None, None
    yields = _ARTICLES[STAGES[before].produces]
    place = f"stages[{index}] '{name}' needs {_ARTICLES[wanted]}"
    hint = f"put export before {name}." if name in ("quantize", "verify") else None
    return f"{place}, but stages[{index - 1}] '{before}' yields {yields}.", hint


TIMED_RUNTIME = "onnxruntime"
_SHARED = ("runtime", "provider", "threads", "batch_size", "repeats")
NO_HALF = ("CPUExecutionProvider",)  # where float16 is cast to float32 and back around every operator
_LATENCY = ("latency", "latency_ms")


def check_deploy(document: Document) -> list[Problem]:
    """Return what does not fit: latency targets without a place to run, and places that cannot do what is asked."""
    targets = list(_latency_targets(document.value))
    deploy = document.value.get("deploy")
    if deploy is None:
        return [_without_deploy(document, path) for path in targets]
    given = deploy if isinstance(deploy, dict) else {}
    runtime, provider = given.get("runtime"), given.get("provider", NO_HALF[0])
    problems = []
    if given.get("precision") == "fp16" and provider in NO_HALF:
        text = f"deploy.precision fp16 must be on a provider that computes in it, got {provider}."
        hint = "fp32 is faster there; CUDAExecutionProvider and TensorrtExecutionProvider have fp16"
        problems.append(Problem(document.origin(("deploy", "precision")), text, hint))
    if targets and runtime in RUNTIMES and runtime != TIMED_RUNTIME:
        text = f"deploy.runtime must be {TIMED_RUNTIME} for a latency target, got {runtime}, which cannot time nodes."
        problems.append(Problem(document.origin(("deploy", "runtime")), text))
    return problems


def _latency_targets(value: Any) -> Iterator[KeyPath]:
    for index, stage in enumerate(_stages(value)):
        target = stage.get("target")
        given = target if isinstance(target, dict) else {}
        yield from (("stages", index, "target", key) for key in _LATENCY if given.get(key) is not None)


def _without_deploy(document: Document, path: KeyPath) -> Problem:
    text = (
        f"{format_path(path)} needs a deploy section, which says on which runtime, provider and threads the "
        "milliseconds are measured."
    )
    hint = "add at the top level: deploy: {provider: CPUExecutionProvider, threads: 1}"
    return Problem(document.origin(path), text, hint)


def follow_deploy(values: dict[str, Any], document: Document) -> None:
    """Let `verify` measure where the model will run, in whatever the file does not say otherwise.

    Args:
        values: Dumped PipelineConfig, changed in place.
        document: Tells what was given.
    """
    deploy = values.get("deploy")
    if deploy is None:
        return
    for stage, given in zip(values["stages"], _stages(document.value), strict=True):
        if stage["stage"] == "verify":
            stage.update({key: deploy[key] for key in _SHARED if key not in given})


def _stages(value: Any) -> list[dict[str, Any]]:
    stages = value.get("stages")
    return [stage if isinstance(stage, dict) else {} for stage in stages] if isinstance(stages, list) else []


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

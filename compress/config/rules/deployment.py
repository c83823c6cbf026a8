"""What follows from where the model will run? Latency targets need it said; `verify` measures there unless told."""

from collections.abc import Iterator
from typing import Any

from compress.catalog import RUNTIMES
from compress.config.document import Document
from compress.config.problems import KeyPath, Problem, format_path

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

"""What follows from where the model will run? Latency targets need it said; `verify` measures there unless told."""

from collections.abc import Iterator
from typing import Any

from compress.catalog import RUNTIMES
from compress.config.document import Document
from compress.config.problems import KeyPath, Problem, format_path

TIMED_RUNTIME = "onnxruntime"
_SHARED = ("runtime", "provider", "threads", "batch_size")
_LATENCY = ("latency", "latency_ms")


def check_deploy(document: Document) -> list[Problem]:
    """Return one problem for each latency target of a pipeline that does not say where it will run."""
    targets = list(_latency_targets(document.value))
    deploy = document.value.get("deploy")
    if deploy is None:
        return [_without_deploy(document, path) for path in targets]
    runtime = deploy.get("runtime") if isinstance(deploy, dict) else None
    if targets and runtime in RUNTIMES and runtime != TIMED_RUNTIME:
        text = f"deploy.runtime must be {TIMED_RUNTIME} for a latency target, got {runtime}, which cannot time nodes."
        return [Problem(document.origin(("deploy", "runtime")), text)]
    return []


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

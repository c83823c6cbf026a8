"""What does the result of a stage depend on, and which part of that changed?

A key is made of the stage's name and version, its settings, the digest of its input, the seed, the threads, the
versions of the libraries, and, where they matter, the contents of the images, the weights and the factory's file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from compress.catalog import NOTHING, STAGES, TORCH_MODEL, StageEntry
from compress.config.digest import digest_data, digest_file
from compress.config.load import Pipeline
from compress.errors import ArtifactError

LIBRARIES = ("numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "onnxscript", "onnxslim", "safetensors", "torch",
             "torch-pruning", "torchvision")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Step:
    """One stage of a pipeline with everything its result depends on but its input.

    Attributes:
        index: Its place, from 0.
        entry: Its declaration.
        config: Its checked settings.
        values: The same, as plain values.
        fixed: The parts of its key that are known before any stage has run.
    """

    index: int
    entry: StageEntry
    config: Any
    values: dict[str, Any]
    fixed: dict[str, Any] = field(default_factory=dict)

    def components(self, input_digest: str) -> dict[str, Any]:
        """Return everything the stage's result depends on."""
        return {**self.fixed, "input": input_digest}


def build_steps(pipeline: Pipeline) -> list[Step]:
    """Return the stages with everything in their keys that does not depend on earlier stages."""
    config = pipeline.config
    resolved = pipeline.resolved
    data = _data_component(resolved["data"])
    libraries = {name: found for name in LIBRARIES if (found := _version(name)) is not None}
    steps = []
    for index, (stage, values) in enumerate(zip(config.stages, resolved["stages"], strict=True)):
        entry = STAGES[stage.stage]
        fixed = {
            "stage": entry.name,
            "version": entry.version,
            "config": _without_paths(entry.name, values),
            "seed": config.seed,
            "threads": config.threads,
            "libraries": libraries,
        }
        if entry.uses_data:
            fixed["data"] = data
        if entry.produces == TORCH_MODEL and entry.consumes == NOTHING:
            fixed["files"] = _model_files(values)
        steps.append(Step(index, entry, stage, values, fixed))
    return steps


def _data_component(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data section with the contents of its files in place of their paths."""
    return {**data, "train": digest_data(data["train"]), "evaluation": digest_data(data["evaluation"])}


def _without_paths(stage: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stage's settings; the files that `load` names count by content, not by place."""
    if stage != "load":
        return dict(values)
    model = {key: value for key, value in values["model"].items() if key != "factory"}
    return {**values, "weights": None, "model": model}


def _model_files(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the digests of the weights and of the factory."""
    weights = Path(values["weights"])
    if not weights.is_file():
        raise ArtifactError(f"Weights file '{weights}' does not exist.")
    files = {"weights": digest_file(weights)}
    factory = values["model"].get("factory")
    if factory is not None:
        place, _, name = factory.rpartition(":")
        path = Path(place)
        is_file = place.endswith(".py") and path.is_file()
        files["factory"] = f"{digest_file(path)}:{name}" if is_file else factory
    return files


def explain(components: dict[str, Any], previous: list[dict[str, Any]], step: Step) -> tuple[str, ...]:
    """Say which part of the key differs from the last run of this pipeline."""
    before = previous[step.index] if step.index < len(previous) else None
    if before is None or before["stage"] != step.entry.name:
        return ("runs for the first time",)
    changed = sorted(_differences(before["components"], components))
    if not changed:
        return ("its stored result is gone",)
    return tuple("its input changed" if name == "input" else f"{name} changed" for name in changed)


def _differences(before: Any, after: Any, path: str = "") -> list[str]:
    """Return the dotted names of all values that differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = sorted(set(before) | set(after))
        return [
            difference
            for name in names
            for difference in _differences(before.get(name), after.get(name), f"{path}.{name}" if path else name)
        ]
    return [] if before == after else [path.removeprefix("config.")]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

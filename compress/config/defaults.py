"""Defaults that follow from other sections: the deployment, an untrained network, the metadata of an ONNX file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from compress.config.paths import UNTRAINED
from compress.config.problems import show
from compress.config.schema.base import Section
from compress.config.schema.data import PreprocessingConfig
from compress.config.schema.low_rank import LowRankConfig
from compress.config.schema.model import LoadConfig, OnnxFileModel
from compress.config.schema.pipeline import PipelineConfig
from compress.config.schema.prune import PruneConfig, SlimConfig
from compress.config.schema.training import FinetuneConfig
from compress.config.schema.verify import DeployConfig, VerifyConfig
from compress.errors import ArtifactError

PREPROCESSING_KEY = "compress.preprocessing"  # of the metadata of an ONNX file; JSON
_DEPLOYMENT = ("runtime", "provider", "threads", "batch_size", "repeats")
_BEFORE_TRAINING = {"repair": ("batch_norm",), "residual": "cut"}

_FEW: dict[str, Any] = {"score_images": 64, "refit_images": 64}
_MANY: dict[str, Any] = {"score_images": 1024, "refit_images": 1024}
_EFFORTS: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {
        "PruneConfig": {**_FEW, "residual_factors": (4.0,)},
        "SlimConfig": {**_FEW, "residual_factors": (4.0,)},
        "VerifyConfig": {"resources": None, "warmup": 3, "repeats": 30},
        "DeployConfig": {"repeats": 30},
    },
    "thorough": {
        "PruneConfig": {**_MANY, "blocks": "auto"},
        "SlimConfig": _MANY,
        "FinetuneConfig": {"average_ratio": 0.2},
        "VerifyConfig": {"warmup": 20, "repeats": 300},
        "DeployConfig": {"repeats": 300},
    },
}

S = TypeVar("S", bound=Section)


def fill_stages(config: PipelineConfig) -> PipelineConfig:
    """Return a pipeline whose stages have the defaults that follow from `deploy` and from untrained weights.

    `verify` measures on the deployment. Before the first training of an untrained network, only batch-norm statistics
    are repaired, and the residual stream is cut by its scores: a validation loss at chance level cannot choose.
    """
    config = _with_effort(config)
    stages = [with_deployment(one, config.deploy) if isinstance(one, VerifyConfig) else one for one in config.stages]
    for index in range(_count_before_training(stages) if is_untrained(stages) else 0):
        stage = stages[index]
        if isinstance(stage, PruneConfig | SlimConfig):
            stages[index] = _filled(stage, _BEFORE_TRAINING)
    return config.model_copy(update={"stages": tuple(stages)})


def _with_effort(config: PipelineConfig) -> PipelineConfig:
    stages = tuple(with_effort(stage, config.effort) for stage in config.stages)
    deploy = None if config.deploy is None else with_effort(config.deploy, config.effort)
    return config.model_copy(update={"stages": stages, "deploy": deploy})


def with_effort(section: S, effort: str) -> S:
    """Return the settings of a stage or a deployment with the defaults of an effort in place of the normal ones."""
    return _filled(section, _EFFORTS.get(effort, {}).get(_kind(section), {}))


def _kind(stage: Section) -> str:
    """Return the key of a stage's defaults; one that trains while it chooses has none of its own."""
    if isinstance(stage, PruneConfig | SlimConfig):
        return "" if isinstance(stage, PruneConfig) and stage.method is not None else type(stage).__name__
    return "" if isinstance(stage, FinetuneConfig) and (stage.own or stage.trained) else type(stage).__name__


def with_deployment(verify: VerifyConfig, deploy: DeployConfig | None) -> VerifyConfig:
    """Return the settings of `verify` with those of the deployment in place of its defaults.

    A command times calls on another machine, so start, memory and throughput of this one are left out.
    """
    if deploy is None:
        return verify
    elsewhere: dict[str, Any] = {} if deploy.command is None else {"resources": None}
    return _filled(verify, {**{key: getattr(deploy, key) for key in _DEPLOYMENT}, **elsewhere})


def is_untrained(stages: Sequence[Section | None]) -> bool:
    """Return whether a pipeline begins with a network at its initialisation."""
    first = stages[0] if stages else None
    return isinstance(first, LoadConfig) and first.weights == UNTRAINED and not isinstance(first.model, OnnxFileModel)


def _count_before_training(stages: Sequence[Section]) -> int:
    for index, stage in enumerate(stages):
        trains = isinstance(stage, PruneConfig | LowRankConfig) and stage.training is not None
        if trains or isinstance(stage, FinetuneConfig):
            return index
    return len(stages)


def _filled(section: S, defaults: Mapping[str, Any]) -> S:
    given = section.model_fields_set
    return section.model_copy(update={key: value for key, value in defaults.items() if key not in given})


def fill_preprocessing(config: PipelineConfig) -> PipelineConfig:
    """Return a pipeline with the preprocessing that its ONNX file names, unless `data.preprocessing` is given.

    Args:
        config: Checked, with absolute paths.

    Returns:
        The same pipeline where there is no ONNX file, or where the file cannot be read: `load` reports that.

    Raises:
        ArtifactError: The preprocessing in the file's metadata is invalid.
    """
    first = config.stages[0]
    if not isinstance(first, LoadConfig) or not isinstance(first.model, OnnxFileModel):
        return config
    written = None if "preprocessing" in config.data.model_fields_set else _read_metadata(Path(first.model.onnx))
    if written is None:
        return config
    try:
        preprocessing = PreprocessingConfig.model_validate(written)
    except ValidationError as error:
        raise ArtifactError(
            f"'{first.model.onnx}' must say how images are prepared as this program writes it ({PREPROCESSING_KEY}), "
            f"got {show(written)}.",
            hint="Give data.preprocessing, which has precedence over the file.",
        ) from error
    return config.model_copy(update={"data": config.data.model_copy(update={"preprocessing": preprocessing})})


def _read_metadata(path: Path) -> Any:
    """Return the preprocessing in the metadata of an ONNX file; None if the file has no such entry or is unreadable."""
    import onnx  # takes half a second; only pipelines with an ONNX file need it

    try:
        model = onnx.load(path, load_external_data=False)
        entries = {entry.key: entry.value for entry in model.metadata_props}
        return json.loads(entries.get(PREPROCESSING_KEY, "null"))
    except Exception:  # protobuf and the file system raise many types; `load` reports the fault
        return None

"""How is an ONNX file verified that no run of ours made? Used by `compress verify FILE.onnx`."""

from pathlib import Path

from compress.artifacts import Verdict
from compress.config.load import Pipeline
from compress.config.schema import VerifyConfig
from compress.data.opening import Splits
from compress.errors import ArtifactError, InternalError
from compress.progress import Progress
from compress.stages.verify import also_of, conditions_of, gates_of, robustness_of
from compress.verification.verdict import verify_onnx


def verify_file(path: Path, pipeline: Pipeline, against: Path | None, progress: Progress) -> Verdict:
    """Hold an ONNX file to the gates of a pipeline, on its data and under its conditions.

    Args:
        path: The file.
        pipeline: Whose data section and `verify` stage say on what, where and how.
        against: Baseline file for the gates that compare; without it those count as not made, and fail.
        progress: Told about each part.

    Raises:
        ArtifactError: A file is missing or no ONNX model.
        RuntimeUnavailable: The provider is not there.
    """
    config = pipeline.config.stages[-1]
    if not isinstance(config, VerifyConfig):
        raise InternalError("A pipeline passed validation without ending in verify.")
    for file in (path, against):
        if file is not None and not file.is_file():
            raise ArtifactError(f"ONNX file '{file}' does not exist.")
    return verify_onnx(
        path,
        evaluation=Splits(pipeline.config.data).evaluation,
        conditions=conditions_of(config),
        gates=gates_of(config),
        parity_samples=config.parity_samples,
        baseline_onnx=against,
        robustness=robustness_of(config, pipeline.config.seed),
        second_opinion=config.second_opinion,
        also=also_of(config),
        progress=progress,
    )

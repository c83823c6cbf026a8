"""verify: OnnxModel -> Verdict."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from compress.config.schema.verify import DeployConfig, VerifyConfig
from compress.data.from_config import open_shifted
from compress.data.splits import Split
from compress.formats.files import list_formats
from compress.model.artifacts import OnnxModel, Verdict
from compress.model.stage_records import VerifyRecord
from compress.search.context import StageContext
from compress.verification.device_command import device_of
from compress.verification.gates import Gates
from compress.verification.job import VerificationJob
from compress.verification.measurement import Conditions
from compress.verification.other_runtimes import Also
from compress.verification.robustness import Robustness
from compress.verification.scope import Scope
from compress.verification.verdict import verify_onnx


class VerifyStage:
    """Stage that measures the file in its runtime, next to the baseline's file, and applies the gates."""

    def __init__(self, config: VerifyConfig) -> None:
        self.config = config

    def run(self, artifact: OnnxModel, ctx: StageContext) -> tuple[Verdict, VerifyRecord]:
        """Verify the file; a failed gate is a verdict, not an error.

        Raises:
            ArtifactError: The file is missing or no ONNX model.
            RuntimeUnavailable: The provider is not available.
            DataError: The evaluation split does not fit the network.
        """
        config, reference = self.config, artifact.reference
        job = VerificationJob(
            artifact.path,
            evaluation=ctx.data.evaluation,
            conditions=conditions_of(config, ctx.deploy),
            gates=gates_of(config),
            scope=with_formats(scope_of(config, ctx.data.evaluation, ctx.seed), artifact.path, config.runtime),
            signature=artifact.signature,
            opset=artifact.opset,
            reference=reference.module,
            baseline_onnx=reference.baseline.onnx_path,
            baseline_metrics=reference.baseline.metrics,
            float_onnx=artifact.float_path,
            int8_baseline=artifact.int8_baseline_path,
        )
        return verify_onnx(job, ctx.progress), VerifyRecord()


def conditions_of(config: VerifyConfig, deploy: DeployConfig | None = None) -> Conditions:
    """Return runtime, provider, threads and batch size from the `verify` section, and the device of the deployment."""
    return Conditions(
        runtime=config.runtime,
        provider=config.provider,
        threads=config.threads,
        batch_size=config.batch_size,
        warmup=config.warmup,
        repeats=config.repeats,
        device=device_of(deploy),
    )


def scope_of(config: VerifyConfig, evaluation: Split, seed: int) -> Scope:
    """Return the optional measurements, from the `verify` section, with the user's data sets opened.

    Raises:
        DataError: A data set cannot be used.
    """
    wanted, resources = config.robustness, config.resources
    return Scope(
        parity_samples=config.parity_samples,
        robustness=None if wanted is None else Robustness(**wanted.model_dump(exclude={"shifted"}), seed=seed),
        shifted={} if wanted is None else open_shifted(wanted.shifted, evaluation),
        batch_sizes=() if resources is None else resources.batch_sizes,
        second_opinion=config.second_opinion,
        also=tuple(Also(one.label, one.runtime, one.provider, one.threads, one.required) for one in config.also),
    )


def with_formats(scope: Scope, path: Path, shipping: str) -> Scope:
    """Return a scope that also requires the runtime of each format that the file was converted into.

    Args:
        scope: Scope of the pipeline file.
        path: The .onnx file, with its formats beside it.
        shipping: Name of the runtime that ships the file, which is not compared with itself.
    """
    names = [name for name in list_formats(path) if name != shipping]
    given = {one.runtime for one in scope.also}
    also = (replace(one, is_required=True) if one.runtime in names else one for one in scope.also)
    return replace(scope, also=(*also, *(Also(name, name, "CPU", None, True) for name in names if name not in given)))


def gates_of(config: VerifyConfig) -> Gates:
    """Return the limits, from the `verify` section."""
    gates = config.gates
    return Gates(
        parity=gates.parity,
        max_drop=_plain(gates.max_drop),
        max_rise=_plain(gates.max_rise),
        minimum=_plain(gates.min),
        maximum=_plain(gates.max),
        max_drop_on=_plain(gates.max_drop_on),
        max_ratio=_plain(gates.max_ratio),
        max_quantile_ms=_plain(gates.max_quantile_ms),
        max_macs=gates.max_macs,
        max_params=gates.max_params,
        judge_by=gates.judge_by,
        min_speedup=gates.min_speedup,
        max_latency_ms=gates.max_latency_ms,
        max_size_mb=gates.max_size_mb,
        max_cold_start_ms=gates.max_cold_start_ms,
        max_memory_mb=gates.max_memory_mb,
        min_images_per_second=gates.min_images_per_second,
        max_fallback_nodes=gates.max_fallback_nodes,
    )


def _plain(limits: Mapping[Any, float]) -> dict[str, float]:
    return {str(name): limit for name, limit in limits.items()}

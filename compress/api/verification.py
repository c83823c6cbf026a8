"""Verification of an ONNX file on data in memory, and runs of pipelines."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from compress.api.data import Loss, derive_task, open_source, resolve_task
from compress.api.lineage import open_lineage
from compress.api.operations import export
from compress.api.settings import Listener, listener, plain_settings, read_settings
from compress.cli.console import Console
from compress.config.document import dump_document
from compress.config.load import Pipeline, load_pipeline, parse_pipeline
from compress.config.schema.verify import VerifyConfig
from compress.data.batches import evaluation_batches
from compress.data.from_config import AS_IT_IS, build_split
from compress.data.packing import is_packed
from compress.data.splits import Split
from compress.engine.runner import RunOutcome
from compress.engine.runner import run as run_stages
from compress.errors import ArtifactError, ConfigValueError
from compress.model.adapter import unpack_rows
from compress.model.artifacts import Signature, Verdict
from compress.onnx_file.io import load_onnx, read_signature
from compress.stages.verify import conditions_of, gates_of, scope_of
from compress.tasks.base import Task
from compress.verification.job import VerificationJob
from compress.verification.verdict import verify_onnx

if TYPE_CHECKING:
    from compress.storage.remote import Remote  # imports fsspec

BASELINE_FILE = "baseline.onnx"


def verify(
    file: str | os.PathLike[str],
    *,
    data: Any,
    baseline: nn.Module | str | os.PathLike[str] | None = None,
    reference: nn.Module | None = None,
    gates: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    task: Task | None = None,
    seed: int = 0,
    progress: Listener = True,
    **settings: Any,
) -> Verdict:
    """Measure an ONNX file in its runtime, next to the baseline, and hold it to gates.

    Args:
        file: The .onnx file.
        data: Loader, data set or tensors of evaluation images, as in `prune`; nothing may have been chosen by them.
        baseline: Network or .onnx file that gates compare with; needed without targets.
        reference: Torch network that the file must equal (parity).
        gates: Limits, as in the stage `verify`: `{"max_drop": {"top1": 0.01}, "min_speedup": 1.5}`.
        loss: As in `prune`.
        task: As there.
        seed: Of noise and corruptions.
        progress: True prints progress and warnings, False nothing; or an object that receives them.
        settings: Settings of the stage `verify`: `provider`, `threads`, `batch_size`, `robustness` and others.

    Returns:
        The verdict: `passed`, `outcome` ("passed", "failed" or "inconclusive"), `checks`, `slim` and `baseline`.

    Raises:
        ArtifactError: A file is missing or no ONNX model.
        RuntimeUnavailable: The provider is not there.
        DataError: The data do not fit the network.
        ConfigValueError: A setting is wrong.
    """
    path = Path(file)
    if not path.is_file():
        raise ArtifactError(f"ONNX file '{path}' does not exist.")
    config = read_settings(VerifyConfig, {"stage": "verify", "gates": gates or {}, **settings}, "verify")
    signature = read_signature(load_onnx(path))
    source = open_source(data, [spec.name for spec in signature.inputs], "data")
    evaluation = build_split("evaluation", source, AS_IT_IS, resolve_task(loss, task) or derive_task(source))
    with ExitStack() as stack:
        against = None if baseline is None else stack.enter_context(_file_of(baseline, evaluation, signature))
        job = VerificationJob(
            path,
            evaluation=evaluation,
            conditions=conditions_of(config),
            gates=gates_of(config),
            scope=scope_of(config, evaluation, seed),
            reference=None if reference is None else _wired(reference, evaluation, signature),
            baseline_onnx=against,
        )
        return _printable(verify_onnx(job, listener(progress)))


@dataclass(frozen=True, slots=True)
class PrintableVerdict(Verdict):
    """A verdict that prints as on the command line, and as tables in a notebook."""

    def __str__(self) -> str:
        """Return the tables, the next steps and the conclusion."""
        printed = io.StringIO()
        Console(stdout=printed).print_verdict(self)
        return printed.getvalue().rstrip()

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def _printable(verdict: Verdict) -> PrintableVerdict:
    return PrintableVerdict(**{one.name: getattr(verdict, one.name) for one in fields(verdict)})


@contextmanager
def _file_of(baseline: nn.Module | str | os.PathLike[str], evaluation: Split, signature: Signature) -> Iterator[Path]:
    """Yield the ONNX file of the baseline; a network is exported for as long as it is needed."""
    if not isinstance(baseline, nn.Module):
        path = Path(baseline)
        if not path.is_file():
            raise ArtifactError(f"Baseline '{path}' does not exist.")
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="compress-") as folder:
        yield export(baseline, Path(folder) / BASELINE_FILE, _example(evaluation, signature))


def _wired(reference: nn.Module, evaluation: Split, signature: Signature) -> nn.Module:
    return open_lineage(reference, _example(evaluation, signature)).model.module


def _example(evaluation: Split, signature: Signature) -> Tensor | dict[str, Tensor]:
    """Return the first sample as the network takes it: one tensor, or the inputs by name."""
    samples, _ = next(evaluation_batches(evaluation.first(1), 1, "nothing"))
    if not is_packed(signature.inputs):
        return samples
    parts = list(unpack_rows(samples, signature.inputs))
    if len(parts) == 1:
        return parts[0]
    return {spec.name: part for spec, part in zip(signature.inputs, parts, strict=True)}


@dataclass(frozen=True)
class Run:
    """A finished run of a pipeline.

    Attributes:
        folder: The run folder, with model.onnx, report.html and slim/.
        verdict: The outcome of the verification.
        report: Contents of report.json.
    """

    folder: Path
    verdict: Verdict
    report: dict[str, Any]

    @property
    def passed(self) -> bool:
        """True if every gate was checked and passed."""
        return self.verdict.passed

    @property
    def outcome(self) -> str:
        """Outcome: "passed", "failed" or "inconclusive"."""
        return self.verdict.outcome

    @property
    def model(self) -> Path:
        """Path of the ONNX file."""
        return self.folder / "model.onnx"

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the file: "macs", "params", "size_bytes", quality by name, "latency_p50_ms" and others."""
        slim = self.verdict.slim
        if slim is None:
            return {}
        costs = {"macs": slim.macs, "params": slim.params, "size_bytes": slim.size_bytes}
        return {**costs, **slim.quality, **{f"latency_{name}_ms": value for name, value in slim.latency_ms.items()}}

    def load(self) -> nn.Module:
        """Return the slim torch network, as `compress.load`."""
        from compress.checkpoint.layout import load_slim

        return load_slim(self.folder)


def run(
    pipeline: str | os.PathLike[str] | Mapping[str, Any],
    *,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    runs_dir: str | os.PathLike[str] = "runs",
    store: str | None = None,
    seed: int | None = None,
    progress: Listener = True,
) -> Run:
    """Run a pipeline, or as much of it as is not done.

    Args:
        pipeline: Path of a pipeline file, or its contents; relative paths in the latter start at the current folder.
        overrides: Settings to change, `{"stages.prune.target.macs": 0.4}`, or texts "key=value".
        runs_dir: Folder of the run folders.
        store: URL of a remote store to share finished stages with, such as "s3://bucket/folder".
        seed: Replaces the seed of the pipeline.
        progress: True prints progress and warnings, False nothing; or an object that receives them.

    Raises:
        ConfigError: The pipeline is missing or wrong.
        CompressError: A stage could not do its work; finished stages are kept.
    """
    texts = _override_texts(overrides)
    if isinstance(pipeline, Mapping):
        text = dump_document(plain_settings(pipeline))
        checked = parse_pipeline(text, Path("pipeline.yaml"), texts, seed, os.environ)
    else:
        checked = load_pipeline(Path(pipeline), texts, seed)
    remote = None
    if store is not None:
        from compress.storage.remote import open_remote  # imports fsspec

        remote = open_remote(store)
    return _run(checked, Path(runs_dir), progress, remote)


def _run(pipeline: Pipeline, runs_dir: Path, progress: Listener, remote: Remote | None) -> Run:
    outcome: RunOutcome = run_stages(pipeline, runs_dir, listener(progress), remote)
    return Run(outcome.folder, _printable(outcome.verdict), outcome.report)


def _override_texts(overrides: Mapping[str, Any] | Sequence[str]) -> list[str]:
    if isinstance(overrides, str):
        raise ConfigValueError(f"run: overrides must be a mapping or a list of texts, got '{overrides}'.")
    if isinstance(overrides, Mapping):
        return [f"{key}={_inline(value)}" for key, value in overrides.items()]
    return list(overrides)


def _inline(value: Any) -> str:
    """Return a value as the YAML text of one line."""
    return value if isinstance(value, str) else json.dumps(plain_settings(value))

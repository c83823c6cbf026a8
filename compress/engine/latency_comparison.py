"""Latency of the networks of several runs, timed in turn on one machine.

Verdicts compare each network with the baseline, at different times and perhaps on different machines. Here all files
are open at once, and blocks of their calls alternate, so that their milliseconds can be compared with each other.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from compress.config.load import Pipeline
from compress.config.schema.verify import VerifyConfig
from compress.engine.runner import STORE
from compress.errors import ArtifactError, InternalError
from compress.progress import Progress
from compress.storage.digest import digest_value

BASELINE = "baseline"
_FEWEST = 2  # networks that are worth a comparison


def comparison_key(pipeline: Pipeline, names: Sequence[str], runs_dir: Path) -> str | None:
    """Return the key of a comparison: files and conditions; None if there is nothing to compare.

    Networks timed by the command of a device are not compared here; each verdict has its ratio to the baseline there.

    Args:
        pipeline: Pipeline of one of the runs; the others differ in nothing that the measurement depends on.
        names: Names of finished runs.
        runs_dir: Parent folder of all run folders.
    """
    if pipeline.config.deploy is not None and pipeline.config.deploy.command is not None:
        return None
    files = [[name, stage["output"]] for name in names if (stage := _exported(runs_dir, name)) is not None]
    conditions = pipeline.resolved["stages"][-1]
    settings = {key: conditions[key] for key in ("runtime", "provider", "threads", "batch_size", "warmup", "repeats")}
    return digest_value([files, settings]) if len(files) >= _FEWEST else None


def compare_runs(pipeline: Pipeline, names: Sequence[str], runs_dir: Path, progress: Progress) -> dict[str, Any]:
    """Time the ONNX files of finished runs and of their baseline in turn.

    Args:
        pipeline: As in `comparison_key`.
        names: Names of finished runs.
        runs_dir: Parent folder of all run folders.
        progress: Receives progress by sitting.

    Returns:
        Keys host, baseline_ms, control (low and high of the baseline against itself) and runs: name -> latency_ms, and
        value, low and high of its latency as a share of the baseline's.

    Raises:
        CompressError: As the `verify` stage.
    """
    from compress.data.from_config import Splits  # imports torch
    from compress.stages.verify import conditions_of
    from compress.tasks.from_config import open_task
    from compress.verification.latency import compare_all
    from compress.verification.measurement import latency_inputs

    verify = pipeline.config.stages[-1]
    if not isinstance(verify, VerifyConfig):
        raise InternalError("A pipeline passed validation without ending in verify.")
    split = Splits(pipeline.config.data, open_task(pipeline.config.task)).evaluation
    conditions = conditions_of(verify)
    files = _find_files(names, runs_dir)
    found = compare_all(
        {label: partial(conditions.open, path) for label, path in files.items()},
        lambda session: latency_inputs(session, split, conditions.batch_size),
        conditions.calls,
        progress,
    )
    control = found.control
    return {
        "host": platform.node(),
        "conditions": str(conditions),
        "baseline_ms": found.samples[BASELINE].p50,
        "control": None if control is None else [control.low, control.high],
        "runs": {
            name: {"latency_ms": found.samples[name].p50, "ratio": one.value, "low": one.low, "high": one.high}
            for name, one in found.ratios.items()
        },
    }


def find_verdict_entry(runs_dir: Path, name: str) -> Path | None:
    """Return the folder of a run's stored verdict; None if it has none."""
    stages = _read_stages(runs_dir, name)
    return runs_dir / STORE / stages[-1]["key"] if stages and stages[-1]["stage"] == "verify" else None


def _find_files(names: Sequence[str], runs_dir: Path) -> dict[str, Path]:
    """Return the ONNX file of each run, and last that of the baseline."""
    files: dict[str, Path] = {}
    baseline: Path | None = None
    for name in names:
        stage = _exported(runs_dir, name)
        if stage is None:
            continue
        folder = runs_dir / STORE / stage["key"]
        values = _read_values(folder / "onnx.json")
        files[name] = folder / values["file"]
        alone = values.get("int8_baseline_file")
        baseline = baseline or (folder / "reference" / "baseline.onnx" if alone is None else folder / alone)
    return files if baseline is None else {**files, BASELINE: baseline}


def _exported(runs_dir: Path, name: str) -> Mapping[str, Any] | None:
    """Return the lock's entry of the stage that made the verified file of a finished run."""
    stages = _read_stages(runs_dir, name)
    return stages[-2] if len(stages) > 1 and stages[-1]["stage"] == "verify" else None


def _read_stages(runs_dir: Path, name: str) -> list[dict[str, Any]]:
    path = runs_dir / name / "lock"
    stages: list[dict[str, Any]] = _read_values(path)["stages"] if path.is_file() else []
    return stages


def _read_values(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"'{path}' cannot be read: {error}.", hint="Run the pipeline again.") from error
    return values

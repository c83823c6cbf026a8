"""Content of `model.json`: all data needed to use a model without any other file.

The content follows from the report of the run and from the ONNX file, so that the same run yields the same text.
"""

import json
import os
import re
from pathlib import PurePath
from typing import Any

import numpy as np
import onnx

from compress.bundle.check import MAX_COUNT, RUNTIME, SCHEMA
from compress.bundle.finished_run import FinishedRun
from compress.errors import ArtifactError, ConfigError
from compress.onnx_file.io import is_half, is_quantized, read_metadata, read_signature
from compress.report.model import Provenance, Report
from compress.verification.other_runtimes import ROUNDED_WITHIN

RELATIVE = 1e-4  # of the largest value of an output: a detector's are in pixels
MIN_AGREEMENT_ROUNDED = 0.9  # one of 16 images, the default, may lie so near to a border that rounding decides
_PROVIDER = "CPUExecutionProvider"  # available in every ONNX Runtime
_FOLDERS = re.compile(  # of an absolute path: in quotes, where there may be spaces in it, or without them
    r"""(?<=['"`])(?:[A-Za-z]:)?[\\/][^'"`\n]*[\\/](?=[^'"`\\/\n])"""
    r"""|(?:(?<![\w./\\'"`-])(?!(?<=:)//)|(?<=file://))(?:[A-Za-z]:)?[\\/]{1,2}(?:[^\s'"`\\/]+[\\/])+(?=[^\s\\/])"""
)


def describe_model(
    run: FinishedRun, proto: onnx.ModelProto, expected: np.ndarray, licence: str | None
) -> dict[str, Any]:
    """Return the content of `model.json`, plain values.

    Args:
        run: Run to bundle.
        proto: ONNX model of the run.
        expected: (N, ...) first output of the model for the samples in the bundle.
        licence: Licence of the model; None for the licence in the report of the run.

    Raises:
        ArtifactError: The ONNX file does not state its preprocessing.
        ConfigError: No check can repeat the measurement of the run.
    """
    metadata = read_metadata(proto)
    if metadata.preprocessing is None:
        raise ArtifactError(f"'{run.folder / 'model.onnx'}' must state its preprocessing, it does not.")
    precision = name_precision(proto)
    provenance = run.report.provenance or Provenance()
    stated = provenance.licence.model_dump()
    return {
        "schema": SCHEMA,
        **({} if run.is_classifier else {"task": run.task}),
        "name": run.name,
        "precision": precision,
        "signature": read_signature(proto).to_dict(),
        **({"formats": _formats(run)} if run.format_files else {}),
        "preprocessing": metadata.preprocessing.to_dict(),
        "classes": list(metadata.classes),
        **_describe_reading(run),
        "metrics": _metrics(run.report),
        "verdict": without_folders(run.report.verdict.model_dump(), is_text=True),
        "promises": _promises(run, precision != "fp32", float(np.abs(expected).max())),
        "measured": _measured(run),
        "samples": len(expected),
        "licence": stated if licence is None else {**stated, "model": licence},
        "provenance": _describe_provenance(run, provenance),
    }


def _describe_reading(run: FinishedRun) -> dict[str, Any]:
    """Return the size that images are fitted into, and the function that decodes the outputs, where there are any."""
    letterbox = getattr(run.data.evaluation, "letterbox", None)
    decoder = None if run.decoder is None else {"name": run.decoder, "kwargs": run.decoder_arguments}
    found = {"letterbox": None if letterbox is None else list(letterbox), "decoder": decoder}
    return {key: value for key, value in found.items() if value is not None}


def _formats(run: FinishedRun) -> dict[str, list[str]]:
    """Return format -> names of its files in the bundle."""
    return {kind: [file.name for file in files] for kind, files in run.format_files.items()}


def name_precision(proto: onnx.ModelProto) -> str:
    """Return "int8", "fp16" or "fp32", the coarsest precision that the file computes in."""
    if is_quantized(proto):
        return "int8"
    return "fp16" if is_half(proto) else "fp32"


def to_text(values: dict[str, Any]) -> bytes:
    """Return values as JSON with sorted keys; names of classes may be in any language."""
    text = json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8", "backslashreplace")


def _metrics(report: Report) -> dict[str, Any]:
    """Return size, quality and latency of both networks, with 95 % intervals where they are known."""
    quality, ratio = report.details.quality, report.details.latency.ratio
    estimates = {"baseline": quality.baseline, "slim": quality.slim, "changes": quality.changes}
    return {
        "baseline": None if report.baseline is None else report.baseline.model_dump(),
        "slim": None if report.slim is None else report.slim.model_dump(),
        "intervals": {
            network: {name: one.model_dump() for name, one in found.items()} or None
            for network, found in estimates.items()
        },
        "latency_ratio": None if ratio is None else ratio.model_dump(),
    }


def _promises(run: FinishedRun, is_rounded: bool, largest_output: float) -> dict[str, Any]:
    """Return the limits of the verdict that another machine can check as well.

    Args:
        run: Run to bundle.
        is_rounded: Whether the file rounds values, which differs between processors.
        largest_output: Largest absolute expected output of a classifier.
    """
    gates, ships = run.verify["gates"], run.verify["runtime"] == RUNTIME
    is_timed_here = run.report.details.latency.device is None
    limits: dict[str, Any] = {"tolerance": gates["parity"]}
    if not run.is_classifier:
        limits["relative"] = ROUNDED_WITHIN if is_rounded else RELATIVE
    elif is_rounded:
        limits["tolerance"] = max(gates["parity"], ROUNDED_WITHIN * largest_output)
    if run.is_classifier:
        limits["min_agreement"] = MIN_AGREEMENT_ROUNDED if is_rounded else 1.0
    return {
        **limits,
        "max_latency_ms": gates["max_latency_ms"] if ships and is_timed_here else None,
        "provider": run.verify["provider"] if ships else _PROVIDER,
    }


def _measured(run: FinishedRun) -> dict[str, Any]:
    """Return the median latency, with the conditions and the machine of its measurement."""
    environment = run.report.environment
    conditions = {name: run.verify[name] for name in ("runtime", "provider", "threads", "batch_size")}
    for name in ("threads", "batch_size"):
        if conditions[name] > MAX_COUNT:
            raise ConfigError(
                f"{name} of verify must be at most {MAX_COUNT:,} for a run to be handed over, got {conditions[name]:,}."
            )
    machine = {"machine": environment.cpu, "cores": environment.cores, "platform": environment.platform}
    latency = run.report.details.latency
    if latency.device is not None:
        conditions |= {"runtime": latency.runtime or "a runtime of its own", "provider": "timed by a command"}
        machine = {"machine": f"device {latency.device}", "cores": None, "platform": None}
    return {"latency_ms": run.report.latency().after, **conditions, **machine}


def _describe_provenance(run: FinishedRun, provenance: Provenance) -> dict[str, Any]:
    """Return the provenance of the model, with the recipe, the pipeline and the versions."""
    environment = run.report.environment
    return {
        "recipe": run.recipe,
        "config": without_folders(run.report.config),
        "seed": run.report.config["seed"],
        "versions": environment.versions,
        "python": environment.python,
        **provenance.model_dump(exclude={"files", "licence"}),
    }


def without_folders(value: Any, *, is_text: bool = False) -> Any:
    """Return values with absolute paths cut to their last part: folders name machines and people, digests the files.

    Args:
        value: Plain value, nested to any depth.
        is_text: Whether texts may be sentences that contain paths; else a text is a complete path, or no path.

    >>> without_folders({"weights": "/home/somebody/net.safetensors", "factory": "/home/somebody/model.py:build"})
    {'weights': 'net.safetensors', 'factory': 'model.py:build'}
    >>> without_folders("'/home/some body/net.onnx' must be a file, see https://host/net", is_text=True)
    "'net.onnx' must be a file, see https://host/net"
    """
    if isinstance(value, dict):
        return {key: without_folders(entry, is_text=is_text) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(entry, is_text=is_text) for entry in value]
    if not isinstance(value, str):
        return value
    if is_text:
        return _FOLDERS.sub("", value)
    return PurePath(value).name if os.path.isabs(value) else value

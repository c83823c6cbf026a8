"""What must somebody know who gets a model and nothing else? The content of `model.json`.

Everything in it follows from the report of the run and from the file itself, so that the same run gives the same text.
"""

import json
import os
from dataclasses import asdict
from pathlib import PurePath
from typing import Any

from compress.artifacts import Signature
from compress.cost.onnx_file import OnnxMetadata
from compress.errors import ArtifactError
from compress.handoff.check import SCHEMA
from compress.handoff.finished import FinishedRun


def describe_model(
    run: FinishedRun, signature: Signature, metadata: OnnxMetadata, samples: int, licence: str | None
) -> dict[str, Any]:
    """Return the content of `model.json`, plain values.

    Args:
        run: What is handed over.
        signature: Of the file.
        metadata: Of the file.
        samples: How many images lie beside it.
        licence: Of the model; None for what the run says.

    Raises:
        ArtifactError: The file does not say how images become its input.
    """
    if metadata.preprocessing is None:
        raise ArtifactError(f"'{run.folder / 'model.onnx'}' must state its preprocessing, it does not.")
    stated = dict(run.report["provenance"]["licence"])
    return {
        "schema": SCHEMA,
        "name": run.name,
        "signature": asdict(signature),
        "preprocessing": metadata.preprocessing.to_dict(),
        "classes": list(metadata.classes),
        "metrics": _metrics(run.report),
        "verdict": run.report["verdict"],
        "promises": _promises(run.verify),
        "measured": _measured(run),
        "samples": samples,
        "licence": stated if licence is None else {**stated, "model": licence},
        "provenance": _provenance(run),
    }


def to_text(values: dict[str, Any]) -> bytes:
    """Return values as JSON with sorted keys; names of classes may be in any language."""
    text = json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8", "backslashreplace")


def _metrics(report: dict[str, Any]) -> dict[str, Any]:
    """Return size, quality and latency of both networks, with 95 % intervals where they are known."""
    quality = report["details"].get("quality") or {}
    latency = report["details"].get("latency") or {}
    return {
        "baseline": report["baseline"],
        "slim": report["slim"],
        "intervals": {name: quality.get(name) for name in ("baseline", "slim", "changes")},
        "latency_ratio": latency.get("ratio"),
    }


def _promises(verify: dict[str, Any]) -> dict[str, Any]:
    """Return what the verdict held the file to and another machine can hold it to as well."""
    return {"tolerance": verify["gates"]["parity"], "max_latency_ms": verify["gates"]["max_latency_ms"]}


def _measured(run: FinishedRun) -> dict[str, Any]:
    """Return the median latency, and on what it was measured."""
    slim, environment = run.report["slim"] or {}, run.report["environment"]
    conditions = {name: run.verify[name] for name in ("runtime", "provider", "threads", "batch_size")}
    return {
        "latency_ms": (slim.get("latency_ms") or {}).get("p50"),
        **conditions,
        "machine": environment["cpu"],
        "cores": environment["cores"],
        "platform": environment["platform"],
    }


def _provenance(run: FinishedRun) -> dict[str, Any]:
    """Return what the model was made of."""
    made, environment = run.report["provenance"], run.report["environment"]
    return {
        "recipe": run.recipe,
        "config": _without_folders(run.report["config"]),
        "seed": run.report["config"]["seed"],
        "versions": environment["versions"],
        "python": environment["python"],
        **{name: made[name] for name in ("data", "weights", "factory", "git")},
    }


def _without_folders(value: Any) -> Any:
    """Return values with absolute paths cut to their last part: folders name machines and people, digests the files.

    >>> _without_folders({"weights": "/home/somebody/net.safetensors", "factory": "/home/somebody/model.py:build"})
    {'weights': 'net.safetensors', 'factory': 'model.py:build'}
    """
    if isinstance(value, dict):
        return {key: _without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_folders(entry) for entry in value]
    return PurePath(value).name if isinstance(value, str) and os.path.isabs(value) else value

"""Provenance of a result (digests, commits, licences) and the environment it was measured in.

The run itself records both: files beside a run folder may change later, but its report does not. No value names a
person, a host or a path.
"""

import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from compress.config.load import Pipeline
from compress.storage.digest import digest_file

CARD_FILE = "card.yaml"
_GIT_SECONDS = 20  # a repository on a slow disk; without git's answer a run goes on


def describe_provenance(
    pipeline: Pipeline,
    components: Mapping[str, Any],
    published: Mapping[str, Path],
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """Return the provenance of a run.

    Args:
        pipeline: Pipeline that ran.
        components: Dependencies of its first stage, with digests of data, weights and factory.
        published: Name in the run folder -> file, for each file that others must be able to identify.
        warn: Receives a warning about a card that cannot be read.

    Returns:
        Keys files (name -> sha256), data (train, evaluation: digest), weights, factory (digest; None for torchvision),
        git (pipeline, model: commit and modified, or None), licence (model, data, data_name: text or None).
    """
    source = pipeline.resolved["stages"][0]["model"].get("factory", "").rpartition(":")[0]
    model = Path(source).parent if source.endswith(".py") else None
    files, data = components.get("files", {}), components.get("data", {})
    return {
        "files": {name: digest_file(path) for name, path in published.items()},
        "data": {half: data.get(half) for half in ("train", "evaluation")},
        "weights": files.get("weights", files.get("onnx")),
        "factory": files["factory"].partition(":")[0] if "factory" in files else None,
        "git": {
            "pipeline": find_commit(pipeline.path.absolute().parent),
            "model": None if model is None else find_commit(model),
        },
        "licence": read_licences(model, warn),
    }


def find_commit(folder: Path) -> dict[str, Any] | None:
    """Return the commit of a folder, and whether tracked files in it differ; None outside of a repository."""
    commit = _ask_git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _ask_git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".")
    return {"commit": commit, "modified": changed != ""}


def read_licences(folder: Path | None, warn: Callable[[str], None]) -> dict[str, str | None]:
    """Return the licences that the card beside a model's factory states.

    Args:
        folder: Folder of the card; None without a card.
        warn: Receives a warning about a card that cannot be read.

    Returns:
        Keys model, data, data_name; None for values that the card does not state.
    """
    card: Any = None
    if folder is not None and (folder / CARD_FILE).is_file():
        try:
            card = yaml.safe_load((folder / CARD_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            warn(f"'{folder / CARD_FILE}' cannot be read, so that the report states no licence: {reason}")
    card = card if isinstance(card, dict) else {}
    data = card.get("data") if isinstance(card.get("data"), dict) else {}
    stated = {"model": card.get("licence"), "data": data.get("licence"), "data_name": data.get("name")}
    return {key: value if isinstance(value, str) else None for key, value in stated.items()}


def _ask_git(folder: Path, *arguments: str) -> str | None:
    """Return the output of git; None without git, without a repository, or without an answer."""
    # a hook or another tool may have set variables that point git to a repository of its own
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            timeout=_GIT_SECONDS,
            env=environment,
            stdin=subprocess.DEVNULL,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace").strip()


LIBRARIES = ("compress", "torch", "torch-pruning", "onnx", "onnxslim", "numpy")
ONNX_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
CPU_INFO = Path("/proc/cpuinfo")


def describe_environment() -> dict[str, Any]:
    """Return platform, Python, processor, cores, memory and library versions.

    Versions come from the installed packages' metadata, so nothing heavy is imported. A library that is not
    installed has the version None; of the two ONNX Runtime packages only those installed are named.

    Returns:
        Keys platform, python, cpu, cores (logical, usable by this process), memory_bytes (None if unknown), versions.
    """
    return {
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "cpu": _read_cpu_model(CPU_INFO) or platform.processor() or platform.machine() or "unknown",
        "cores": _count_usable_cores(),
        "memory_bytes": _count_memory_bytes(),
        "versions": _list_versions(),
    }


def _read_cpu_model(path: Path) -> str | None:
    """Return the processor's name from Linux; None elsewhere, and on ARM, where Linux does not state it."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in fields if key.strip() == "model name" and value.strip()), None)


def _count_usable_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not offered on macOS and Windows
        return os.cpu_count() or 1


def _count_memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not offered on Windows
        return None


def _list_versions() -> dict[str, str | None]:
    versions = {name: _find_version(name) for name in (*LIBRARIES, *ONNX_RUNTIMES)}
    if any(versions[name] for name in ONNX_RUNTIMES):
        return {name: version for name, version in versions.items() if version or name not in ONNX_RUNTIMES}
    return versions


def _find_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

"""On what was this measured? Machine and library versions; nothing that names a person, a host or a path."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

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
    """Return the processor's name as Linux tells it; None elsewhere, and on ARM, where it is not told."""
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

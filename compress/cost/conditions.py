"""Conditions that a latency depends on besides the network: processor, runtime, settings of the call.

Two latency tables may be mixed only when all their conditions are equal.
"""

from __future__ import annotations

import os
import platform
import shlex
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path

from compress.catalog import RUNTIME_PACKAGES
from compress.config.schema.pipeline import QuantizeConfig
from compress.config.schema.verify import DeployConfig
from compress.storage.digest import digest_value

_CPU_INFO = Path("/proc/cpuinfo")
_VECTOR_SETS = ("avx", "avx2", "fma", "avx512f", "avx512_vnni", "amx_tile", "asimd", "sve")
_VNNI = ("avx512_vnni", "avx_vnni")
COMMAND = "command"  # in place of a runtime: a command that times complete files


@dataclass(frozen=True, slots=True)
class TableConditions:
    """Conditions of a latency table besides the network.

    Attributes:
        machine: Model of the processor or accelerator; for a command the name of the device.
        cores: Cores of the machine that the process may use; 0 for a command.
        instructions: Vector instruction sets, comma-separated.
        runtime: Name and version of the runtime; "command" for a command.
        provider: Execution provider; for a command its arguments.
        threads: Threads inside one operator.
        batch_size: Images in one call.
        precision: Precision of weights and activations, such as "fp32"; for INT8 with the settings that its speed
            depends on.
    """

    machine: str
    cores: int
    instructions: str
    runtime: str
    provider: str
    threads: int
    batch_size: int
    precision: str = "fp32"

    def differences(self, other: TableConditions) -> list[str]:
        """Return the differences in words: "threads 1 here, 4 in the table"."""
        return [
            f"{entry.name} {getattr(self, entry.name)} here, {getattr(other, entry.name)} in the table"
            for entry in fields(self)
            if getattr(self, entry.name) != getattr(other, entry.name)
        ]

    @property
    def key(self) -> str:
        """Digest of the conditions, for a file name."""
        return digest_value(asdict(self))


def present_conditions(
    runtime: str, provider: str, threads: int, batch_size: int, precision: str = "fp32"
) -> TableConditions:
    """Return the conditions of this machine."""
    return TableConditions(
        machine=_read_cpu_info("model name") or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        instructions=",".join(name for name in _VECTOR_SETS if name in _flags()),
        runtime=f"{runtime} {_runtime_version(runtime)}",
        provider=provider,
        threads=threads,
        batch_size=batch_size,
        precision=precision,
    )


def deploy_conditions(deploy: DeployConfig, int8: QuantizeConfig | None = None) -> TableConditions:
    """Return the conditions of this machine, or of the device of a command, with the settings of a `deploy` section.

    Args:
        deploy: The section.
        int8: Settings of the quantisation if `deploy.precision` is "int8".
    """
    precision = deploy.precision if int8 is None else describe_int8(int8)
    if deploy.command is not None:
        device, command = deploy.device or "", shlex.join(deploy.command)
        return TableConditions(device, 0, "", COMMAND, command, deploy.threads, deploy.batch_size, precision)
    return present_conditions(deploy.runtime, deploy.provider, deploy.threads, deploy.batch_size, precision)


def describe_int8(int8: QuantizeConfig) -> str:
    """Return the settings of a quantisation that the speed of its files depends on, in words.

    >>> describe_int8(QuantizeConfig(stage="quantize", per_channel=False))
    'int8, weights int8 per tensor, activations uint8'
    """
    scales = "per channel" if int8.per_channel else "per tensor"
    parts = ["int8", f"weights {int8.weight_type} {scales}", f"activations {int8.activation_type}"]
    if int8.format == "qoperator":
        parts.append("qoperator")
    if int8.exclude:
        parts.append(f"float {' '.join(sorted(int8.exclude))}")
    return ", ".join(parts)


def has_vnni() -> bool | None:
    """Return whether the processor adds products of 8-bit numbers without saturating; None where that is not known."""
    flags = _flags()
    return None if "sse2" not in flags else not flags.isdisjoint(_VNNI)


def _flags() -> frozenset[str]:
    text = _read_cpu_info("flags") or _read_cpu_info("Features") or ""
    return frozenset(text.split())


def _read_cpu_info(wanted: str) -> str:
    """Return a field of the first processor in /proc/cpuinfo, "" where it is missing."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    fields_of = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in fields_of if key.strip() == wanted), "")


def _runtime_version(runtime: str) -> str:
    for name in RUNTIME_PACKAGES.get(runtime, ("onnxruntime-gpu", "onnxruntime")):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"

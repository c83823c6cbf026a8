"""Latency tables on disk, and the check that they were measured on this machine.

A file holds the timed variants and not the table made of them, so that the same file always gives the same table:

    {"kind": ..., "schema": 2, "conditions": {...}, "network": digest, "reference_ms": ..., "samples": [...]}

The file is rewritten after every few variants, so that interrupted timing can continue.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.cost.conditions import TableConditions
from compress.cost.latency_table import Sample
from compress.cost.variants import Site
from compress.errors import ArtifactError
from compress.storage.digest import DIGEST_KEY, RecordDamaged, add_digest, check_digest, digest_value, read_json
from compress.storage.files import write_atomic

KIND = "compress latency table"
SCHEMA = 2
_KEYS = {"kind", "schema", "conditions", "network", "reference_ms", "samples", "runtime"}


@dataclass(frozen=True, slots=True)
class TableFile:
    """Content of a file with a latency table.

    Attributes:
        conditions: Conditions of the timing.
        network: Digest of the network's sites (`network_digest`).
        reference_ms: Latency of the baseline.
        samples: Timed variants.
        runtime: Runtime that the command of a device states; "" elsewhere.
    """

    conditions: TableConditions
    network: str
    reference_ms: float
    samples: tuple[Sample, ...]
    runtime: str = ""

    def write(self, path: Path) -> None:
        """Write the file atomically."""
        content = {
            "kind": KIND,
            "schema": SCHEMA,
            "conditions": asdict(self.conditions),
            "network": self.network,
            "reference_ms": self.reference_ms,
            "samples": [_plain(sample) for sample in self.samples],
            **({"runtime": self.runtime} if self.runtime else {}),
        }
        write_atomic(path, json.dumps(add_digest(content), indent=1), is_shared=True)

    @classmethod
    def read_cached(cls, path: Path, warn: Callable[[str], None]) -> TableFile | None:
        """Read a cached file; return None if it is missing or, with a warning, damaged.

        Args:
            path: The file.
            warn: Function called with a message about a damaged file.
        """
        if not path.is_file():
            return None
        try:
            return cls.read(path)
        except ArtifactError as error:
            warn(f"A kept latency table is damaged and is measured again: {error.message}")
            return None

    @classmethod
    def read(cls, path: Path) -> TableFile:
        """Read a file.

        Raises:
            ArtifactError: The file is missing, or no latency table of this version.
        """
        if not path.is_file():
            raise ArtifactError(f"Latency table '{path}' does not exist.")
        try:
            content = read_json(path)
            if DIGEST_KEY in content or not set(content) <= _KEYS:  # older versions wrote no digest
                check_digest(content, str(path))
            if content["kind"] != KIND or content["schema"] != SCHEMA:
                raise ValueError(f"kind {content['kind']!r}, schema {content['schema']!r}")
            samples = tuple(_sample(values) for values in content["samples"])
            conditions = TableConditions(**content["conditions"])
            runtime = str(content.get("runtime", ""))
            return cls(conditions, str(content["network"]), _time(content["reference_ms"]), samples, runtime)
        except (RecordDamaged, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ArtifactError(
                f"'{path}' must be a latency table of schema {SCHEMA}, it is not: {type(error).__name__}: {error}",
                hint="compress profile writes such files.",
            ) from error


def network_digest(sites: Sequence[Site]) -> str:
    """Return a digest of the layers, kinds and sizes of all sites; weights do not change it."""
    return digest_value([[site.layer, site.kind, *site.sizes] for site in sites])


def _plain(sample: Sample) -> dict[str, Any]:
    return {
        "sizes": {layer: list(sizes) for layer, sizes in sample.sizes.items()},
        "site_ms": {str(site): value for site, value in sample.site_ms.items()},
        "spreads": {str(site): value for site, value in sample.spreads.items()},
        "total_ms": sample.total_ms,
    }


def _sample(values: Mapping[str, Any]) -> Sample:
    sizes = {str(layer): (int(out), int(inp)) for layer, (out, inp) in values["sizes"].items()}
    site_ms = {int(site): _time(value) for site, value in values["site_ms"].items()}
    spreads = {int(site): _time(value) for site, value in values["spreads"].items()}
    return Sample(sizes, site_ms, spreads, _time(values["total_ms"]))


def _time(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"times must be finite numbers of at least 0, got {value!r}")
    return float(value)

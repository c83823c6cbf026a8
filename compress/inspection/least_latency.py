"""Least latency that pruning can reach, from files of the baseline and of the narrowest network."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from compress.data.packing import draw
from compress.errors import InternalError
from compress.exporting.settings import ExportSettings
from compress.exporting.torch_onnx import export_onnx
from compress.inspection.potential import Potential, find_potential
from compress.inspection.targets import Network
from compress.model.artifacts import Signature
from compress.model.recipe import RemoveBlock, RemoveChannels
from compress.progress import Progress
from compress.pruning.blocks import find_removable_blocks
from compress.pruning.groups import ChannelGroup
from compress.pruning.surgery import remove_block, remove_channels
from compress.search.export import OPSET
from compress.verification.latency import Comparison, compare_latency
from compress.verification.measurement import Conditions


@dataclass(frozen=True, slots=True)
class TimedShare:
    """Latency of a smaller network, timed in turn with the baseline.

    Attributes:
        latency_ms: Median latency of the smaller network in milliseconds.
        share: Latency as a share of the baseline's latency.
        low: Lower end of the 95 % confidence interval of the share.
        high: Upper end of this interval.
    """

    latency_ms: float
    share: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class LeastLatency:
    """Least latency that pruning can reach.

    Attributes:
        conditions: Description of the target device and the settings of the measurement.
        whole_ms: Median latency of the baseline in milliseconds.
        narrowest: Latency with every channel group at its least width; None if no group is prunable.
        without_blocks: Latency after also removing all removable blocks; None without removable blocks.
    """

    conditions: str
    whole_ms: float
    narrowest: TimedShare | None
    without_blocks: TimedShare | None


def measure_least_latency(
    network: Network, potential: Potential, groups: Mapping[str, ChannelGroup], progress: Progress
) -> LeastLatency:
    """Export a network unchanged, at its least widths, and without its blocks, and time the files in turn.

    Args:
        network: The network; unchanged.
        potential: Potential of the network.
        groups: Prunable channel groups of the network by name.
        progress: Listener for the progress.

    Raises:
        ExportFailed: torch or ONNX refused the export.
        RuntimeUnavailable: The execution provider is not available.
    """
    module, example, conditions = network.module, network.example, network.conditions
    smaller: dict[str, nn.Module] = {}
    if potential.least_widths:
        smaller["at the least widths"] = narrowed(module, groups, potential.least_widths, example)
    if potential.blocks:
        smaller["without blocks"] = _shortened(network, progress)
    with tempfile.TemporaryDirectory() as folder:
        names = {"whole": module, **smaller}
        paths = {name: Path(folder) / f"{number}.onnx" for number, name in enumerate(names)}
        with progress.task("export to ONNX", len(names)) as task:
            for name, one in names.items():
                export_onnx(one, network.signature, paths[name], ExportSettings(opset=OPSET))
                task.advance()
        times = {name: _timed(paths[name], paths["whole"], conditions, progress) for name in smaller}
        whole_ms = [whole for _, whole in times.values()] or [_timed_alone(paths["whole"], conditions, progress)]
    shares = [times[name][0] if name in times else None for name in ("at the least widths", "without blocks")]
    return LeastLatency(str(conditions), whole_ms[0], *shares)


def narrowed(
    module: nn.Module, groups: Mapping[str, ChannelGroup], widths: Mapping[str, int], example: Tensor
) -> nn.Module:
    """Return a copy without the last channels of each group.

    Args:
        module: The network; unchanged.
        groups: Prunable channel groups of the network by name.
        widths: Group name -> number of kept channels, below the full width.
        example: One input, (1, ...).
    """
    removed = {
        name: groups[name].expand(range(width // groups[name].parts, groups[name].width // groups[name].parts))
        for name, width in widths.items()
    }
    return remove_channels(module, RemoveChannels(removed), example)


def _shortened(network: Network, progress: Progress) -> nn.Module:
    """Return the network without its residual blocks, at the least widths of the other groups."""
    module, example = network.module, network.example
    while blocks := find_removable_blocks(module, example):
        for block in blocks:
            module = remove_block(module, RemoveBlock(block))
    potential, groups = find_potential(module, example, network.limits, progress)
    return narrowed(module, groups, potential.least_widths, example) if potential.least_widths else module


def _timed(path: Path, whole: Path, conditions: Conditions, progress: Progress) -> tuple[TimedShare, float]:
    """Return the latency of a file relative to that of the baseline, and the baseline's milliseconds."""
    found = _time_files({"smaller": path, "whole": whole}, conditions, progress)
    if found.ratio is None:
        raise InternalError("Two files were timed and not compared.")
    ratio, samples = found.ratio, found.samples
    return TimedShare(samples["smaller"].p50, ratio.value, ratio.low, ratio.high), samples["whole"].p50


def _timed_alone(path: Path, conditions: Conditions, progress: Progress) -> float:
    return _time_files({"whole": path}, conditions, progress).samples["whole"].p50


def _time_files(files: Mapping[str, Path], conditions: Conditions, progress: Progress) -> Comparison:
    return compare_latency(
        {label: partial(conditions.open, path) for label, path in files.items()},
        lambda session: random_inputs(session.signature, conditions.batch_size),
        conditions.calls,
        progress,
    )


def random_inputs(signature: Signature, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random values for every input of a signature."""
    random = np.random.default_rng(seed)
    shapes = {s.name: [size if isinstance(size, int) else batch for size in s.shape] for s in signature.inputs}
    return {spec.name: draw(spec, shapes[spec.name], random) for spec in signature.inputs}

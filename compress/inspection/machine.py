"""The machine for `compress doctor`: versions, execution providers, instruction sets, noise of latency."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from compress.cost.conditions import has_vnni, present_conditions
from compress.progress import Progress
from compress.report.provenance import describe_environment
from compress.verification.latency import Calls, LatencyRatio, compare_latency
from compress.verification.measurement import Conditions
from compress.verification.runtimes.base import Runtime

Row = tuple[str, str]
NOISY_SCATTER, NOISY_RATIO = 0.1, 0.03  # relative; above these a budget in milliseconds needs more calls
_SIDE, _CHANNELS, _LAYERS, _CALLS = 56, 32, 4, 60


@dataclass(frozen=True)
class Noise:
    """Noise of a latency measurement: one small network, timed against itself.

    Attributes:
        median_ms: Median latency of a call in milliseconds.
        scatter: Interquartile range of the calls over their median.
        ratio: Latency of the network over its own latency, with its 95 % interval.
    """

    median_ms: float
    scatter: float
    ratio: LatencyRatio

    @property
    def is_high(self) -> bool:
        """True if latency budgets are uncertain on this machine in its present state."""
        return self.scatter > NOISY_SCATTER or self.ratio.error > NOISY_RATIO


def describe_machine(folder: Path) -> list[Row]:
    """Return the properties of the machine that measurements depend on, as rows of a table.

    Args:
        folder: Folder of the runs, whose free space is shown.
    """
    found = describe_environment()
    memory = found["memory_bytes"]
    conditions = present_conditions("onnxruntime", "CPUExecutionProvider", 1, 1)
    vnni = {True: "yes", False: "no: INT8 weights use 7 bits", None: "unknown"}[has_vnni()]
    rows = [
        ("platform", found["platform"]),
        ("Python", found["python"]),
        ("processor", found["cpu"]),
        ("cores", str(found["cores"])),
        ("vector instructions", conditions.instructions or "unknown"),
        ("8-bit products (VNNI)", vnni),
        ("memory", "unknown" if memory is None else f"{memory / 2**30:.1f} GiB"),
        ("free disk", _free_disk(folder)),
        ("GPU for training", _gpu()),
        ("execution providers", ", ".join(_providers())),
    ]
    return rows + [(name, version or "not installed") for name, version in found["versions"].items()]


def measure_noise(threads: int, progress: Progress) -> Noise:
    """Time a small convolutional network against itself in ONNX Runtime, for some seconds.

    Raises:
        RuntimeUnavailable: ONNX Runtime cannot be opened.
    """
    conditions = Conditions(threads=threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "noise.onnx"
        onnx.save_model(_network(), path)
        inputs = {"x": np.random.default_rng(0).standard_normal((1, _CHANNELS, _SIDE, _SIDE)).astype(np.float32)}

        def runtime() -> Runtime:
            return conditions.open(path)

        found = compare_latency(
            {"first": runtime, "second": runtime}, lambda session: inputs, Calls(10, _CALLS), progress
        )
    sample, ratio = found.samples["first"], found.ratio
    assert ratio is not None
    low, middle, high = np.quantile(sample.milliseconds, [0.25, 0.5, 0.75])
    return Noise(float(middle), float((high - low) / middle), ratio)


def _network() -> onnx.ModelProto:
    random = np.random.default_rng(0)
    weights = [
        helper.make_tensor(
            f"w{layer}",
            TensorProto.FLOAT,
            [_CHANNELS, _CHANNELS, 3, 3],
            (0.05 * random.standard_normal(_CHANNELS * _CHANNELS * 9)).astype(np.float32),
        )
        for layer in range(_LAYERS)
    ]
    names = ["x", *(f"y{layer}" for layer in range(_LAYERS - 1)), "y"]
    nodes = [
        helper.make_node("Conv", [names[layer], f"w{layer}"], [names[layer + 1]], pads=[1, 1, 1, 1])
        for layer in range(_LAYERS)
    ]
    shape = [1, _CHANNELS, _SIDE, _SIDE]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "noise", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _free_disk(folder: Path) -> str:
    place = next((one for one in (folder, *folder.absolute().parents) if one.exists()), Path("/"))
    return f"{shutil.disk_usage(place).free / 2**30:.1f} GiB in '{os.fspath(folder)}'"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none that torch can use"
    return ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))


def _providers() -> Sequence[str]:
    try:
        import onnxruntime
    except ImportError:
        return ["ONNX Runtime is not installed"]
    return list(onnxruntime.get_available_providers())


def judge_noise(noise: Noise) -> str:
    """Return the conclusion from a measurement of noise, one sentence."""
    low, high = noise.ratio.low, noise.ratio.high
    text = (
        f"latency noise: calls scatter by {noise.scatter:.0%} around {noise.median_ms:.2f} ms; a network against "
        f"itself: {low:.3f} to {high:.3f}"
    )
    if not noise.is_high:
        return f"{text}. Latency budgets can be met here."
    return f"{text}. That is much: stop other programs, or raise deploy.repeats, before you trust milliseconds."

"""Measurement of one file: conditions, inputs, latency, quality."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from compress.catalog import RUNTIMES
from compress.config.schema.device_command import CALLS
from compress.data.splits import Split
from compress.errors import ConfigValueError, InternalError, RuntimeUnavailable
from compress.model.artifacts import ModelMetrics, TensorSpec
from compress.onnx_file.counting import count_onnx
from compress.onnx_file.io import is_present, model_files
from compress.progress import Progress, SilentProgress
from compress.verification.device_command import DeviceCommand, DeviceTimes
from compress.verification.device_latency import compare_on_device
from compress.verification.latency import Calls, Comparison, LatencyRatio, compare_latency, measure_latency
from compress.verification.quality import check_not_empty, image_input, predict
from compress.verification.runtimes.base import Runtime
from compress.verification.runtimes.onnx_session import NVIDIA
from compress.verification.runtimes.onnxruntime import OnnxRuntime
from compress.verification.samples import feed, fixed_batch
from compress.verification.task_metrics import Measured

if TYPE_CHECKING:  # a file alone is measured without torch
    from torch import nn

_ELEMENTS_AT_ONCE = 2**22
_IMAGES_AT_ONCE = 256
_WARMUP, _MS_EACH, _FEWEST_CALLS = 3, 8.0, 0.1  # the latter two: for each requested repeat of a file timed alone
_TOO_NOISY = 0.015  # half of the 3 % that a budget may be missed by


@dataclass(frozen=True, slots=True)
class Conditions:
    """Conditions of a file's measurement: runtime, provider, threads, batch size.

    Attributes:
        runtime: Name in `catalog.RUNTIMES`.
        provider: Execution provider, which must be the one in use.
        threads: Intra-op threads of the latency measurement; top-1 and parity use all cores.
        batch_size: Images in one call of the latency measurement.
        warmup: Untimed calls before the latency measurement.
        repeats: Timed calls of each model; the calls for a ratio are proportional to it.
        device: Command that times files on a device. Runtime and provider are then those of all other measurements,
            which are made on this machine.
    """

    runtime: str = "onnxruntime"
    provider: str = "CPUExecutionProvider"
    threads: int = 1
    batch_size: int = 1
    warmup: int = 10
    repeats: int = 100
    device: DeviceCommand | None = None

    @property
    def here(self) -> Conditions:
        """The conditions of measurements on this machine, also where latency is measured on a device."""
        return self if self.device is None else replace(self, threads=1, device=None)

    @property
    def timed_images(self) -> int:
        """Number of images in all calls of a latency measurement on this machine, untimed ones included."""
        return 0 if self.device is not None else (self.warmup + self.repeats) * self.batch_size

    @property
    def calls(self) -> Calls:
        """Calls of each model in a comparison of latencies."""
        return Calls(self.warmup, self.repeats)

    @property
    def times_nodes(self) -> bool:
        """True where single nodes can be timed: in ONNX Runtime, on providers that do not only launch them."""
        return self.device is None and self.runtime == OnnxRuntime.name and self.provider not in NVIDIA

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        if self.device is not None:
            return f"device {self.device.device}, {threads}, batch {self.batch_size}"
        return f"{self.runtime} {self.provider}, {threads}, batch {self.batch_size}"

    def open(self, path: Path, *, all_cores: bool = False) -> Runtime:
        """Return the runtime of a file, to be opened by `with`.

        Raises:
            UnknownName: There is no such runtime.
            ConfigValueError: There are more threads than cores, which makes a measurement meaningless.
            RuntimeUnavailable: The runtime cannot read ONNX files, or a package it needs is not installed.
        """
        if self.device is None and self.threads > available_cores():
            raise ConfigValueError(
                f"threads must be at most the cores of this machine ({available_cores()}), got {self.threads}."
            )
        threads = available_cores() if all_cores else self.here.threads
        try:
            kind = RUNTIMES.get(self.runtime)
        except ImportError as error:
            raise RuntimeUnavailable(f"Runtime '{self.runtime}' is not available: {error}.") from error
        runtime: Runtime = kind.from_file(path, provider=self.provider, threads=threads)
        return runtime


def require_conditions(conditions: Conditions) -> None:
    """Check that files can be run under these conditions on this machine, with a file of one node.

    Raises:
        As `Conditions.open`, and RuntimeUnavailable when the provider is not available.
    """
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "trial", value[:1], value[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trial.onnx"
        onnx.save_model(model, path)
        conditions.open(path).require()


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def measure_onnx(
    path: Path,
    split: Split,
    conditions: Conditions,
    *,
    reference: nn.Module | None = None,
    progress: Progress | None = None,
) -> ModelMetrics:
    """Measure one file alone: MACs, params, size, latency, and top-1 or the task's metrics over a complete split.

    Args:
        path: The .onnx file.
        split: Split of at least one image.
        conditions: Conditions of the measurement.
        reference: The torch network, whose params are then reported instead of the graph's.
        progress: Receives progress by part.

    Raises:
        ArtifactError: The file is missing or cannot be opened.
        RuntimeUnavailable: The provider is not available.
        ModelError, NonFinite: The network does not fit the task, or fails on an image.
        DataError: The targets do not fit.
        ConfigValueError: The batch size is not the file's fixed one.
    """
    progress = progress or SilentProgress()
    counts = count_onnx(path)
    with conditions.open(path, all_cores=True) as session:
        check_batch_size(session, conditions)
        found = predict(session, split, evaluation_batch(image_input(session)), progress)
    sample = time_files({"file": path}, split, conditions, progress).samples["file"]
    params = counts.params if reference is None else torch_params(reference)
    quality = found.metrics if isinstance(found, Measured) else {found.metric.name: found.value}
    return ModelMetrics(counts.macs, params, existing_bytes(path), dict(quality), sample.to_metrics())


def time_files(
    files: Mapping[str, Path],
    split: Split,
    conditions: Conditions,
    progress: Progress | None = None,
    *,
    has_control: bool = False,
    is_close: Callable[[LatencyRatio], bool] = lambda ratio: False,
) -> Comparison:
    """Time one file, or two side by side, in sittings for which they are opened anew.

    Args:
        files: Label -> .onnx file; the first is compared with the second.
        split: Images for the calls.
        conditions: Runtime, provider, threads and calls.
        progress: Receives progress by sitting.
        has_control: True compares the second file with itself as well.
        is_close: Function that returns True for a ratio so close to its limit that it must be measured for longer.

    Raises:
        As `compare_latency` and `compare_on_device`.
    """
    if conditions.device is not None:
        listener = progress or SilentProgress()
        return compare_on_device(
            files,
            lambda path: time_on_device(path, conditions, listener),
            listener,
            has_control=has_control,
            is_close=is_close,
        )
    return compare_latency(
        {label: partial(conditions.open, path) for label, path in files.items()},
        lambda session: latency_inputs(session, split, conditions.batch_size),
        conditions.calls,
        progress,
        has_control=has_control,
        is_close=is_close,
    )


def time_on_device(path: Path, conditions: Conditions, progress: Progress) -> DeviceTimes:
    """Time one file by the command of the device.

    Raises:
        InternalError: The conditions have no device.
        DeviceFailed: The command fails.
    """
    if conditions.device is None:
        raise InternalError("A file was to be timed on a device, but the conditions name no device.")
    values = {name: getattr(conditions, name) for name in CALLS}
    return conditions.device.time_file(path, values, progress)


def time_complete(path: Path, split: Split, conditions: Conditions, progress: Progress) -> DeviceTimes:
    """Time one file alone: by the command of the device, or in one opening of the runtime on this machine.

    Raises:
        As `time_on_device` and `measure_onnx`.
    """
    if conditions.device is not None:
        return time_on_device(path, conditions, progress)
    with conditions.open(path) as session:
        opened, inputs = {"file": session}, {"file": latency_inputs(session, split, conditions.batch_size)}
        first_ms = measure_latency(opened, inputs, _WARMUP, 1)["file"].p50
        share = float(np.clip(_MS_EACH / first_ms, _FEWEST_CALLS, 1.0))
        found = measure_latency(opened, inputs, 0, max(2, round(conditions.repeats * share)))["file"]
    return DeviceTimes(found.milliseconds, session.name)


@dataclass(frozen=True, slots=True)
class PairLatency:
    """Latency of a file beside another one.

    Attributes:
        ratio: Latency of the file / latency of the reference file.
        reference_ms: Median latency of the reference file in milliseconds.
    """

    ratio: float
    reference_ms: float


def measure_ratio(
    path: Path, reference: Path, split: Split, conditions: Conditions, progress: Progress | None = None
) -> float:
    """Return latency of a file / latency of a reference file, measured as in `measure_pair`."""
    return measure_pair(path, reference, split, conditions, progress).ratio


def measure_pair(
    path: Path, reference: Path, split: Split, conditions: Conditions, progress: Progress | None = None
) -> PairLatency:
    """Time a file and a reference file side by side, over sittings for which both are opened anew.

    A budget may be missed by 3 %. Where the error of the ratio is above half of that, a warning states it.

    Args:
        path: The .onnx file.
        reference: The .onnx file it is compared with.
        split: Images for the calls.
        conditions: Conditions of the measurement.
        progress: Receives progress by sitting.

    Raises:
        As `measure_onnx`.
    """
    progress = progress or SilentProgress()
    found = time_files({"file": path, "reference": reference}, split, conditions, progress)
    if found.ratio is None:
        raise InternalError("Two files were timed and not compared.")
    if found.ratio.error > _TOO_NOISY:
        count = f"{found.ratio.sittings} sitting{'' if found.ratio.sittings == 1 else 's'}"
        where = "this machine" if conditions.device is None else f"the device '{conditions.device.device}'"
        progress.warn(
            f"A latency of {found.ratio.value:.3f} of another's is known to within {found.ratio.error:.1%} of it only, "
            f"after {len(found.samples['file'].milliseconds)} calls in {count}: {where} is too noisy to tell 3 % "
            f"apart. Stop other work on it, or raise deploy.repeats ({conditions.repeats} now)."
        )
    return PairLatency(found.ratio.value, found.samples["reference"].p50)


def latency_inputs(session: Runtime, split: Split, batch_size: int) -> dict[str, np.ndarray]:
    """Return inputs for one call: the first images of the split, repeated where it has too few."""
    check_not_empty(split)
    positions = np.arange(batch_size) % len(split)
    images = split.preprocessing.normalize(split.source.read(split.indices[positions]))
    return feed(session, images)


def evaluation_batch(spec: TensorSpec) -> int:
    """Return the number of images to evaluate at once: many small ones, few large ones.

    >>> evaluation_batch(TensorSpec("image", ("batch", 3, 32, 32)))
    256
    >>> evaluation_batch(TensorSpec("image", ("batch", 3, 224, 224)))
    27
    """
    elements = math.prod(size for size in spec.shape[1:] if isinstance(size, int))
    return max(1, min(_IMAGES_AT_ONCE, _ELEMENTS_AT_ONCE // max(1, elements)))


def check_batch_size(session: Runtime, conditions: Conditions) -> None:
    """Raise ConfigValueError when the network has a fixed batch size other than the one to measure."""
    fixed = fixed_batch(session)
    if fixed is not None and fixed != conditions.batch_size:
        whose = "baseline" if session.owner else "file"
        raise ConfigValueError(
            f"verify.batch_size must be {fixed}, the fixed batch size of the {whose}, got {conditions.batch_size}.",
            hint=f"batch_size: {fixed} in the file of gates, or in the verify stage of a pipeline (and in deploy); or "
            "export with dynamic_batch: true to measure other batch sizes.",
        )


def torch_params(reference: nn.Module) -> int:
    """Return the number of scalars in parameters of a torch network."""
    from compress.cost.macs import count_params  # torch, only where there is a reference

    return count_params(reference)


def existing_bytes(path: Path) -> int:
    """Return the total size in bytes of a model's files that exist."""
    return sum(file.stat().st_size for file in model_files(path) if is_present(file) and file.is_file())

"""Runtime onnxruntime: ONNX Runtime on the requested provider and on no other.

ONNX Runtime falls back to the CPU in silence when a provider cannot start (the GPU build lists CUDA on any machine),
so the provider of the open session is compared with the one asked for. Single nodes that a provider does not know go to
the CPU too; only the profile of a call tells which.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from onnx import ModelProto

from compress.catalog import closest
from compress.errors import (
    ArtifactError,
    InternalError,
    ModelError,
    NoSuchPlace,
    RuntimeUnavailable,
    attempt,
    first_line,
    translated,
)
from compress.model.artifacts import Signature
from compress.onnx_file.io import is_half, is_quantized, load_onnx, model_files, read_signature, require_external
from compress.storage.digest import digest_file, digest_value
from compress.verification.runtimes.base import Arrays, Runtime

CPU = "CPUExecutionProvider"
_SILENT, _WARNING = 4, 2
_KERNEL = "_kernel_time"
_TENSORRT = "TensorrtExecutionProvider"
_NVIDIA = ("CUDAExecutionProvider", _TENSORRT, "NvTensorRTRTXExecutionProvider")


@dataclass(frozen=True, slots=True, eq=False)
class NodeTimes:
    """What every node took.

    Attributes:
        names: In the order in which the nodes run, as the runtime calls them after it rewrote the graph.
        milliseconds: (nodes, calls); the runtime counts in whole microseconds.
    """

    names: tuple[str, ...]
    milliseconds: np.ndarray


class OnnxRuntime(Runtime):
    """An ONNX file in ONNX Runtime.

    Args:
        path: The .onnx file; external data lies beside it.
        provider: Exact ONNX Runtime name of the execution provider.
        threads: Threads inside one operator; operators run one after the other.
        profile_folder: Where the times of single nodes are kept until `read_profile`; None to take none.
    """

    name: ClassVar[str] = "onnxruntime"
    reads_onnx: ClassVar[bool] = True

    def __init__(self, path: Path, provider: str = CPU, threads: int = 1, profile_folder: Path | None = None) -> None:
        super().__init__(provider)
        self.path, self.threads, self.profile_folder = path, threads, profile_folder
        self._session: Any = None

    @classmethod
    def from_file(cls, path: Path, *, provider: str, threads: int) -> OnnxRuntime:
        """Return the runtime of an ONNX file, not opened yet."""
        return cls(path, provider, threads)

    @classmethod
    def unavailable_reason(cls) -> str | None:
        """Return why ONNX Runtime cannot be used, None when it can."""
        return None if find_spec("onnxruntime") else "the package onnxruntime is not installed"

    @property
    def provider_in_use(self) -> str:
        """The first provider of the open session."""
        return str(self._session.get_providers()[0])

    @property
    def io_binding(self) -> bool:
        """True on a GPU."""
        return self.provider in _NVIDIA

    def bind(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """Return a call whose inputs and outputs stay on the device, where that is not the CPU."""
        if not self.io_binding:
            return super().bind(inputs)
        self._check_inputs(inputs)
        return self._bind_on("cuda", inputs)

    def placements(self, inputs: Mapping[str, np.ndarray]) -> dict[str, tuple[str, ...]]:
        """Return provider -> the nodes it computes, as the runtime calls them after it rewrote the graph.

        A provider that compiles parts of the graph (TensorRT) counts each of them as one node.
        """
        with tempfile.TemporaryDirectory() as folder:
            profiled = OnnxRuntime(self.path, self.provider, self.threads, Path(folder))
            with profiled:
                profiled.run(inputs)
                return placements_in(profiled._take_events())

    def _open(self) -> Signature:
        signature, options = self._read_file()
        started = time.perf_counter()
        self._session = self._create_session(options)
        self.start_ms = (time.perf_counter() - started) * 1e3
        if self.provider_in_use != self.provider:
            got = self.provider_in_use
            self._session = None
            raise self._unavailable(f"the session fell back to {got}")
        return signature

    def _read_file(self) -> tuple[Signature, dict[str, str]]:
        """Return what the file says; it is not held in memory while the session is made, which is measured."""
        model = load_onnx(self.path)
        require_external(model, self.path)
        self._check_provider_is_built_in()
        return read_signature(model), self._provider_options(model)

    def _provider_options(self, model: ModelProto) -> dict[str, str]:
        """Return what TensorRT is to be told: precision as in the file, and engines that are built once a process."""
        if self.provider != _TENSORRT:
            return {}
        # TensorRT knows engines by the names in a graph, so that files with other weights must not share a folder
        folder = _engines() / digest_value([digest_file(file) for file in model_files(self.path)])
        folder.mkdir(exist_ok=True)
        return {
            "trt_engine_cache_enable": "True",
            "trt_engine_cache_path": str(folder),
            "trt_fp16_enable": str(is_half(model)),
            "trt_int8_enable": str(is_quantized(model)),
        }

    def _bind_on(self, device: str, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        from onnxruntime import OrtValue

        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array, device, 0))
        for spec in self.signature.outputs:
            binding.bind_output(spec.name, device, 0)
        binding.synchronize_inputs()

        def call() -> None:
            with translated(self._failure):
                self._session.run_with_iobinding(binding)
                binding.synchronize_outputs()  # a clock stopped before that would time the start of the work

        return call

    def _run(self, inputs: Arrays) -> Arrays:
        names = [spec.name for spec in self.signature.outputs]
        with translated(self._failure):
            return dict(zip(names, self._session.run(names, inputs), strict=True))

    def _failure(self, error: Exception) -> ModelError:
        return ModelError(f"'{self.path}' must run on its input, ONNX Runtime says: {first_line(error)}")

    def _close(self) -> None:
        self._session = None

    def read_profile(self) -> NodeTimes:
        """Return what every node took in every call so far, and stop taking times.

        Raises:
            InternalError: The runtime was not opened with a `profile_folder`.
            ModelError: The nodes were not the same in every call.
        """
        times: dict[str, list[float]] = {}
        for event in _nodes_of(self._take_events()):
            times.setdefault(event["name"].removesuffix(_KERNEL), []).append(event["dur"] / 1e3)
        if len({len(calls) for calls in times.values()}) > 1:
            raise ModelError(f"'{self.path}' must run the same nodes in every call to be profiled, it does not.")
        return NodeTimes(tuple(times), np.asarray(list(times.values())))

    def _take_events(self) -> list[dict[str, Any]]:
        if self.profile_folder is None:
            raise InternalError("Only a runtime with a profile_folder can be asked what its nodes took.")
        file = Path(self._session.end_profiling())
        events: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
        file.unlink()
        return events

    def _check_provider_is_built_in(self) -> None:
        import onnxruntime  # half a second; not needed by those who only name the runtime

        present, known = onnxruntime.get_available_providers(), onnxruntime.get_all_providers()
        if self.provider in present:
            return
        if self.provider not in known:
            raise NoSuchPlace(
                f"Runtime '{self.name}': provider must be one of {', '.join(present)}, got '{self.provider}'.",
                hint=closest(self.provider, present),
            )
        raise RuntimeUnavailable(
            f"Runtime '{self.name}': {self.provider} was asked for, but this build offers {', '.join(present)} only."
        )

    def _create_session(self, provider_options: dict[str, str]) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = _SILENT
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        # threads that go on spinning after a run would slow down the model measured next
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self.profile_folder is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(self.profile_folder / "nodes")
        try:
            with _quiet(onnxruntime):
                if self.provider in _NVIDIA:
                    onnxruntime.preload_dlls()  # CUDA libraries that came as Python packages are not on the path
                return onnxruntime.InferenceSession(
                    str(self.path),
                    options,
                    providers=[self.provider],
                    provider_options=[provider_options],
                    enable_fallback=0,
                )
        except Exception as error:  # ONNX Runtime raises plain Exception subclasses of its own
            if self.provider != CPU and _runs_on_cpu(self.path, options):
                raise self._unavailable(first_line(error)) from error
            reason = first_line(error)
            raise ArtifactError(f"'{self.path}' must be a model that ONNX Runtime can open: {reason}") from error

    def _unavailable(self, reason: str) -> RuntimeUnavailable:
        return RuntimeUnavailable(
            f"Runtime '{self.name}': {self.provider} was asked for, but it cannot start on this machine ({reason}); "
            f"{CPU} is present.",
            hint=f"{self.provider} needs an NVIDIA GPU, its driver and libraries."
            if self.provider in _NVIDIA
            else None,
        )


def placements_in(events: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Return provider -> "operator name" of the nodes it computed, out of the events of a profile, each node once."""
    found: dict[str, dict[str, None]] = {}
    for event in _nodes_of(events):
        said = event.get("args") or {}
        node = f"{said.get('op_name', '?')} {event['name'].removesuffix(_KERNEL)}"
        found.setdefault(str(said.get("provider") or "unknown"), {})[node] = None
    return {provider: tuple(nodes) for provider, nodes in found.items()}


def _nodes_of(events: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield the events of a profile that tell of a node's work."""
    for event in events:
        if event.get("cat") == "Node" and str(event["name"]).endswith(_KERNEL):
            yield event


@cache
def _engines() -> Path:
    """Return a folder for what TensorRT builds, which takes minutes; it goes when the process ends."""
    folder = tempfile.mkdtemp(prefix="compress-engines-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@contextlib.contextmanager
def _quiet(onnxruntime: Any) -> Iterator[None]:
    """Silence what ONNX Runtime prints, warns and logs while a provider fails to start; the caller says it instead."""
    onnxruntime.set_default_logger_severity(_SILENT)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        onnxruntime.set_default_logger_severity(_WARNING)


def _runs_on_cpu(path: Path, options: Any) -> bool:
    import onnxruntime

    def opened() -> bool:
        onnxruntime.InferenceSession(str(path), options, providers=[CPU])
        return True

    return attempt(opened, lambda _: False)

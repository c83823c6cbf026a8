"""Runtime onnxruntime: an ONNX file in ONNX Runtime, on the requested provider and on no other.

Single nodes that a provider does not support run on the CPU; only the profile of a call lists them.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from compress.errors import InternalError, ModelError, first_line, translated
from compress.model.artifacts import Signature
from compress.onnx_file.io import load_onnx, read_signature, require_external
from compress.verification.runtimes.base import Arrays, Runtime, check_inputs
from compress.verification.runtimes.onnx_session import CPU, NVIDIA, SessionRequest

_KERNEL = "_kernel_time"


@dataclass(frozen=True, slots=True, eq=False)
class NodeTimes:
    """Time of every node.

    Attributes:
        names: Node names after the runtime's graph rewrites, in the order in which the nodes run.
        milliseconds: (nodes, calls) times; the runtime counts in whole microseconds.
    """

    names: tuple[str, ...]
    milliseconds: np.ndarray


class OnnxRuntime(Runtime):
    """An ONNX file in ONNX Runtime.

    Args:
        path: The .onnx file; external data lies beside it.
        provider: Exact ONNX Runtime name of the execution provider.
        threads: Threads inside one operator; operators run one after the other.
        profile_folder: Folder for the profile of single nodes until `read_profile`; None turns profiling off.
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
        return self.provider in NVIDIA

    def bind(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """Return a call whose inputs and outputs stay on the device, where that is not the CPU."""
        if not self.io_binding:
            return super().bind(inputs)
        check_inputs(self.signature, inputs)
        return self._bind_on("cuda", inputs)

    def placements(self, inputs: Mapping[str, np.ndarray]) -> dict[str, tuple[str, ...]]:
        """Return provider -> the nodes it computes, by their names after the runtime's graph rewrites.

        A provider that compiles parts of the graph (TensorRT) counts each part as one node.
        """
        with tempfile.TemporaryDirectory() as folder:
            profiled = OnnxRuntime(self.path, self.provider, self.threads, Path(folder))
            with profiled:
                profiled.run(inputs)
                return placements_in(_take_events(profiled._session))

    def _open(self) -> Signature:
        request = SessionRequest(self.name, self.path, self.provider, self.threads)
        signature, options = _read_file(request)
        started = time.perf_counter()
        self._session = request.create(options, self.profile_folder)
        self.start_ms = (time.perf_counter() - started) * 1e3
        if self.provider_in_use != self.provider:
            got = self.provider_in_use
            self._session = None
            raise request.unavailable(f"the session fell back to {got}")
        return signature

    def _bind_on(self, device: str, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        from onnxruntime import OrtValue

        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array, device, 0))
        for spec in self.signature.outputs:
            binding.bind_output(spec.name, device, 0)
        binding.synchronize_inputs()

        def call() -> None:
            with translated(_failed_on(self.path)):
                self._session.run_with_iobinding(binding)
                binding.synchronize_outputs()  # a clock stopped before that would time the start of the work

        return call

    def _run(self, inputs: Arrays) -> Arrays:
        names = [spec.name for spec in self.signature.outputs]
        with translated(_failed_on(self.path)):
            return dict(zip(names, self._session.run(names, inputs), strict=True))

    def _close(self) -> None:
        self._session = None

    def read_profile(self) -> NodeTimes:
        """Return the time of every node in every call so far, and stop profiling.

        Raises:
            InternalError: The runtime was not opened with a `profile_folder`.
            ModelError: The nodes were not the same in every call.
        """
        if self.profile_folder is None:
            raise InternalError("Only a runtime with a profile_folder can be asked what its nodes took.")
        times: dict[str, list[float]] = {}
        for event in _nodes_of(_take_events(self._session)):
            times.setdefault(event["name"].removesuffix(_KERNEL), []).append(event["dur"] / 1e3)
        if len({len(calls) for calls in times.values()}) > 1:
            raise ModelError(f"'{self.path}' must run the same nodes in every call to be profiled, it does not.")
        return NodeTimes(tuple(times), np.asarray(list(times.values())))


def _read_file(request: SessionRequest) -> tuple[Signature, dict[str, str]]:
    """Return the signature and the provider's options; releases the file's content before the session is made."""
    model = load_onnx(request.path)
    require_external(model, request.path)
    request.check_built_in()
    return read_signature(model), request.provider_options(model)


def _failed_on(path: Path) -> Callable[[Exception], ModelError]:
    """Return the function that makes an error of ONNX Runtime one of the model."""
    return lambda error: ModelError(f"'{path}' must run on its input, ONNX Runtime says: {first_line(error)}")


def _take_events(session: Any) -> list[dict[str, Any]]:
    """Return the events of a session's profile, and end it."""
    file = Path(session.end_profiling())
    events: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    return events


def placements_in(events: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Return provider -> "operator name" of each node it computed, once, from the events of a profile."""
    found: dict[str, dict[str, None]] = {}
    for event in _nodes_of(events):
        said = event.get("args") or {}
        node = f"{said.get('op_name', '?')} {event['name'].removesuffix(_KERNEL)}"
        found.setdefault(str(said.get("provider") or "unknown"), {})[node] = None
    return {provider: tuple(nodes) for provider, nodes in found.items()}


def _nodes_of(events: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield the events of a profile that hold the kernel time of a node."""
    for event in events:
        if event.get("cat") == "Node" and str(event["name"]).endswith(_KERNEL):
            yield event

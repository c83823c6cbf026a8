"""How is an ONNX file run in ONNX Runtime, on the provider asked for and on no other?

ONNX Runtime falls back to the CPU in silence when a provider cannot start (the GPU build lists CUDA on any machine),
so the provider of the open session is compared with the one asked for.
"""

from __future__ import annotations

import contextlib
import io
import json
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from compress.artifacts import Signature
from compress.cost.onnx_file import first_line, load_onnx, read_signature
from compress.errors import ArtifactError, InternalError, ModelError, RuntimeUnavailable
from compress.registry import closest
from compress.verification.runtimes.base import Arrays, Runtime

CPU = "CPUExecutionProvider"
_SILENT, _WARNING = 4, 2
_KERNEL = "_kernel_time"
_NVIDIA = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")


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

    def _open(self) -> Signature:
        signature = read_signature(load_onnx(self.path))
        self._check_provider_is_built_in()
        started = time.perf_counter()
        self._session = self._create_session()
        self.start_ms = (time.perf_counter() - started) * 1e3
        if self.provider_in_use != self.provider:
            got = self.provider_in_use
            self._session = None
            raise self._unavailable(f"the session fell back to {got}")
        return signature

    def _run(self, inputs: Arrays) -> Arrays:
        names = [spec.name for spec in self.signature.outputs]
        try:
            return dict(zip(names, self._session.run(names, inputs), strict=True))
        except Exception as error:  # ONNX Runtime raises plain Exception subclasses of its own
            raise ModelError(f"'{self.path}' must run on its input, ONNX Runtime says: {first_line(error)}") from error

    def _close(self) -> None:
        self._session = None

    def read_profile(self) -> NodeTimes:
        """Return what every node took in every call so far, and stop taking times.

        Raises:
            InternalError: The runtime was not opened with a `profile_folder`.
            ModelError: The nodes were not the same in every call.
        """
        if self.profile_folder is None:
            raise InternalError("Only a runtime with a profile_folder can be asked what its nodes took.")
        file = Path(self._session.end_profiling())
        events = json.loads(file.read_text(encoding="utf-8"))
        file.unlink()
        times: dict[str, list[float]] = {}
        for event in events:
            name = str(event["name"])
            if event.get("cat") == "Node" and name.endswith(_KERNEL):
                times.setdefault(name.removesuffix(_KERNEL), []).append(event["dur"] / 1e3)
        if len({len(calls) for calls in times.values()}) > 1:
            raise ModelError(f"'{self.path}' must run the same nodes in every call to be profiled, it does not.")
        return NodeTimes(tuple(times), np.asarray(list(times.values())))

    def _check_provider_is_built_in(self) -> None:
        import onnxruntime  # half a second; not needed by those who only name the runtime

        present, known = onnxruntime.get_available_providers(), onnxruntime.get_all_providers()
        if self.provider in present:
            return
        if self.provider not in known:
            raise RuntimeUnavailable(
                f"Runtime '{self.name}': provider must be one of {', '.join(present)}, got '{self.provider}'.",
                hint=closest(self.provider, present),
            )
        raise RuntimeUnavailable(
            f"Runtime '{self.name}': {self.provider} was asked for, but this build offers {', '.join(present)} only."
        )

    def _create_session(self) -> Any:
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
                    str(self.path), options, providers=[self.provider], enable_fallback=0
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

    try:
        onnxruntime.InferenceSession(str(path), options, providers=[CPU])
    except Exception:  # see above; any failure means that the file cannot be opened
        return False
    return True
